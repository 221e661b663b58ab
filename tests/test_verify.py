"""verify says yes to whatever plan and fuse make of whatever recipe. What it says no to is in test_verify_failures."""

from __future__ import annotations

import ast
import errno
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import vocabularies
from adapters import llama, train
from checkpoints import cases, save, settings, write_case, write_recipe
from hub_server import Hub
from hypothesis import assume, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from test_semantics import fine_tunes
from verified import edit, small_chunks
from vocabularies import added, model

import cpimerge
from cpimerge.verify_results import Verification

LIMITS: dict[str, Any] = {"threads": 1}
EDITED = "are not those that the recipe gives"


def merged(directory: Path, recipe: Path, **options: Any) -> Verification:
    """Plan, fuse, and verify."""
    cpimerge.plan(recipe, directory / "plan", **LIMITS)
    cpimerge.fuse(directory / "plan", directory / "out", **LIMITS, **options)
    return cpimerge.verify(directory / "out", **LIMITS)


def check(directory: Path, recipe: Path, **options: Any) -> Verification:
    """As merged, without a complaint; the inputs are those of the plan, too."""
    found = merged(directory, recipe, **options)
    assert found.failures == ()
    assert found.notes == ()
    assert cpimerge.verify_inputs(directory / "plan", **LIMITS).failures == ()
    return found


# --- every setting ----------------------------------------------------------------------------------


@examples(max_examples=60)
@given(st.data(), st.sampled_from([1, 5, 8, 1 << 18]))
def test_any_merge(data: st.DataObject, chunk: int) -> None:
    case = data.draw(cases())
    s = data.draw(settings(case))
    assume(s.t is not None or s.weight != 0 or s.backbone in ("base", "path"))
    with tempfile.TemporaryDirectory() as temporary, small_chunks(chunk):
        directory = Path(temporary)
        found = merged(directory, write_case(directory, case, s, shards=data.draw(st.integers(1, 2))))
        assert found.failures == ()
        own = reference.run(case.base, case.experts, s, case.extra)
        assert found.notes == () or own.fragile
        assert found.tensors == len(case.base)
        assert found.elements == sum(tensor.numel() for tensor in case.base.values())
        blended = [name for name, kind in own.disposition.items() if kind == "fused"]
        assert found.core == sum(len({i for core in own.cores.values() for i in core[x]}) for x in blended)
        assert found.core + found.blended == sum(case.base[name].numel() for name in blended)
        for share in ("1%", 0.5):
            assert cpimerge.verify(directory / "out", sample=share, **LIMITS).failures == ()


@pytest.mark.parametrize("space", ["weights", "delta"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
def test_every_combination(tmp_path: Path, scope: str, granularity: str, space: str) -> None:
    case = fine_tunes(["a", "b", "c"])
    every = product(["last", "first", "largest", "mean", "elect"], ["last", "base", "b", "path"])
    for number, (conflict, backbone) in enumerate(every):
        s = reference.Settings(
            density=Fraction(3, 10),
            scope=scope,
            granularity=granularity,
            space=space,
            conflict=conflict,
            backbone=backbone,
            rest=Fraction(1, 2) if space == "delta" else Fraction(1),
        )
        check(tmp_path / str(number), write_case(tmp_path / str(number), case, s))


@pytest.mark.parametrize(
    "s",
    [
        reference.Settings(stages=[["c", "a"], ["b"]], conflict="first"),
        reference.Settings(order=7, tau=Fraction(1)),
        reference.Settings(weight=lambda task, _: Fraction({"a": 1, "b": 3, "c": 0}[task])),
        reference.Settings(density=lambda task, _: Fraction({"a": 1, "b": 3, "c": 0}[task], 10)),
        reference.Settings(t=Fraction(3, 10), backbone="base"),
        reference.Settings(exclude=["*.bias", "embed"], conflict="mean", scope="global"),
        reference.Settings(density=Fraction(1), conflict="largest"),
        reference.Settings(density=Fraction(0)),
        reference.Settings(density=Fraction(1), conflict="elect", space="delta", rest=Fraction(0)),
        reference.Settings(dtype=torch.float32, conflict="elect"),
        reference.Settings(dtype=torch.float16, conflict="mean", granularity="row", space="delta"),
    ],
)
def test_settings_one_by_one(tmp_path: Path, s: reference.Settings) -> None:
    check(tmp_path, write_case(tmp_path, fine_tunes(["a", "b", "c"]), s))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_chunks_of_the_real_size(tmp_path: Path, granularity: str, threads: int) -> None:
    """Several of one tensor, some of one row; nothing depends on the threads."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"many.weight": (900, 700), "long.weight": (2, 600_000), "small.weight": (3,)}
    base = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    save(tmp_path / "base", base)
    for task in ("a", "b"):
        save(
            tmp_path / task, {name: x + (x * torch.rand(x.shape, generator=generator) / 9) for name, x in base.items()}
        )
    recipe = simple(tmp_path, "a", "b", scope="global", granularity=granularity, conflict="elect")
    cpimerge.plan(recipe, tmp_path / "plan", threads=2)
    cpimerge.fuse(tmp_path / "plan", tmp_path / "out", threads=2, shard_size="1.5MB")
    found = cpimerge.verify(tmp_path / "out", threads=threads, memory="512MB")
    assert found == cpimerge.verify(tmp_path / "out", tmp_path / "plan", threads=1)
    assert (found.failures, found.notes) == ((), ())
    assert found.files == 5  # config.json, README.md, the index, and two of weights
    assert found.output_bytes == 2 * found.elements == 2 * (900 * 700 + 1_200_000 + 3)
    assert found.input_bytes == (2 + 4 + 4) * found.elements  # the tasks' are in float32
    assert found.core + found.blended == found.elements
    assert found.cores == 2


def test_updates_of_very_different_sizes(tmp_path: Path) -> None:
    """What moved least is not lost beside what moved most, in the sums over a core and over the rest."""
    base = {"weight": torch.zeros(100)}
    save(tmp_path / "base", base)
    save(tmp_path / "a", {"weight": torch.tensor([1e4] * 10 + [1e-11] * 90)})
    check(tmp_path, simple(tmp_path, "a"))


def simple(directory: Path, *tasks: str, **parameters: Any) -> Path:
    """A recipe of `base` and tasks below `directory`."""
    keys: dict[str, Any] = {"base_model": directory / "base", "models": [{"model": directory / t} for t in tasks]}
    return write_recipe(directory / "recipe.yml", **keys, parameters={"density": 0.1, **parameters})


# --- every kind of input ----------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", ["1kB", "200B"])
def test_shards(tmp_path: Path, shard_size: str) -> None:
    case = fine_tunes(["a", "b"])
    found = check(tmp_path, write_case(tmp_path, case, reference.Settings(), shards=2), shard_size=shard_size)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file() == (found.files > 3)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, to PEFT
def test_adapters(tmp_path: Path) -> None:
    trained = train(tmp_path, llama, torch.bfloat16, r=4, target_modules=["q_proj", "up_proj"], use_dora=True)
    recipe = simple(tmp_path, "adapter", space="delta")
    check(tmp_path, recipe)
    assert cpimerge.verify(tmp_path / "out", sample="10%", **LIMITS).ok
    assert trained.base == tmp_path / "base"


@pytest.mark.parametrize("mode", ["base", "union"])
def test_vocabularies(tmp_path: Path, mode: str) -> None:
    models = {"base": model(added("<x>"), 8, 0), "one": model(added("<y>", "<x>"), 7, 1), "two": model(added(), 5, 2)}
    for name, it in models.items():
        vocabularies.write(tmp_path / name, it)
    keys: dict[str, Any] = {
        "base_model": tmp_path / "base",
        "models": [{"model": tmp_path / x} for x in ("one", "two")],
    }
    recipe = write_recipe(
        tmp_path / "recipe.yml", **keys, vocabulary=mode, parameters={"density": 0.2, "space": "delta"}
    )
    check(tmp_path, recipe)


def test_pickled_tied_and_buffers(tmp_path: Path) -> None:
    """A base of pytorch_model.bin with buffers, and experts with a copy of the embeddings as head, without them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(20, 8, generator=generator)}
    tensors["model.layers.0.mlp.weight"] = torch.randn(8, 8, generator=generator)
    config = {"model_type": "llama", "tie_word_embeddings": True, "vocab_size": 20}
    save(tmp_path / "base", tensors, config=config)
    (tmp_path / "base" / "model.safetensors").unlink()
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0)}
    torch.save(tensors | buffers, tmp_path / "base" / "pytorch_model.bin")
    for task in ("a", "b"):
        tuned = {name: x + torch.randn(x.shape, generator=generator) / 50 for name, x in tensors.items()}
        save(tmp_path / task, tuned | {"lm_head.weight": tuned["model.embed_tokens.weight"]}, config=config)
    check(tmp_path, simple(tmp_path, "a", "b"))


def test_models_of_the_hub(published: Path, hub: Hub, tmp_path: Path) -> None:
    """Streamed as for the merge, or told to be absent."""
    cpimerge.plan(published, tmp_path / "plan", download="stream", **LIMITS)
    cpimerge.fuse(tmp_path / "plan", tmp_path / "out", download="stream", **LIMITS)
    found = cpimerge.verify(tmp_path / "out", download="stream", **LIMITS)
    assert (found.failures, found.notes) == ((), ())
    assert cpimerge.verify(tmp_path / "out", download="stream", sample="1%", **LIMITS).ok
    assert cpimerge.verify_inputs(tmp_path / "plan", download="stream", **LIMITS).ok
    asked = len(hub.requests)
    absent = cpimerge.verify(tmp_path / "out", **LIMITS)
    assert {failure.file for failure in absent.failures} == {"input 'base'", "input 'task0'", "input 'task1'"}
    assert absent.files == found.files  # which need no inputs
    assert absent.notes == ("the elements were not compared, for want of what is told as wrong",)
    assert [failure.file for failure in cpimerge.verify_inputs(tmp_path / "plan", **LIMITS).failures] == [
        failure.file for failure in absent.failures
    ]
    assert len(hub.requests) == asked


@pytest.mark.parametrize("depth", [1, 6])
def test_a_recipe_that_is_not_found_again(tmp_path: Path, depth: int) -> None:
    """What a recipe's paths mean depends on where it was: a model called `.`, the base among the models."""
    case = fine_tunes(["a", "b"])
    write_case(tmp_path, case, reference.Settings())
    inner = tmp_path / "a" / "/".join(["recipes"] * depth)
    inner.mkdir(parents=True)
    keys: dict[str, Any] = {"base_model": str(tmp_path / "base"), "parameters": {"density": 0.3}}
    up = "/".join([".."] * depth)
    models = [{"model": f"{up}/../base"}, {"model": up}, {"model": f"{up}/../b"}]
    recipe = write_recipe(inner / "recipe.yml", **keys, models=models)
    found = merged(tmp_path, recipe)
    assert (found.failures, found.notes) == ((), ())


def test_a_recipe_made_in_python(tmp_path: Path) -> None:
    """Without its text, the sizes of the cores cannot be proven, which is said."""
    from dataclasses import replace

    recipe = write_case(tmp_path, fine_tunes(["a", "b"]), reference.Settings(scope="layer", exclude=["bias"]))
    cpimerge.plan(replace(cpimerge.load_recipe(recipe), text=""), tmp_path / "plan", **LIMITS)
    cpimerge.fuse(tmp_path / "plan", tmp_path / "out", **LIMITS)
    found = cpimerge.verify(tmp_path / "out", **LIMITS)
    assert found.failures == ()
    (note,) = found.notes
    assert note.endswith("plan.json: holds no recipe, so sizes of cores and what is levelled are taken as they are")


# --- edited plans -----------------------------------------------------------------------------------


def _coefficients(raw: dict[str, Any]) -> None:
    for tensor in raw["tensors"]:
        if tensor["blend"]:
            tensor["blend"]["coefficients"] = [0.75, 0.5, -0.25]


def _stages(raw: dict[str, Any]) -> None:
    raw["stages"] = [["c"], ["b", "a"]]


def _conflict(raw: dict[str, Any]) -> None:
    raw["settings"]["conflict"] = "largest"


def _space(raw: dict[str, Any]) -> None:
    raw["settings"]["space"] = "weights"


def _rest(raw: dict[str, Any]) -> None:
    raw["settings"]["rest"] = 0.5


def _tau(raw: dict[str, Any]) -> None:
    raw["settings"]["tau"] = 0.5


def _dtype(raw: dict[str, Any]) -> None:
    raw["tensors"][1]["dtype"] = "F32"


@pytest.mark.parametrize(
    ("change", "noted"),
    [
        (_coefficients, EDITED),
        (_stages, "its stages are not those"),
        (_conflict, "conflict is largest"),
        (_space, "space is weights"),
        (_rest, "rest is 0.5, in its recipe 1.0"),
        (_tau, "tau is 0.5, in its recipe auto"),
        (_dtype, ""),
    ],
)
def test_a_plan_edited_before_it_was_fused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], noted: str
) -> None:
    recipe = write_case(tmp_path, fine_tunes(["a", "b", "c"]), reference.Settings(density=Fraction(1, 2)))
    cpimerge.plan(recipe, tmp_path / "plan", **LIMITS)
    edit(tmp_path / "plan", change)
    cpimerge.fuse(tmp_path / "plan", tmp_path / "out", **LIMITS)
    found = cpimerge.verify(tmp_path / "out", **LIMITS)
    assert found.failures == ()
    assert any(noted in note for note in found.notes) if noted else not found.notes


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("key", ["angles", "steps", "slerped"])
def test_what_a_plan_says_of_a_fold(tmp_path: Path, granularity: str, key: str) -> None:
    """The manifest repeats it."""

    def change(raw: dict[str, Any]) -> None:
        blend = next(tensor["blend"] for tensor in raw["tensors"] if tensor["blend"] and tensor["blend"]["angles"])
        blend[key] = [*blend[key][:-1], blend[key][-1] + 0.02] if key == "angles" else blend[key] + 1

    s = reference.Settings(granularity=granularity, space="delta")
    check(tmp_path, write_case(tmp_path, fine_tunes(["a", "b", "c"]), s))
    edit(tmp_path / "plan", change)
    cpimerge.fuse(tmp_path / "plan", tmp_path / "other", **LIMITS)
    found = cpimerge.verify(tmp_path / "other", **LIMITS)
    assert found.failures == ()
    (note,) = found.notes
    assert EDITED in note


def test_coefficients_are_judged_by_the_recipes_rest(tmp_path: Path) -> None:
    """Not by what an edited plan says of it."""

    def change(raw: dict[str, Any]) -> None:
        raw["settings"]["rest"] = 0.5
        for tensor in raw["tensors"]:
            if tensor["blend"]:
                tensor["blend"]["coefficients"] = [x / 2 for x in tensor["blend"]["coefficients"]]

    recipe = write_case(tmp_path, fine_tunes(["a", "b", "c"]), reference.Settings(space="delta"))
    cpimerge.plan(recipe, tmp_path / "plan", **LIMITS)
    edit(tmp_path / "plan", change)
    cpimerge.fuse(tmp_path / "plan", tmp_path / "out", **LIMITS)
    found = cpimerge.verify(tmp_path / "out", **LIMITS)
    assert found.failures == ()
    assert any(EDITED in note for note in found.notes)


# --- where the plan is ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plan` and `out` of three fine-tunes. Not to be changed."""
    root = tmp_path_factory.mktemp("made")
    assert merged(root, write_case(root, fine_tunes(["a", "b", "c"]), reference.Settings(density=Fraction(3, 10)))).ok
    return root


def test_the_plan_is_found_beside_the_output_by_its_hash(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "out", tmp_path / "out")
    shutil.copytree(made / "plan", tmp_path / "z")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "plan.json").write_text("{}")
    (tmp_path / "none").mkdir()
    assert cpimerge.verify(str(tmp_path / "out"), **LIMITS).plan == str(tmp_path / "z")


def test_the_plan_is_found_beside_where_an_output_really_lies(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(made / "out")
    assert cpimerge.verify(tmp_path / "link", **LIMITS).plan == str(made / "plan")
    shutil.copytree(made, tmp_path / "made")
    (tmp_path / "made" / "out" / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "made" / "out" / "sub")
    assert cpimerge.verify("..", **LIMITS).ok


def test_a_directory_beside_it_that_may_not_be_read_is_passed_over(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are some in any /tmp."""
    shutil.copytree(made, tmp_path / "made")
    real = os.stat

    def refused(path: Any, *more: Any, **named: Any) -> os.stat_result:
        if str(path).startswith(str(tmp_path / "made" / "closed" / "p")):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *more, **named)

    (tmp_path / "made" / "closed").mkdir()
    monkeypatch.setattr(os, "stat", refused)
    assert cpimerge.verify(tmp_path / "made" / "out", **LIMITS).ok


def test_a_plan_elsewhere_is_given(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "out", tmp_path / "out")
    with pytest.raises(
        cpimerge.PlanError, match=r"no directory beside it holds its plan.*--plan.*cpimerge plan RECIPE"
    ):
        cpimerge.verify(tmp_path / "out", **LIMITS)
    assert cpimerge.verify(tmp_path / "out", str(made / "plan"), **LIMITS).ok


def test_a_plan_that_was_edited_since_is_another(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "plan", tmp_path / "plan")
    edit(tmp_path / "plan", _stages)
    with pytest.raises(cpimerge.PlanError, match=r"is not the plan of .*out: .* It was edited since, or is of another"):
        cpimerge.verify(made / "out", tmp_path / "plan", **LIMITS)


def test_a_merge_keeps_no_plan_and_its_plan_can_be_made_again(made: Path, tmp_path: Path) -> None:
    cpimerge.merge(made / "recipe.yml", tmp_path / "out", **LIMITS)
    with pytest.raises(cpimerge.PlanError, match="`cpimerge merge` keeps none"):
        cpimerge.verify(tmp_path / "out", **LIMITS)
    cpimerge.plan(made / "recipe.yml", tmp_path / "plan", **LIMITS)
    assert cpimerge.verify(tmp_path / "out", **LIMITS).ok


def test_files_of_ones_own_are_noted(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "made")
    (tmp_path / "made" / "out" / "notes.txt").write_text("mine")
    found = cpimerge.verify(tmp_path / "made" / "out", **LIMITS)
    assert found.ok
    assert found.notes == (f"{tmp_path / 'made' / 'out' / 'notes.txt'}: is not of the merge",)


# --- the rest ---------------------------------------------------------------------------------------


def test_progress_ends_at_its_total(made: Path) -> None:
    for verify, place in ((cpimerge.verify, "out"), (cpimerge.verify_inputs, "plan")):
        calls: list[tuple[str, int, int]] = []

        def record(*call: Any, calls: list[Any] = calls) -> None:
            calls.append(call)

        found = verify(made / place, progress=record, **LIMITS)
        read = found.input_bytes + getattr(found, "output_bytes", 0)
        assert {(phase, total) for phase, _, total in calls} == {("verify", read)}
        done = [done for _, done, _ in calls]
        assert done == sorted(done)
        assert done[-1] == read


def test_what_progress_raises_ends_the_run(made: Path) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    threads = threading.active_count()
    for verify, place in ((cpimerge.verify, "out"), (cpimerge.verify_inputs, "plan")):
        with pytest.raises(KeyboardInterrupt):
            verify(made / place, progress=stop, threads=2)
    assert threading.active_count() == threads


def test_results_are_json(made: Path) -> None:
    found = cpimerge.verify(made / "out", **LIMITS)
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["ok"] is True
    assert json.loads(json.dumps(cpimerge.verify_inputs(made / "plan", **LIMITS).as_dict()))["inputs"] == list(
        ("base", "a", "b", "c")
    )


@pytest.mark.parametrize("sample", ["0%", "101%", "-1", "nan", "x", 0, 2.0, "1%%", ""])
def test_a_sample_is_a_share(made: Path, sample: Any) -> None:
    with pytest.raises(cpimerge.OutputError, match=r"sample: .* is not a share of the elements: write it like 1% or"):
        cpimerge.verify(made / "out", sample=sample, **LIMITS)


def test_a_sample_of_everything_is_everything(made: Path) -> None:
    assert cpimerge.verify(made / "out", sample="100%", **LIMITS) == cpimerge.verify(made / "out", **LIMITS)


def test_a_sample_reads_its_share(tmp_path: Path) -> None:
    """Spread over each tensor, at least one chunk of each; always the same ones."""
    tensor = torch.arange(40.0)
    save(tmp_path / "base", {"a": tensor, "b": tensor[:10], "c": tensor[:0]})
    save(tmp_path / "x", {"a": tensor + 1, "b": tensor[:10] * 2, "c": tensor[:0]})
    with small_chunks(4):
        check(tmp_path, simple(tmp_path, "x"))
        for share, elements in (("1%", 4 + 4), ("20%", 8 + 4), (0.5, 20 + 8), (0.99, 40 + 10)):
            found = cpimerge.verify(tmp_path / "out", sample=share, **LIMITS)
            assert found.ok
            assert abs(found.elements - elements) <= 2  # the last chunk of b has two elements
            assert found == cpimerge.verify(tmp_path / "out", sample=share, threads=2)


def test_memory_that_is_too_little(made: Path) -> None:
    with pytest.raises(cpimerge.ResourceError, match=r"memory: 1\.0 MB is too little"):
        cpimerge.verify(made / "out", memory="1MB")


# --- independence -----------------------------------------------------------------------------------

MAKERS = {
    *("analysis", "blend", "comparing", "cores", "folding", "fusion", "kernels", "overlap", "passes", "planning"),
    *("plan_arrays", "selection", "singles", "staging", "transplant", "writer", "companions", "preflight"),
}
OF_STREAM = {"Chunk", "PENDING", "Workers", "workers"}  # reading, and no arithmetic
OF_LEVELLING = {"one_thread"}  # how many threads compute, and not what
OF_PLAN_FILE = {"COEFFICIENTS_FILE", "PLAN_FILE", "Blend", "Input", "Plan", "TensorPlan"}


def imports(file: Path) -> dict[str, set[str]]:
    """What a module of the package imports from others of it, wherever it does."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.Import) and any(name.name.startswith("cpimerge") for name in node.names))
        if isinstance(node, ast.ImportFrom) and node.level:
            module = (node.module or "").split(".")[0]
            found.setdefault(module, set()).update(name.name for name in node.names)
    return found


def test_nothing_that_plans_or_fuses_takes_part() -> None:
    package = Path(cpimerge.__file__).parent
    modules = sorted(package.glob("verify*.py"))
    assert len(modules) == 12
    for file in modules:
        found = imports(file)
        assert not found.keys() & MAKERS, file
        assert found.get("stream", set()) <= OF_STREAM, file
        assert found.get("levelling", set()) <= OF_LEVELLING, file
        assert found.get("checkpoint", set()) <= {"Checkpoint", "Tensor"}, file
        assert found.get("plan_file", set()) <= OF_PLAN_FILE
