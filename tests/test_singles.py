"""Small tensors in one go find what each of them gives by itself."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from checkpoints import save
from hypothesis import given
from hypothesis import strategies as st

from cpimerge import analysis, preflight, singles, stream
from cpimerge.examination import examine
from cpimerge.kernels.singles import GOLDEN, MOST, RUN, SHARE, WHOLE
from cpimerge.needs import plan_room
from cpimerge.passes import Passes, Scanned, Settled
from cpimerge.plan_journal import PlanJournal
from cpimerge.preflight import Inputs
from cpimerge.recipe import load_recipe
from cpimerge.staging import Target, Watch, Work, staged_directory

Found = list[Scanned | Settled]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(directory: Path, checkpoints: list[dict[str, torch.Tensor]], parameters: str) -> Inputs:
    """Of checkpoints, the base first, with these `parameters` of the recipe."""
    names = ["base", *(f"task{number}" for number in range(1, len(checkpoints)))]
    for name, tensors in zip(names, checkpoints, strict=True):
        save(directory / name, tensors)
    models = "".join(f"  - model: ./{name}\n" for name in names[1:])
    text = f"merge_method: cpi\nbase_model: ./base\nmodels:\n{models}parameters: {{{parameters}}}\n"
    (directory / "recipe.yml").write_text(text)
    return preflight.check(load_recipe(directory / "recipe.yml"))


def both_ways(found: Inputs) -> tuple[list[Found], list[Found]]:
    """What is found of every tensor in one go, and one by one."""
    granularity, recipe = found.recipe.granularity, found.recipe
    with stream.workers(1, len(found.checkpoints)) as pool:
        passes = Passes(pool, len(recipe.tasks), found.first_member, recipe.space == "delta")
        together = list(singles.settle_singles(found.tensors, granularity, passes))
        return together, [list(examine([spec], granularity, passes, map)) for spec in found.tensors]


def check_same(together: Found, alone: Found) -> None:
    ours, theirs = together[0], alone[0]
    assert isinstance(ours, Scanned)
    assert isinstance(theirs, Scanned)
    assert (ours.spec, ours.chunk, ours.identical) == (theirs.spec, theirs.chunk, theirs.identical)
    assert list(ours.digests) == list(theirs.digests)
    np.testing.assert_array_equal(ours.counts[:, :3], theirs.counts[:, :3])
    assert len(together) == len(alone) == 2 - ours.identical
    for one, other in zip(together[1:], alone[1:], strict=True):
        assert isinstance(one, Settled)
        assert isinstance(other, Settled)
        assert (one.spec, one.chunk, one.cores, one.claimed) == (other.spec, other.chunk, other.cores, other.claimed)
        np.testing.assert_array_equal(one.pairs, other.pairs)
        np.testing.assert_array_equal(one.aligned, other.aligned)
        np.testing.assert_array_equal(one.inwards, other.inwards)
        np.testing.assert_allclose(one.sums, other.sums, rtol=1e-12, atol=0)
        np.testing.assert_allclose(one.gram, other.gram, rtol=1e-12, atol=1e-12)


@st.composite
def sets(draw: st.DrawFn) -> list[dict[str, torch.Tensor]]:
    """A base and one to five tasks, with tensors around the sizes where sampling begins; ties and zeros abound."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    count = draw(st.integers(2, 6))
    checkpoints: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    for number in range(draw(st.integers(1, 4))):
        shape = draw(st.sampled_from([(), (1,), (3, 5), (64, 64), (WHOLE + 1,), (3, WHOLE), (17, 1000), (90, 700)]))
        base = rng.normal(size=shape)
        for tensors in checkpoints:
            update = rng.normal(size=shape) if draw(st.booleans()) else rng.integers(-2, 3, shape) / 4
            moved = draw(st.sampled_from([0.0, 0.01, 1.0])) if tensors is not checkpoints[0] else 0.0
            values = torch.from_numpy(np.asarray(base + moved * update))
            tensors[f"t{number}"] = values.to(draw(st.sampled_from(DTYPES)))
    return checkpoints


@given(
    sets(),
    st.sampled_from(["0", "0.01", "0.2", "1"]),
    st.sampled_from(["", ", space: delta", ", granularity: row", ", backbone: base", ", exclude: [t0]"]),
)
def test_as_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: list[dict[str, torch.Tensor]], density: str, more: str
) -> None:
    found = inputs(tmp_path_factory.mktemp("set"), checkpoints, f"density: {density}{more}")
    for one, alone in zip(*both_ways(found), strict=True):
        if one:  # else it was left to the other way, which the next tests are about
            check_same(one, alone)


def test_what_is_left_open(tmp_path: Path) -> None:
    """A sample that sees nothing of the update, and updates that are not finite; their neighbours are settled."""
    n = 8 * WHOLE
    seen = np.zeros(n, bool)
    runs = min(n // SHARE, MOST) // RUN
    for number in range(runs):
        start = int(number * (n / runs) + (number * GOLDEN % 1.0) * (n / runs - RUN))
        seen[start : start + RUN] = True
    hidden = torch.from_numpy(np.where(seen, 0, np.arange(n)).astype(np.float32))
    task = {"a": torch.ones(9), "b": hidden, "c": torch.full((4,), torch.inf), "d": torch.arange(5.0)}
    found = inputs(tmp_path, [{name: torch.zeros_like(values) for name, values in task.items()}, task], "density: 0.1")
    together, alone = both_ways(found)
    assert [len(one) for one in together] == [2, 0, 0, 2]
    check_same(together[0], alone[0])
    check_same(together[3], alone[3])


def test_unreadable_files_are_left_to_those_who_say_why(tmp_path: Path) -> None:
    found = inputs(tmp_path, [{"a": torch.zeros(4)}, {"a": torch.ones(4)}], "density: 1")
    (tmp_path / "task1" / "model.safetensors").unlink()
    with stream.workers(1, 2) as pool:
        assert list(singles.settle_singles(found.tensors, "tensor", Passes(pool, 1, 1, False))) == [[]]


def test_which_tensors_are_taken(tmp_path: Path) -> None:
    tensors = {
        "fits": torch.zeros(512, 512),
        "ids": torch.zeros(3, dtype=torch.int64),
        "large": torch.zeros(stream.CHUNK + 1),
        "none": torch.zeros(0, 3),
        "rows": torch.zeros(stream.CHUNK_ROWS + 1, 2),
    }
    found = inputs(tmp_path, [tensors, tensors], "density: 1")
    for granularity, taken in (("tensor", ["fits", "rows"]), ("row", ["fits"])):
        assert [spec.name for spec in found.tensors if singles.is_single(spec, granularity)] == taken


def test_they_are_not_examined_one_by_one(tmp_path: Path) -> None:
    tensors = [{f"w{number}": torch.full((8,), float(task)) for number in range(50)} for task in range(3)]
    found = inputs(tmp_path, tensors, "density: 0.5")
    with (
        mock.patch.object(analysis, "examine", side_effect=AssertionError),
        staged_directory(Target(tmp_path / "plan"), [], Work("plan", "")) as staging,
        PlanJournal(found, staging, plan_room(found)) as journal,
        stream.workers(1, 3) as pool,
    ):
        work = analysis.Analysis(found, pool, journal, Watch(lambda *_: None, lambda *_: None))
        assert [found.claimed for found in work.run().values()] == [4] * 50
