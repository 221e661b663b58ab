"""What is done to elements of a parameter's memory that are held as the gaps between them (see train/gaps.py).

Codes uint8 or uint16 [c] add up to positions; a code that is `skip` is no element. Memory [n] and values [k] are
integers of the parameter's item size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import Counts, compiled

Codes = npt.NDArray[Any]
Integers = npt.NDArray[np.signedinteger[Any]]


@compiled
def size(positions: Counts, skip: int) -> int:
    """How many codes the ascending positions int64 [k] take."""
    codes, before = positions.size, 0
    for position in positions:
        codes += (position - before) // skip
        before = position
    return codes


@compiled
def encode(positions: Counts, skip: int, codes: Codes) -> None:
    """Write the codes of the ascending positions int64 [k]; there is room for `size` of them."""
    place, before = 0, 0
    for position in positions:
        for _ in range((position - before) // skip):
            codes[place] = skip
            place += 1
        codes[place] = (position - before) % skip
        place += 1
        before = position


@compiled
def take(codes: Codes, skip: int, memory: Integers, values: Integers) -> None:
    """Copy the elements from memory to `values`."""
    position, count = 0, 0
    for code in codes:
        position += code
        if code != skip:
            values[count] = memory[position]
            count += 1


@compiled
def put(codes: Codes, skip: int, values: Integers, memory: Integers) -> None:
    """Copy the elements from `values` to memory."""
    position, count = 0, 0
    for code in codes:
        position += code
        if code != skip:
            memory[position] = values[count]
            count += 1


@compiled
def clear(codes: Codes, skip: int, memory: Integers) -> None:
    """Set the elements to zero."""
    position = 0
    for code in codes:
        position += code
        if code != skip:
            memory[position] = 0
