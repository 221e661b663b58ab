"""Stored bits of the float dtypes ↔ float32, and what is not finite among them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import Bits, Stored, compiled

KINDS = {"BF16": 0, "F16": 1, "F32": 2}  # how the kernels name the float dtypes


@compiled
def item_bytes(kind: int) -> int:
    """Bytes of a stored element of `kind`."""
    return 4 if kind == 2 else 2


@compiled
def decode(raw: Stored, kind: int, out: Bits) -> None:
    """Stored bytes of `kind` (see KINDS) as bit patterns of float32: `out` uint32 [n]. Exact."""
    if kind == 0:
        _decode_bfloat16(raw[: 2 * out.size].view(np.uint16), out)
    elif kind == 1:
        _decode_float16(raw[: 2 * out.size].view(np.uint16), out)
    else:
        out[:] = raw[: 4 * out.size].view(np.uint32)


@compiled
def _decode_bfloat16(stored: npt.NDArray[np.uint16], out: Bits) -> None:
    for i in range(out.size):
        out[i] = np.uint32(stored[i]) << np.uint32(16)


@compiled
def _decode_float16(stored: npt.NDArray[np.uint16], out: Bits) -> None:
    values = out.view(np.float32)
    for i in range(out.size):  # exponent and fraction move into place, which divides by 2^112; subnormals come right
        out[i] = (np.uint32(stored[i]) & np.uint32(0x7FFF)) << np.uint32(13)
    for i in range(out.size):
        values[i] *= np.float32(2.0**112)
    for i in range(out.size):
        special = np.uint32(0x7F800000) if stored[i] & np.uint16(0x7C00) == np.uint16(0x7C00) else np.uint32(0)
        out[i] |= special | (np.uint32(stored[i]) & np.uint32(0x8000)) << np.uint32(16)


@compiled
def encode(values: Bits, kind: int, out: Stored) -> None:
    """Bit patterns of float32 `values` uint32 [n], none of them NaN, rounded to nearest even into stored bytes."""
    if kind == 0:
        _encode_bfloat16(values, out[: 2 * values.size].view(np.uint16))
    elif kind == 1:
        _encode_float16(values, out[: 2 * values.size].view(np.uint16))
    else:
        out[: 4 * values.size].view(np.uint32)[:] = values


@compiled
def _encode_bfloat16(values: Bits, out: npt.NDArray[np.uint16]) -> None:
    for i in range(values.size):
        x = values[i]
        out[i] = (x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@compiled
def _encode_float16(values: Bits, out: npt.NDArray[np.uint16]) -> None:
    sizes = values.view(np.float32)
    for i in range(values.size):
        x = values[i] & np.uint32(0x7FFFFFFF)
        normal = ((x + np.uint32(0xFFF) + ((x >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)) - np.uint32(
            112 << 10
        )
        # Beside 0.5, float32 has the step of float16's subnormals, so adding 0.5 rounds to it.
        small = np.uint32(np.float32(abs(sizes[i]) + np.float32(0.5)).view(np.uint32)) - np.uint32(0x3F000000)
        bits = small if x < np.uint32(113 << 23) else min(normal, np.uint32(0x7C00))
        out[i] = bits | (values[i] >> np.uint32(16)) & np.uint32(0x8000)


@compiled
def quiet(values: Bits) -> None:
    """Every NaN among bit patterns of float32 becomes the one that rounding keeps from becoming a number."""
    for i in range(values.size):
        if values[i] & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
            values[i] = np.uint32(0x7FC00000)


@compiled
def first_nonfinite(bits: npt.NDArray[Any], exponent: np.unsignedinteger[Any]) -> int:
    """Index of the first NaN or Inf among the bit patterns `bits` [n] of floats; -1 where all are finite.

    `exponent`, of the same unsigned dtype, has the bits of the float format's exponent field set.
    """
    found = False
    for i in range(bits.size):
        found |= (bits[i] & exponent) == exponent
    if found:
        for i in range(bits.size):
            if (bits[i] & exponent) == exponent:
                return i
    return -1
