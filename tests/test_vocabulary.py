"""Vocabularies that differ: what is said of them, and rows matched token by token."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mergekit_oracle
import pytest
import torch
import vocabularies
import yaml
from checkpoints import write_json, write_recipe
from files import stored_bytes, write_raw
from hub_models import contents
from hub_server import Hub
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from trees import files as tree
from vocabularies import BLOCK, CORE, EMBEDDING, HEAD_BIAS, Model, added, model

import cpimerge
from cpimerge.checkpoint import Checkpoint, StoredTensor
from cpimerge.errors import CpimergeError, IncompatibleError, PlanError
from cpimerge.models import Located, open_model
from cpimerge.needs import Needs
from cpimerge.plan_file import Plan
from cpimerge.vocabulary import Settled, settle

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def opened(directory: Path, models: Mapping[str, Model]) -> dict[str, Checkpoint]:
    """The models, saved and opened; the first is the base."""
    checkpoints: dict[str, Checkpoint] = {}
    for name, it in models.items():
        vocabularies.write(directory / name, it)
        checkpoints[name] = open_model(Located(directory / name), checkpoints.get("base"))
    return checkpoints


def settled(directory: Path, mode: Any, **models: Model) -> Settled:
    return settle(opened(directory, models), mode)


def recipe(directory: Path, models: Mapping[str, Model], vocabulary: str | None = None, **parameters: Any) -> Path:
    """The models, saved below `directory`, and a recipe for them."""
    for name, it in models.items():
        vocabularies.write(directory / name, it)
    return write_recipe(
        directory / "recipe.yml",
        base_model=directory / "base",
        models=[{"model": directory / name} for name in models if name != "base"],
        parameters={"density": 0.2, "space": "delta", **parameters},
        **({"vocabulary": vocabulary} if vocabulary else {}),
    )


# --- rows -------------------------------------------------------------------------------------------


POOL = ("<x>", "<y>", "<z>", "ü", "\n")


@st.composite
def added_tokens(draw: st.DrawFn) -> Model:
    """CORE with some tokens added, in any order; perhaps with padding, perhaps with fewer rows than tokens."""
    tokens = draw(st.lists(st.sampled_from(POOL), unique=True, max_size=4))
    names = added(*tokens)
    rows = len(names) + draw(st.integers(-min(2, len(tokens)), 3))
    return model(names, rows, draw(st.integers(0, 99)), draw(st.sampled_from(FLOATS)))


@st.composite
def any_tokens(draw: st.DrawFn) -> Model:
    """Any tokens with any ids."""
    tokens = draw(st.lists(st.sampled_from((*CORE, *POOL)), unique=True, min_size=1))
    rows = draw(st.lists(st.integers(0, 14), unique=True, min_size=len(tokens), max_size=len(tokens)))
    names = dict(zip(rows, tokens, strict=True))
    return model(names, draw(st.integers(3, 16)), draw(st.integers(0, 99)), draw(st.sampled_from(FLOATS)))


few = settings(max_examples=40)
cuts = st.lists(st.integers(1, 60), max_size=6)


@few
@given(st.data())
def test_union_equals_the_slow_way(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    base, one, two = (data.draw(added_tokens()) for _ in range(3))
    rowless = [token for row, token in base.names.items() if row >= base.rows]
    found = settled(tmp_path_factory.mktemp("union"), "union", base=base, one=one, two=two)
    if found.problems:
        assert any(one.row(token) is None and two.row(token) is None for token in rowless)
    else:
        assert_same_rows(found, vocabularies.aligned(base, {"one": one, "two": two}, "union"), data.draw(cuts))


@few
@given(st.data())
def test_base_equals_the_slow_way(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    base, one, two = (data.draw(any_tokens()) for _ in range(3))
    expected = vocabularies.aligned(base, {"one": one, "two": two}, "base")
    found = settled(tmp_path_factory.mktemp("base"), "base", base=base, one=one, two=two)
    assert found.problems == []
    assert_same_rows(found, expected, data.draw(cuts))


def assert_same_rows(found: Settled, expected: Mapping[str, Model], cuts: list[int]) -> None:
    for name, checkpoint in found.checkpoints.items():
        for tensor, values in expected[name].tensors.items():
            info = checkpoint.tensors[tensor]
            assert info.shape == tuple(values.shape)
            assert vocabularies.read(info, cuts) == stored_bytes(values), (name, tensor)


def test_what_needs_nothing_is_left_as_it_is(tmp_path: Path) -> None:
    base = model(added("<x>"), 8, 0)
    found = settled(tmp_path, "union", base=base, one=model(added("<x>"), 8, 1), two=model(added("<x>"), 8, 2))
    assert (found.vocabulary, found.notes, found.problems) == (None, [], [])
    assert all(isinstance(info, StoredTensor) for it in found.checkpoints.values() for info in it.tensors.values())


def test_a_model_that_only_has_more_padding_is_read_from_its_own_rows(tmp_path: Path) -> None:
    base, one = model(added(), 6, 0), model(added(), 9, 1)
    found = settled(tmp_path, "base", base=base, one=one)
    assert found.vocabulary is not None
    assert (found.vocabulary.rows, found.vocabulary.joined, found.notes) == (6, [], [])
    assert isinstance(found.checkpoints["base"].tensors[EMBEDDING], StoredTensor)
    expected = one.tensors[EMBEDDING][:6]
    assert vocabularies.read(found.checkpoints["one"].tensors[EMBEDDING]) == stored_bytes(expected)


def test_joined_tokens_take_padding_first(tmp_path: Path) -> None:
    base = model(added(), 7, 0)
    found = settled(tmp_path, "union", base=base, one=model(added("<x>", "<y>", "<z>"), 8, 1))
    assert found.vocabulary is not None
    assert [(token.id, token.content) for token in found.vocabulary.joined] == [(5, "<x>"), (6, "<y>"), (7, "<z>")]
    assert (found.vocabulary.base_rows, found.vocabulary.rows) == (7, 8)
    assert found.vocabulary.tensors == [HEAD_BIAS, EMBEDDING]


def test_the_first_model_says_how_a_token_is_added(tmp_path: Path) -> None:
    one = model(added("<x>"), 6, 1, flags={"<x>": {"special": False, "lstrip": True}})
    two = model(added("<y>", "<x>"), 7, 2)
    found = settled(tmp_path, "union", base=model(added(), 5, 0), one=one, two=two)
    assert found.vocabulary is not None
    flags = [token.model_dump(exclude={"single_word", "rstrip", "normalized"}) for token in found.vocabulary.joined]
    assert flags == [
        {"id": 5, "content": "<x>", "lstrip": True, "special": False},
        {"id": 6, "content": "<y>", "lstrip": False, "special": True},
    ]


# --- whole merges -----------------------------------------------------------------------------------


MODELS = {
    "base": model(added("<b>"), 8, 0, torch.bfloat16),
    "one": model(added("<b>", "<x>", "<y>"), 8, 1, torch.bfloat16),
    "two": model(added("<y>"), 11, 2, torch.float32),
    "three": model({**added(), 6: "<b>"}, 7, 3, torch.bfloat16),
}


@pytest.mark.parametrize("mode", ["base", "union"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_a_merge_is_that_of_models_in_one_vocabulary(tmp_path: Path, mode: str, granularity: str) -> None:
    experts = {name: it for name, it in MODELS.items() if name != "base"}
    apart = recipe(tmp_path / "apart", MODELS, mode, granularity=granularity)
    alike = vocabularies.aligned(MODELS["base"], experts, mode)
    together = write_alike(tmp_path / "together", alike, granularity=granularity)
    for place, file in (("apart", apart), ("together", together)):
        cpimerge.merge(file, tmp_path / place / "out", threads=1)
    ours, theirs = (tmp_path / place / "out" / "model.safetensors" for place in ("apart", "together"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert load_file(ours)[EMBEDDING].shape == (8, 3) == MODELS["base"].tensors[EMBEDDING].shape


@pytest.mark.parametrize("mode", ["base", "union"])
def test_large_embeddings_in_another_order(tmp_path: Path, mode: str) -> None:
    """Of several chunks, of which a sample is read first; half of the added tokens have other ids."""
    many = [f"<{n}>" for n in range(3000)]
    mixed = [many[n] if n % 2 else many[-1 - n - 1] for n in range(2000)]
    models = {
        "base": model(added(*many), 3010, 0, torch.bfloat16, width=150),
        "one": model(added(*mixed, "<x>"), 2006, 1, torch.bfloat16, width=150),
        "two": model(added(*many[:2500], "<y>", "<x>"), 2600, 2, torch.float32, width=150),
    }
    experts = {name: it for name, it in models.items() if name != "base"}
    apart = recipe(tmp_path / "apart", models, mode)
    alike = vocabularies.aligned(models["base"], experts, mode)
    together = write_alike(tmp_path / "together", alike)
    cpimerge.merge(apart, tmp_path / "apart" / "out", threads=2)
    cpimerge.merge(together, tmp_path / "together" / "out", threads=2)
    ours, theirs = (tmp_path / place / "out" / "model.safetensors" for place in ("apart", "together"))
    assert ours.read_bytes() == theirs.read_bytes()


def write_alike(directory: Path, models: Mapping[str, Model], **parameters: Any) -> Path:
    """The tokens are the same, and so should the files be: there are none."""
    file = recipe(directory, models, **parameters)
    for name in models:
        (directory / name / "tokenizer.json").unlink()
    return file


def test_a_backbone_with_tokens_of_its_own(tmp_path: Path) -> None:
    """It is a model like the others, and the last of them."""
    models = {"base": MODELS["base"], "one": MODELS["one"], "backbone": model(added("<b>", "<y>", "<z>"), 9, 4)}
    alike = vocabularies.aligned(models["base"], {name: models[name] for name in ("one", "backbone")}, "union")
    outs = []
    for place, (every, mode) in {"apart": (models, "union"), "together": (alike, None)}.items():
        file = recipe(tmp_path / place, every, mode, backbone=f"{tmp_path}/{place}/backbone")
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        content["models"] = [entry for entry in content["models"] if entry["model"] == "one"]
        file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        if mode is None:
            for name in every:
                (tmp_path / place / name / "tokenizer.json").unlink()
        cpimerge.merge(file, tmp_path / place / "out", threads=1)
        outs.append((tmp_path / place / "out" / "model.safetensors").read_bytes())
    assert outs[0] == outs[1]


def test_same_bytes_for_every_thread_count(tmp_path: Path) -> None:
    file = recipe(tmp_path, MODELS, "union")
    for threads in (1, 3):
        cpimerge.merge(file, tmp_path / f"out{threads}", threads=threads)
    assert tree(tmp_path / "out1") == tree(tmp_path / "out3")


def test_models_that_are_streamed(hub: Hub, tmp_path: Path) -> None:
    """What travels for rows that come from another model is announced, too."""
    local = recipe(tmp_path / "local", MODELS, "union")
    for name in MODELS:
        hub.add(f"org/{name}", tmp_path / "local" / name)
    text = local.read_text(encoding="utf-8").replace("model: ", "model: org/")
    (tmp_path / "recipe.yml").write_text(text, encoding="utf-8")
    needs: list[Needs] = []
    cpimerge.merge(tmp_path / "recipe.yml", tmp_path / "out", threads=1, download="stream", announce=needs.append)
    cpimerge.merge(local, tmp_path / "out-local", threads=1)
    streamed, expected = (contents(tmp_path / place) for place in ("out", "out-local"))
    assert streamed == expected
    assert needs[0].plan_travel_bytes == sum(tensor.nbytes for it in MODELS.values() for tensor in it.tensors.values())


def test_the_mean_of_mergekit(tmp_path: Path) -> None:
    """Where no core is taken, its `linear` with `tokenizer_source: union` has the same rows for every token."""
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    models = {"base": added("<b>"), "one": added("<b>", "<x>", "<y>", "<z>"), "two": added("<b>", "<z>", "<y>")}
    small: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    for seed, (name, names) in enumerate(models.items()):
        torch.manual_seed(0)  # nearly parallel, so that slerp is lerp
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=6, **small))
        llama.resize_token_embeddings(len(names))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in llama.parameters():
                if len(parameter) == len(names):
                    parameter[5:] = parameter[0]
                parameter.add_(1e-4 * torch.randn(parameter.shape))
        llama.save_pretrained(tmp_path / name)
        content = vocabularies.tokenizer(Model(names, {}))
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        write_json(tmp_path / name / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    theirs = mergekit_oracle.merge(
        {
            "merge_method": "linear",
            "base_model": str(tmp_path / "base"),
            "models": [
                {"model": str(tmp_path / name), "parameters": {"weight": 0 if name == "base" else 1}} for name in models
            ],
            "tokenizer": {"source": "union"},
            "dtype": "float32",
        },
        tmp_path / "theirs",
    )
    file = write_recipe(
        tmp_path / "recipe.yml",
        base_model=tmp_path / "base",
        models=[{"model": tmp_path / "one"}, {"model": tmp_path / "two"}],
        parameters={"density": 0, "space": "weights"},
        vocabulary="union",
    )
    cpimerge.merge(file, tmp_path / "ours", threads=1)
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    ids = (vocabulary_of(tmp_path / place) for place in ("ours", "theirs"))
    mine, its = ids
    assert mine.keys() == its.keys() == {*CORE, "<b>", "<x>", "<y>", "<z>"}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        for token, row in mine.items():
            torch.testing.assert_close(ours[name][row], theirs[name][its[token]], rtol=1e-5, atol=1e-8)


def vocabulary_of(directory: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(directory).get_vocab()
    return vocabulary


# --- what fuse relies on ----------------------------------------------------------------------------


def changed(file: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(file.read_bytes())
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def test_fuse_refuses_other_tokens(tmp_path: Path) -> None:
    cpimerge.plan(recipe(tmp_path, MODELS, "base"), tmp_path / "plan", threads=1)
    changed(tmp_path / "one" / "tokenizer.json", lambda it: it["added_tokens"][1].update(content="<q>"))
    with pytest.raises(PlanError) as caught:
        cpimerge.fuse(tmp_path / "plan", tmp_path / "out", threads=1)
    assert caught.value.problems == (
        f"{tmp_path}/one: its tokens changed since it was planned",
        "The inputs are not those that were planned: run `cpimerge plan` again",
    )
    assert not (tmp_path / "out").exists()


def test_fuse_refuses_a_tokenizer_that_is_gone(tmp_path: Path) -> None:
    cpimerge.plan(recipe(tmp_path, MODELS, "union"), tmp_path / "plan", threads=1)
    (tmp_path / "two" / "tokenizer.json").unlink()
    with pytest.raises(PlanError, match=r"Which tokens they are cannot be told: no tokenizer\.json in .*/two"):
        cpimerge.fuse(tmp_path / "plan", tmp_path / "out", threads=1)


def test_the_vocabulary_of_a_plan_is_sealed(tmp_path: Path) -> None:
    cpimerge.plan(recipe(tmp_path, MODELS, "union"), tmp_path / "plan", threads=1)
    assert Plan.load(tmp_path / "plan").vocabulary is not None
    changed(tmp_path / "plan" / "plan.json", lambda it: it["vocabulary"].update(mode="base"))
    with pytest.raises(PlanError, match="entries were edited that must not be"):
        Plan.load(tmp_path / "plan")


def test_an_older_plan_can_still_be_read(tmp_path: Path) -> None:
    same = {name: model(added(), 6, seed) for seed, name in enumerate(("base", "one"))}
    cpimerge.plan(recipe(tmp_path, same), tmp_path / "plan", threads=1)
    changed(tmp_path / "plan" / "plan.json", lambda it: it.pop("vocabulary"))
    assert Plan.load(tmp_path / "plan").vocabulary is None


# --- what is said -----------------------------------------------------------------------------------


def problems(directory: Path, mode: str | None, **models: Model) -> list[str]:
    """What `plan` says of the models, without the directory."""
    with pytest.raises(CpimergeError) as caught:
        cpimerge.plan(recipe(directory, models, mode), directory / "plan", threads=1)
    return [line.replace(f"{directory}/", "") for line in caught.value.problems]


WAYS_OUT = "Write vocabulary: base to keep the base's tokens, or vocabulary: union to have all"


def test_more_tokens(tmp_path: Path) -> None:
    one, two = model(added("<x>", "\x1b[2J"), 8, 1), model(added(*"fghijklm"), 13, 2)
    assert problems(tmp_path, None, base=model(added(), 5, 0), one=one, two=two) == [
        "one: its tokens are not those of base: 2 tokens not in the base: '<x>' (id 5), '\\x1b[2J' (id 6); 8 rows, the "
        f"base has 5. {WAYS_OUT}",
        "two: its tokens are not those of base: 8 tokens not in the base: 'f' (id 5), 'g' (id 6), 'h' (id 7), 'i' "
        f"(id 8), 'j' (id 9) and 3 more; 13 rows, the base has 5. {WAYS_OUT}",
    ]


def test_more_tokens_in_the_padding(tmp_path: Path) -> None:
    assert problems(tmp_path, None, base=model(added(), 8, 0), one=model(added("<x>"), 8, 1)) == [
        f"one: its tokens are not those of base: 1 token not in the base: '<x>' (id 5). {WAYS_OUT}"
    ]


def test_renamed_moved_and_missing_tokens(tmp_path: Path) -> None:
    base, one = model(added("<p>", "<q>", "<r>"), 8, 0), model(added("<think>", "<r>"), 7, 1)
    assert problems(tmp_path, None, base=base, one=one) == [
        "one: its tokens are not those of base: 1 token of the base not in it: '<q>' (id 6); id 5 is '<think>', in the "
        f"base '<p>'; '<r>' has id 6, in the base 7; 7 rows, the base has 8. {WAYS_OUT}"
    ]


def test_only_padding(tmp_path: Path) -> None:
    assert problems(tmp_path, None, base=model(added("<x>"), 6, 0), one=model(added("<x>"), 8, 1)) == [
        "one: 8 rows for the same tokens, where base has 6: the rest is padding. Write vocabulary: base to have the "
        "base's rows"
    ]


def test_tokens_without_rows_do_not_count(tmp_path: Path) -> None:
    base, one = model(added(), 5, 0), model(added("<pad>"), 5, 1)
    plan = cpimerge.plan(recipe(tmp_path, {"base": base, "one": one}), tmp_path / "plan", threads=1)
    assert plan.vocabulary is None
    note = f"{tmp_path}/one: tokenizer.json differs from the base's; the output takes the base's"
    assert plan.notes == [note] or note in plan.notes


def test_tokens_that_only_the_base_has_are_a_note(tmp_path: Path) -> None:
    found = settled(tmp_path, None, base=model(added("<x>"), 7, 0), one=model(added(), 7, 1))
    assert (found.problems, found.vocabulary) == ([], None)
    assert found.notes == [
        f"{tmp_path}/one: 1 token of the base not in its tokenizer, whose rows are merged as they are: '<x>' (id 5)"
    ]


def test_what_becomes_of_tokens_is_a_note(tmp_path: Path) -> None:
    models = {"base": model(added("<p>"), 6, 0), "one": model(added("<x>"), 6, 1)}
    notes = {mode: settled(tmp_path / mode, mode, **models).notes for mode in ("base", "union")}
    missing = "1 token of the base not in it, for which it has the rows of the base: '<p>' (id 5)"
    assert notes == {
        "base": [
            f"{tmp_path}/base/one: 1 token left out, which the base lacks: '<x>' (id 5)",
            f"{tmp_path}/base/one: {missing}",
        ],
        "union": [
            f"{tmp_path}/union/one: 1 token joined to the base: '<x>' (id 6)",
            f"{tmp_path}/union/one: {missing}",
        ],
    }


def test_tokens_of_another_vocabulary_cannot_be_joined(tmp_path: Path) -> None:
    one = model({**dict(enumerate(CORE)), 5: "word"}, 6, 1, core=(*CORE, "word"))
    two = model({0: "b", 1: "a", **dict(enumerate(CORE[2:], 2)), 5: "<x>"}, 6, 2)
    only = "vocabulary: union can only join added tokens; write vocabulary: base"
    assert problems(tmp_path, "union", base=model(added(), 5, 0), one=one, two=two) == [
        f"one: its tokenizer is another: 1 token in its vocabulary, not added to it: 'word' (id 5). {only}",
        f"two: its tokenizer is another: vocabulary, merges or scores are not the base's. {only}",
    ]


def test_a_base_without_tokenizer_json_takes_no_tokens(tmp_path: Path) -> None:
    models = {"base": model(added(), 5, 0), "one": model(added("<x>"), 6, 1)}
    checkpoints = opened(tmp_path, models)
    (tmp_path / "base" / "tokenizer.json").unlink()
    (tmp_path / "base" / "vocab.txt").write_text("a\nb\nc\nd\ne\n", encoding="utf-8")
    changed(tmp_path / "one" / "tokenizer.json", lambda it: it["model"].update(type="WordPiece"))
    found = settle(checkpoints, "union")
    assert found.problems == [
        f"{tmp_path}/base: has no tokenizer.json, to which vocabulary: union adds tokens. Load the tokenizer with "
        "transformers and save it, or write vocabulary: base"
    ]
    assert settle(checkpoints, "base").problems == []


def test_ids_that_leave_gaps_take_no_tokens(tmp_path: Path) -> None:
    base = model({**dict(enumerate(CORE[:4])), 6: "e"}, 8, 0)
    one = model({**dict(enumerate(CORE[:4])), 6: "e", 7: "<x>"}, 8, 1)
    assert problems(tmp_path, "union", base=base, one=one) == [
        "base/tokenizer.json: has an id 6, and the next token added to it would get 5, so vocabulary: union cannot add "
        "any. Write vocabulary: base"
    ]


def test_tokens_of_the_base_without_rows(tmp_path: Path) -> None:
    base, one = model(added("<pad>"), 5, 0), model(added("<x>"), 6, 1)
    assert problems(tmp_path, "union", base=base, one=one) == [
        "base: 1 token without a row, and no model has one: '<pad>' (id 5). Give it rows for all its tokens "
        "(transformers: resize_token_embeddings), or write vocabulary: base"
    ]


def test_rows_whose_tokens_cannot_be_told(tmp_path: Path) -> None:
    models = {"base": model(added(), 5, 0), "one": model(added("<x>"), 6, 1)}
    for mode in (None, "base", "union"):
        checkpoints = opened(tmp_path, models)
        (tmp_path / "one" / "tokenizer.json").unlink()
        found = settle(checkpoints, mode)
        assert found.problems == [
            f"{tmp_path}/one: rows of the vocabulary: 'final_logits_bias' 6, 'model.embed_tokens.weight' 6, where the "
            f"base has 5. Which tokens they are cannot be told: no tokenizer.json in {tmp_path}/one. Put it there "
            "(transformers: load the tokenizer and save it)"
        ]
        assert found.explained == {"one": {EMBEDDING, HEAD_BIAS}}


def test_tensors_of_one_model_in_different_rows(tmp_path: Path) -> None:
    one = model(added("<x>"), 6, 1)
    one = Model(one.names, {**one.tensors, HEAD_BIAS: one.tensors[HEAD_BIAS][:, :5]})
    assert problems(tmp_path, "base", base=model(added(), 5, 0), one=one) == [
        "one: rows of the vocabulary: 'final_logits_bias' 5, 'model.embed_tokens.weight' 6, where the base has 5. "
        "Tensors of one vocabulary must have the same number of rows: save the model again"
    ]


def test_tokenizers_that_cannot_be_read(tmp_path: Path) -> None:
    """A merge row by row does not need them, any other does."""
    models = {"base": model(added(), 6, 0), "one": model(added(), 6, 1), "two": model(added(), 6, 2)}
    checkpoints = opened(tmp_path, models)
    (tmp_path / "one" / "tokenizer.json").write_text("[]", encoding="utf-8")
    damaged = (
        f"{tmp_path}/one/tokenizer.json: expected a JSON object, got list. Save the tokenizer again with transformers"
    )
    found = settle(checkpoints, None)
    assert (found.damaged, found.problems, found.notes) == ([], [], [f"tokens are not compared: {damaged}"])
    for mode in ("base", "union"):
        assert settle(checkpoints, mode).damaged == [damaged]
    larger = opened(tmp_path / "larger", {**models, "one": model(added(), 7, 1)})
    (tmp_path / "larger" / "one" / "tokenizer.json").write_text("[]", encoding="utf-8")
    found = settle(larger, None)
    assert found.damaged == [damaged.replace(f"{tmp_path}/", f"{tmp_path}/larger/")]
    assert found.explained == {"one": {EMBEDDING, HEAD_BIAS}}


def test_numbers_that_are_not_finite_are_said_of_the_model_that_has_them(tmp_path: Path) -> None:
    """By their place in its file, though it is another in the output."""
    one = model(added("<pad>", "<x>"), 7, 1)
    one.tensors[EMBEDDING][6, 2] = torch.inf
    found = problems(tmp_path, "union", base=model(added(), 5, 0), one=one, two=model(added("<pad>"), 6, 2))
    where = f"tensor '{EMBEDDING}': "
    joined = "flat index 20 in the rows of the output is NaN or Inf, and it has that from other models. Repair these"
    assert [line for line in found if line.startswith("one")] == [
        f"one: {where}flat index 20 is NaN or Inf. Repair the checkpoint or take another; nothing can be merged with it"
    ]
    assert [line for line in found if not line.startswith("one")] == [
        f"{name}: {where}{joined}" for name in ("base", "two")
    ]
    three = model({**added("<x>"), 7: "<y>"}, 8, 3)
    three.tensors[EMBEDDING][7, 1] = torch.nan
    found = problems(tmp_path / "moved", "union", base=model(added(), 5, 0), three=three)
    assert f"three: {where}flat index 22 is NaN or Inf. " in "".join(found)


@pytest.mark.parametrize("mode", ["base", "union"])
def test_a_model_without_one_of_the_tensors(tmp_path: Path, mode: str) -> None:
    one = model(added("<x>"), 6, 1)
    one = Model(one.names, {name: tensor for name, tensor in one.tensors.items() if name != HEAD_BIAS})
    found = problems(tmp_path, mode, base=model(added(), 5, 0), one=one, two=model(added(), 5, 2))
    assert len(found) == 1
    assert found[0].startswith("one: tensor 'final_logits_bias': missing, though base has it. ")


def test_all_problems_at_once(tmp_path: Path) -> None:
    one = model(added("<x>"), 6, 1)
    one = Model(one.names, {**one.tensors, BLOCK: torch.zeros(3, 4)})
    found = problems(tmp_path, None, base=model(added(), 5, 0), one=one, two=model(added("<y>"), 6, 2))
    assert [line.split(":")[0] for line in found] == ["one", "two", "one"]
    assert found[2].startswith("one: tensor 'model.layers.0.mlp.weight': expected float32 [2, 4]")


def test_a_model_that_stands_twice_is_told_of_once(tmp_path: Path) -> None:
    recipe(tmp_path, {"base": model(added(), 5, 0), "one": model(added("<x>"), 6, 1)})
    file = write_recipe(
        tmp_path / "recipe.yml",
        base_model=tmp_path / "base",
        models=[{"model": tmp_path / "one"}, {"model": tmp_path / "one", "name": "again"}],
    )
    with pytest.raises(IncompatibleError) as caught:
        cpimerge.plan(file, tmp_path / "plan", threads=1)
    assert len(caught.value.problems) == 1


# --- which tensors have a row a token ---------------------------------------------------------------


def test_positions_are_not_tokens(tmp_path: Path) -> None:
    """Another first dimension is no other vocabulary."""
    found = {}
    for name, positions in (("base", 4), ("one", 6)):
        it = model(added(), 5, 0)
        it = Model(it.names, {**it.tensors, "model.embed_positions.weight": torch.zeros(positions, 3)})
        found[name] = it
    for mode in (None, "base", "union"):
        assert problems(tmp_path, mode, **found) == [
            "one: tensor 'model.embed_positions.weight': expected float32 [4, 3] (as in base), got float32 [6, 3]. It "
            "is no fine-tune of this base as it stands"
        ]


def test_the_size_of_a_vocabulary_may_lie_in_a_nested_config(tmp_path: Path) -> None:
    models = {"base": model(added(), 5, 0), "one": model(added("<x>"), 6, 1)}
    for name, it in models.items():
        vocabularies.write(tmp_path / name, it, {"model_type": "test", "text_config": {"vocab_size": it.rows}})
    checkpoints = {name: open_model(Located(tmp_path / name), None) for name in models}
    found = settle(checkpoints, "union")
    assert found.vocabulary is not None
    assert (found.vocabulary.rows, found.vocabulary.tensors) == (6, [HEAD_BIAS, EMBEDDING])


def test_where_no_config_says_the_size_names_do(tmp_path: Path) -> None:
    models = {"base": model(added(), 5, 0), "one": model(added("<x>"), 6, 1)}
    for name, it in models.items():
        vocabularies.write(tmp_path / name, it, {"model_type": "test"})
    checkpoints = {name: open_model(Located(tmp_path / name), None) for name in models}
    assert settle(checkpoints, "base").problems == []
    assert settle(checkpoints, "union").problems == [
        f"{tmp_path}/base: config.json has no vocab_size of 5, which vocabulary: union would make 6. Write it there, "
        "or write vocabulary: base"
    ]


def test_more_rows_than_any_vocabulary_has(tmp_path: Path) -> None:
    """They cost nothing in a file where a row is empty; they are not listed."""
    models = {}
    for seed, (name, token) in enumerate({"base": "<p>", "one": "<x>"}.items()):
        header = {"embed": {"dtype": "F32", "shape": [1 << 40, 0], "data_offsets": [0, 0]}}
        write_raw(tmp_path / name / "model.safetensors", header)
        write_json(tmp_path / name / "config.json", {"vocab_size": 1 << 40})
        content = vocabularies.tokenizer(model(added(token), 6, seed))
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        models[name] = open_model(Located(tmp_path / name), None)
    assert settle(models, None).problems[0].startswith(f"{tmp_path}/one: its tokens are not those of {tmp_path}/base: ")
    assert "which tensors have a row a token cannot be told" in settle(models, "union").problems[0]


def test_where_nothing_tells_the_size(tmp_path: Path) -> None:
    models = {"base": model(added("<p>"), 6, 0), "one": model(added("<x>"), 6, 1)}
    for name, it in models.items():
        words = Model(it.names, {"words": it.tensors[EMBEDDING]})
        vocabularies.write(tmp_path / name, words, {"model_type": "test"})
    checkpoints = {name: open_model(Located(tmp_path / name), None) for name in models}
    assert settle(checkpoints, "base").problems == [
        f"{tmp_path}/base: which tensors have a row a token cannot be told: no vocab_size in config.json is the number "
        "of rows of one. Put it there"
    ]


def test_layers_with_as_many_rows_as_the_vocabulary(tmp_path: Path) -> None:
    """What is called an embedding is one; the rest is left, or refused where it may be one."""
    models = {}
    for seed, (name, token) in enumerate({"base": "<p>", "one": "<x>"}.items()):
        it = model(added(token), 6, seed)
        layer = {"model.layers.0.mlp.weight": torch.zeros(6, 2)}
        models[name] = Model(it.names, {EMBEDDING: it.tensors[EMBEDDING], **layer})
    found = settle(opened(tmp_path / "clear", models), "base")
    assert found.problems == []
    assert found.vocabulary is not None
    assert found.vocabulary.tensors == [EMBEDDING]
    models = {name: Model(it.names, {**it.tensors, "model.norm.weight": torch.zeros(6)}) for name, it in models.items()}
    assert settle(opened(tmp_path / "unclear", models), "base").problems == [
        f"{tmp_path}/unclear/base: tensor 'model.norm.weight': has 6 rows, as many as the vocabulary, and so have "
        "tensors in the layers: whether its rows are tokens cannot be told. Give all models one vocabulary before"
    ]
