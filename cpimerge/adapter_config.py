"""What adapter_config.json says about an adapter: PEFT's format, and only what can be merged."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, StringConstraints, TypeAdapter, ValidationError
from pydantic_core import SchemaError

from .checkpoint import is_unicode, read_json_object
from .errors import CheckpointError

__all__ = ["ADAPTER_CONFIG", "AdapterConfig", "read_config"]

ADAPTER_CONFIG = "adapter_config.json"
MAX_FLOAT32 = 3.4e38
MAX_CONFIG_BYTES = 10_000_000
MAX_PATTERNS = 10_000
# Most patterns are the end of a name, or all of it. Others are compiled, so they must be few and small.
PLAIN_PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.)+")
MAX_EXPRESSIONS = 32
MAX_EXPRESSION = 200  # characters
COUNTED = re.compile(r"\{")

# Keys that say nothing about what the trained weights mean, whatever their value.
HARMLESS = {
    *("peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("lora_dropout", "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "runtime_config", "ensure_weight_tying", "merge_weights"),
    "velora_config",  # changes the backward pass only
}
USED = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out", "bias", "lora_bias"),
    *("rank_pattern", "alpha_pattern", "init_lora_weights"),
}
# Variants of LoRA by the key that turns them on.
VARIANTS = {
    "trainable_token_indices": "single trained tokens",
    "target_parameters": "LoRA on parameters that are no module's weight (as of fused experts)",
    "layer_replication": "replicated layers",
    "megatron_config": "Megatron's parallel layers",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "enable_lora": "LoRA on parts of a layer (enable_lora)",
}
# How the factors began: these leave the base as it is, ...
PLAIN_STARTS = {"gaussian", "eva", "orthogonal", "mica", "true", "false", "none"}
# ... and these take what they began with out of the base.
CHANGED_BASE = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
}


@dataclass(frozen=True)
class AdapterConfig:
    """How an adapter's factors change a weight: ΔW = scale · B·A."""

    file: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    lora_bias: bool

    def rank_of(self, module: str) -> int:
        """The rank of a module by its name in the model that was trained."""
        found = _first_match(self.rank_pattern, module)
        return self.rank if found is None else self.rank_pattern[found]

    def scale_of(self, module: str) -> float:
        """What B·A is multiplied by: alpha / rank, or alpha / √rank for rank-stabilised LoRA."""
        found = _first_match(self.alpha_pattern, module)
        alpha = self.alpha if found is None else self.alpha_pattern[found]
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_config(directory: Path) -> AdapterConfig:
    """The config of the adapter in `directory`. Raises CheckpointError listing all that cannot be merged."""
    file = directory / ADAPTER_CONFIG
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{file}: larger than {MAX_CONFIG_BYTES} bytes. Take a config as PEFT saves it")
        raw = read_json_object(file)
    except FileNotFoundError as error:
        what = f"no {ADAPTER_CONFIG} in it" if directory.is_dir() else "no such directory"
        raise CheckpointError(f"{directory}: {what}. Give the directory of an adapter as PEFT saves it") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    problems = [f"{file}: {problem}" for problem in (*_refused(raw), *_faults(raw))]
    if problems:
        raise CheckpointError(problems)
    return AdapterConfig(
        file=file,
        rank=raw["r"],
        alpha=float(raw["lora_alpha"]),
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern={key: float(alpha) for key, alpha in (raw.get("alpha_pattern") or {}).items()},
        use_rslora=bool(raw.get("use_rslora")),
        use_dora=bool(raw.get("use_dora")),
        fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
        lora_bias=bool(raw.get("lora_bias")),
    )


def _refused(raw: Mapping[str, Any]) -> Iterator[str]:
    """Kinds of adapters that cannot be merged, by name."""
    kind = raw.get("peft_type")
    if kind != "LORA":
        yield f"peft_type is {_shown(kind)}; only LORA can be merged. Merge it into its base first (PEFT)"
        return
    for key, name in VARIANTS.items():
        if raw.get(key):
            yield f"{key}: {name} cannot be merged here. Merge the adapter into its base first (PEFT)"
    for key in sorted(raw.keys() - HARMLESS - USED - VARIANTS.keys()):
        if raw[key]:
            yield f"{_shown(key)}: not known, and it may change what the weights mean. Merge the adapter into its base"
    start = str(raw.get("init_lora_weights", True)).lower()
    changed = next((name for prefix, name in CHANGED_BASE.items() if start.startswith(prefix)), None)
    if changed:
        yield (
            f"init_lora_weights: {changed} changed the base's weights before training, so the adapter does not fit the "
            "base as it is. Convert it to plain LoRA (PEFT: save_pretrained(path_initial_model_for_weight_conversion)) "
            "or merge it into the changed base"
        )
    elif start not in PLAIN_STARTS:
        yield f"init_lora_weights: {_shown(raw['init_lora_weights'])} is not known. Merge the adapter into its base"


def _faults(raw: Mapping[str, Any]) -> Iterator[str]:
    """Values of the wrong kind."""
    if raw.get("peft_type") != "LORA":
        return
    if not _is_rank(raw.get("r")):
        yield f"r must be a whole number from 1 on, got {_shown(raw.get('r'))}"
    if not _is_alpha(raw.get("lora_alpha")):
        yield f"lora_alpha must be a number, got {_shown(raw.get('lora_alpha'))}"
    for key in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"):
        if not isinstance(raw.get(key, False), bool | None):
            yield f"{key} must be true or false, got {_shown(raw[key])}"
    if raw.get("bias", "none") not in ("none", "all", "lora_only", None):
        yield f"bias must be none, all or lora_only, got {_shown(raw['bias'])}"
    for key, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        patterns = raw.get(key) or {}
        if not isinstance(patterns, dict) or len(patterns) > MAX_PATTERNS or not all(map(fits, patterns.values())):
            yield f"{key} must map at most {MAX_PATTERNS} names of modules to numbers, got {_shown(patterns)}"
        else:
            yield from (f"{key}: {fault}" for fault in _pattern_faults(patterns))


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MAX_FLOAT32  # which NaN is not


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _pattern_faults(patterns: Mapping[str, Any]) -> Iterator[str]:
    expressions = [pattern for pattern in patterns if not PLAIN_PATTERN.fullmatch(pattern)]
    if len(expressions) > MAX_EXPRESSIONS:
        yield f"{len(expressions)} regular expressions; at most {MAX_EXPRESSIONS} are matched. Name modules instead"
        return
    for pattern in expressions:
        if len(pattern) > MAX_EXPRESSION:
            yield f"{_shown(pattern)}: longer than {MAX_EXPRESSION} characters"
        elif not is_unicode(pattern) or len(COUNTED.findall(pattern)) > 1 or not _compiles(pattern):
            yield f"{_shown(pattern)}: not a regular expression that can be matched in bounded time"


def _compiles(pattern: str) -> bool:
    try:
        _matcher(pattern)
    except SchemaError:
        return False
    return True


@lru_cache(2 * MAX_EXPRESSIONS)
def _matcher(pattern: str) -> TypeAdapter[str]:
    """Accepts the names of modules that a key of PEFT's patterns means.

    These are regular expressions of a stranger, and Python's own may take forever; those of pydantic do not.
    """
    whole = Annotated[str, StringConstraints(pattern=rf"^(?:(?:.*\.)?(?:{pattern}))$")]
    return TypeAdapter(whole, config=ConfigDict(regex_engine="rust-regex"))


def _first_match(patterns: Mapping[str, Any], module: str) -> str | None:
    """The first of `patterns` that means `module`, as PEFT's get_pattern_key."""
    return next((pattern for pattern in patterns if _means(pattern, module)), None)


def _means(pattern: str, module: str) -> bool:
    if PLAIN_PATTERN.fullmatch(pattern):
        return _ends(pattern, module)
    try:
        _matcher(pattern).validate_python(module)
    except ValidationError:
        return False
    return True


def _ends(pattern: str, module: str) -> bool:
    """Whether the plain `pattern` is the end of `module`, in whole parts; a dot is any character, as to PEFT."""
    body = pattern.removeprefix("^").replace("\\.", "\n")
    before, end = module[: -len(body)], module[-len(body) :]
    fits = len(end) == len(body) and all(
        p in (".", char) or (p, char) == ("\n", ".") for p, char in zip(body, end, strict=True)
    )
    return fits and (not before or (before.endswith(".") and body == pattern.replace("\\.", "\n")))
