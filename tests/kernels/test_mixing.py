"""The blend of a chunk against float32 numpy, in the order that the kernel promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
from chunk_of_checkpoints import NAMES, SHAPES, near_the_base, store, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from cpimerge import stream
from cpimerge.kernels.mixing import Mix, blend
from cpimerge.kernels.scanning import scratch


def blended(values: np.ndarray, mix: Mix, coefficients: np.ndarray) -> np.ndarray:
    """Σ c·vector, one member after the other, then the base: every step rounded to float32."""
    vectors = values - values[mix.base] if mix.delta else values
    factors = np.repeat(coefficients, mix.row, axis=0)
    total = factors[:, 0] * vectors[0]
    for v in range(1, coefficients.shape[1]):
        total = total + factors[:, v] * vectors[v]
    result: np.ndarray = total + values[mix.base] if mix.based else total
    return result


@pytest.mark.parametrize(("n", "row"), SHAPES)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.data())
@settings(max_examples=30)
def test_blend(n: int, row: int, kinds: list[int], data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    members = data.draw(st.integers(1, len(kinds)))
    base, kind = data.draw(st.integers(0, len(kinds) - 1)), data.draw(st.integers(0, 2))
    delta, based = data.draw(st.sampled_from([(False, False), (True, True), (True, False)]))
    mix = Mix(n, row, base, delta, based, kind)
    chunk = stored(near_the_base(rng, len(kinds), n), kinds)
    coefficients = rng.normal(size=(n // row, members)).astype(np.float32)
    item = 4 if mix.kind == 2 else 2
    out = np.full(n * item + 8, 0xAB, np.uint8)
    room = scratch(len(kinds))
    for rubbish in room:
        rubbish.fill(0x7FFFFFFF)
    blend(chunk.raw, chunk.kinds, mix, coefficients, out, room)
    assert out.tobytes() == store(blended(chunk.values, mix, coefficients), mix.kind) + b"\xab" * 8


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_a_blend_too_large_is_infinite(kind: int) -> None:
    largest = {0: 3.3895313892515355e38, 1: 65504.0, 2: 3.4028234663852886e38}[kind]
    chunk = stored(np.array([[largest, -largest], [largest, 0]], np.float32), [kind, kind])
    out = np.empty(8, np.uint8)[: 8 if kind == 2 else 4]
    blend(chunk.raw, chunk.kinds, Mix(2, 2, 0, False, False, kind), np.ones((1, 2), np.float32), out, scratch(2))
    assert stream.decode(out, NAMES[kind]).tolist() == [math.inf, -np.float32(largest)]


def test_the_product_is_rounded_before_it_is_added() -> None:
    """A fused multiply-add would leave the product's rounding error."""
    x = np.float32(1 + 2**-12)
    chunk = stored(np.array([[-(x * x)], [x]], np.float32), [2, 2])
    out = np.empty(4, np.uint8)
    blend(chunk.raw, chunk.kinds, Mix(1, 1, 0, False, False, 2), np.array([[1, x]], np.float32), out, scratch(2))
    assert float(x) ** 2 != float(np.float32(x * x))
    assert out.view(np.float32).tolist() == [0]
