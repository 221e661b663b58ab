"""Sets of elements as the gaps between them, a byte or two each (see train/gaps.py), back to positions."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from .arrays import Counts, compiled


@compiled
def decode(codes: npt.NDArray[Any], skip: int, before: int, out: Counts) -> tuple[int, int]:
    """Positions of the elements among `codes` uint8 or uint16 [c] into `out` int64 [≥ elements].

    `before` is the position that the codes before these have come to. A code that is `skip` is no element. Returns how
    many elements there are, and the position that these codes have come to.
    """
    count, position = 0, before
    for code in codes:
        position += code
        if code != skip:
            out[count] = position
            count += 1
    return count, position
