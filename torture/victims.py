"""What is tortured: small models that are real in all but size, and the commands that work on them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

TASKS = ("math", "code", "chat")
SHAPES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "model.embed.weight": ("bfloat16", (1330, 900)),  # five chunks, two blocks
    "model.layers.0.mlp.weight": ("float32", (320, 500)),
    "model.layers.0.norm.weight": ("float32", (500,)),
    "model.layers.1.mlp.weight": ("bfloat16", (320, 500)),
    "model.layers.1.norm.weight": ("float16", (500,)),
    "model.layers.1.scale": ("float32", ()),
}
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
RANK = 4
ADAPTED = ("model.layers.0.mlp", "model.layers.1.mlp")
SHARD_SIZE = "500KB"  # several files

Tree = Mapping[str, bytes]


@dataclass(frozen=True)
class Victim:
    """A command that writes `target`. `before` is what lies there when it starts, None for nothing."""

    name: str
    arguments: Sequence[str]
    target: Path
    before: Path | None = None

    def prepare(self) -> None:
        """The state before the first run: the directory around the target holds it alone, or nothing."""
        shutil.rmtree(self.target.parent, ignore_errors=True)
        self.target.parent.mkdir(parents=True)
        if self.before is not None:
            shutil.copytree(self.before, self.target)


def make_victims(root: Path, seed: int, run: Callable[[Sequence[str]], None]) -> list[Victim]:
    """Models, recipes and a plan below `root`, and every command to try. `run` runs a command to its end."""
    _make_models(root, seed)
    models = [{"model": f"./{task}"} for task in TASKS]
    settings: dict[str, dict[str, object]] = {
        "plain": {"density": 0.05},
        "rows": {"density": 0.02, "scope": "global", "granularity": "row", "space": "delta", "conflict": "mean"},
        "layers": {"density": 0.05, "scope": "layer", "conflict": "largest"},
    }
    recipes = {name: _write_recipe(root / f"{name}.yml", models, keys) for name, keys in settings.items()}
    adapted = _write_recipe(root / "adapted.yml", [*models[:2], {"model": "./base+adapter"}], settings["plain"])
    for name in ("plain", "rows"):
        run(["plan", str(recipes[name]), "-o", str(root / f"plan-{name}")])
    run(["fuse", str(root / "plan-plain"), "-o", str(root / "old"), "--shard-size", "5GB"])
    return [
        *_plans(root, recipes["plain"], recipes["rows"], recipes["layers"]),
        *_fusions(root),
        _victim(root, "merge an adapter", "merge", adapted, "--shard-size", SHARD_SIZE),
    ]


def _plans(root: Path, plain: Path, rows: Path, layers: Path) -> list[Victim]:
    return [
        _victim(root, "plan", "plan", plain),
        _victim(root, "plan rows, global", "plan", rows),
        _victim(root, "plan layers, --force", "plan", layers, "--force", before=root / "plan-plain"),
    ]


def _fusions(root: Path) -> list[Victim]:
    return [
        _victim(root, "fuse shards", "fuse", root / "plan-plain", "--shard-size", SHARD_SIZE),
        _victim(root, "fuse rows, --force", "fuse", root / "plan-rows", "--force", before=root / "old"),
    ]


def _victim(root: Path, name: str, command: str, source: Path, *options: str, before: Path | None = None) -> Victim:
    target = root / "work" / name.replace(" ", "-").replace(",", "") / "out"
    return Victim(name, (command, str(source), "-o", str(target), *options), target, before)


def _write_recipe(file: Path, models: Sequence[Mapping[str, object]], parameters: Mapping[str, object]) -> Path:
    content = {"merge_method": "cpi", "base_model": "./base", "models": models, "parameters": parameters}
    file.write_text(json.dumps(content), encoding="utf-8")  # which is YAML, too
    return file


def _make_models(root: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = {name: rng.normal(size=shape).astype(np.float32) for name, (_, shape) in SHAPES.items()}
    names = list(SHAPES)
    _save(root / "base", base, [names[:1], names[1:3], names[3:]])
    for task in TASKS:
        tuned = {name: values + _update(rng, values.shape) for name, values in base.items()}
        _save(root / task, tuned, [names[:2], names[2:]])
    _save_adapter(root / "adapter", rng)


def _update(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """On a coarse grid, so that ties are common."""
    return (rng.integers(-3, 4, size=shape) / 128).astype(np.float32)


def _save(directory: Path, tensors: Mapping[str, npt.NDArray[np.float32]], shards: Sequence[Sequence[str]]) -> None:
    directory.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        _write_safetensors(directory / file, {name: (SHAPES[name][0], tensors[name]) for name in names})
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}), encoding="utf-8")
    (directory / "notes.txt").write_text("a file that the output needs, too\n" * 2000, encoding="utf-8")


def _save_adapter(directory: Path, rng: np.random.Generator) -> None:
    directory.mkdir()
    tensors: dict[str, tuple[str, npt.NDArray[np.float32]]] = {}
    for module in ADAPTED:
        rows, columns = SHAPES[f"{module}.weight"][1]
        for part, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
            values = (rng.normal(size=shape) / 10).astype(np.float32)
            tensors[f"base_model.model.{module}.lora_{part}.weight"] = "float32", values
    _write_safetensors(directory / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["mlp"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def _write_safetensors(file: Path, tensors: Mapping[str, tuple[str, npt.NDArray[np.float32]]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, values) in tensors.items():
        stored = _stored(values, dtype)
        offsets = [len(data), len(data) + len(stored)]
        header[name] = {"dtype": DTYPES[dtype], "shape": list(values.shape), "data_offsets": offsets}
        data += stored
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _stored(values: npt.NDArray[np.float32], dtype: str) -> bytes:
    if dtype == "bfloat16":  # cut off, not rounded: any value will do
        return (values.reshape(-1).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(dtype).tobytes()


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones included: path → content."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def fingerprint(root: Path) -> str:
    """Of all that victims read, which lies below `root`, but for `work`: names, sizes, modes, times."""
    digest = hashlib.sha256()
    for path in sorted(path for place in root.iterdir() if place.name != "work" for path in [place, *place.rglob("*")]):
        status = path.lstat()
        digest.update(f"{path} {status.st_mode} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode())
    return digest.hexdigest()


def neighbours(target: Path) -> list[str]:
    """What lies beside the target."""
    return sorted(name for name in os.listdir(target.parent) if name != target.name)
