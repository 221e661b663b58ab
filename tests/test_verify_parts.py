"""The arithmetic and the parsers of verify, each against torch, pyroaring or the slow reference."""

from __future__ import annotations

import contextlib
import hashlib
import os
from fractions import Fraction
from math import prod
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pyroaring import BitMap

from cpimerge import PlanError, blend, checkpoint, verify_sources
from cpimerge.recipe import parse_recipe
from cpimerge.verify_arrays import open_npy
from cpimerge.verify_cores import layer_of, natural, positions_in
from cpimerge.verify_files import sha256
from cpimerge.verify_fold import Overlaps, deviation, folded, shares, stages_of
from cpimerge.verify_numbers import half_units, nonfinite, rounded, shown, values_of
from cpimerge.verify_results import parse_share

ORDERS: list[str | int] = ["recipe", 0, 7]
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
bits32 = arrays.arrays(np.uint32, st.integers(0, 50))
EDGES = np.array(
    [
        *(0, 1, 0x80000000, 0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x3F808000, 0x3F818000, 0x3F808001, 0x477FEFFF),
        *(0x477FF000, 0x33000000, 0x33000001, 0x33800000, 0x387FC000, 0x387FE000, 0x38800000, 0x00008000, 0x00018000),
        0x80008001,
    ],
    np.uint32,
)


# --- numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(bits32)
def test_rounding_is_torchs(dtype: str, bits: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> None:
    values = np.concatenate([bits, EDGES]).view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values).to(DTYPES[dtype]).view(torch.uint8).numpy().tobytes()
    assert rounded(values, dtype).tobytes() == expected


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_number(dtype: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    stored = torch.from_numpy(every.view(np.int16)).view(DTYPES[dtype])
    finite = torch.isfinite(stored).numpy()
    values = values_of(every.view(np.uint8), dtype)
    assert (values[finite] == stored.float().numpy()[finite]).all()
    assert (rounded(values[finite], dtype) == every[finite]).all()
    for some in (every, every[::-1]):
        assert nonfinite(some, dtype) == int(
            (~torch.isfinite(torch.from_numpy(some.copy().view(np.int16)).view(DTYPES[dtype]))).numpy().argmax()
        )
    units = half_units(values[finite], dtype)
    expected = np.array([reference.ulp(x, DTYPES[dtype]) / 2 for x in values[finite].tolist()])
    assert (units.astype(np.float64) == expected.astype(np.float32)).all()


@given(bits32)
def test_half_a_unit_of_float32(bits: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> None:
    values = np.concatenate([bits, EDGES]).view(np.float32)
    values = values[np.isfinite(values)]
    expected = [np.float32(reference.ulp(x, torch.float32) / 2) for x in values.tolist()]
    assert half_units(values, "F32").tolist() == expected


def test_only_floats_can_be_infinite() -> None:
    assert nonfinite(np.array([0x7FFF, 0xFFFF], np.uint16), "I16") is None
    assert nonfinite(np.array([0, 0x7F800000], np.uint32), "F32") == 1
    assert nonfinite(np.array([0, 0x7F7FFFFF], np.uint32), "F32") is None


@pytest.mark.parametrize(
    ("bits", "dtype", "expected"),
    [
        (0x3F00, "BF16", "0.5 (0x3f00)"),
        (0x8000, "F16", "-0.0 (0x8000)"),
        (0x7FC00000, "F32", "nan (0x7fc00000)"),
        (0x3DCCCCCD, "F32", "0.1 (0x3dcccccd)"),
        (1, "BOOL", "true (0x01)"),
        (0xFF, "I8", "-1 (0xff)"),
        (0xFF, "U8", "255 (0xff)"),
        (0xFFFFFFFFFFFFFFFE, "I64", "-2 (0xfffffffffffffffe)"),
    ],
)
def test_elements_as_they_are_shown(bits: int, dtype: str, expected: str) -> None:
    assert shown(bits, dtype) == expected


# --- bitmaps ----------------------------------------------------------------------------------------


@st.composite
def bitmaps(draw: st.DrawFn) -> BitMap:
    """Of few elements, of many, and of runs, in one container or several."""
    found = BitMap()
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, 1 << 20))
        step, count = draw(st.sampled_from([(1, 5000), (1, 70_000), (2, 6000), (9, 300), (70_000, 6), (1, 1)]))
        found |= BitMap(range(start, start + step * count, step))
    if draw(st.booleans()):
        found.run_optimize()
    return found


@given(bitmaps())
def test_bitmaps_of_any_kind(bitmap: BitMap) -> None:
    assert positions_in(bitmap.serialize()).tolist() == list(bitmap)


@given(bitmaps(), st.data())
def test_no_bitmap_is_an_error_or_another_one(bitmap: BitMap, data: st.DataObject) -> None:
    """Whatever is done to its bytes: no other exception, and nothing that they do not hold."""
    raw = bytearray(bitmap.serialize())
    cut = data.draw(st.integers(0, len(raw)))
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        assert positions_in(bytes(raw[:cut])).size <= 16 * len(raw) + (1 << 20) * 5


@pytest.mark.parametrize("raw", [b"", b"\0" * 8, b"\x3b\x30", b"\x3a\x30\0\0\xff\xff\xff\xff", b"\x3b\x30\xff\xff"])
def test_no_bitmap(raw: bytes) -> None:
    with pytest.raises(ValueError, match="bitmap"):
        positions_in(raw)


# --- arrays -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("descr", "shape"), [("<u8", (3,)), ("<f4", (4, 2)), ("<f4", (0, 2)), ("<u8", (1,))])
def test_arrays(tmp_path: Path, descr: str, shape: tuple[int, ...]) -> None:
    wanted = np.arange(prod(shape)).astype(descr).reshape(shape)
    np.save(tmp_path / "x.npy", wanted)
    found = open_npy(tmp_path / "x.npy", descr, shape)
    assert (found.dtype, found.tolist()) == (wanted.dtype, wanted.tolist())


ARRAY = np.arange(3, dtype="<u8")


@pytest.mark.parametrize(
    "wrong",
    [
        *(ARRAY[:2], ARRAY.astype("<i8"), ARRAY.astype(">u8"), ARRAY.reshape(3, 1), np.asfortranarray(np.eye(3))),
        np.array([{}, {}, {}], object),
    ],
)
def test_other_arrays(tmp_path: Path, wrong: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> None:
    np.save(tmp_path / "x.npy", wrong)
    with pytest.raises(PlanError, match=r"x\.npy: is not an array of uint64 \[3\], as plan\.json wants it"):
        open_npy(tmp_path / "x.npy", "<u8", (3,))


@given(st.data())
def test_what_is_no_array_is_one_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Cut short, or with other bytes in its header: the array that was meant, or an error."""
    file = tmp_path_factory.mktemp("array") / "x.npy"
    np.save(file, ARRAY)
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, 127))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    with contextlib.suppress(PlanError):
        assert open_npy(file, "<u8", (3,)).tolist() == [0, 1, 2]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.npy")
    with pytest.raises(PlanError, match=r"x\.npy: cannot be read: is no ordinary file"):
        open_npy(tmp_path / "x.npy", "<u8", (3,))


# --- folds ------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(0, 2**32 - 1), st.booleans())
def test_a_fold_is_the_references(members: int, seed: int, nearly_parallel: bool) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(members, 3, 20)) * (1e-3 if nearly_parallel else 1) + nearly_parallel
    vectors[rng.integers(members)] *= rng.integers(0, 2)  # a vector of zeros, perhaps
    weights = [Fraction(int(weight), 3) for weight in rng.integers(0, 4, members)]
    constants = [None if even else Fraction(1, 3) for even in rng.integers(0, 2, members)]
    steps = shares(weights, constants)
    planned = blend.shares(tuple(weights), tuple(constants))
    gram = np.einsum("irk,jrk->rij", vectors, vectors)
    coefficients, angles = folded(gram, steps, 0.5)
    for row in range(3):
        names, omega, constant = [str(i) for i in range(1, members)], [s for s, _ in planned], [c for _, c in planned]
        _, expected, its = reference.fold(list(vectors[:, row]), names, omega, constant)
        if any(step.fragile for step in its):
            continue
        assert coefficients[row] == pytest.approx(expected / 2, abs=1e-9)
        for angle, step in zip(angles[row].tolist(), its, strict=True):
            if step.cos is None:
                assert np.isnan(angle)
            else:
                assert np.cos(np.radians(angle)) == pytest.approx(step.cos, abs=1e-9)


def test_shares_of_the_weights() -> None:
    one, two, no = Fraction(1), Fraction(2), Fraction(0)
    assert shares([one, one, two], [None, None, None]) == [(1, None), (1, None)]
    assert shares([no, no, one, one], [None] * 4) == [(0, None), (np.inf, None), (1, None)]
    assert shares([one, one, one], [Fraction(1, 4), Fraction(3, 4), None]) == [(1, 0.75), (0.5, None)]
    assert shares([one], [None]) == []


@given(
    st.lists(st.sets(st.integers(0, 12)), min_size=1, max_size=5), st.sampled_from(["0", "0.2", "0.5", "1"]), st.data()
)
def test_stages_are_the_references(cores: list[set[int]], tau: str, data: st.DataObject) -> None:
    names = [f"t{number}" for number in range(len(cores))]
    order: str | int = data.draw(st.sampled_from(ORDERS))
    stages = data.draw(st.sampled_from([None, [[name] for name in reversed(names)]]))
    said = f"stages: {stages}" if stages else "order: recipe" if order == "recipe" else f"order: {{seed: {order}}}"
    models = "".join(f"\n  - {{model: ./{name}}}" for name in names)
    text = f"merge_method: cpi\nbase_model: ./base\nmodels:{models}\nparameters: {{tau: {tau}, {said}}}\n"
    pairs = np.array([[len(a & b) for b in cores] for a in cores])
    by_name = {name: {"w": sorted(core)} for name, core in zip(names, cores, strict=True)}
    groups = reference.groups(names, reference.jaccard(by_name, ["w"]), Fraction(tau))
    expected = reference.stages(groups, reference.Settings(order=order, stages=stages))
    assert stages_of(parse_recipe(text, None, Path("/")), names, Overlaps(pairs, pairs, pairs, pairs / 2)) == expected


def test_how_far_coefficients_are_off() -> None:
    expected = np.array([[0.5, 4.0]])
    assert deviation(np.array([[0.5, 4.0]], np.float32), expected) == 0
    assert deviation(np.array([[0.25, 4.0]], np.float32), expected) == 0.25
    assert deviation(np.array([[0.5, 6.0]], np.float32), expected) == 0.5


# --- the rest ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.weight", "model.layers.3."),
        ("model.layers.03.experts.7.w", "model.layers.03."),
        ("3", "3."),
        ("a.3", "a.3."),
        ("..3.x", "..3."),
        ("model.layers3.x", ""),
        ("model.3b.4.x", "model.3b.4."),
        ("model.\u0663.\u00b2.x", ""),
        ("a\n.5.x", "a\n.5."),
        ("", ""),
    ],
)
def test_layers(name: str, layer: str) -> None:
    assert layer_of(name) == layer == checkpoint.layer_of(name)


@given(st.lists(st.sampled_from(["", "a", "1", "02", "x3", "\n"]), max_size=6).map(".".join))
def test_layers_of_any_name(name: str) -> None:
    assert layer_of(name) == checkpoint.layer_of(name)


@given(st.lists(st.text("0123456789a.", max_size=6)))
def test_natural_order(names: list[str]) -> None:
    assert sorted(names, key=natural) == sorted(names, key=reference.natural)


@pytest.mark.parametrize(
    "shape", [(), (0,), (7,), (600_000,), (3, 300_000), (5000, 3), (0, 4), (2, 3, 100_000), (9, 1)]
)
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_chunks_are_those_of_the_document(shape: tuple[int, ...], granularity: str) -> None:
    """docs/plan.md: whole rows, at most 262,144 elements and 2,048 rows; a long row is cut."""
    elements = prod(shape)
    row = shape[-1] if granularity == "row" and len(shape) > 1 else elements
    found = verify_sources.chunks_of(shape, granularity)
    assert [place for chunk in found for place in (chunk.start, chunk.stop)][1:-1:2] == [c.start for c in found[1:]]
    assert sum(chunk.size for chunk in found) == elements
    for chunk in found:
        assert chunk.size <= 262_144
        assert chunk.row == row
        if row > 262_144:
            assert chunk.start // row == (chunk.stop - 1) // row
            assert chunk.start % row % 262_144 == 0
        else:
            assert chunk.start % row == chunk.stop % row == 0
            assert chunk.size // row <= 2048 or granularity == "tensor"
            assert chunk is found[-1] or chunk.size == min(262_144 // row, 2048) * row


@pytest.mark.parametrize(
    ("shape", "granularity", "most"),
    [((100_000, 1), "row", 1), ((100_000, 3), "row", 1), ((10, 300_000), "row", 2), ((600_000,), "tensor", 1)],
)
def test_a_worker_takes_no_more_than_fits(shape: tuple[int, ...], granularity: str, most: int) -> None:
    """Of short rows, too, which each have a Gram matrix."""
    chunks = verify_sources.chunks_of(shape, granularity)
    every = [verify_sources.Job("x", number, chunk) for number, chunk in enumerate(chunks)]
    jobs = [*verify_sources.jobs_of(iter(every))]
    assert [job for some in jobs for job in some] == every
    assert max(map(len, jobs)) == most


def test_a_worker_takes_small_chunks_together() -> None:
    (chunk,) = verify_sources.chunks_of((8, 8), "row")
    every = [verify_sources.Job(str(number), 0, chunk) for number in range(600)]
    assert [len(some) for some in verify_sources.jobs_of(iter(every))] == [256, 256, 88]


def test_a_files_hash(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes((1 << 20) + 5)
    (tmp_path / "x").write_bytes(data)
    assert sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(("text", "share"), [("1%", "0.01"), (" 0.5 % ", "0.005"), (0.25, "0.25"), ("1/3", "1/3")])
def test_shares(text: str | float, share: str) -> None:
    assert parse_share(text) == Fraction(share)
