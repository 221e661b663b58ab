"""What loops over vector registers are written with: a few of LLVM's instructions at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

INDEX = ir.IntType(64)
SHORT = ir.IntType(32)
ALIGNED = 4  # bytes: that much every element is

Combine = Callable[[Any, Any], Any]  # the addition of two numbers, or what takes its place


def pointer(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """Where an array's elements begin."""
    return context.make_array(kind)(context, builder, array).data


def load(builder: Any, address: Any, offset: Any, vector: ir.VectorType) -> Any:
    """`vector` elements at `offset`, aligned to 4 bytes at least."""
    loaded = builder.load(builder.bitcast(builder.gep(address, [offset]), vector.as_pointer()))
    loaded.align = ALIGNED
    return loaded


def store(builder: Any, value: Any, address: Any, offset: Any) -> None:
    """The vector `value` to `offset`, aligned to 4 bytes at least."""
    stored = builder.store(value, builder.bitcast(builder.gep(address, [offset]), value.type.as_pointer()))
    stored.align = ALIGNED


def splat(builder: Any, value: Any, vector: ir.VectorType) -> Any:
    """A vector of the same value everywhere."""
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(SHORT, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(SHORT, vector.count), [0] * vector.count))


def variable(builder: Any, kind: Any) -> Any:
    """Where a number or a vector is kept in a loop, 0 at first."""
    nothing = [0] * kind.count if isinstance(kind, ir.VectorType) else 0
    return cgutils.alloca_once_value(builder, ir.Constant(kind, nothing))  # type: ignore[no-untyped-call]


def add_to(builder: Any, address: Any, value: Any, combine: Combine) -> None:
    """Put what `combine` makes of what is there and `value`."""
    builder.store(combine(builder.load(address), value), address)


def add_all(builder: Any, address: Any, values: Sequence[Any], combine: Combine) -> None:
    """As `add_to`, each to the place after the one before."""
    for number, value in enumerate(values):
        add_to(builder, builder.gep(address, [ir.Constant(INDEX, number)]), value, combine)


def folded(builder: Any, lanes: Any, combine: Combine) -> Any:
    """What `combine` makes of all lanes of a vector: of its halves, until one is left."""
    width = lanes.type.count
    while width > 1:
        width //= 2
        low, high = (list(range(begin, begin + width)) for begin in (0, width))
        parts = (ir.Constant(ir.VectorType(SHORT, width), places) for places in (low, high))
        lanes = combine(*(builder.shuffle_vector(lanes, lanes, part) for part in parts))
    return builder.extract_element(lanes, ir.Constant(SHORT, 0))


def loop(builder: Any, start: Any, stop: Any, step: int) -> Any:
    """A context in which what is built is done for every `step`-th place; yields that place first."""
    return cgutils.for_range_slice(builder, start, stop, ir.Constant(INDEX, step), intp=INDEX)
