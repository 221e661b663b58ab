"""A few small models on a Hub on this machine, for the tests of what is fetched from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from checkpoints import save, write_json
from hub_server import Hub, serving
from huggingface_hub import constants, file_download
from safetensors.torch import save_file
from trees import files

import cpimerge

NAMES = ("base", "math", "code")
LIMITS: dict[str, Any] = {"threads": 1}


@contextmanager
def connected(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A Hub that huggingface_hub asks from now on; an empty `cache`, no token, and no waiting between attempts."""
    with serving() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield hub
        huggingface_hub.close_session()


def publish(hub: Hub, directory: Path) -> Path:
    """A base and two experts, each in three shards, with files that nobody needs; returns a recipe of them."""
    for seed, name in enumerate(NAMES):
        place = save(directory / "hub" / name, tensors(seed), shards=3)
        write_json(place / "tokenizer_config.json", {"model_max_length": 512})
        for file in ("model.gguf", "pytorch_model.bin", "onnx/model.onnx", "original/consolidated.00.pth", "README.md"):
            (place / file).parent.mkdir(exist_ok=True)
            (place / file).write_bytes(b"not needed")
        (place / "generation_config.json").write_text("{}")
        hub.add(f"org/{name}", place)
    return recipe(directory / "recipe.yml", *(f"org/{name}" for name in NAMES))


def tensors(seed: int, layers: int = 4) -> dict[str, torch.Tensor]:
    """A small model, whose head comes first in natural order and last in its files."""
    generator = torch.Generator().manual_seed(0)
    names = ["model.embed.weight", *(f"model.layers.{i}.mlp.weight" for i in range(layers)), "lm_head.weight"]
    base = {name: torch.randn(64, 32, generator=generator) for name in names}
    noise = torch.Generator().manual_seed(seed)
    return {name: t + (seed > 0) * torch.randn(64, 32, generator=noise) / 50 for name, t in base.items()}


def recipe(file: Path, base: str, *experts: str, **parameters: Any) -> Path:
    """Write one; the models are named as given."""
    content = {
        "merge_method": "cpi",
        "base_model": base,
        "models": [{"model": expert, "name": f"task{i}"} for i, expert in enumerate(experts)],
        "parameters": {"density": 0.1, **parameters},
    }
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def merged_locally(directory: Path, **parameters: Any) -> dict[str, bytes]:
    """What the same merge gives from the directories that were published."""
    places = [str(directory / "hub" / name) for name in NAMES]
    cpimerge.merge(recipe(directory / "local.yml", *places, **parameters), directory / "local", force=True, **LIMITS)
    return contents(directory / "local")


def contents(out: Path) -> dict[str, bytes]:
    """All files of an output but those that say where it came from."""
    return {name: data for name, data in files(out).items() if name not in ("README.md", "cpimerge_manifest.json")}


def publish_adapter(hub: Hub, directory: Path) -> None:
    """A LoRA adapter of the models above, as `org/lora`."""
    place = directory / "hub" / "lora"
    place.mkdir()
    generator = torch.Generator().manual_seed(9)
    module = "base_model.model.model.layers.1.mlp"
    factors = {
        f"{module}.lora_A.weight": torch.randn(4, 32, generator=generator),
        f"{module}.lora_B.weight": torch.randn(64, 4, generator=generator),
    }
    save_file(factors, place / "adapter_model.safetensors")
    (place / "README.md").write_text("not needed")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["mlp"]}
    write_json(place / "adapter_config.json", settings)
    hub.add("org/lora", place)
