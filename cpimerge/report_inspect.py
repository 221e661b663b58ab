"""Tables and sentences about checkpoints and how they differ; rich renderables, made from results and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeVar

from rich.console import RenderableType

from .budget import format_size
from .checkpoint import layer_of
from .comparison import Comparison, Difference, Fault, Unequal, Unlike
from .inspection import Contents, Kind, Stack, Total, kind_of, stack_of
from .report import HALF_PRECISION, Titled, printable, share, titled

__all__ = ["inspect_report"]

MAX_ROWS = 300  # of a table
MAX_LISTED = 20
OUTSIDE = "outside the layers"
HEADINGS = ("elems", "changed", "≤ 1e-5", "≤ ½ ulp", "rel |Δ|", "cosine", "max |Δ|")
Row = tuple[str, ...]
Listed = TypeVar("Listed")


def inspect_report(found: Contents | Comparison) -> Iterator[RenderableType]:
    """What is in a checkpoint, or how two differ."""
    return _contents(found) if isinstance(found, Contents) else _comparison(found)


def _contents(found: Contents) -> Iterator[RenderableType]:
    """What is in a checkpoint: files, sizes, layers, vocabulary; then every kind of tensor."""
    yield from _facts(found)
    yield ""
    headings = ("kind", "tensors", "shape", "dtype", "elements", "share")
    yield from titled("Tensors by kind", headings, _cut(_kind_rows(found), len(headings)), 0)
    if found.notes:
        yield ""
    yield from (f"note: {printable(note)}" for note in found.notes)


def _facts(found: Contents) -> Iterator[str]:
    classes = f" ({', '.join(found.architectures)})" if found.architectures else ""
    yield printable(f"{found.name}: {found.model_type or 'no model type'}{classes}, {found.format}")
    if found.path != os.path.abspath(found.name):
        yield printable(f"path: {found.path}")
    if found.adapter:
        yield printable(f"adapter: {found.adapter}")
    more = f" and {len(found.files) - 1:,} more" if len(found.files) > 1 else ""
    names = f" ({printable(found.files[0].name)}{more})" if found.files else ""
    yield f"files: {_counted(len(found.files), 'file')}, {format_size(sum(file.bytes for file in found.files))}{names}"
    total = found.total
    yield f"tensors: {total.tensors:,}, {total.elements:,} elements, {format_size(total.bytes)}"
    yield f"dtypes: {', '.join(_dtype(dtype, some, total) for dtype, some in found.dtypes.items())}"
    yield f"layers: {_layers(found)}"
    yield f"output head: {_head(found)}"
    yield f"vocabulary: {_vocabulary(found)}"
    yield f"tokenizer: {_tokenizer(found)}"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _dtype(dtype: str, some: Total, total: Total) -> str:
    return f"{dtype} {share(some.elements, total.elements)} ({_counted(some.tensors, 'tensor')})"


def _layers(found: Contents) -> str:
    parts = [f"{printable(stack.pattern)} ({_numbers(stack)})" for stack in found.stacks[:MAX_LISTED]]
    if len(parts) < len(found.stacks):
        parts.append(f"{len(found.stacks) - len(parts):,} more such stacks")
    return "; ".join((", ".join(parts) or "none", f"{_counted(found.outside.tensors, 'tensor')} outside"))


def _numbers(stack: Stack) -> str:
    """How many layers, and which."""
    first, last, count = stack.numbers[0], stack.numbers[-1], len(stack.numbers)
    if last - first + 1 == count:
        return f"{count:,}: {first}–{last}" if count > 1 else f"1: {first}"
    return f"{count:,} of {first}–{last}"


def _head(found: Contents) -> str:
    said = {
        True: "tied to the embeddings",
        False: "not tied to the embeddings",
        None: "the config does not say if tied",
    }
    stored = f"{', '.join(map(printable, found.heads))} stored" if found.heads else "none stored"
    return f"{said[found.tied]}; {stored}"


def _vocabulary(found: Contents) -> str:
    rows = ", ".join(
        f"{printable(name)} {count:,} rows" for name, count in islice(found.vocabulary.items(), MAX_LISTED)
    )
    said = "" if found.vocab_size is None else f"; vocab_size {found.vocab_size:,}"
    return f"{rows or 'no tensor recognised'}{said}"


def _tokenizer(found: Contents) -> str:
    tokenizer = found.tokenizer
    if tokenizer is None:
        return "none"
    tokens = "tokens cannot be counted" if tokenizer.tokens is None else f"{tokenizer.tokens:,} tokens"
    return printable(f"{tokenizer.kind or 'unknown kind'}, {tokens} ({', '.join(tokenizer.files)})")


def _kind_rows(found: Contents) -> Iterator[Row]:
    """Kinds outside the layers, then each stack's below a row for all of it."""
    every = found.total.elements
    totals = {"": None} | {stack.pattern: stack.total for stack in found.stacks}
    for pattern, total in totals.items():
        if total is not None:
            name = printable(pattern)
            yield name, f"{total.tensors:,}", "", "", _short(total.elements), share(total.elements, every)
        for kind in found.kinds:
            if kind.stack == pattern:
                yield _kind_row(kind, every)


def _kind_row(kind: Kind, every: int) -> Row:
    total = kind.total
    shape = _shape(kind.shapes[0]) if len(kind.shapes) == 1 else f"{len(kind.shapes):,} shapes"
    elements = _short(total.elements), share(total.elements, every)
    return _indented(kind.name, kind.stack), f"{total.tensors:,}", shape, "/".join(sorted(kind.dtypes)), *elements


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _indented(kind: str, stack: str) -> str:
    """A kind's name below the row of its stack."""
    return f" {printable(kind.removeprefix(f'{stack}.'))}" if stack else printable(kind)


def _cut(rows: Iterable[Row], columns: int) -> Iterator[Row]:
    """At most MAX_ROWS; a last one says how many were left out."""
    every = list(rows)
    yield from every[:MAX_ROWS]
    if len(every) > MAX_ROWS:
        yield f"and {len(every) - MAX_ROWS:,} more rows: --json has all", *[""] * (columns - 1)


def _comparison(found: Comparison) -> Iterator[RenderableType]:
    """How two checkpoints differ: by kind of tensor, by layer, and what could not be compared."""
    total = found.total
    for role, one in (("base", found.base), ("other", found.other)):
        count = f"{_counted(one.total.tensors, 'tensor')}, {format_size(one.total.bytes)}"
        yield printable(f"{role}: {one.name}, {one.model_type or 'no model type'}, {count}")
    if total.tensors:
        yield ""
        by_kind, by_layer = found.by(kind_of), found.by(layer_of)
        yield from _table("by kind of tensor", total, _grouped_rows(found, by_kind))
        if len(by_layer) > 1:
            yield ""
            rows = ((printable(layer.rstrip(".")) or OUTSIDE, some) for layer, some in by_layer.items())
            yield from _table("by layer", total, rows)
        dtypes = "; dtypes: of both, or base→other" if len(total.dtypes) > 1 else ""
        yield f"elems: elements; rel |Δ|: ‖other − base‖ / ‖base‖{dtypes}"
    yield ""
    yield from _findings(found)


def _grouped_rows(found: Comparison, by_kind: Mapping[str, Difference]) -> Iterator[tuple[str, Difference]]:
    """Kinds outside the layers, then each stack's below a row for all of it, then everything."""
    for stack, some in sorted(found.by(stack_of).items(), key=lambda item: item[0] != ""):
        if stack:
            yield printable(stack), some
        inside = ((kind, one) for kind, one in by_kind.items() if _stack_of_kind(kind) == stack)
        yield from ((_indented(kind, stack), one) for kind, one in inside)
    yield "total", found.total


def _stack_of_kind(kind: str) -> str:
    """The stack's pattern that a kind begins with; '' where it has none."""
    parts = kind.split(".")
    return ".".join(parts[: parts.index("*") + 1]) if "*" in parts else ""


def _table(by: str, total: Difference, rows: Iterable[tuple[str, Difference]]) -> Titled:
    """Dtypes stand in the title where all tensors have the same, else in a column."""
    mixed = len(total.dtypes) > 1
    headings = ("", *HEADINGS, *(["dtypes"] * mixed))
    cells = ((name, *_cells(some), *([_dtypes(some)] * mixed)) for name, some in rows)
    dtypes = "" if mixed else f" (base {total.dtypes[0][0]}, other {total.dtypes[0][1]})"
    title, table = titled(f"Difference {by}{dtypes}", headings, _cut(cells, len(headings)), 0)
    table.padding = (0, 0)  # names of usual length fit 80 columns so
    return title, table


def _dtypes(some: Difference) -> str:
    return "/".join(base if base == other else f"{base}→{other}" for base, other in some.dtypes)


def _cells(some: Difference) -> Iterator[str]:
    yield _short(some.elements)
    for count in (some.changed, some.near, some.rounding):
        yield share(count, some.compared) if some.compared else "–"
    yield "–" if some.relative is None else f"{some.relative:.3g}"
    yield _cosine(some.cosine)
    yield f"{some.largest.value:.3g}" if some.largest else "0"


def _short(count: int) -> str:
    """A number in three digits: `67.1M`."""
    size = float(count)
    for unit in ("", "K", "M", "G"):
        if size < 999.5:
            return f"{size:.3g}{unit}"
        size /= 1000
    return f"{size:,.0f}T"


def _cosine(cosine: float | None) -> str:
    """Only 1 is 1."""
    if cosine is None:
        return "–"
    return "1" if cosine == 1 else ">0.999999" if cosine > 0.999999 else f"{cosine:.6f}"


def _findings(found: Comparison) -> Iterator[str]:
    total = found.total
    floats = f"{total.identical:,} of {_counted(total.tensors, 'floating-point tensor')} identical, byte for byte"
    yield f"{floats}; {share(total.changed, total.compared) if total.compared else '0%'} of the elements changed"
    if total.largest:
        place = f"{printable(total.largest.tensor)}, flat index {total.largest.index}"
        yield f"largest |Δ|: {total.largest.value:.6g} at {place}"
    if found.unequal:
        equal = sum(not tensor.changed for tensor in found.unequal)
        yield f"not floating-point: {equal:,} of {_counted(len(found.unequal), 'tensor')} equal"
    changed = [tensor for tensor in found.unequal if tensor.changed]
    yield from _listed("not floating-point, not equal", changed, _unequal)
    yield from _listed("only in the base", found.only_base, printable)
    yield from _listed("only in the other", found.only_other, printable)
    yield from _listed("another shape or dtype", found.unlike, _unlike)
    yield from _listed("not finite, and left out", found.faults, _fault)
    yield from (f"note: {printable(note)}" for note in found.notes)
    if any(other in HALF_PRECISION for _, other in total.dtypes):
        yield "note: stored in 16 bits, an update below ½ ulp is lost: part of what is unchanged is rounding"


def _listed(title: str, every: Sequence[Listed], line: Callable[[Listed], str]) -> Iterator[str]:
    """A title, and an indented line for each; nothing where there are none."""
    if every:
        yield f"{title}: {len(every):,}"
        yield from (f"  {line(one)}" for one in every[:MAX_LISTED])
    if len(every) > MAX_LISTED:
        yield f"  and {len(every) - MAX_LISTED:,} more: --json has all"


def _unequal(tensor: Unequal) -> str:
    where = f"{tensor.changed:,} of {_counted(tensor.elements, 'element')}, first at flat index {tensor.first}"
    return f"{printable(tensor.name)} ({tensor.dtype}): {where}"


def _unlike(tensor: Unlike) -> str:
    compared = f"the first {tensor.rows:,} rows were compared" if tensor.rows else "not compared"
    return f"{printable(tensor.name)}: base {tensor.base}, other {tensor.other}; {compared}"


def _fault(fault: Fault) -> str:
    what = {
        "base": "NaN or Inf in the base",
        "other": "NaN or Inf in the other",
        "difference": "a difference beyond float32",
    }
    count = _counted(fault.count, "element")
    return f"{printable(fault.tensor)}: {what[fault.where]}: {count}, first at flat index {fault.first}"
