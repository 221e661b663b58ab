"""The few loops that touch every element. Stored bits in, nothing allocated in a loop, no global interpreter lock.

No kernel is compiled with fast-math: sums keep the order written here, so results do not depend on the machine. Dot
products may be fused multiply-adds: the product of two float32 is exact in float64, so both round alike. A magnitude
|Δ| is kept as the bit pattern of its float32 (uint32): patterns of non-negative floats order like the numbers.

Shapes: n elements of a chunk, C checkpoints, T tasks, V vectors, R rows, P = V·(V+1)/2 pairs (i ≤ j) in row-major
order, W = ⌈n/64⌉ words of 64 elements, U open elements.

    arrays      types that the kernels share, where they lie, and how kernels are compiled
    reading     many pieces of files in one go
    registers   what loops over explicit vector registers are written with
    vectors     dot products and comparisons, written so
    sifting     one pass over a task's part of a tile, written so: magnitudes sorted, counted and added up
    floats      stored bits ↔ float32
    scanning    the read of `plan`: everything that one look at a chunk can settle, and what was left open
    differences the read of `inspect`: how two checkpoints differ
    singles     many small tensors in one go: their thresholds, and all that follows
    bitsets     cores as bits: positions, overlaps, and signs in them
    mixing      the write of `fuse`: the blend
    lowrank     an adapter's update, added to a weight as it is read
    gaps        sets of elements as the gaps between them, back to positions
"""

from contextlib import suppress
from pathlib import Path


def _forget_stale_kernels(here: Path) -> None:
    """Numba keeps a compiled kernel until its own file changes, also where it calls into a file that has changed."""
    newest = max(source.stat().st_mtime for source in here.glob("*.py"))
    for compiled in here.glob("__pycache__/*.nb?"):
        if compiled.stat().st_mtime < newest:
            compiled.unlink(missing_ok=True)


with suppress(OSError):  # an installation that may not be written to has no compiled kernels in it, either
    _forget_stale_kernels(Path(__file__).parent)
