"""The documented Python interface: cpimerge.plan, fuse, merge, load_recipe, Recipe and the errors."""

from __future__ import annotations

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoints import save, write_recipe
from safetensors.torch import load_file
from trees import files

import cpimerge
from cpimerge import errors, fusion
from cpimerge import needs as sizes
from cpimerge.needs import Needs
from cpimerge.plan_file import Plan

LIMITS: dict[str, Any] = {"threads": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two experts and `recipe.yml`. Not to be changed."""
    root = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(1)
    base = {f"model.layers.{i}.weight": torch.randn(50, 20, generator=generator) for i in range(3)}
    save(root / "base", base | {"ids": torch.arange(5)})
    for task in ("a", "b"):
        expert = {name: t + torch.randn(50, 20, generator=generator) / 100 for name, t in base.items()}
        save(root / task, expert | {"ids": torch.arange(5)})
    write_recipe(root / "recipe.yml", **recipe_keys(root))
    return root


def recipe_keys(models: Path) -> dict[str, Any]:
    return {
        "base_model": models / "base",
        "models": [{"model": models / "a"}, {"model": models / "b"}],
        "parameters": {"density": 0.05},
    }


class Watcher:
    """Records every call of `progress`, `announce` and `planned`, in order."""

    def __init__(self, fail: str = "") -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fail = fail

    def callback(self, name: str) -> Callable[..., None]:
        def record(*values: Any) -> None:
            self.calls.append((name, values))
            if name == self.fail:
                raise KeyError(name)

        return record

    def phases(self) -> dict[str, list[tuple[int, int]]]:
        result: dict[str, list[tuple[int, int]]] = {}
        for name, values in self.calls:
            if name == "progress":
                phase, done, total = values
                result.setdefault(phase, []).append((done, total))
        return result


# --- what is there ----------------------------------------------------------------------------------


def test_all_names_exactly_the_public_ones() -> None:
    functions = ["estimate", "fuse", "inspect", "load_recipe", "merge", "plan", "push", "verify", "verify_inputs"]
    classes = ["Recipe", *errors.__all__]
    assert sorted(cpimerge.__all__) == sorted(functions + classes)
    for name in functions:
        assert inspect.isfunction(getattr(cpimerge, name))
    for name in classes:
        assert inspect.isclass(getattr(cpimerge, name))
    assert all(getattr(cpimerge, name).__doc__ for name in cpimerge.__all__)


def test_every_error_is_a_cpimerge_error_and_holds_its_problems() -> None:
    for name in errors.__all__:
        kind = getattr(cpimerge, name)
        assert issubclass(kind, cpimerge.CpimergeError)
        assert kind("one").problems == ("one",)
        assert kind(iter(["one", "two"])).problems == ("one", "two")
        assert str(kind(["one", "two"])) == "one\ntwo"


def test_no_other_names() -> None:
    with pytest.raises(AttributeError, match="module 'cpimerge' has no attribute 'nonsense'"):
        _ = cpimerge.nonsense


def test_the_import_is_light() -> None:
    code = "import sys, cpimerge; print(sorted({'torch','numba','numpy','pydantic','yaml'} & sys.modules.keys()))"
    environment = os.environ | {"PYTHONPATH": str(Path(cpimerge.__file__).parents[1])}
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert ast.literal_eval(shown) == []


def test_merging_needs_no_torch(models: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; import cpimerge; cpimerge.merge(*sys.argv[1:])"
    environment = os.environ | {"PYTHONPATH": str(Path(cpimerge.__file__).parents[1])}
    command = [sys.executable, "-c", code, str(models / "recipe.yml"), str(tmp_path / "out")]
    subprocess.run(command, env=environment, check=True)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("function", [cpimerge.plan, cpimerge.fuse, cpimerge.merge])
def test_options_are_keywords(function: Callable[..., Any]) -> None:
    parameters = list(inspect.signature(function).parameters.values())
    assert [p.kind for p in parameters[:2]] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2
    assert {p.kind for p in parameters[2:]} == {inspect.Parameter.KEYWORD_ONLY}
    assert {p.name: p.default for p in parameters[2:5]} == {"threads": None, "memory": None, "force": False}
    assert "progress" in {p.name for p in parameters[5:]}


# --- plan -------------------------------------------------------------------------------------------


def test_plan_returns_what_it_writes(models: Path, tmp_path: Path) -> None:
    plan = cpimerge.plan(str(models / "recipe.yml"), str(tmp_path / "plan"), **LIMITS)
    assert plan == Plan.load(tmp_path / "plan")
    assert [task.core for task in plan.tasks] == [150, 150]
    assert sorted(files(tmp_path / "plan")) == [
        "cores/00.npy",
        "cores/00.roaring",
        "cores/01.npy",
        "cores/01.roaring",
        "plan.json",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_a_recipe_object_is_as_good_as_its_file(models: Path, tmp_path: Path) -> None:
    recipe = cpimerge.load_recipe(models / "recipe.yml")
    assert isinstance(recipe, cpimerge.Recipe)
    cpimerge.plan(recipe, tmp_path / "object", **LIMITS)
    cpimerge.plan(models / "recipe.yml", tmp_path / "file", **LIMITS)
    assert files(tmp_path / "object") == files(tmp_path / "file")


def test_a_recipe_changed_in_memory_is_obeyed(models: Path, tmp_path: Path) -> None:
    recipe = replace(cpimerge.load_recipe(models / "recipe.yml"), conflict="first", stages=(("b",), ("a",)))
    plan = cpimerge.plan(recipe, tmp_path / "plan", **LIMITS)
    assert (plan.settings.conflict, plan.stages, plan.backbone) == ("first", [["b"], ["a"]], "a")
    assert recipe.density_of(recipe.tasks[0], "any", Fraction(0)) == Fraction(1, 20)


def test_announce_comes_once_before_anything_is_read(models: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    cpimerge.plan(
        models / "recipe.yml",
        tmp_path / "plan",
        progress=watcher.callback("progress"),
        announce=watcher.callback("announce"),
        **LIMITS,
    )
    names = [name for name, _ in watcher.calls]
    assert names[0] == "announce"
    assert names.count("announce") == 1
    needs: Needs = watcher.calls[0][1][0]
    assert needs.threads == 1
    assert needs.input_bytes == 3 * (3 * 50 * 20 * 4 + 5 * 8)
    assert needs.output_bytes == 3 * 50 * 20 * 4 + 5 * 8
    assert needs.memory_bytes >= 220_000_000
    assert (needs.scratch_bytes, needs.plan_seconds, needs.fuse_seconds) == (0, None, None)
    written = sum(map(len, files(tmp_path / "plan").values()))
    assert 0 < written <= needs.plan_bytes


def test_nothing_is_written_where_announce_objects(models: Path, tmp_path: Path) -> None:
    watcher = Watcher(fail="announce")
    with pytest.raises(KeyError, match="announce"):
        cpimerge.plan(
            models / "recipe.yml",
            tmp_path / "plan",
            progress=watcher.callback("progress"),
            announce=watcher.callback("announce"),
        )
    assert [name for name, _ in watcher.calls] == ["announce"]
    assert not list(tmp_path.iterdir())


# --- progress ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_progress_never_falls_and_ends_at_the_total(models: Path, tmp_path: Path, threads: int) -> None:
    watcher = Watcher()
    progress = watcher.callback("progress")
    with mock.patch.object(fusion, "CHUNK", 50 * 20):  # so that no two of these small tensors are fused together
        cpimerge.merge(models / "recipe.yml", tmp_path / "out", progress=progress, threads=threads)
    phases = watcher.phases()
    assert list(phases) == ["plan", "fuse"]
    totals = {"plan": 3 * (3 * 50 * 20 * 4 + 5 * 8), "fuse": 3 * 50 * 20 * 4 + 5 * 8}
    for phase, steps in phases.items():
        assert {total for _, total in steps} == {totals[phase]}
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert steps[-1][0] == totals[phase]
        assert len(steps) > 1


@pytest.mark.parametrize(("phase", "left"), [("plan", []), ("fuse", [".out.merge", ".out.partial"])])
def test_what_a_callback_raises_ends_the_run(models: Path, tmp_path: Path, phase: str, left: list[str]) -> None:
    """What was done stays for the next run, if that was anything."""

    def progress(now: str, done: int, total: int) -> None:
        if now == phase:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cpimerge.merge(models / "recipe.yml", tmp_path / "out", progress=progress, threads=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    cpimerge.merge(models / "recipe.yml", tmp_path / "out", threads=2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- fuse and merge ---------------------------------------------------------------------------------


def test_fuse_returns_its_manifest(models: Path, tmp_path: Path) -> None:
    cpimerge.plan(models / "recipe.yml", tmp_path / "plan", **LIMITS)
    manifest = cpimerge.fuse(str(tmp_path / "plan"), str(tmp_path / "out"), **LIMITS)
    assert manifest == json.loads((tmp_path / "out" / "cpimerge_manifest.json").read_bytes())
    fused = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(fused) == sorted(manifest["tensors"]) == ["ids", *(f"model.layers.{i}.weight" for i in range(3))]


def test_merge_equals_plan_and_fuse(models: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    cpimerge.plan(models / "recipe.yml", tmp_path / "plan", **LIMITS)
    manifest = cpimerge.fuse(tmp_path / "plan", tmp_path / "fused", **LIMITS)
    callbacks: dict[str, Any] = {name: watcher.callback(name) for name in ("announce", "progress", "planned")}
    merged = cpimerge.merge(models / "recipe.yml", tmp_path / "merged", **callbacks, **LIMITS)
    assert merged == manifest
    assert files(tmp_path / "merged") == files(tmp_path / "fused")
    names = [name for name, _ in watcher.calls]
    assert (names[0], names.count("announce"), names.count("planned")) == ("announce", 1, 1)
    assert [values[0] for name, values in watcher.calls if name == "planned"] == [Plan.load(tmp_path / "plan")]
    between = names.index("planned")
    assert {values[0] for name, values in watcher.calls[:between] if name == "progress"} == {"plan"}
    assert {values[0] for name, values in watcher.calls[between:] if name == "progress"} == {"fuse"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fused", "merged", "plan"]


def test_merge_makes_the_parents_of_its_output(models: Path, tmp_path: Path) -> None:
    cpimerge.merge(models / "recipe.yml", tmp_path / "some" / "where" / "out", **LIMITS)
    assert (tmp_path / "some" / "where" / "out" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["some"]
    assert [path.name for path in (tmp_path / "some" / "where").iterdir()] == ["out"]


def test_merge_takes_relative_paths(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cpimerge.merge(os.path.relpath(models / "recipe.yml"), "out", **LIMITS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("watched", "left"), [("announce", []), ("planned", ["deep", ".out.merge"])])
def test_merge_where_a_callback_objects(models: Path, tmp_path: Path, watched: str, left: list[str]) -> None:
    watcher = Watcher(fail=watched)
    objecting: dict[str, Any] = {watched: watcher.callback(watched)}
    with pytest.raises(KeyError, match=watched):
        cpimerge.merge(models / "recipe.yml", tmp_path / "deep" / "out", **objecting)
    assert len(watcher.calls) == 1
    assert [path.name for path in tmp_path.rglob("*") if path.parent.name in ("deep", tmp_path.name)] == left


def test_merge_goes_on_when_an_input_is_back(models: Path, tmp_path: Path) -> None:
    """The base disappears after planning."""
    for name in ("base", "a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for file, content in files(models / name).items():
            (tmp_path / "in" / name / file).write_bytes(content)
    recipe = write_recipe(tmp_path / "in" / "recipe.yml", **recipe_keys(tmp_path / "in"))
    base, away = tmp_path / "in" / "base", tmp_path / "in" / "away"

    def unplug(plan: Plan) -> None:
        base.rename(away)

    with pytest.raises(cpimerge.CheckpointError, match="base: no such directory"):
        cpimerge.merge(recipe, tmp_path / "out", planned=unplug, **LIMITS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.merge", "in"]
    away.rename(base)
    watcher = Watcher()
    cpimerge.merge(recipe, tmp_path / "out", progress=watcher.callback("progress"), **LIMITS)
    assert {call[1][0] for call in watcher.calls} == {"fuse"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("place", [".out.merge", ".out.partial"])
def test_a_merge_that_was_killed_at_its_end(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """While it deleted what lies beside its output, which was there: the next run sees that, and does nothing."""
    rmtree = shutil.rmtree

    def stop(path: Path, **options: Any) -> None:
        if Path(path).name == place:
            rmtree(path / "plan" / "cores" if place == ".out.merge" else path / "files", **options)
            raise KeyboardInterrupt
        rmtree(path, **options)

    whole = cpimerge.merge(models / "recipe.yml", tmp_path / "whole", **LIMITS)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            cpimerge.merge(models / "recipe.yml", tmp_path / "out", **LIMITS)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    (tmp_path / ".out.lock").touch()  # as a loss of power brings it back
    watcher = Watcher()
    again = cpimerge.merge(models / "recipe.yml", tmp_path / "out", progress=watcher.callback("progress"), **LIMITS)
    assert again == whole
    assert not watcher.calls
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    with pytest.raises(cpimerge.OutputError, match="not empty"):
        cpimerge.merge(models / "recipe.yml", tmp_path / "out", **LIMITS)


def test_merge_refuses_its_output_before_it_plans(models: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    watcher = Watcher()
    with pytest.raises(cpimerge.OutputError, match="not empty"):
        cpimerge.merge(models / "recipe.yml", tmp_path / "out", announce=watcher.callback("announce"))
    with pytest.raises(cpimerge.OutputError, match="not empty"):
        cpimerge.plan(models / "recipe.yml", tmp_path / "out", announce=watcher.callback("announce"))
    assert not watcher.calls
    cpimerge.merge(models / "recipe.yml", tmp_path / "out", force=True, **LIMITS)
    assert "file" not in files(tmp_path / "out")


@pytest.mark.parametrize("which", ["plan", "merge"])
def test_an_input_is_never_the_output(models: Path, tmp_path: Path, which: str) -> None:
    before = files(models)
    with pytest.raises(cpimerge.OutputError, match="would be lost"):
        getattr(cpimerge, which)(models / "recipe.yml", models / "base", force=True)
    assert files(models) == before


@pytest.mark.parametrize("which", ["plan", "merge"])
def test_an_output_below_a_file_is_refused_before_anything_is_read(models: Path, tmp_path: Path, which: str) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    watcher = Watcher()
    with pytest.raises(cpimerge.OutputError) as caught:
        getattr(cpimerge, which)(models / "recipe.yml", out, progress=watcher.callback("progress"))
    assert str(caught.value).startswith(f"{out}: cannot be made, as {tmp_path / 'file'} is no directory")
    assert not watcher.calls


def test_merge_takes_no_plan_that_it_did_not_make(models: Path, tmp_path: Path) -> None:
    leftover = tmp_path / ".out.merge" / "plan"
    leftover.mkdir(parents=True)
    (leftover / "plan.json").write_text("half a plan")
    cpimerge.merge(models / "recipe.yml", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_merge_makes_sure_of_the_disk_before_it_plans(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(sizes, "check_disk", lambda needed, directory: asked.append(needed))
    watcher = Watcher(fail="announce")
    with pytest.raises(KeyError, match="announce"):
        cpimerge.merge(models / "recipe.yml", tmp_path / "out", announce=watcher.callback("announce"))
    needs: Needs = watcher.calls[0][1][0]
    assert asked[-1] == needs.plan_bytes + needs.output_bytes + needs.companion_bytes


def test_estimate_where_nothing_can_be_written(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("cpimerge.probe.tempfile.TemporaryFile", refuse)
    needs = cpimerge.estimate(models / "recipe.yml", **LIMITS)
    assert needs.fuse_seconds is None
    assert needs.plan_seconds is not None


# --- limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"memory": "lots"}, "memory: 'lots' is not a size: write it like 512MB or 2GiB"),
        ({"memory": 1000, "threads": 1}, "memory: 1.0 kB is too little for 1 thread"),
        ({"threads": 0}, "threads: at least 1 is needed, got 0"),
    ],
)
def test_impossible_limits(models: Path, tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    cpimerge.plan(models / "recipe.yml", tmp_path / "plan", **LIMITS)
    for call in (
        lambda: cpimerge.plan(models / "recipe.yml", tmp_path / "out", **options),
        lambda: cpimerge.fuse(tmp_path / "plan", tmp_path / "out", **options),
        lambda: cpimerge.merge(models / "recipe.yml", tmp_path / "out", **options),
    ):
        with pytest.raises(cpimerge.ResourceError) as caught:
            call()
        assert caught.value.problems[0].startswith(problem)
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


@pytest.mark.parametrize("memory", ["1GB", "1 GiB", 1_000_000_000])
def test_memory_in_every_spelling(models: Path, tmp_path: Path, memory: int | str) -> None:
    watcher = Watcher()
    cpimerge.plan(
        models / "recipe.yml", tmp_path / "plan", memory=memory, threads=1, announce=watcher.callback("announce")
    )
    assert watcher.calls[0][1][0].memory_bytes == (2**30 if memory == "1 GiB" else 10**9)
