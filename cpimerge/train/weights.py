"""From a checkpoint to a model that can be trained, and back: the same tensors in the same dtypes, and no others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ..checkpoint import INDEX, Checkpoint, Handles, Tensor
from ..errors import CheckpointError, OutputError
from ..writer import OutputTensor, ShardWriter, index_json, shard_layouts

__all__ = ["load", "load_config", "load_tokenizer", "restore", "save", "stored_values", "write_weights"]

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
OPEN_FILES = 8
NOISE = 1e-4  # of float32, and of how it is summed up


def load(start: Checkpoint) -> PreTrainedModel:
    """The causal language model in `start`, its weights in float32.

    Raises CheckpointError where transformers cannot load it, or holds its tensors in another form than the files do.
    """
    with _quiet(), _refused(start.path, "it as a causal language model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            start.path, dtype=torch.float32, trust_remote_code=False, local_files_only=True, output_loading_info=True
        )
    model: PreTrainedModel = loaded[0]
    values = stored_values(model, start)
    problems = [*_missing(model, start, values), *_unlike(start, values)]
    if problems or (problems := list(_objections(model, start.path))):
        raise CheckpointError(problems)
    return model


def load_config(start: Checkpoint) -> PretrainedConfig:
    """Its config, with the names that all models have in common. Raises CheckpointError as `load` does."""
    with _quiet(), _refused(start.path, "its config.json"):
        loaded: Any = AutoConfig.from_pretrained(start.path, trust_remote_code=False, local_files_only=True)
    config: PretrainedConfig = loaded.get_text_config()
    return config


def load_tokenizer(start: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer in the directory of `start`. Raises CheckpointError where transformers cannot load it."""
    with _quiet(), _refused(start.path, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(start.path, trust_remote_code=False, local_files_only=True)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise CheckpointError(f"{start.path}: holds no tokenizer that transformers can load")
    return tokenizer


@contextmanager
def _refused(path: Path, what: str) -> Iterator[None]:
    """What transformers objects to is a CheckpointError: it raises whatever its many parts do."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: transformers cannot load {what}: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars of transformers' own, on whatever they would stand."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def stored_values(model: PreTrainedModel, start: Checkpoint) -> dict[str, torch.Tensor]:
    """What the model holds of each floating-point tensor of its checkpoint, by the name in the files.

    Names may differ by `base_model_prefix`. What the model does not hold is not in it.
    """
    state = model.state_dict(keep_vars=True)
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name, tensor in start.tensors.items():
        for called in (name, prefix + name, name.removeprefix(prefix)):
            if tensor.is_float and called in state and state[called].shape == tensor.shape:
                found[name] = state[called]
                break
    return found


def _missing(model: PreTrainedModel, start: Checkpoint, values: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """A problem for each parameter that no tensor of the files is: it would be trained in vain."""
    held = {id(value) for value in values.values()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in held:
            yield (
                f"{start.path}: the model's parameter {name!r} {list(parameter.shape)} is no tensor of its files, "
                "which transformers renames or joins as it loads them. Such a model cannot be trained here"
            )


def _unlike(start: Checkpoint, values: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """A problem for each tensor that was changed as it was loaded."""
    with closing(Handles(OPEN_FILES)) as handles:
        for name, value in values.items():
            tensor = start.tensors[name]
            stored = torch.from_numpy(_bytes(tensor, handles)).view(DTYPES[tensor.dtype]).reshape(tensor.shape)
            if not torch.equal(stored.float(), value.detach().float().cpu()):
                yield f"{start.path}: tensor {name!r}: NaN in it, or transformers changes its values as it loads them"


def _objections(model: PreTrainedModel, path: Path) -> Iterator[str]:
    """A problem where what the model says is no number, or where a token changes what it says of those before it."""
    ids = torch.tensor([[1, 2, 3, 1], [1, 2, 3, 2]])  # that have an embedding in any model
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    change = (logits[0] - logits[1]).abs().amax(dim=-1)  # float32 [4]
    if not torch.isfinite(logits).all():
        yield f"{path}: what it says of a few tokens is no number. Its weights are infinite, or too large"
    elif change[:3].max() > NOISE * change[3]:
        yield (
            f"{path}: is no causal language model: what it says of a token depends on those after it, so that it would "
            "learn to copy them"
        )


def _bytes(tensor: Tensor, handles: Handles) -> np.ndarray[Any, np.dtype[np.uint8]]:
    raw = np.empty(tensor.nbytes, np.uint8)
    tensor.read_into(memoryview(raw), 0, handles)
    return raw


def save(model: PreTrainedModel, file: Path) -> None:
    """Write every parameter and buffer, in its own dtype. Raises OSError."""
    save_model(model, str(file))


def restore(model: PreTrainedModel, file: Path) -> None:
    """What `save` wrote. Raises OutputError where it is not that."""
    try:
        load_model(model, file)
    except Exception as error:  # of another model, cut short, or not there
        reason = " ".join(str(error).split())
        raise OutputError(f"{file}: cannot be read: {reason}. Begin anew with --restart") from error


def write_weights(
    start: Checkpoint, values: Mapping[str, torch.Tensor], out: Path, shard_bytes: int
) -> dict[str, dict[str, Any]]:
    """Write all tensors of `start` to `out`: with `values` rounded to their dtypes, the others byte for byte.

    Returns `size` and `sha256` of each file. Raises OutputError where a value does not fit its dtype, or OSError.
    """
    layouts = shard_layouts((OutputTensor(t.name, t.dtype, t.shape) for t in start.tensors.values()), shard_bytes)
    written: dict[str, dict[str, Any]] = {}
    with closing(Handles(OPEN_FILES)) as handles:
        for layout in layouts:
            file = out / layout.filename
            with closing(ShardWriter(file, layout.header())) as writer:
                for output in layout.tensors:
                    tensor = start.tensors[output.name]
                    raw = _rounded(tensor, values[output.name]) if output.name in values else _bytes(tensor, handles)
                    writer.append(memoryview(raw))
                sha256 = writer.finish()
            written[layout.filename] = {"size": file.stat().st_size, "sha256": sha256}
    if len(layouts) > 1:
        (out / INDEX).write_text(index_json(layouts), encoding="utf-8")
    return written


def _rounded(tensor: Tensor, value: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a trained tensor in the dtype of its checkpoint, to nearest even."""
    rounded = value.detach().cpu().to(DTYPES[tensor.dtype]).contiguous()
    if not torch.isfinite(rounded).all():
        raise OutputError(f"tensor {tensor.name!r}: trained to values that {tensor.dtype} does not hold")
    raw: np.ndarray[Any, np.dtype[np.uint8]] = rounded.reshape(-1).view(torch.uint8).numpy()
    return raw
