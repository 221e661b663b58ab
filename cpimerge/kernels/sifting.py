"""The innermost loop of `plan`: what a task did to each element of a tile, in one pass over it."""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir

from .arrays import WORD, intrinsic
from .registers import INDEX, SHORT, add_all, add_to, folded, load, loop, pointer, splat, store, variable

SUM_LANES = 32  # independent partial sums; a constant, because it enters them
PATTERNS, STORED, WIDE = (ir.VectorType(kind, SUM_LANES) for kind in (SHORT, ir.FloatType(), ir.DoubleType()))
NOTHING = ir.Constant(PATTERNS, [0] * SUM_LANES)
ZERO = ir.Constant(STORED, [0.0] * SUM_LANES)
NO_SIGN = ir.Constant(PATTERNS, [0x7FFFFFFF] * SUM_LANES)


@intrinsic
def sift(typing, values, base, half, limits, words, counts, sums, peak):  # type: ignore[no-untyped-def]
    """Sort the elements of a tile by their magnitude, |value − base|, and count and add up what can be.

    `values`, `base` and `half` uint32 [n], n a multiple of WORD, are bit patterns of float32: a task's values, those of
    the base, half a unit in the last place of these. `limits` are three more without a sign: low, high, near.
    `words` are four uint64 [≥ n / WORD]. The first two are set to the elements above `high`, and those of them that
    moved inward, which are less than a base of 0 or more (−0 is one) or not less than one below 0; to the other two are
    added the open elements, from `low` to `high`, and those from `low` on.
    Adds to `counts` int64 [5] how many are not 0, ≤ near, ≤ half, above `high`, and open; to `sums` float64 [2] the Σ
    of those above `high` and of those below `low`. Raises `peak` uint32 [≥ 1] to the largest.
    """
    signature = numba.types.void(values, base, half, limits, words, counts, sums, peak)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        def addresses(kinds: Any, arrays: Any) -> list[Any]:
            return [pointer(context, builder, kind, array) for kind, array in zip(kinds, arrays, strict=True)]

        sources = addresses(signature.args[:3], args[:3])
        parts = [builder.extract_value(args[4], number) for number in range(len(words))]
        bits, inward, opened, reached = addresses(words, parts)
        tile = _Tile(builder, [builder.extract_value(args[3], number) for number in range(len(limits))])
        size = builder.extract_value(context.make_array(values)(context, builder, args[0]).shape, 0)
        with loop(builder, ir.Constant(INDEX, 0), size, WORD) as (place, _):
            inside, inwards, between, beyond = tile.look_at_word(sources, place)
            number = [builder.udiv(place, ir.Constant(INDEX, WORD))]
            builder.store(inside, builder.gep(bits, number))
            builder.store(inwards, builder.gep(inward, number))
            add_to(builder, builder.gep(opened, number), between, builder.or_)
            add_to(builder, builder.gep(reached, number), beyond, builder.or_)
        counted, added, most = addresses(signature.args[5:], args[5:])
        add_all(builder, counted, tile.counts(), builder.add)
        add_all(builder, added, tile.sums(), builder.fadd)
        add_all(builder, most, [tile.peak()], tile.larger)
        return context.get_dummy_value()

    return signature, generate


class _Tile:
    """Writes what is done with the elements of a tile, and keeps where in registers its results are.

    Comparisons are signed, which is right as no magnitude and no limit has a sign: not every processor has others for
    vectors.
    """

    def __init__(self, builder: Any, limits: list[Any]) -> None:
        self.builder = builder
        self.low, self.high, self.near = (splat(builder, limit, PATTERNS) for limit in limits)
        self.tallies = [variable(builder, PATTERNS) for _ in range(3)]
        self.found = [variable(builder, INDEX) for _ in range(2)]
        self.totals = [variable(builder, WIDE) for _ in range(2)]
        self.most = variable(builder, PATTERNS)

    def look_at_word(self, sources: list[Any], place: Any) -> tuple[Any, Any, Any, Any]:
        """The words of WORD elements from `place` on: above `high`, of these moved inward, open, from `low` on."""
        build = self.builder
        words = [ir.Constant(INDEX, 0)] * 3
        for first in range(0, WORD, SUM_LANES):
            shift = ir.Constant(INDEX, first)
            masks = self._look_at_lanes([load(build, source, build.add(place, shift), PATTERNS) for source in sources])
            parts = [build.zext(build.bitcast(mask, ir.IntType(SUM_LANES)), INDEX) for mask in masks]
            words = [build.or_(word, build.shl(part, shift)) for word, part in zip(words, parts, strict=True)]
        inside, below, inwards = words
        reached = build.not_(below)
        between = build.and_(reached, build.not_(inside))
        for total, word in zip(self.found, (inside, between), strict=True):
            add_to(build, total, build.ctpop(word), build.add)
        return inside, build.and_(inside, inwards), between, reached

    def _look_at_lanes(self, elements: list[Any]) -> tuple[Any, Any, Any]:
        """Which of SUM_LANES elements are above `high`, which below `low`, and which moved inward."""
        build, half = self.builder, elements[2]
        values, base = (build.bitcast(patterns, STORED) for patterns in elements[:2])
        magnitude = build.and_(build.bitcast(build.fsub(values, base), PATTERNS), NO_SIGN)
        limits = (("!=", NOTHING), ("<=", self.near), ("<=", half))
        for tally, (operator, limit) in zip(self.tallies, limits, strict=True):
            mask = build.icmp_signed(operator, magnitude, limit)
            add_to(build, tally, build.zext(mask, PATTERNS), build.add)
        add_to(build, self.most, magnitude, self.larger)
        above, below = build.icmp_signed(">", magnitude, self.high), build.icmp_signed("<", magnitude, self.low)
        for mask, total in zip((above, below), self.totals, strict=True):
            taken = build.bitcast(build.select(mask, magnitude, NOTHING), STORED)
            add_to(build, total, build.fpext(taken, WIDE), build.fadd)
        down, negative = build.fcmp_ordered("<", values, base), build.fcmp_ordered("<", base, ZERO)
        return above, below, build.xor(down, negative)

    def counts(self) -> list[Any]:
        build = self.builder
        tallies = [folded(build, build.load(tally), build.add) for tally in self.tallies]
        return [build.zext(tally, INDEX) for tally in tallies] + [build.load(total) for total in self.found]

    def sums(self) -> list[Any]:
        return [folded(self.builder, self.builder.load(total), self.builder.fadd) for total in self.totals]

    def peak(self) -> Any:
        return folded(self.builder, self.builder.load(self.most), self.larger)

    def larger(self, a: Any, b: Any) -> Any:
        return self.builder.select(self.builder.icmp_signed(">", b, a), b, a)


@intrinsic
def clear_where(typing, words, out):  # type: ignore[no-untyped-def]
    """`out` uint32 [n], n a multiple of WORD: 0 where the words [n / WORD] have a bit set, else all bits."""
    signature = numba.types.void(words, out)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vector, mask = ir.VectorType(SHORT, WORD), ir.VectorType(ir.IntType(1), WORD)
        source, target = (
            pointer(context, builder, kind, array) for kind, array in zip((words, out), args, strict=True)
        )
        size = builder.extract_value(context.make_array(out)(context, builder, args[1]).shape, 0)
        with loop(builder, ir.Constant(INDEX, 0), size, WORD) as (place, _):
            word = builder.load(builder.gep(source, [builder.udiv(place, ir.Constant(INDEX, WORD))]))
            kept = builder.sext(builder.bitcast(builder.not_(word), mask), vector)
            store(builder, kept, target, place)
        return context.get_dummy_value()

    return signature, generate
