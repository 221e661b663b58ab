"""The recipes that come with the project, against the formula that each one's first line promises."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import save
from safetensors.torch import load_file

import cpimerge
from cpimerge.plan_file import Plan

RECIPES = Path(__file__).parent.parent / "recipes"
TASKS = ("math", "code", "chat")
SHAPES = {
    "model.embed_tokens.weight": (50, 8),
    "model.layers.0.mlp.up_proj.weight": (40, 10),
    "model.layers.0.self_attn.q_proj.weight": (20, 10),
    "model.layers.1.mlp.up_proj.weight": (40, 10),
    "model.layers.1.self_attn.q_proj.weight": (20, 10),
    "model.norm.weight": (100,),
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three fine-tunes of it in float64-exact float32 numbers, with the recipes beside them."""
    directory = tmp_path_factory.mktemp("recipes")
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    save(directory / "base", base)
    for task in TASKS:
        save(
            directory / task,
            {name: x + 0.01 * torch.randn(x.shape, generator=generator) for name, x in base.items()},
        )
    for recipe in RECIPES.glob("*.yml"):
        shutil.copy(recipe, directory)
    return directory


def load(directory: Path) -> Tensors:
    return load_file(directory / "model.safetensors")


def merged(models: Path, recipe: str, out: Path) -> Tensors:
    cpimerge.merge(models / recipe, out)
    return load(out)


def updates(models: Path, name: str) -> torch.Tensor:
    """The tasks' updates float32 [3, n] of one tensor."""
    base = load(models / "base")[name]
    return torch.stack([(load(models / task)[name] - base).flatten() for task in TASKS])


def trimmed(update: torch.Tensor, density: float) -> torch.Tensor:
    """Each row with all but its largest magnitudes set to 0."""
    k = int(density * update.shape[1])
    keep = update.abs().topk(k, dim=1).indices
    return torch.zeros_like(update).scatter(1, keep, update.gather(1, keep))


def test_average(models: Path, tmp_path: Path) -> None:
    for name, x in merged(models, "average.yml", tmp_path / "out").items():
        mean = torch.stack([load(models / task)[name] for task in TASKS]).mean(0)
        torch.testing.assert_close(x, mean, rtol=1e-6, atol=1e-6)


def test_magmax(models: Path, tmp_path: Path) -> None:
    for name, x in merged(models, "magmax.yml", tmp_path / "out").items():
        winner = updates(models, name).abs().argmax(0)
        values = torch.stack([load(models / task)[name].flatten() for task in TASKS])
        assert torch.equal(x.flatten(), values.gather(0, winner[None])[0])


def test_localize_and_stitch(models: Path, tmp_path: Path) -> None:
    base = load(models / "base")
    for name, x in merged(models, "localize-and-stitch.yml", tmp_path / "out").items():
        kept = trimmed(updates(models, name), 0.1)
        mean = kept.sum(0) / (kept != 0).sum(0).clamp(min=1)
        torch.testing.assert_close(x.flatten(), base[name].flatten() + mean, rtol=1e-6, atol=1e-6)


def test_ties(models: Path, tmp_path: Path) -> None:
    base = load(models / "base")
    for name, x in merged(models, "ties.yml", tmp_path / "out").items():
        kept = trimmed(updates(models, name), 0.2)
        agree = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
        mean = (kept * agree).sum(0) / agree.sum(0).clamp(min=1)
        torch.testing.assert_close(x.flatten(), base[name].flatten() + mean, rtol=1e-6, atol=1e-6)


def test_paper(models: Path, tmp_path: Path) -> None:
    """One budget over the model, groups where cores meet, later tasks overwrite, the rest is the mean."""
    plan = cpimerge.plan(models / "paper.yml", tmp_path / "plan")
    elements = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert [task.core for task in plan.tasks] == [elements // 100] * 3
    assert plan.settings.scope == "global"
    assert plan.stages == [["math"], ["code"], ["chat"]]
    assert (plan.backbone, plan.actions["lerp"]) == ("chat", len(SHAPES))
    cpimerge.fuse(tmp_path / "plan", tmp_path / "out")
    assert load(tmp_path / "out").keys() == SHAPES.keys()


def test_everything(models: Path, tmp_path: Path) -> None:
    """Gradients, filters and exclusions end up where the comments say."""
    out = merged(models, "everything.yml", tmp_path / "out")
    assert {x.dtype for x in out.values()} == {torch.bfloat16}
    cpimerge.plan(models / "everything.yml", tmp_path / "plan")
    cores = {t.name: [task.core for task in t.tasks.values()] for t in Plan.load(tmp_path / "plan").tensors}
    assert cores == {  # math: 2 % everywhere; code: 1 % at the first layer, 2 % at the last; chat: by filter
        "model.embed_tokens.weight": [8, 4, 4],
        "model.layers.0.mlp.up_proj.weight": [8, 4, 12],
        "model.layers.0.self_attn.q_proj.weight": [4, 2, 2],
        "model.layers.1.mlp.up_proj.weight": [8, 8, 12],
        "model.layers.1.self_attn.q_proj.weight": [4, 4, 4],
        "model.norm.weight": [0, 0, 0],
    }


def test_every_recipe_is_tested() -> None:
    tested = {name.removeprefix("test_").replace("_", "-") for name in globals() if name.startswith("test_")}
    assert {recipe.stem for recipe in RECIPES.glob("*.yml")} <= tested
