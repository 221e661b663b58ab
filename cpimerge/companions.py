"""Everything of an output directory that is not weights: the base's other files, index, card and manifest."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import xxhash

from .card import hub_place, model_card, model_name, recipe_without_places
from .chat_template import write_template
from .checkpoint import CONFIG, FLOAT_NAMES, INDEX, is_unicode
from .directory import CHECKPOINT_FILES
from .errors import CheckpointError
from .ordinary import LEADS_OUT, leads_out, read_ordinary
from .plain_json import json_bytes
from .plan_file import Input, Plan, TensorPlan, plan_hash
from .union_tokenizer import Edit, union_edits
from .writer import ShardLayout, index_json

__all__ = [
    "MANIFEST",
    "companion_bytes",
    "companion_files",
    "is_weights",
    "matches_any",
    "module_weights",
    "read_manifest",
    "unreadable",
    "write_companions",
]

MANIFEST = "cpimerge_manifest.json"
MODULES = "modules.json"
CARD = "README.md"
MAX_MODULES_BYTES = 1_000_000
# What an output has as files, whatever the base has.
WRITTEN = re.compile(
    r"readme\.md|cpimerge_manifest\.json|chat_template\.jinja|config\.json|model.*\.safetensors.*", re.IGNORECASE
)
# Of card, headers, index and manifest: for the whole, a tensor, and an angle of its blend. Names are rarely longer.
JSON_BYTES, TENSOR_JSON_BYTES, ANGLE_JSON_BYTES = 10_000, 500, 30
DTYPE_KEYS = ("dtype", "torch_dtype")
DTYPE_WORDS = {*FLOAT_NAMES.values(), "float64"}
# Not copied from the base: weights in any form ...
WEIGHTS_IN_ANY_FORM = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5"),
    *(
        "*.msgpack",
        "*.gguf",
        "*.onnx",
        "*.onnx_data",
        "*.onnx.data",
        "*.ot",
        "*.tflite",
        "*.mlmodel",
        "*.npz",
        "adapter_*",
    ),
)
# ... optimizer and trainer state, and what describes the base.
STATE = (
    *("optimizer*", "scheduler*", "rng_state*", "scaler*", "trainer_state.json", "trainer_log.jsonl", "training_args*"),
    *("events.out.*", "zero_to_fp32.py", "latest", "*_results.json", "cpimerge_training.json", "training_log.jsonl"),
    *(CARD, ".*", "mergekit_config.yml", MANIFEST),
)
NOT_ENTERED = (
    *(".*", "checkpoint-*", "global_step*", "runs", "logs", "wandb", "__pycache__"),
    *("onnx", "openvino", "coreml", "original"),
)


def write_companions(
    plan: Plan, plan_dir: Path, base: Path, out: Path, layouts: Sequence[ShardLayout], sha256: Mapping[str, str]
) -> dict[str, Any]:
    """Complete the output directory around its shards; returns the manifest."""
    edits = companion_edits(plan)
    for source in companion_files(base):
        target = out / source.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        edit = edits.get(str(source.relative_to(base)))
        if edit is None:
            shutil.copyfile(source, target)
        else:
            target.write_bytes(edit(source.read_bytes()))
    if len(layouts) > 1:
        (out / INDEX).write_text(index_json(layouts), encoding="utf-8")
    if plan.chat_template is not None:
        write_template(out, plan.chat_template)
    (out / CARD).write_text(model_card(plan, _library(base)), encoding="utf-8")
    manifest = _manifest(plan, plan_dir, _contents(out, sha256))
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def companion_edits(plan: Plan) -> Mapping[str, Edit]:
    """What becomes of the content of the base's files, by path in it; others are copied."""
    edits = union_edits(plan.vocabulary)
    resize = edits.get(CONFIG, bytes)
    return {**edits, CONFIG: lambda raw: config_with_dtype(resize(raw), _float_dtypes(plan))}


def companion_bytes(base: Path, tensors: int, members: int) -> int:
    """About what an output holds beside the data of its tensors. Raises OSError for unreadable folders."""
    copied = sum(file.stat().st_size for file in companion_files(base))
    return copied + JSON_BYTES + tensors * (TENSOR_JSON_BYTES + members * ANGLE_JSON_BYTES)


def companion_files(base: Path) -> Iterator[Path]:
    """Every file of the base that its output needs too, in a fixed order. Raises OSError for unreadable folders."""
    return (place for place in _companions(base) if not place.is_dir())


def _companions(base: Path) -> Iterator[Path]:
    """The companion files, and the folders that would be entered if they did not lead out of the base."""
    modules = _modules(base)
    seen = {_identity_of(base)}  # links may go in circles
    for directory, folders, files in os.walk(base, followlinks=True, onerror=_raise):
        entered = []
        for folder in (Path(directory, name) for name in sorted(folders)):
            if not _enters(folder, modules) or _identity_of(folder) in seen:
                continue
            if folder.is_symlink() and leads_out(folder, base):
                yield folder
                continue
            seen.add(_identity_of(folder))
            entered.append(folder.name)
        folders[:] = entered
        denied = STATE if Path(directory) in modules else WEIGHTS_IN_ANY_FORM + STATE
        yield from (Path(directory, name) for name in sorted(files) if not matches_any(name, denied))


def _identity_of(directory: Path) -> tuple[int, int]:
    found = directory.stat()
    return found.st_dev, found.st_ino


def _enters(folder: Path, modules: Iterable[Path]) -> bool:
    """Whether files of a folder go along: not those of another model that happens to lie there."""
    if folder in modules:
        return True
    another = any((folder / name).exists() for name in (*CHECKPOINT_FILES, "adapter_config.json"))
    return not another and not matches_any(folder.name, NOT_ENTERED)


def _modules(base: Path) -> set[Path]:
    """Folders of sentence-transformers' modules.json; none where there is no such file."""
    try:
        modules = json.loads(read_ordinary(base / MODULES, MAX_MODULES_BYTES))
    except (FileNotFoundError, ValueError, RecursionError):
        return set()
    except OSError as error:
        raise CheckpointError(f"{base / MODULES}: cannot be read: {error.strerror}") from error
    entries = [entry for entry in modules if isinstance(entry, dict)] if isinstance(modules, list) else []
    return {base / str(entry.get("path")) for entry in entries} - {base}


def module_weights(base: Path) -> Iterator[Path]:
    """Weights that lie in folders of their own, such as sentence-transformers' `2_Dense`: copied, not merged."""
    return (file for file in companion_files(base) if is_weights(file.name))


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights, in whatever form, or is their index."""
    return matches_any(name, WEIGHTS_IN_ANY_FORM)


def unreadable(base: Path) -> Iterator[str]:
    """A problem for each companion that cannot be copied, so that no merge fails at its end."""
    for file in _companions(base):
        if file.is_symlink() and file.exists() and leads_out(file, base):
            yield f"{file}: {LEADS_OUT}"
        elif not is_unicode(str(file.relative_to(base))):
            yield f"{str(file)!r}: its name is not Unicode, and the output needs it too. Rename or remove it"
        elif not (file.is_file() and os.access(file, os.R_OK)):
            yield f"{file}: cannot be read, and the output needs it too. Complete the download, or remove it"
    for folder in sorted(base.iterdir()):
        if folder.is_dir() and WRITTEN.fullmatch(folder.name):
            yield f"{folder}: is a folder, and the output has a file of this name. Rename or remove it"


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file's name fits one of the globs."""
    return any(fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)  # README.md is readme.md, too


def _raise(error: OSError) -> None:
    raise error


def _float_dtypes(plan: Plan) -> list[str]:
    """The float dtypes of the output, that of most elements first."""
    elements: Counter[str] = Counter()
    for tensor in plan.tensors:
        if tensor.dtype in FLOAT_NAMES:
            elements[FLOAT_NAMES[tensor.dtype]] += tensor.output.elements
    return [dtype for dtype, _ in elements.most_common()]


def config_with_dtype(raw: bytes, dtypes: Sequence[str]) -> bytes:
    """config.json whose every `dtype` and `torch_dtype`, at any depth, agrees with the tensors; verbatim if they do.

    `dtypes` are those of the tensors, that of most elements first. Where they are mixed, parts of the model may be
    meant to differ: an entry that differs from that of the whole model stays, if there are tensors of that dtype.
    """
    config = json.loads(raw)
    if not dtypes or not isinstance(config, dict):
        return raw
    whole = {_dtype_name(config.get(key)) for key in DTYPE_KEYS}
    if not _set_dtype(config, dtypes[0], set(dtypes) - whole):
        return raw
    return json_bytes(config)


def _set_dtype(node: Any, dtype: str, kept: Set[str]) -> bool:
    """Set the dtype in place, but for those that are `kept`; returns whether anything changed."""
    changed = False
    for key, value in node.items() if isinstance(node, dict) else ():
        if key not in DTYPE_KEYS or not isinstance(value, str):
            changed |= _set_dtype(value, dtype, kept)
        elif _dtype_name(value) not in {None, dtype, *kept}:
            node[key] = dtype
            changed = True
    for value in node if isinstance(node, list) else ():
        changed |= _set_dtype(value, dtype, kept)
    return changed


def _dtype_name(value: Any) -> str | None:
    """What a config calls a float dtype; None for other values."""
    name = value.removeprefix("torch.") if isinstance(value, str) else None
    return name if name in DTYPE_WORDS else None


def _library(base: Path) -> str | None:
    """What loads the model, as the Hub calls it; None where nothing tells."""
    if (base / MODULES).is_file():
        return "sentence-transformers"
    config = json.loads((base / CONFIG).read_bytes()) if (base / CONFIG).is_file() else {}
    return "transformers" if "model_type" in config or "architectures" in config else None


def _manifest(plan: Plan, plan_dir: Path, contents: Mapping[str, Any]) -> dict[str, Any]:
    """What is in the output and where it came from; nothing about this machine's directories."""
    return {
        "format": "cpimerge manifest",
        "version": 1,
        "cpimerge": plan.cpimerge,
        "plan_xxh3": plan_hash(plan_dir),
        "recipe": recipe_without_places(plan),
        "inputs": [_identity(plan, entry) for entry in plan.inputs],
        "stages": plan.stages,
        "backbone": plan.backbone,
        **contents,
        "tensors": {tensor.name: disposition(tensor) for tensor in plan.tensors},
    }


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of an output that this cpimerge wrote. Raises OSError or ValueError."""
    manifest: dict[str, Any] = json.loads((out / MANIFEST).read_bytes())
    return manifest


def _identity(plan: Plan, entry: Input) -> dict[str, Any]:
    """An input in public: what it is called, its files, and the xxh3-128 of what its tensors are called and hold.

    Revisions are commits of the Hub, where the Hub's cache names them. The same tensors in other shards have the same
    `content_xxh3`.
    """
    content = json.dumps([[tensor.name, tensor.xxh3[entry.name]] for tensor in plan.tensors]).encode()
    place, adapter = hub_place(entry.path), entry.adapter and hub_place(entry.adapter)
    return entry.model_dump(exclude={"path", "adapter", "scratch_bytes"}) | {
        "model": model_name(entry.path),
        "revision": place and place.revision,
        "adapter": entry.adapter and model_name(entry.adapter),
        "adapter_revision": adapter and adapter.revision,
        "content_xxh3": xxhash.xxh3_128_hexdigest(content),
    }


def _contents(out: Path, sha256: Mapping[str, str]) -> dict[str, Any]:
    """Size and sha256 of every file that is in the output by now: the shards, and all others."""
    files = sorted(file for file in out.rglob("*") if file.is_file())
    described = {file.relative_to(out).as_posix(): {"size": file.stat().st_size} for file in files}
    others: dict[str, dict[str, Any]] = {
        name: entry | {"sha256": _sha256(out / name)} for name, entry in described.items() if name not in sha256
    }
    shards = {name: described[name] | {"sha256": digest} for name, digest in sha256.items()}
    return {"shards": shards, "files": others}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def disposition(tensor: TensorPlan) -> dict[str, Any]:
    """What was done to a tensor; `transplanted` is the share of its elements in any core, angles are degrees."""
    if tensor.blend is None:
        return {"action": tensor.action}
    return {
        "action": "slerp" if tensor.blend.slerped else "lerp",
        "transplanted": tensor.claimed / max(1, tensor.output.elements),
        "angles": tensor.blend.angles,
        "levelled": tensor.blend.levelled,
    }
