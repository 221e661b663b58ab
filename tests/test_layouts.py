"""One model in two layouts: each way in which they differ is one line, and what it does not explain stays listed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import save, write_recipe

import cpimerge
from cpimerge import IncompatibleError
from cpimerge.compatibility import differences
from cpimerge.directory import open_checkpoint

Tensors = dict[str, torch.Tensor]
ONE_MODEL = "It is one model in two layouts: save both from the same class, with one version of transformers"
NOT_IN_BASE = "not in base. Remove it from the checkpoint, or merge onto a base that has it"


def compared(home: Path, base: Tensors, other: Tensors) -> list[str]:
    """What differs, without the directories."""
    paths = [save(home / name, tensors) for name, tensors in (("base", base), ("other", other))]
    found = differences(open_checkpoint(paths[0]), open_checkpoint(paths[1]))
    return [problem.replace(f"{home}/", "") for problem in found]


def llama(layers: int = 12) -> Tensors:
    """The names of a Llama; every shape occurs often, as in a real one."""
    names = [f"{name}.weight" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "input_layernorm")]
    stack = {f"model.layers.{layer}.{name}": torch.zeros(3, 2) for layer in range(layers) for name in names}
    return {"model.embed_tokens.weight": torch.zeros(5, 2), "lm_head.weight": torch.zeros(5, 2)} | stack


def renamed(tensors: Tensors, change: Callable[[str], str]) -> Tensors:
    return {change(name): tensor for name, tensor in tensors.items()}


# From the base's names to the other's; the lines.
RENAMINGS: dict[str, tuple[Callable[[str], str], list[str]]] = {
    "a prefix of all": (
        lambda name: f"text.{name}",
        ["other: 50 tensors are called 'text.X' where base has 'X'. " + ONE_MODEL],
    ),
    "a prefix of most": (
        lambda name: name.removeprefix("model."),
        ["other: 49 tensors are called 'X' where base has 'model.X'. " + ONE_MODEL],
    ),
    "transformers before 4.52 and since": (
        lambda name: re.sub("^model[.]", "language_model.model.", name).replace("lm_head", "language_model.lm_head"),
        [
            "other: 50 tensors are called 'language_model.X' where base has 'X'. " + ONE_MODEL,
        ],
    ),
    "another prefix": (
        lambda name: name.replace("model.", "model.language_model."),
        ["other: 49 tensors are called 'model.language_model.X' where base has 'model.X'. " + ONE_MODEL],
    ),
    "a part inside": (
        lambda name: name.replace("self_attn", "attention"),
        [
            "other: 24 tensors have 'attention' in their names where base has 'self_attn', such as "
            f"'model.layers.0.attention.k_proj.weight'. {ONE_MODEL}"
        ],
    ),
    "a part more": (
        lambda name: name.replace("self_attn.", "self_attn.self."),
        [
            "other: 24 tensors have 'self_attn.self' in their names where base has 'self_attn', such as "
            f"'model.layers.0.self_attn.self.k_proj.weight'. {ONE_MODEL}"
        ],
    ),
    "a part after the number": (  # as PyTorch's FSDP wraps layers
        lambda name: re.sub(r"layers[.](\d+)[.]", r"layers.\1._checkpoint_wrapped_module.", name),
        [
            "other: 48 tensors have '*._checkpoint_wrapped_module' in their names where base has '*', such as "
            f"'model.layers.0._checkpoint_wrapped_module.input_layernorm.weight'. {ONE_MODEL}"
        ],
    ),
    "at the end, as the first BERT": (
        lambda name: name.replace("layernorm.weight", "layernorm.gamma"),
        [
            "other: 12 tensors have 'gamma' in their names where base has 'weight', such as "
            f"'model.layers.0.input_layernorm.gamma'. {ONE_MODEL}"
        ],
    ),
    "two parts at once": (
        lambda name: name.replace("model.layers", "transformer.h").replace("self_attn", "attn"),
        [
            "other: 24 tensors are called 'transformer.h.0.attn.k_proj.weight' where base has "
            f"'model.layers.0.self_attn.k_proj.weight'. {ONE_MODEL}",
            "other: 24 tensors are called 'transformer.h.X' where base has 'model.layers.X'. " + ONE_MODEL,
        ],
    ),
}


@pytest.mark.parametrize("case", RENAMINGS)
def test_renamings(tmp_path: Path, case: str) -> None:
    change, problems = RENAMINGS[case]
    found = compared(tmp_path, llama(), renamed(llama(), change))
    assert sorted(found) == sorted(problems)


def test_what_a_renaming_does_not_explain(tmp_path: Path) -> None:
    other = renamed(llama(), lambda name: f"text.{name}") | {"vision.norm": torch.zeros(7)}
    del other["text.model.layers.3.input_layernorm.weight"]
    assert compared(tmp_path, llama(), other) == [
        "other: 49 tensors are called 'text.X' where base has 'X'. " + ONE_MODEL,
        "other: tensor 'model.layers.3.input_layernorm.weight': missing, though base has it. "
        "It is no fine-tune of this base as it stands",
        f"other: tensor 'vision.norm': {NOT_IN_BASE}",
    ]


def test_another_vocabulary_does_not_hide_a_renaming(tmp_path: Path) -> None:
    other = renamed(llama(), lambda name: f"text.{name}") | {"text.model.embed_tokens.weight": torch.zeros(7, 2)}
    assert compared(tmp_path, llama(), other) == [
        "other: 50 tensors are called 'text.X' where base has 'X'. " + ONE_MODEL
    ]


def test_stars_in_names_are_no_numbers(tmp_path: Path) -> None:
    names = [f"model.a{i}.x" for i in range(4)]
    other = {name.replace(".x", ".*.x"): torch.zeros(2) for name in names}
    assert len(compared(tmp_path, {name: torch.zeros(2) for name in names}, other)) == 4 * 2


def test_other_shapes_are_no_renaming(tmp_path: Path) -> None:
    other = {f"text.{name}": torch.zeros(tensor.numel()) for name, tensor in llama(2).items()}
    assert all("layouts" not in problem for problem in compared(tmp_path, llama(2), other))


# --- other pieces -----------------------------------------------------------------------------------


def experts(layers: int = 2, count: int = 4) -> Tensors:
    names = [f"{expert}.{name}_proj" for expert in range(count) for name in ("gate", "up", "down")]
    return {f"model.layers.{n}.mlp.experts.{name}.weight": torch.zeros(6) for n in range(layers) for name in names}


def fused(layers: int = 2, count: int = 4, prefix: str = "model.layers") -> Tensors:
    return {
        f"{prefix}.{n}.mlp.experts.{name}": torch.zeros(count, size)
        for n in range(layers)
        for name, size in (("gate_up_proj", 12), ("down_proj", 6))
    }


SPLIT_KINDS = ", ".join(f"'model.layers.*.mlp.experts.*.{name}_proj.weight'" for name in ("down", "gate", "up"))
FUSED_KINDS = ", ".join(f"'model.layers.*.mlp.experts.{name}_proj'" for name in ("down", "gate_up"))


def test_fused_experts(tmp_path: Path) -> None:
    assert compared(tmp_path, llama(2) | experts(), llama(2) | fused()) == [
        f"other: 4 tensors ({FUSED_KINDS}) hold fused what base has in 24 ({SPLIT_KINDS}). {ONE_MODEL}"
    ]


def test_split_experts(tmp_path: Path) -> None:
    assert compared(tmp_path, llama(2) | fused(), llama(2) | experts()) == [
        f"other: 24 tensors ({SPLIT_KINDS}) hold split what base has in 4 ({FUSED_KINDS}). {ONE_MODEL}"
    ]


def test_renamed_and_fused(tmp_path: Path) -> None:
    other = renamed(llama(2), lambda name: name.replace("model.", "model.language_model.")) | fused(
        prefix="model.language_model.layers"
    )
    kinds = FUSED_KINDS.replace("model.", "model.language_model.")
    assert compared(tmp_path, llama(2) | experts(), other) == [
        "other: 9 tensors are called 'model.language_model.X' where base has 'model.X'. " + ONE_MODEL,
        f"other: 4 tensors ({kinds}) hold fused what base has in 24 ({SPLIT_KINDS}). {ONE_MODEL}",
    ]


def test_queries_keys_and_values(tmp_path: Path) -> None:
    def attention(split: bool) -> Tensors:
        pieces = [("q_proj", 8), ("k_proj", 2), ("v_proj", 2)] if split else [("qkv_proj", 12)]
        return {f"h.{n}.attn.{name}.weight": torch.zeros(size, 4) for n in range(3) for name, size in pieces}

    assert compared(tmp_path, attention(True), attention(False)) == [
        "other: 3 tensors ('h.*.attn.qkv_proj.weight') hold fused what base has in 9 ('h.*.attn.k_proj.weight', "
        f"'h.*.attn.q_proj.weight', 'h.*.attn.v_proj.weight'). {ONE_MODEL}"
    ]


def test_fewer_elements_are_not_the_same_in_other_pieces(tmp_path: Path) -> None:
    found = compared(tmp_path, llama(2) | experts(), llama(2) | fused(count=3))
    assert len(found) == 28
    assert not any("layouts" in problem for problem in found)


def test_many_layers_and_experts(tmp_path: Path) -> None:
    """As many tensors as the largest models have, in two layouts, are compared in seconds."""
    base = {
        f"model.{name}": torch.zeros(1) for name in (f"layers.{n}.experts.{e}.w" for n in range(60) for e in range(256))
    }
    assert compared(tmp_path, base, renamed(base, lambda name: f"text.{name}")) == [
        "other: 15360 tensors are called 'text.model.layers.X' where base has 'model.layers.X'. " + ONE_MODEL
    ]


def test_names_without_end(tmp_path: Path) -> None:
    """No real name has so many parts; how they differ is not looked for, which would take minutes."""
    deep = {".".join("ab"[(number >> bit) & 1] for bit in range(400)): torch.zeros(1) for number in range(2000)}
    found = compared(tmp_path, llama(1) | deep, llama(1) | renamed(deep, lambda name: f"{name}.c"))
    assert len(found) == 2 * len(deep)


# --- what transformers saves ------------------------------------------------------------------------


def test_a_model_with_and_without_its_head(tmp_path: Path) -> None:
    """BertModel against the BertForMaskedLM that it is a part of."""
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "expert")
    recipe = write_recipe(
        tmp_path / "recipe.yml", base_model=tmp_path / "base", models=[{"model": tmp_path / "expert"}]
    )
    with pytest.raises(IncompatibleError) as error:
        cpimerge.plan(recipe, tmp_path / "plan")
    count = len(open_checkpoint(tmp_path / "base").tensors)
    assert error.value.problems[0] == (
        f"{tmp_path}/expert: {count} tensors are called 'bert.X' where {tmp_path}/base has 'X'. {ONE_MODEL}"
    )
    assert all("'cls.predictions." in problem for problem in error.value.problems[1:])


def test_mixtral_as_transformers_saves_it_and_keeps_it(tmp_path: Path) -> None:
    """What a model has in memory since transformers 5 is not what it saves: both are found in the wild."""
    config = transformers.MixtralConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "saved")
    save(tmp_path / "kept", model.state_dict())
    saved, kept = (open_checkpoint(tmp_path / name) for name in ("saved", "kept"))
    assert len(saved.tensors) > len(kept.tensors)
    for base, other, how in ((saved, kept, "fused"), (kept, saved, "split")):
        found = list(differences(base, other))
        assert all("layouts" in problem for problem in found)
        assert any(f"hold {how} what" in problem and "experts" in problem for problem in found)
