"""Adapters by hand: which names and shapes are understood, every refusal with its words, and whole merges with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import value, values, write_adapter
from checkpoints import save, write_json, write_recipe
from safetensors.torch import load_file
from trees import files

import cpimerge
from cpimerge.adapter import is_adapter, open_adapter
from cpimerge.adapter_update import OTHER_MODEL
from cpimerge.checkpoint import Checkpoint
from cpimerge.directory import open_checkpoint
from cpimerge.errors import CheckpointError
from cpimerge.models import Located, open_model
from cpimerge.preflight import check
from cpimerge.ties import judge

P = "base_model.model."
GENERATOR = torch.Generator().manual_seed(3)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


MODEL = {
    "model.embed.weight": noise(10, 4),
    "model.layers.0.q.weight": noise(6, 4),
    "model.layers.0.q.bias": noise(6),
    "model.layers.0.o.weight": noise(4, 4),
    "model.layers.1.q.weight": noise(6, 4),
    "model.layers.1.o.weight": noise(4, 4),
    "model.ids": torch.arange(4),
}


def factors(module: str, outputs: int = 6, inputs: int = 4, rank: int = 2) -> dict[str, torch.Tensor]:
    return {
        f"{P}{module}.lora_A.weight": noise(rank, inputs),
        f"{P}{module}.lora_B.weight": noise(outputs, rank),
    }


def model(root: Path, tensors: dict[str, torch.Tensor] = MODEL, **config: Any) -> Checkpoint:
    return open_checkpoint(save(root / "model", tensors, config={"model_type": "test"} | config))


def problems(base: Checkpoint, adapter: Path) -> list[str]:
    """What opening says, without the adapter's directory."""
    with pytest.raises(CheckpointError) as caught:
        open_adapter(base, adapter)
    starts = tuple(f"{adapter}{end}" for end in (": ", "/"))
    assert all(problem.startswith(starts) for problem in caught.value.problems)
    return [problem.removeprefix(str(adapter)).lstrip(":/ ") for problem in caught.value.problems]


# --- names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [P, ""], ids=["peft", "bare"])
def test_a_module_and_a_replacement(tmp_path: Path, prefix: str) -> None:
    parts = factors("model.layers.0.q") | {f"{P}model.layers.1.o.weight": noise(4, 4)}
    tensors = {name.replace(P, prefix): tensor for name, tensor in parts.items()}
    base = model(tmp_path)
    adapter = write_adapter(tmp_path / "a", tensors, lora_alpha=3)
    opened = open_adapter(base, adapter)
    assert (opened.path, opened.adapter, opened.where) == (base.path, adapter, adapter)
    assert [shard.file.name for shard in opened.shards] == ["model.safetensors", "adapter_model.safetensors"]
    found = values(opened)
    a, b = (parts[f"{P}model.layers.0.q.lora_{x}.weight"].double() for x in "AB")
    expected = MODEL["model.layers.0.q.weight"].double() + 1.5 * b @ a
    torch.testing.assert_close(found.pop("model.layers.0.q.weight").double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.pop("model.layers.1.o.weight"), parts[f"{P}model.layers.1.o.weight"])
    assert all(torch.equal(tensor, MODEL[name]) for name, tensor in found.items())


def test_replacements_take_the_models_dtype(tmp_path: Path) -> None:
    tensors = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor for name, tensor in MODEL.items()
    }
    new = noise(6, 4) * 3
    adapter = write_adapter(tmp_path / "a", {f"{P}model.layers.0.q.modules_to_save.weight": new})
    found = open_adapter(model(tmp_path, tensors), adapter).tensors["model.layers.0.q.weight"]
    assert torch.equal(value(found), new.to(torch.bfloat16))
    assert torch.equal(value(found, 5), new.to(torch.bfloat16))


@pytest.mark.parametrize("there", ["model.layers", "bert.model.layers", "layers"])
def test_names_with_another_prefix(tmp_path: Path, there: str) -> None:
    """Adapters of a model with a head on checkpoints without it, and the reverse."""
    tensors = {name.replace("model.layers", there): tensor for name, tensor in MODEL.items()}
    adapter = write_adapter(tmp_path / "a", factors("model.layers.0.q") | factors("model.layers.1.o", 4))
    opened = open_adapter(model(tmp_path, tensors), adapter)
    changed = [name for name, tensor in values(opened).items() if not torch.equal(tensor, tensors[name])]
    assert changed == [f"{there}.0.q.weight", f"{there}.1.o.weight"]
    assert len(opened.notes) == (there != "model.layers")


def test_names_that_may_mean_two_tensors(tmp_path: Path) -> None:
    tensors = {f"{side}.layers.0.q.weight": noise(6, 4) for side in ("encoder", "decoder")}
    adapter = write_adapter(tmp_path / "a", factors("layers.0.q"))
    base = model(tmp_path, tensors)
    assert problems(base, adapter)[0] == (
        "tensor 'layers.0.q.weight': may be 'decoder.layers.0.q.weight' or 'encoder.layers.0.q.weight' of "
        f"{base.path}. Save the model from the class trained on"
    )


def test_square_weights_lie_as_their_namesakes(tmp_path: Path) -> None:
    """GPT-2's attn.c_proj is square; mlp.c_proj is not, and its bias says which side is the output."""
    conv = {"h.attn.c.weight": noise(4, 4), "h.mlp.c.weight": noise(8, 4), "h.mlp.c.bias": noise(4)}
    base = model(tmp_path, conv)
    parts = factors("h.attn.c", 4, 4)
    found = values(open_adapter(base, write_adapter(tmp_path / "a", parts, lora_alpha=2)))["h.attn.c.weight"]
    a, b = parts.values()
    torch.testing.assert_close(found, conv["h.attn.c.weight"] + (b @ a).T)
    for named, fits in ((False, False), (True, True)):  # without a namesake, all that is known must agree
        adapter = write_adapter(tmp_path / f"{named}", factors("h.attn.d", 4, 4), fan_in_fan_out=named)
        other = model(
            tmp_path / str(named), {name.replace("attn.c", "attn.d"): tensor for name, tensor in conv.items()}
        )
        if fits:
            open_adapter(other, adapter)
        else:
            assert problems(other, adapter) == [
                f"tensor '{P}h.attn.d.lora_A.weight': updates 'h.attn.d.weight' [4, 4], which may be stored as "
                "[in, out] or as [out, in], and other layers do not tell. Merge the adapter into its base first (PEFT)"
            ]


# --- what is wrong ----------------------------------------------------------------------------------


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    q, o = (f"{P}model.layers.{x}" for x in ("0.q", "0.o"))
    tensors = {
        **factors("model.layers.0.q", rank=3),  # of another rank than the config says
        f"{q}.lora_B.bias": noise(6),
        f"{q}.lora_magnitude_vector": noise(6),
        **factors("model.layers.0.o", 4, 5),  # of another shape
        **factors("model.layers.7.q"),  # not in the model
        f"{P}model.layers.1.q.lora_A.weight": noise(2, 4),  # alone
        f"{P}model.layers.1.o.lora_A.weight": noise(4),
        f"{P}model.layers.1.o.lora_B.weight": noise(4, 2),
        f"{P}model.embed.lora_A.weight": noise(2, 10),
        f"{P}model.embed.lora_embedding_A": noise(2, 10),
        f"{P}model.embed.lora_embedding_B": noise(4, 2),
        f"{P}model.layers.1.q.lora_diag": noise(2),
        f"{P}model.embed.token_adapter.trainable_tokens_delta": noise(2, 4),
        f"{P}model.x.original_module.weight": noise(2, 4),
        f"{P}model.norm.weight": torch.ones(4, dtype=torch.int32),
    }
    base = model(tmp_path)
    a, q7 = "lora_A.weight", "model.layers.7.q"
    again = "Save the adapter again"
    first = "cannot be merged here. Merge the adapter into its base first (PEFT)"
    shapes = "[rank, in, …] and [out, rank, …]"
    parallel = "If it was trained in parallel, gather its shards and save it again"
    assert sorted(problems(base, write_adapter(tmp_path / "a", tensors, r=2))) == sorted(
        [
            f"tensor '{q}.{a}': is of rank 3, adapter_config.json says 2. {again}",
            f"tensor '{q}.lora_B.bias': is of no use without lora_bias in adapter_config.json. {again}",
            f"tensor '{q}.lora_magnitude_vector': is of no use without use_dora in adapter_config.json. {again}",
            f"tensor '{o}.{a}': [2, 5] and its B [4, 2] do not fit 'model.layers.0.o.weight' [4, 4]. {OTHER_MODEL}",
            f"tensor '{P}{q7}.{a}': updates '{q7}.weight', which {base.path} does not have. {OTHER_MODEL}",
            f"tensor '{P}model.layers.1.q.{a}': has no lora_B.weight beside it. Complete the adapter",
            f"tensor '{P}model.layers.1.o.{a}': [4] and its B [4, 2] are not {shapes}. {parallel}",
            f"tensor '{P}model.embed.{a}': is no part of what '{P}model.embed.lora_embedding_A' updates. {again}",
            f"tensor '{P}model.layers.1.q.lora_diag': {first}",
            f"tensor '{P}model.embed.token_adapter.trainable_tokens_delta': {first}",
            f"tensor '{P}model.x.original_module.weight': what replaces it is missing. {again}",
            f"tensor '{P}model.norm.weight': I32 cannot be merged. Save the adapter as float32 or bfloat16",
        ]
    )


@pytest.mark.parametrize(
    ("tensors", "config", "expected"),
    [
        (
            factors("model.layers.0.q"),
            {"use_dora": True, "lora_bias": True},
            [
                "lora_A.weight': has no lora_magnitude_vector beside it, though use_dora is set. Complete the adapter",
                "lora_A.weight': has no lora_B.bias beside it, though lora_bias is set. Complete the adapter",
            ],
        ),
        (
            factors("model.layers.0.q") | {f"{P}model.layers.0.q.lora_magnitude_vector": noise(4)},
            {"use_dora": True},
            ["lora_magnitude_vector': expected 6 elements, got [4]. Was the adapter trained on another model?"],
        ),
        (
            factors("model.layers.0.q") | {f"{P}model.layers.0.q.lora_magnitude_vector": noise(1)},
            {"use_dora": True},
            ["lora_magnitude_vector': expected 6 elements, got [1]. Was the adapter trained on another model?"],
        ),
        (
            factors("model.layers.1.q") | {f"{P}model.layers.1.q.lora_B.bias": noise(6)},
            {"lora_bias": True},
            [f"lora_B.bias': needs a bias 'model.layers.1.q.bias' [6] in MODEL. {OTHER_MODEL}"],
        ),
        (
            {f"{P}model.ids.lora_A.weight": noise(1, 1), f"{P}model.ids.lora_B.weight": noise(4, 1)},
            {},
            [f"lora_A.weight': updates 'model.ids.weight', which MODEL does not have. {OTHER_MODEL}"],
        ),
        (
            {f"{P}model.embed.weight": noise(10, 4), f"{P}model.embed.base_layer.weight": noise(10, 4)},
            {},
            [f"{P}model.embed.weight': says the same as '{P}model.embed.base_layer.weight'. Remove one of them"],
        ),
        ({}, {}, ["the adapter holds no tensors. Complete the download"]),
    ],
    ids=["missing", "magnitude", "one-magnitude", "bias", "not-a-layer", "twice", "empty"],
)
def test_single_faults(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], expected: list[str]
) -> None:
    base = model(tmp_path)
    found = problems(base, write_adapter(tmp_path / "a", tensors, **config))
    assert len(found) == len(expected)
    assert all(
        problem.endswith(end.replace("MODEL", str(base.path))) for problem, end in zip(found, expected, strict=True)
    )


def test_a_quantised_model(tmp_path: Path) -> None:
    base = model(tmp_path, {"q.weight": torch.ones(6, 4, dtype=torch.int8)})
    assert problems(base, write_adapter(tmp_path / "a", factors("q"))) == [
        f"tensor '{P}q.lora_A.weight': updates 'q.weight', which is I8. "
        "Give the model in bfloat16 or float32, as it was before it was quantised"
    ]


def test_a_tied_head(tmp_path: Path) -> None:
    base = model(tmp_path, tie_word_embeddings=True)
    assert problems(base, write_adapter(tmp_path / "a", factors("lm_head", 10))) == [
        f"tensor '{P}lm_head.lora_A.weight': updates a head that {base.path} ties to its embeddings, and no tied model "
        "is equal to what was trained. Save the model untied (transformers: tie_word_embeddings=False)"
    ]
    embedding = {f"{P}model.embed.lora_embedding_A": noise(2, 10), f"{P}model.embed.lora_embedding_B": noise(4, 2)}
    opened = open_adapter(base, write_adapter(tmp_path / "b", embedding))
    assert opened.notes == (
        f"{tmp_path / 'b'}: updates the embeddings, to which {base.path} ties its head: "
        "the head changes with them, as where PEFT merges",
    )


def test_missing_files(tmp_path: Path) -> None:
    base = model(tmp_path)
    adapter = write_adapter(tmp_path / "a", factors("model.layers.0.q"))
    (adapter / "adapter_model.safetensors").unlink()
    assert problems(base, adapter) == ["no adapter_model.safetensors in it. Complete the download"]
    (adapter / "adapter_config.json").unlink()
    assert problems(base, adapter) == [
        "no adapter_config.json in it. Give the directory of an adapter as PEFT saves it",
        "no adapter_model.safetensors in it. Complete the download",
    ]
    assert problems(base, tmp_path / "gone") == ["no such directory. Give the directory of an adapter as PEFT saves it"]


def test_weights_that_torch_saved(tmp_path: Path) -> None:
    base = model(tmp_path)
    adapter = write_adapter(tmp_path / "a", factors("model.layers.0.q"))
    expected = values(open_adapter(base, adapter))
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    found = values(open_adapter(base, adapter))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("cut", [8, 100, -1])
def test_damaged_weights(tmp_path: Path, cut: int) -> None:
    file = write_adapter(tmp_path / "a", factors("model.layers.0.q")) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    assert problems(model(tmp_path), file.parent)[0].startswith("adapter_model.safetensors: incomplete")


@pytest.mark.parametrize("shape", [(5, 0), (0, 5)])
def test_a_weight_without_elements(tmp_path: Path, shape: tuple[int, int]) -> None:
    base = model(tmp_path, MODEL | {"none.weight": torch.empty(shape)})
    parts = factors("none", *shape) | {f"{P}none.lora_magnitude_vector": noise(shape[0])}
    adapter = write_adapter(tmp_path / "a", parts, use_dora=True)
    recipe = write_recipe(tmp_path / "recipe.yml", base_model=base.path, models=[{"model": adapter}])
    cpimerge.merge(recipe, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["none.weight"].shape == shape


# --- as a recipe's models ---------------------------------------------------------------------------


def test_opening_what_a_recipe_names(tmp_path: Path) -> None:
    base = model(tmp_path)
    adapter = write_adapter(tmp_path / "a", factors("model.layers.0.q"))
    assert is_adapter(adapter)
    assert not is_adapter(base.path)
    alone, on_base = open_model(Located(adapter), base), open_model(Located(base.path, adapter), base)
    by_itself = open_model(Located(base.path, adapter), None)
    for opened in (alone, on_base, by_itself):
        assert (opened.path, opened.adapter) == (base.path, adapter)
        assert opened.tensors.keys() == base.tensors.keys()
    shutil.copy(base.path / "model.safetensors", adapter)  # merged, with the adapter left beside it
    both = open_model(Located(adapter), base)
    assert both.adapter is None
    assert both.notes == (f"{adapter}: holds an adapter, too, which is not merged, as there is a full model beside it",)


@pytest.mark.parametrize("adapted", [False, True])
def test_an_adapter_alone_needs_a_base(tmp_path: Path, adapted: bool) -> None:
    adapter = write_adapter(tmp_path / "a", factors("model.layers.0.q"))
    base = open_adapter(model(tmp_path), adapter) if adapted else None
    with pytest.raises(CheckpointError) as caught:
        open_model(Located(adapter), base)
    assert caught.value.problems == (
        f"{adapter}: holds an adapter, and the recipe's base is no model that it could lie on. "
        "Say on which model it was trained: model+adapter",
    )


@pytest.fixture
def merge(tmp_path: Path) -> Path:
    """A recipe of two adapters, and beside it one of the same two experts merged before."""
    base = model(tmp_path)
    other = model(tmp_path / "other", MODEL | {"model.layers.1.q.weight": noise(6, 4)})
    write_adapter(tmp_path / "a", factors("model.layers.0.q") | factors("model.layers.1.o", 4, rank=2))
    tensors = factors("model.layers.1.q", rank=3) | {f"{P}model.layers.1.q.lora_magnitude_vector": noise(6)}
    write_adapter(tmp_path / "b", tensors, use_dora=True, use_rslora=True)
    for name, below in (("a", base), ("b", other)):
        save(tmp_path / f"merged-{name}", values(open_adapter(below, tmp_path / name)))
    models = [{"model": "./a", "name": "x"}, {"model": "./other/model+./b", "name": "y"}]
    merged = [{"model": "./merged-a", "name": "x"}, {"model": "./merged-b", "name": "y"}]
    settings = {"base_model": "./model", "parameters": {"density": 0.2}}
    write_recipe(tmp_path / "merged.yml", **settings, models=merged)
    return write_recipe(tmp_path / "recipe.yml", **settings, models=models)


def test_a_merge_is_that_of_the_merged_experts(merge: Path, tmp_path: Path) -> None:
    for recipe, threads in (("recipe", 1), ("recipe", 2), ("merged", 2)):
        out = tmp_path / f"{recipe}{threads}"
        cpimerge.plan(tmp_path / f"{recipe}.yml", tmp_path / f"{out}-plan", threads=threads)
        cpimerge.fuse(tmp_path / f"{out}-plan", out, threads=threads)
    one, two = files(tmp_path / "recipe1"), files(tmp_path / "recipe2")
    assert one == two
    assert one["model.safetensors"] == files(tmp_path / "merged2")["model.safetensors"]


def test_card_and_manifest_name_the_adapters(merge: Path, tmp_path: Path) -> None:
    manifest = cpimerge.merge(merge, tmp_path / "out")
    assert [(entry["model"], entry["adapter"]) for entry in manifest["inputs"]] == [
        ("model", None),
        ("model", "a"),
        ("model", "b"),
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- **x** (`a`)" in card
    assert str(tmp_path) not in card + json.dumps(manifest)


def test_an_adapter_that_changes_between_plan_and_fuse(merge: Path, tmp_path: Path) -> None:
    cpimerge.plan(merge, tmp_path / "plan")
    config = tmp_path / "a" / "adapter_config.json"
    before = json.loads(config.read_text())
    write_json(config, before | {"lora_alpha": 9})
    with pytest.raises(cpimerge.PlanError, match=r"a: tensor 'model.layers.0.q.weight': changed since planned"):
        cpimerge.fuse(tmp_path / "plan", tmp_path / "out")
    write_json(config, before)
    write_adapter(tmp_path / "a", factors("model.layers.0.q", rank=5))
    with pytest.raises(cpimerge.PlanError, match=r"a/adapter_model.safetensors: \d+ bytes, was \d+ when planned"):
        cpimerge.fuse(tmp_path / "plan", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_output_replaces_an_adapter(merge: Path, tmp_path: Path) -> None:
    before = files(tmp_path / "a")
    cpimerge.plan(merge, tmp_path / "plan")
    for run in (
        lambda: cpimerge.plan(merge, tmp_path / "a", force=True),
        lambda: cpimerge.fuse(tmp_path / "plan", tmp_path / "a", force=True),
        lambda: cpimerge.merge(merge, tmp_path / "a", force=True),
    ):
        with pytest.raises(cpimerge.OutputError, match="would be lost"):
            run()
    assert files(tmp_path / "a") == before


def test_what_an_adapter_lacks_or_has_too_much_is_said_of_it(tmp_path: Path) -> None:
    """A classifier that the base does not have is an extra tensor like any other."""
    base = model(tmp_path).path
    adapter = write_adapter(tmp_path / "a", factors("model.layers.0.q") | {f"{P}score.weight": noise(2, 4)})
    recipe = write_recipe(tmp_path / "recipe.yml", base_model=base, models=[{"model": adapter}])
    with pytest.raises(cpimerge.IncompatibleError) as caught:
        check(cpimerge.load_recipe(recipe))
    assert [problem.split(". ")[0] for problem in caught.value.problems] == [
        f"{adapter}: tensor 'score.weight': not in {base}"
    ]


def test_embeddings_saved_along_with_new_rows(tmp_path: Path) -> None:
    """Resized for new tokens: the adapter's own rows are what its update applies to."""
    rows, head = noise(12, 4), noise(12, 4)
    tensors = MODEL | {"lm_head.weight": noise(10, 4)}
    parts = factors("lm_head", 12) | {f"{P}lm_head.base_layer.weight": head, f"{P}model.embed.weight": rows}
    opened = open_adapter(model(tmp_path, tensors), write_adapter(tmp_path / "a", parts, lora_alpha=2))
    a, b = (parts[f"{P}lm_head.lora_{x}.weight"] for x in "AB")
    torch.testing.assert_close(value(opened.tensors["lm_head.weight"]), head + b @ a)
    assert torch.equal(value(opened.tensors["model.embed.weight"]), rows)
    recipe = write_recipe(tmp_path / "recipe.yml", base_model=tmp_path / "model", models=[{"model": tmp_path / "a"}])
    with pytest.raises(cpimerge.IncompatibleError, match=rf"^{tmp_path / 'a'}: .*got float32 .12, 4."):
        check(cpimerge.load_recipe(recipe))


def test_embeddings_and_head_that_were_trained_as_one(tmp_path: Path) -> None:
    """PEFT's ensure_weight_tying: one update, which is saved for both sides, each with the weight under it."""
    base = model(tmp_path, tie_word_embeddings=True)
    a, b = noise(2, 10), noise(4, 2)
    weight = MODEL["model.embed.weight"]
    parts = {
        f"{P}model.embed.base_layer.weight": weight,
        f"{P}model.embed.lora_embedding_A": a,
        f"{P}model.embed.lora_embedding_B": b,
        f"{P}lm_head.base_layer.weight": weight.clone(),
        f"{P}lm_head.lora_A.weight": b.T.contiguous(),
        f"{P}lm_head.lora_B.weight": a.T.contiguous(),
    }
    adapter = write_adapter(tmp_path / "a", parts, ensure_weight_tying=True)
    found = values(open_adapter(base, adapter))
    assert torch.equal(found["lm_head.weight"], found["model.embed.weight"])
    assert not torch.equal(found["lm_head.weight"], weight)
    recipe = write_recipe(tmp_path / "recipe.yml", base_model=base.path, models=[{"model": adapter}])
    plan = cpimerge.plan(recipe, tmp_path / "plan")
    copy = (
        f"{adapter}: lm_head.weight is a copy of model.embed.weight; the base has no such copy, and the output has none"
    )
    assert copy in plan.notes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("updated", [False, True])
def test_a_tied_head_in_the_dtype_of_the_training(tmp_path: Path, dtype: torch.dtype, updated: bool) -> None:
    """A bfloat16 model that was trained in float32: both copies are rounded to what the embeddings are in the model."""
    base = model(tmp_path, {name: it.to(dtype) for name, it in MODEL.items()}, tie_word_embeddings=True)
    weight, a, b = noise(12, 4), noise(2, 12), noise(4, 2)
    parts = {f"{P}lm_head.base_layer.weight": weight, f"{P}model.embed.base_layer.weight": weight.clone()}
    if updated:
        parts |= {f"{P}model.embed.lora_embedding_A": a, f"{P}model.embed.lora_embedding_B": b}
        parts |= {f"{P}lm_head.lora_A.weight": b.T.contiguous(), f"{P}lm_head.lora_B.weight": a.T.contiguous()}
    adapter = write_adapter(tmp_path / "a", parts, r=2)
    found = open_model(Located(adapter), base)
    assert value(open_adapter(base, adapter).tensors["lm_head.weight"]).dtype == dtype
    assert [(twins.kind, twins.copy.name) for twins in found.twins] == [("extra", "lm_head.weight")]
    assert judge(base, [found])[0] == []


def test_a_head_that_the_model_lacks_where_its_config_does_not_say_why(tmp_path: Path) -> None:
    """Gemma's configs leave out that the head is tied; one that says it is not has lost a head."""
    adapter = write_adapter(tmp_path / "a", factors("lm_head", 10))
    assert "updates a head that" in problems(model(tmp_path / "silent"), adapter)[0]
    untied = model(tmp_path / "untied", tie_word_embeddings=False)
    assert f"which {untied.path} does not have. {OTHER_MODEL}" in problems(untied, adapter)[0]


def test_embeddings_that_were_trained_without_the_head_tied_to_them(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", {f"{P}model.embed.weight": noise(10, 4)})
    tied = model(tmp_path, tie_word_embeddings=True)
    assert open_adapter(tied, adapter).notes == (
        f"{adapter}: has other embeddings but not the head, which {tied.path} ties to them: it changes with them, "
        "though PEFT would keep the old one beside them",
    )
    untied = model(tmp_path / "untied", MODEL | {"lm_head.weight": noise(10, 4)}, tie_word_embeddings=False)
    assert open_adapter(untied, adapter).notes == ()
    both = {f"{P}{name}.weight": MODEL["model.embed.weight"].clone() for name in ("model.embed", "lm_head")}
    assert open_adapter(tied, write_adapter(tmp_path / "both", both)).notes == ()
