"""Coefficients from Gram matrices against the running fold on the vectors themselves."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from cpimerge.blend import LERP_EPSILON, Share, fold, shares


def gram_of(vectors: np.ndarray) -> np.ndarray:
    full: np.ndarray = vectors @ vectors.T
    return full[np.triu_indices(len(vectors))][np.newaxis]


@given(st.integers(1, 6), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.01, 0.1, 1.0, 100.0]), st.data())
def test_fold_is_the_running_slerp(members: int, seed: int, spread: float, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=40) + spread * rng.normal(size=(members, 40))
    order = data.draw(st.permutations(range(members)))
    omegas = [data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])) for _ in range(members - 1)]
    constant = [data.draw(st.booleans()) for _ in omegas]
    found = fold(gram_of(vectors), order, list(map(Share, omegas, constant)), 0.5)
    running, _, _ = reference.fold(list(vectors[order]), [str(i) for i in order[1:]], omegas, constant)
    blended = found.coefficients[0].astype(np.float64) @ vectors[order]
    np.testing.assert_allclose(blended, 0.5 * running, rtol=1e-6, atol=1e-6 * float(np.abs(vectors).max()))


@given(st.integers(2, 9), st.integers(0, 2**32 - 1), st.data())
def test_the_direction_does_not_depend_on_the_order(members: int, seed: int, data: st.DataObject) -> None:
    """Of vectors of any norms and angles, the coefficients are all as the weights are."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=40) * rng.random() + rng.normal(size=(members, 40)) * rng.random((members, 1))
    order = data.draw(st.permutations(range(members)))
    weights = [Fraction(int(weight), 7) for weight in rng.integers(1, 20, members)]
    steps = shares(tuple(weights[i] for i in order), (None,) * members)
    [found] = fold(gram_of(vectors), order, steps, 1.0).coefficients
    ratio = found / np.array([float(weights[i]) for i in order])
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)


@pytest.mark.parametrize(("cosine", "slerped"), [(1 - 1.01 * LERP_EPSILON, True), (1 - 0.99 * LERP_EPSILON, False)])
@pytest.mark.parametrize("sign", [1, -1])
def test_lerp_takes_over_at_epsilon(cosine: float, slerped: bool, sign: int) -> None:
    found = fold(np.array([[4.0, sign * cosine * 6, 9.0]]), [0, 1], [Share(0.25, True)], 1.0)
    assert found.slerped.tolist() == [[slerped]]
    angle = math.acos(sign * cosine)
    assert found.angles[0, 0] == pytest.approx(angle)
    wanted = [0.75, 0.25]
    if slerped:
        wanted = [math.sin(0.75 * angle) / math.sin(angle), math.sin(0.25 * angle) / math.sin(angle)]
    assert found.coefficients[0] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("gram", [[0.0, 0.0, 9.0], [9.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
def test_a_zero_vector_is_lerped(gram: list[float]) -> None:
    found = fold(np.array([gram]), [0, 1], [Share(0.25, True)], 1.0)
    assert found.coefficients.tolist() == [[0.75, 0.25]]
    assert not found.slerped.any()
    assert np.isnan(found.angles).all()


def test_a_sum_that_cancels_is_a_zero_vector() -> None:
    """x, −x at equal shares leave 0; what is left of 0.3² − 2·0.3·0.3 + 0.3² in floating point has no direction."""
    x = np.array([0.1, 0.2, 0.3])
    found = fold(gram_of(np.stack([x, -x, np.array([0.3, -0.1, 0.7])])), [0, 1, 2], [Share(0.5, True)] * 2, 1.0)
    assert found.coefficients[0].tolist() == [0.25, 0.25, 0.5]


def test_rows_do_not_mix() -> None:
    grams = np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [4.0, -1.0, 1.0]])
    together = fold(grams, [1, 0], [Share(0.3, False)], 1.0).coefficients
    alone = [fold(gram[np.newaxis], [1, 0], [Share(0.3, False)], 1.0).coefficients[0] for gram in grams]
    assert together.tolist() == np.array(alone).tolist()


@pytest.mark.parametrize(
    ("weights", "constant", "omegas"),
    [
        ([1, 1, 1], [None] * 3, [1 / 2, 1 / 3]),
        ([1, 3, 4], [None] * 3, [3 / 4, 1 / 2]),
        ([0, 0, 2], [None] * 3, [0.0, 1.0]),
        ([1, 1, 1], [None, Fraction(3, 10), None], [0.3, 1 / 3]),
        ([5], [None], []),
    ],
)
def test_shares(weights: list[int], constant: list[Fraction | None], omegas: list[float]) -> None:
    wanted = tuple(Share(omega, t is not None) for omega, t in zip(omegas, constant[1:], strict=True))
    assert shares(tuple(Fraction(w) for w in weights), tuple(constant)) == wanted
