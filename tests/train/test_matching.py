"""Which parameter is which tensor of the checkpoint."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers

from cpimerge.errors import IncompatibleError
from cpimerge.plan_file import TensorPlan
from cpimerge.train.matching import matched


class Inner(torch.nn.Module):
    base_model_prefix = "bert"

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = torch.nn.Embedding(5, 3)
        self.norm = torch.nn.BatchNorm1d(3)


class Outer(torch.nn.Module):
    base_model_prefix = "bert"

    def __init__(self) -> None:
        super().__init__()
        self.bert = Inner()
        self.head = torch.nn.Linear(3, 5)
        self.head.weight = self.bert.embeddings.weight


def planned(**shapes: list[int]) -> list[TensorPlan]:
    fixed: dict[str, Any] = {"dtype": "F32", "base_dtype": "F32", "action": "identical", "blend": None}
    counts: dict[str, Any] = {"first_chunk": 0, "first_row": 0, "claimed": 1, "xxh3": {}, "tasks": {}}
    return [TensorPlan(name=name.replace("__", "."), shape=shape, **fixed, **counts) for name, shape in shapes.items()]


def names(model: torch.nn.Module, tensors: list[TensorPlan]) -> dict[str, list[str]]:
    """What the model calls each parameter, and the tensors it is."""
    _, found = matched(model, tensors)
    own = dict(model.named_parameters(remove_duplicate=False))
    assert all(any(parameter is each for each in own.values()) for parameter in found)
    return {name: [tensor.name for tensor in of] for name, of in found.values()}


@pytest.mark.parametrize("model", [Outer(), torch.nn.DataParallel(Outer()), torch.compile(Outer(), backend="eager")])
@pytest.mark.parametrize("prefix", ["", "bert__"])
def test_the_inner_models_checkpoint_in_the_outer_model_and_the_outer_ones(model: Any, prefix: str) -> None:
    tensors = planned(**{f"{prefix}embeddings__weight": [5, 3], f"{prefix}norm__bias": [3]})
    assert names(model, tensors) == {
        "bert.embeddings.weight": [tensors[0].name],
        "bert.norm.bias": [tensors[1].name],
    }


def test_the_outer_models_checkpoint_in_the_inner_model() -> None:
    tensors = planned(bert__embeddings__weight=[5, 3])
    assert names(Inner(), tensors) == {"embeddings.weight": ["bert.embeddings.weight"]}


def test_a_compiled_part() -> None:
    model = Outer()
    model.bert = torch.compile(model.bert, backend="eager")  # type: ignore[assignment]
    assert names(model, planned(bert__norm__weight=[3])) == {"bert.norm.weight": ["bert.norm.weight"]}


def test_tied_parameters_are_both_tensors() -> None:
    tensors = planned(bert__embeddings__weight=[5, 3], head__weight=[5, 3])
    assert names(Outer(), tensors) == {"bert.embeddings.weight": ["bert.embeddings.weight", "head.weight"]}


TINY: dict[str, Any] = {
    "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    "tie_word_embeddings": True,
}  # fmt: skip
BERT = transformers.BertConfig(**TINY)
LLAMA = transformers.LlamaConfig(**TINY)


@pytest.mark.parametrize(
    ("saved", "trained", "missing"),
    [
        (transformers.BertModel(BERT), transformers.BertForSequenceClassification(BERT), 0),
        (transformers.BertForSequenceClassification(BERT), transformers.BertModel(BERT), 2),
        (transformers.LlamaModel(LLAMA), transformers.LlamaForCausalLM(LLAMA), 0),
        (transformers.LlamaForCausalLM(LLAMA), transformers.LlamaModel(LLAMA), 0),
    ],
)
def test_models_of_transformers_with_and_without_a_head(saved: Any, trained: Any, missing: int) -> None:
    shapes = {name: list(value.shape) for name, value in saved.named_parameters()}
    fit = {name: shape for name, shape in shapes.items() if not name.startswith("classifier.")}
    assert len(shapes) - len(fit) == missing
    found = names(trained, planned(**fit))
    assert sorted(tensor for tensors in found.values() for tensor in tensors) == sorted(fit)
    parts = [{name.removeprefix("bert.").removeprefix("model.") for name in of} for of in (found, fit)]
    assert parts[0] == parts[1]
    if missing:
        with pytest.raises(IncompatibleError) as caught:
            names(trained, planned(**shapes))
        assert len(caught.value.problems) == missing


def test_all_parameters_are_told() -> None:
    model = Outer()
    assert matched(model, [])[0] == frozenset(model.parameters())


def test_everything_that_is_wrong_at_once() -> None:
    tensors = planned(head__weight=[6, 3], absent=[2], norm__running_mean=[3], embeddings__weight=[5, 3])
    with pytest.raises(IncompatibleError) as caught:
        matched(Outer(), tensors)
    assert [problem.split(". ")[0] for problem in caught.value.problems] == [
        "tensor 'head.weight': expected [6, 3] (as planned), the model has [5, 3]",
        "tensor 'absent': has frozen elements, and the model has no parameter of that name",
        "tensor 'norm.running_mean': has frozen elements, and is a buffer of the model, which training may change "
        "without an optimizer",
    ]


class Adapted(torch.nn.Module):
    """A layer as peft wraps it."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(3, 2, bias=False)})


def test_adapters_are_told_once() -> None:
    model = Outer()
    model.head = Adapted(model.head)  # type: ignore[assignment]
    tensors = planned(head__weight=[5, 3], head__bias=[5], bert__norm__weight=[3], bert__embeddings__weight=[4, 3])
    with pytest.raises(IncompatibleError) as caught:
        matched(model, tensors)
    assert caught.value.problems == (
        "tensor 'bert.embeddings.weight': expected [4, 3] (as planned), the model has [5, 3]",
        "model Outer: has adapters (parameter 'head.base_layer.bias'), with which 2 tensors of the plan are not "
        "found. Train the whole model: to merge what adapters learn would move frozen elements",
    )
    assert len(matched(model, planned(bert__norm__weight=[3]))[1]) == 1  # where no adapter is in the way


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_models_of_peft() -> None:
    whole = transformers.LlamaForCausalLM(LLAMA)
    tensors = planned(**{name: list(value.shape) for name, value in whole.named_parameters()})
    settings = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["norm"])
    model = peft.get_peft_model(whole, settings)
    for each in (model, model.get_base_model()):
        with pytest.raises(IncompatibleError, match="has adapters") as caught:
            matched(each, tensors)
        assert len(caught.value.problems) == 1


class Sharded(torch.nn.Module):
    """As FSDP1 leaves parameters, in the two ways that it has."""

    def __init__(self, name: str) -> None:
        super().__init__()
        inner = torch.nn.Module()
        inner.register_parameter(name, torch.nn.Parameter(torch.zeros(3)))
        self.add_module("_fsdp_wrapped_module", inner)


@pytest.mark.parametrize("name", ["weight", "_flat_param"])
def test_fsdp1_is_told_once(name: str) -> None:
    with pytest.raises(IncompatibleError) as caught:
        matched(Sharded(name), planned(head__weight=[5, 3], head__bias=[5]))
    (problem,) = caught.value.problems
    assert problem.startswith("model Sharded: is sharded by FSDP1 (parameter '_fsdp_wrapped_module.")
    assert problem.endswith("Shard it by FSDP2: `fully_shard`, or accelerate's `fsdp_version: 2`")
