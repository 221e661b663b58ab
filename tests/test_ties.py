"""Heads tied to embeddings and other copies: what is left out, what serves as what, and what is refused."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoints import save, write_recipe
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import cpimerge
from cpimerge import IncompatibleError, ties
from cpimerge.checkpoint import StoredTensor
from cpimerge.directory import open_checkpoint
from cpimerge.plan_file import Plan
from cpimerge.ties import copies_in, first_difference, onto

Tensors = dict[str, torch.Tensor]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED: dict[str, Any] = {"tie_word_embeddings": True}
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}


def model(seed: int, head: str) -> Tensors:
    """A model whose head is "none", a "copy" of its embedding, or its "own"."""
    common, own = torch.Generator().manual_seed(100), torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(6, 4, generator=common) + torch.randn(6, 4, generator=own) / 10
        for name in (EMBED, "model.layers.0.mlp.weight", "model.layers.1.mlp.weight", HEAD)
    }
    if head == "copy":
        tensors[HEAD] = tensors[EMBED].clone()
    return {name: tensor for name, tensor in tensors.items() if head != "none" or name != HEAD}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def settle(home: Path, base: tuple[str, Any], expert: tuple[str, Any], **parameters: Any) -> Plan:
    """The plan of a base and an expert with these heads and configs."""
    save(home / "base", model(0, base[0]), config=base[1])
    save(home / "expert", model(1, expert[0]), config=expert[1])
    parameters.setdefault("density", 0.3)
    models = [{"model": home / "expert"}]
    write_recipe(home / "recipe.yml", base_model=home / "base", models=models, parameters=parameters)
    return cpimerge.plan(home / "recipe.yml", home / "plan", threads=1, force=True)


def fused(home: Path) -> Tensors:
    cpimerge.fuse(home / "plan", home / "out", threads=1, force=True)
    return load_file(home / "out" / "model.safetensors")


def head_notes(home: Path, plan: Plan) -> list[str]:
    return [note.replace(f"{home}/", "") for note in plan.notes if "config.json" not in note]


def refused(home: Path, base: tuple[str, Any], expert: tuple[str, Any]) -> list[str]:
    with pytest.raises(IncompatibleError) as error:
        settle(home, base, expert)
    return [problem.replace(f"{home}/", "") for problem in error.value.problems]


LEFT_OUT = f"expert: {HEAD} is a copy of {EMBED}; the base has no such copy, and the output has none"
SERVES = f"expert: has no {HEAD}; {EMBED} serves, of which it is a copy in the base"
APART = f"expert: tensor {HEAD!r}: not in base, and no copy of {EMBED!r} (first at flat index 0). "
OWN = (
    f"expert: tensor {HEAD!r}: missing, though base has it, and there it is no copy of {EMBED!r} (first at flat index "
    f"0). If {EMBED!r} shall serve as both, save the model untied; or merge onto a tied base"
)


def differ(name: str) -> str:
    return (
        f"{name}: tensor {HEAD!r}: its config ties it to {EMBED!r}, but they differ (first at flat index 0). Write "
        "tie_word_embeddings: false into its config.json if both are in use, or remove the one that is not"
    )


@pytest.mark.parametrize(
    ("ours", "theirs"), [*itertools.product([TIED, {}, {"text_config": TIED}], [TIED, {}, UNTIED])]
)
def test_an_experts_copy_is_left_out(home: Path, ours: Any, theirs: Any) -> None:
    plan = settle(home, ("none", ours), ("copy", theirs))
    assert head_notes(home, plan) == [LEFT_OUT]
    assert HEAD not in fused(home)


@pytest.mark.parametrize("theirs", [TIED, {}, UNTIED])
def test_a_head_of_its_own_is_not_left_out(home: Path, theirs: Any) -> None:
    assert refused(home, ("none", TIED), ("own", theirs)) == [
        APART + "It was trained apart: merge onto a base that was saved untied, or tie the model again",
    ]


def test_a_base_that_has_no_head_at_all(home: Path) -> None:
    """Its config says that nothing is tied: then it is not a copy that is missing."""
    assert refused(home, ("none", UNTIED), ("copy", UNTIED)) == [
        f"expert: tensor {HEAD!r}: not in base. Remove it from the checkpoint, or merge onto a base that has it"
    ]


@pytest.mark.parametrize(("ours", "theirs"), [*itertools.product([TIED, {}, UNTIED], [TIED, {}])])
def test_an_embedding_serves_as_the_head(home: Path, ours: Any, theirs: Any) -> None:
    """The output is the one that an expert with a copy of its own gives."""
    plan = settle(home, ("copy", ours), ("none", theirs))
    assert head_notes(home, plan) == [SERVES]
    found = fused(home)
    settle(home, ("copy", ours), ("copy", theirs))
    expected = fused(home)
    assert found.keys() == expected.keys() >= {HEAD}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(found[HEAD], found[EMBED])


def test_an_expert_that_is_untied_needs_its_head(home: Path) -> None:
    assert refused(home, ("copy", TIED), ("none", UNTIED)) == [
        f"expert: tensor {HEAD!r}: missing, though base has it. It is no fine-tune of this base as it stands"
    ]


@pytest.mark.parametrize(("ours", "theirs"), [*itertools.product([{}, UNTIED], [TIED, {}])])
def test_no_embedding_serves_for_a_head_of_its_own(home: Path, ours: Any, theirs: Any) -> None:
    assert refused(home, ("own", ours), ("none", theirs)) == [OWN]


@pytest.mark.parametrize("heads", ["none", "copy"])
def test_those_that_agree_need_no_word(home: Path, heads: str) -> None:
    assert head_notes(home, settle(home, (heads, TIED), (heads, TIED))) == []


def test_untied_heads_need_no_word(home: Path) -> None:
    assert head_notes(home, settle(home, ("own", UNTIED), ("own", UNTIED))) == []
    assert head_notes(home, settle(home, ("own", {}), ("copy", {}))) == []


def test_configs_that_are_wrong(home: Path) -> None:
    assert refused(home, ("own", TIED), ("own", TIED)) == [differ("base"), differ("expert")]
    assert refused(home, ("own", TIED), ("none", TIED)) == [differ("base")]
    assert refused(home, ("copy", TIED), ("own", TIED)) == [differ("expert")]


@pytest.mark.parametrize(
    "parameters", [{"scope": "global"}, {"density": [{"filter": "lm_head", "value": 0}, {"value": 0.5}]}]
)
def test_copies_that_may_drift_apart(home: Path, parameters: dict[str, Any]) -> None:
    plan = settle(home, ("copy", TIED), ("copy", TIED), **parameters)
    assert head_notes(home, plan) == [
        f"base: {HEAD} is a copy of {EMBED}, and with these parameters they may come out different, so that they are "
        "tied no longer. To have one only, load the base with transformers and save it"
    ]


# --- as PyTorch saves them --------------------------------------------------------------------------


def bert(seed: int) -> Tensors:
    """A masked language model: `decoder` is tied, its bias to another."""
    common, own = torch.Generator().manual_seed(100), torch.Generator().manual_seed(seed)
    rows = {"bert.embeddings.position_embeddings": 6, "bert.embeddings.word_embeddings": 6}
    weights = {
        f"{name}.weight": torch.randn(count, 4, generator=common) + torch.randn(count, 4, generator=own) / 10
        for name, count in (rows | {"bert.encoder.layer.0.output.dense": 4}).items()
    }
    return weights | {
        "cls.predictions.bias": torch.zeros(6),
        "cls.predictions.transform.dense.bias": torch.zeros(6),
    }


def shared(tensors: Tensors) -> Tensors:
    """With both names of what is tied."""
    return tensors | {
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
    }


@pytest.mark.parametrize("base_has_both", [False, True])
@pytest.mark.parametrize("pickled", [False, True])
def test_a_pickle_has_both_names(home: Path, base_has_both: bool, pickled: bool) -> None:
    """Of tensors that share memory, safetensors have one, a pickle both, at one place in the file."""
    for name, seed, both in (("base", 0, base_has_both), ("expert", 1, not base_has_both)):
        tensors = shared(bert(seed)) if both else bert(seed)
        save(home / name, tensors)
        if both and pickled:
            torch.save(tensors, home / name / "pytorch_model.bin")
            (home / name / "model.safetensors").unlink()
    write_recipe(home / "recipe.yml", base_model=home / "base", models=[{"model": home / "expert"}])
    notes = cpimerge.plan(home / "recipe.yml", home / "plan", threads=1).notes
    names = ["cls.predictions.decoder.bias", "cls.predictions.decoder.weight"]
    originals = ["cls.predictions.bias", "bert.embeddings.word_embeddings.weight"]
    text = "has no {}; {} serves, of which it is a copy in the base"
    if not base_has_both:
        text = "{} is a copy of {}; the base has no such copy, and the output has none"
    assert notes == [f"{home}/expert: {text.format(*pair)}" for pair in zip(names, originals, strict=True)]
    assert fused(home).keys() == (shared(bert(0)) if base_has_both else bert(0)).keys()


def test_shared_memory_that_may_drift_apart(home: Path) -> None:
    """Also where no config says that they are tied, and whatever they are called."""
    weight = torch.randn(3, 3)
    for name, other in (("base", weight + 1), ("expert", weight + 1.1)):
        (home / name).mkdir()
        torch.save({"lm_head.weight": weight, "a": weight, "b": weight, "c": other}, home / name / "pytorch_model.bin")
    parameters = {"scope": "global"}
    models = [{"model": home / "expert"}]
    write_recipe(home / "recipe.yml", base_model=home / "base", models=models, parameters=parameters)
    plan = cpimerge.plan(home / "recipe.yml", home / "plan", threads=1)
    assert [note.split(", and")[0] for note in head_notes(home, plan)] == [
        "base: b is a copy of a",
        "base: lm_head.weight is a copy of a",
    ]
    assert [twins.copy.name for twins in copies_in(open_checkpoint(home / "base"))] == ["b", "lm_head.weight"]


def test_shared_memory_under_any_name(home: Path) -> None:
    """Where both names are one place of a file, nothing has to be guessed."""
    weight = torch.randn(3, 3)
    save(home / "base", {"layers.0.w": torch.randn(3, 3)})
    (home / "expert").mkdir()
    torch.save({"layers.0.w": weight, "layers.0.same": weight}, home / "expert" / "pytorch_model.bin")
    base, expert = (open_checkpoint(home / name) for name in ("base", "expert"))
    found = onto(base, expert)
    assert list(found.tensors) == ["layers.0.w"]
    assert [(twins.kind, twins.copy.name) for twins in found.twins] == [("extra", "layers.0.same")]
    with mock.patch.object(StoredTensor, "read_into", side_effect=AssertionError):
        assert ties.judge(base, [found])[0] == []


@pytest.mark.parametrize("name", ["score.weight", "model.layers.2.embed.weight", "lm_head.bias", "model.norm.weight"])
def test_equal_values_alone_make_no_copy(home: Path, name: str) -> None:
    """What is not called like a head or an embedding outside the layers stays a tensor of its own."""
    save(home / "base", {EMBED: torch.ones(2, 2), "norm.bias": torch.ones(2)})
    value = torch.ones(2) if name.endswith("bias") else torch.ones(2, 2)
    save(home / "expert", {EMBED: torch.ones(2, 2), "norm.bias": torch.ones(2), name: value})
    base, expert = (open_checkpoint(home / directory) for directory in ("base", "expert"))
    assert onto(base, expert) is expert


def test_thousands_of_names_take_no_search(home: Path) -> None:
    """Looking for the twin of each among all others would take minutes."""
    zero = torch.zeros(1)
    for name, letter in (("base", "v"), ("expert", "w")):
        save(home / name, {f"{letter}.{number}": zero for number in range(20_000)})
    base, expert = (open_checkpoint(home / name) for name in ("base", "expert"))
    assert onto(base, expert) is expert


# --- comparing --------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.data())
def test_the_first_difference(values: list[int], data: st.DataObject) -> None:
    other = list(values)
    if data.draw(st.booleans()):
        other[data.draw(st.integers(0, len(values) - 1))] = 5
    a, b = (torch.tensor(numbers, dtype=torch.int16) for numbers in (values, other))
    expected = next((i for i, (x, y) in enumerate(zip(values, other, strict=True)) if x != y), None)
    with tempfile.TemporaryDirectory() as directory, mock.patch.object(ties, "PIECE_BYTES", 6):
        found = open_checkpoint(save(Path(directory, "m"), {"a": a, "b": b})).tensors
        assert first_difference(found["a"], found["b"]) == expected
