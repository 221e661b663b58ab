"""Stored numbers in plain numpy: decoded, rounded, shown. `verify` shares none of this with what it checks."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "NEAR",
    "SIZES",
    "Bits",
    "Bytes",
    "Floats",
    "bits_of",
    "half_units",
    "nonfinite",
    "rounded",
    "shown",
    "values_of",
]

Bytes = npt.NDArray[np.uint8]
Bits = npt.NDArray[np.unsignedinteger[Any]]
Floats = npt.NDArray[np.float32]

# Bytes of an element, by the dtypes of the safetensors format that a merge can have; its writer's order of them.
SIZES = {
    **{"U64": 8, "I64": 8, "F32": 4, "U32": 4, "I32": 4, "BF16": 2, "F16": 2, "U16": 2, "I16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1},
}
NEAR = np.float32(1e-5)  # METHOD §6; rounds down, so that m ≤ 1e-5 and m ≤ NEAR are the same for a float32 m
_EXPONENTS: dict[str, np.unsignedinteger[Any]] = {
    "F32": np.uint32(0x7F800000),
    "BF16": np.uint16(0x7F80),
    "F16": np.uint16(0x7C00),
}
_STORED_BITS = {"F32": (23, -126), "BF16": (7, -126), "F16": (10, -14)}  # of the fraction; the least exponent


def bits_of(raw: Bytes, dtype: str) -> Bits:
    """Bytes as unsigned integers, one an element."""
    return raw.view(f"<u{SIZES[dtype]}")


def values_of(raw: Bytes, dtype: str) -> Floats:
    """Bytes of a float dtype as float32, exactly."""
    if dtype == "F32":
        return raw.view("<f4")
    if dtype == "F16":
        return raw.view("<f2").astype(np.float32)
    return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def rounded(values: Floats, dtype: str) -> Bits:
    """float32 rounded to nearest even: bits of `dtype`."""
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    kept, rest = (bits >> np.uint32(16)).astype(np.uint16), bits.astype(np.uint16)
    half = np.uint16(0x8000)
    kept += (rest > half) | ((rest == half) & (kept & np.uint16(1)).astype(np.bool_))
    return kept


def nonfinite(bits: Bits, dtype: str) -> int | None:
    """Where the first NaN or Inf is; None: there is none, as in what is not floating-point."""
    if dtype not in _EXPONENTS:
        return None
    found = (bits & _EXPONENTS[dtype]) == _EXPONENTS[dtype]
    return int(found.argmax()) if found.any() else None


def half_units(values: Floats, dtype: str) -> Floats:
    """Half a unit in the last place of each value, of `dtype` (METHOD §6); 0 where that is no float32."""
    fraction, least = _STORED_BITS[dtype]
    exponents = np.maximum(np.frexp(values)[1] - 1, least)  # frexp's mantissa is from 0.5 up to 1
    exponents[values == 0] = least
    units: Floats = np.ldexp(np.float32(1), exponents - fraction - 1)
    return units


def shown(bits: int, dtype: str) -> str:
    """An element as people and programs want it: `0.5 (0x3f00)`."""
    raw = np.array([bits], f"<u{SIZES[dtype]}").view(np.uint8)
    if dtype in _EXPONENTS:
        value = str(values_of(raw, dtype)[0])
    elif dtype == "BOOL":
        value = json.dumps(bool(bits))
    else:
        value = str(int(raw.view(f"<{'u' if dtype[0] == 'U' else 'i'}{SIZES[dtype]}")[0]))
    return f"{value} (0x{bits:0{2 * SIZES[dtype]}x})"
