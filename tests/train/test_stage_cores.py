"""Which elements a stage freezes, as the reference has them."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import reference
from checkpoints import cases, settings, write_case
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from staged import World, make_world

import cpimerge
from cpimerge.errors import PlanError
from cpimerge.train.stage_cores import Freeze, StageCores


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("staged"))


def positions(plan: Path, stage: int, freeze: Freeze) -> dict[str, list[int]]:
    """By tensor, those with frozen elements only."""
    cores = StageCores(plan, stage, freeze)
    with cores.opened() as opened:
        return {tensor.name: opened.positions(tensor).tolist() for tensor in cores.tensors}


@effort(max_examples=25)
@given(data=st.data())
def test_every_stage_of_any_plan(data: st.DataObject) -> None:
    case = data.draw(cases(max_tasks=4))
    drawn = replace(data.draw(settings(case)), weight=Fraction(1))  # not zero for all
    with tempfile.TemporaryDirectory() as directory:
        recipe = write_case(Path(directory), case, drawn)
        plan = cpimerge.plan(recipe, Path(directory, "plan"), threads=1)
        cores = reference.run(case.base, case.experts, drawn, case.extra).cores
        freeze: Freeze = data.draw(st.sampled_from(["prior", "all"]))
        for stage in range(1, len(plan.stages) + 1):
            frozen: dict[str, set[int]] = {}
            for number, group in enumerate(plan.stages, 1):
                if number < stage or (freeze == "all" and number > stage):
                    for task in group:
                        for name, indices in cores[task].items():
                            frozen.setdefault(name, set()).update(indices)
            expected = {name: sorted(indices) for name, indices in frozen.items() if indices}
            assert positions(Path(directory, "plan"), stage, freeze) == expected


def test_the_tasks_are_those_of_other_stages(world: World) -> None:
    assert [StageCores(world.plan, stage, "prior").tasks for stage in (1, 2, 3)] == [(), ("c",), ("c", "a", "d")]
    assert [StageCores(world.plan, stage, "all").tasks for stage in (1, 2, 3)] == [
        ("a", "d", "b"),
        ("c", "b"),
        ("c", "a", "d"),
    ]


@pytest.mark.parametrize("stage", [0, -1, 4])
def test_there_is_no_such_stage(world: World, stage: int) -> None:
    with pytest.raises(PlanError, match=f"stage {stage}: its stages are numbered 1 to 3"):
        StageCores(world.plan, stage, "prior")


@pytest.mark.parametrize("stage", [True, 2.0, "2", None])
def test_what_is_no_number_of_a_stage(world: World, stage: object) -> None:
    with pytest.raises(ValueError, match=f"stage: {stage!r}: expected a whole number from 1 on"):
        StageCores(world.plan, stage, "prior")  # type: ignore[arg-type]


def test_there_is_no_such_choice(world: World) -> None:
    with pytest.raises(ValueError, match="freeze: 'later': expected 'prior' or 'all'"):
        StageCores(world.plan, 1, "later")  # type: ignore[arg-type]


def test_a_damaged_core_is_found(world: World, tmp_path: Path) -> None:
    plan = Path(shutil.copytree(world.plan, tmp_path / "plan"))
    file = plan / "cores" / "02.roaring"  # of c
    file.write_bytes(file.read_bytes()[:-1] + b"\x77")
    assert positions(plan, 1, "prior") == {}
    with pytest.raises(PlanError, match=r"02\.roaring: is not the core that the plan was saved with"):
        positions(plan, 2, "prior")


def test_no_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="not found"):
        StageCores(tmp_path, 1, "all")
