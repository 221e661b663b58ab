"""Decoding and encoding are torch's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpimerge import stream
from cpimerge.kernels.floats import KINDS, decode, encode, first_nonfinite, quiet
from cpimerge.stream import EXPONENT

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
WIDTH = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
SIGNED = {"BF16": torch.int16, "F16": torch.int16, "F32": torch.int32}


def oracle_decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Bit patterns of float32."""
    signed = torch.from_numpy(stored.view(np.dtype(f"i{stored.itemsize}")))
    bits: np.ndarray = signed.view(TORCH[dtype]).float().numpy().view(np.uint32)
    return bits


def oracle_encode(bits: np.ndarray, dtype: str) -> np.ndarray:
    values = torch.from_numpy(bits.view(np.float32))
    stored: np.ndarray = values.to(TORCH[dtype]).view(SIGNED[dtype]).numpy().view(WIDTH[dtype])
    return stored


def every_pattern(dtype: str) -> np.ndarray:
    """All patterns of a 16-bit float; of float32 all exponents with some fractions, and the edges of each."""
    if dtype != "F32":
        return np.arange(1 << 16, dtype=np.uint16)
    fractions = np.random.default_rng(1).integers(0, 1 << 23, 300, np.uint32)
    fractions = np.concatenate([fractions, np.array([0, 1, 2, 1 << 22, (1 << 23) - 1], np.uint32)])
    heads = np.arange(512, dtype=np.uint32) << 23
    every: np.ndarray = (heads[:, np.newaxis] | fractions).ravel()
    return every


def with_signs(bits: np.ndarray) -> np.ndarray:
    return np.concatenate([bits, bits | np.uint32(1 << 31)])


def halfway(dtype: str) -> np.ndarray:
    """float32 halfway between neighbours of a 16-bit float, and 1 unit of float32 beside; up to what becomes Inf."""
    finite = np.arange(int(EXPONENT[dtype]), dtype=np.uint16)
    values = oracle_decode(finite, dtype).view(np.float32).astype(np.float64)
    beyond = 2 * values[-1] - values[-2]  # the next value, if the exponent went on
    middles = ((values + np.append(values[1:], beyond)) / 2).astype(np.float32).view(np.uint32)
    return with_signs(np.concatenate([middles - 1, middles, middles + 1]))


def is_nan(bits: np.ndarray) -> np.ndarray:
    return np.isnan(bits.view(np.float32))


@pytest.mark.parametrize("dtype", KINDS)
def test_decode_is_torchs(dtype: str) -> None:
    stored = every_pattern(dtype)
    out = np.full(stored.size, 0x12345678, np.uint32)
    decode(stored.view(np.uint8), KINDS[dtype], out)
    wanted = oracle_decode(stored, dtype)
    assert (is_nan(out) == is_nan(wanted)).all()
    assert (out[~is_nan(out)] == wanted[~is_nan(out)]).all()
    assert (stream.decode(stored.view(np.uint8), dtype).view(np.uint32) == out).all()


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("source", [*KINDS, "halfway BF16", "halfway F16"])
def test_encode_is_torchs(dtype: str, source: str) -> None:
    bits = halfway(source.split()[1]) if source.startswith("halfway") else oracle_decode(every_pattern(source), source)
    bits = bits[~is_nan(bits)]
    assert bits.size > 60_000
    out = np.full(bits.size, 0x1234, WIDTH[dtype])
    encode(bits, KINDS[dtype], out.view(np.uint8))
    assert (out == oracle_encode(bits, dtype)).all()
    assert (stream.encode(bits.view(np.float32), dtype) == out).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_what_is_halfway_goes_to_even(dtype: str) -> None:
    """Says that `halfway` is what it claims to be, without torch."""
    _, middle, beside = np.split(halfway(dtype)[: halfway(dtype).size // 2], 3)
    down = np.arange(middle.size, dtype=np.uint16)
    assert (stream.encode(middle.view(np.float32), dtype) == down + (down & 1)).all()
    assert (stream.encode(beside.view(np.float32), dtype) == down + 1).all()


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("size", [0, 1, 2, 7, 8, 9, 31, 33])
def test_every_size_and_nothing_beside_it(dtype: str, size: int) -> None:
    values = np.random.default_rng(size).normal(size=size).astype(np.float32)
    stored = stream.encode(values, dtype)
    assert (stored == oracle_encode(values.view(np.uint32), dtype)).all()
    back = stream.decode(stored.view(np.uint8), dtype)
    assert (back.dtype, back.size) == (np.dtype(np.float32), size)
    assert (back.view(np.uint32) == oracle_decode(stored, dtype)).all()
    guarded = np.full(stored.nbytes + 4, 0xAB, np.uint8)
    encode(values.view(np.uint32), KINDS[dtype], guarded)
    assert guarded.tobytes() == stored.tobytes() + b"\xab" * 4


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("place", [0, 1, 63, 64, 199])
@pytest.mark.parametrize("mantissa", [0, 1])
def test_first_nonfinite(dtype: str, place: int, mantissa: int) -> None:
    exponent = EXPONENT[dtype]
    largest_finite = exponent.dtype.type(int(exponent) - 1)
    values = np.full(200, largest_finite)
    assert first_nonfinite(values, exponent) == -1
    values[place:] = int(exponent) | mantissa
    assert first_nonfinite(values, exponent) == place


def test_quiet() -> None:
    bits = np.array([0x7F800001, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x3F800000, 0x80000000], np.uint32)
    quiet(bits)
    assert bits.tolist() == [0x7FC00000, 0x7FC00000, 0x7F800000, 0xFF800000, 0x3F800000, 0x80000000]
