"""Checkpoints that hold no plain numbers: what scheme they are quantised in, and what to merge instead.

A scheme is known by the tensors, and named as config.json names it, if it does. The values of a quantised tensor are
codes or need scales that lie elsewhere, so that blending them would give nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .checkpoint import CONFIG, PACKED_BITS, REFUSED_BYTES, Checkpoint, Tensor, shown

__all__ = ["quantization", "refused", "stale_config"]

SMALL_FLOATS = {dtype for dtype in REFUSED_BYTES if dtype.startswith("F8_")} | PACKED_BITS.keys()
CODES = {"U8", "I8", "U16", "I16", "U32", "I32"}  # integers that quantised matrices are stored as
# Names that only quantised layers have, and the scheme; the first that matches counts. Of tensors in `CODES` ...
MARKS = (
    (r"\.quant_state\.bitsandbytes__|\.weight\.(nested_)?absmax$", "bitsandbytes"),
    (r"\.weight_packed$", "compressed-tensors"),
    (r"\.g_idx$", "gptq"),
    (r"\.q(weight|zeros)$", "awq"),
    (r"_blocks$", "mxfp4"),
    (r"\.W_q$", "hqq"),
    (r"\.weight\._data$", "quanto"),
    (r"[._]qdata$", "torchao"),
    (r"\.dense_weights$", "spqr"),
)
# ... and of others, beside the tensors that they scale.
SCALES = (
    (r"\.SCB$", "bitsandbytes"),
    (r"\.weight_scale_inv$", "fp8"),
    (r"\.biases$", "mlx"),
    (r"\.(weight|input)_scale$", ""),
)
# What people call a scheme, where that is not its name in a config.
TITLES = {
    "fp8": "FP8 with scales for blocks (as DeepSeek-V3)",
    "fbgemm_fp8": "FP8 (FBGEMM)",
    "mxfp4": "MXFP4 (as gpt-oss)",
    "nvfp4": "NVFP4",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "spqr": "SpQR",
    "eetq": "EETQ",
    "higgs": "HIGGS",
    "bitnet": "BitNet",
    "quark": "Quark",
    "mxfp8": "MXFP8",
    "mlx": "MLX",
    "fp_quant": "FP-Quant",
    "auto-round": "AutoRound",
}
UNNAMED = "of a kind it does not name"
ORIGINAL = "Take the checkpoint in bfloat16 or float32 that it was made from"
# Where transformers can turn it back into plain numbers when it loads it.
DEQUANTIZE = {
    "fp8": "FineGrainedFP8Config(dequantize=True)",
    "mxfp4": "Mxfp4Config(dequantize=True)",
    "compressed-tensors": "CompressedTensorsConfig(dequantize=True)",
}
DEQUANTIZE_AFTER = ("bitsandbytes", "higgs")  # by `dequantize()` of the loaded model


def refused(checkpoint: Checkpoint) -> Iterator[str]:
    """What of a checkpoint cannot be merged: one problem for its quantisation, else one for each dtype."""
    found = quantization(checkpoint)
    if found is not None:
        yield f"{checkpoint.path}: is quantised: {_title(found, checkpoint)}. {_way_out(found)}"
        return
    for dtype in REFUSED_BYTES:
        names = [name for name, info in checkpoint.tensors.items() if info.dtype == dtype]
        if names:
            where = f"{checkpoint.where}: tensor {_first(names)}"
            yield f"{where}: {dtype} cannot be merged. Convert the checkpoint to bfloat16 or float32"


def _first(names: list[str]) -> str:
    return f"{names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def stale_config(checkpoint: Checkpoint) -> Iterator[str]:
    """A note where config.json speaks of a quantisation that the tensors do not have."""
    method = _method(checkpoint.config)
    if method is not None and quantization(checkpoint) is None:
        yield (
            f"{checkpoint.where}: {CONFIG} speaks of a quantisation ({method}), but the tensors are plain numbers; "
            "they are merged as such. Where this is the base, remove it from the output's"
        )


def quantization(checkpoint: Checkpoint) -> str | None:
    """The scheme that a checkpoint is quantised in, as transformers calls it, or "" for one without a name.

    None: it is not quantised, whatever its config says.
    """
    names = _codes(checkpoint)
    found = [scheme for pattern, scheme in MARKS if any(re.search(pattern, name) for name in names)]
    matrices = [name for name in names if _is_matrix(checkpoint.tensors[name])]
    if matrices:
        found += [scheme for pattern, scheme in SCALES if any(re.search(pattern, name) for name in checkpoint.tensors)]
    method = _method(checkpoint.config)
    if found and method in (None, UNNAMED):
        return found[0]
    return method if found or matrices else None


def _codes(checkpoint: Checkpoint) -> list[str]:
    return [name for name, info in checkpoint.tensors.items() if info.dtype in CODES | SMALL_FLOATS]


def _is_matrix(info: Tensor) -> bool:
    """Whether it is of the size of weights: not a scale, nor numbers of positions."""
    return info.dtype in SMALL_FLOATS or sum(size > 1 for size in info.shape) > 1


def _method(config: Mapping[str, Any]) -> str | None:
    """The scheme that a config.json names, of the model or of a part of it."""
    parts = [config, *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))]
    for part in parts:
        for key in ("quantization_config", "compression_config", "quantization"):
            found = part.get(key)
            if isinstance(found, dict) and found:
                return _method_of(found)
    return None


def _method_of(found: Mapping[str, Any]) -> str:
    method = found.get("quant_method")
    if isinstance(method, str) and method:
        return shown(method)[1:-1]
    return "bitsandbytes" if found.get("load_in_4bit") or found.get("load_in_8bit") else UNNAMED


def _title(scheme: str, checkpoint: Checkpoint) -> str:
    """The scheme and what shows it."""
    names = [name for name in _codes(checkpoint) if _is_matrix(checkpoint.tensors[name])] or _codes(checkpoint)
    dtypes = sorted({checkpoint.tensors[name].dtype for name in names})
    shows = f"tensor {_first(names)} in {' and '.join(dtypes)}"
    title = TITLES.get(scheme, scheme)
    return f"{title} ({shows})" if title else f"scales beside {shows}"


def _way_out(scheme: str) -> str:
    if scheme in DEQUANTIZE:
        return f"{ORIGINAL}, or load it with transformers and {DEQUANTIZE[scheme]}, and save that"
    if scheme in DEQUANTIZE_AFTER:
        return f"{ORIGINAL}, or load it with transformers, call model.dequantize(), and save that"
    return ORIGINAL
