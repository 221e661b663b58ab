"""mergekit's words: what its other merge methods are in cpimerge's terms, and its keys that have no meaning here.

What cpimerge reads of the dialect is in recipe_schema.py; docs/mergekit.md tells users all of it.
"""

from __future__ import annotations

from typing import Any

from .yamltree import as_text, as_whole, describe

__all__ = ["NOT_SUPPORTED", "has_control", "one_range", "only_method", "template", "true", "truth"]

_ELSE = "use mergekit for it"
_RANDOM = "it draws at random what it keeps, and cpimerge's result is always the same; " + _ELSE

# Every method of mergekit 0.1.5: what to do instead.
METHODS = {
    "linear": "with density: 0 and space: weights cpi averages the models by weight, see recipes/average.yml",
    "slerp": "with one model besides the base, density: 0, space: weights and backbone: base, cpi's t is slerp's",
    "ties": "with equal weights and lambda 1 it is cpi with conflict: elect, space: delta and rest: 0, "
    "see recipes/ties.yml",
    "task_arithmetic": "with lambda 1 and weights that add up to 1 it averages the models, "
    "as cpi does with density: 0 and space: weights (recipes/average.yml); else use mergekit for it",
    "ram": "at epsilon 0 it is cpi with density: 1, conflict: mean, space: delta and rest: 0",
    "nuslerp": "two models with density: 0 are slerped, their differences from the base unless space is weights, with "
    "equal weights or the first's share as its t; for its other forms use mergekit",
    "passthrough": "it copies layers, and cpimerge fuses whole models; " + _ELSE,
    "dare_linear": _RANDOM,
    "dare_ties": _RANDOM,
    "della": _RANDOM,
    "della_linear": _RANDOM,
    "arcee_fusion": _ELSE,
    "breadcrumbs": _ELSE,
    "breadcrumbs_ties": _ELSE,
    "karcher": _ELSE,
    "model_stock": _ELSE,
    "multislerp": _ELSE,
    "nearswap": _ELSE,
    "ramplus_tl": _ELSE,
    "sce": _ELSE,
}

_OF_ANOTHER_METHOD = "it belongs to another merge method; remove it"
_OF_ANOTHER_PROGRAM = "it belongs to another of mergekit's programs; use mergekit for it"

# Keys of mergekit that mean nothing here: what to do about each.
NOT_SUPPORTED = {
    "modules": "list whole checkpoints under models; all their modules are merged",
    "residual_weight": "remove it; mergekit does not use it either",
    "tokens": "remove it; a row that a model lacks is the base's, and one that the base lacks the others' mean",
    "pad_to_multiple_of": "remove it; the vocabulary is not padded",
    "lambda": "cores are taken whole, as at 1; rest is the factor on the non-core with space: delta",
    "rescale": "remove it; what is kept is not scaled",
    "scale": _OF_ANOTHER_METHOD,
    "gamma": _OF_ANOTHER_METHOD,
    "epsilon": _OF_ANOTHER_METHOD,
    "eps": _OF_ANOTHER_METHOD,
    "r": _OF_ANOTHER_METHOD,
    "alpha": _OF_ANOTHER_METHOD,
    "select_topk": _OF_ANOTHER_METHOD,
    "filter_wise": _OF_ANOTHER_METHOD,
    "max_iter": _OF_ANOTHER_METHOD,
    "tol": _OF_ANOTHER_METHOD,
    "normalize_weights": "remove it; shares by weight always add up to 1",
    "nuslerp_flatten": "use granularity, whose tensor takes a tensor as one vector",
    "nuslerp_row_wise": "use granularity, whose row takes each row as a vector",
    "input_model_parameters": "write each model's own parameters under models",
    "experts": _OF_ANOTHER_PROGRAM,
    "gate_mode": _OF_ANOTHER_PROGRAM,
    "genome": _OF_ANOTHER_PROGRAM,
    "tasks": _OF_ANOTHER_PROGRAM,
}
TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")


def only_method(value: object) -> str:
    """`cpi`. Raises ValueError for any other method, which says what to do instead of mergekit's."""
    if (text := as_text(value)) == "cpi":
        return text
    instead = f": {METHODS[text]}" if text in METHODS else ""
    raise ValueError(f"{describe(text)} is not supported; cpimerge has one method, cpi{instead}")


def truth(value: object) -> bool:
    """True or false as YAML writes them."""
    if (word := as_text(value).lower()) not in ("true", "false"):
        raise ValueError(f"expected true or false, got {describe(value)}")
    return word == "true"


def true(value: object) -> bool:
    """`normalize: true`, which is what cpimerge does. Raises ValueError for false."""
    if not truth(value):
        raise ValueError("false is not supported; shares by weight always add up to 1. Remove it")
    return True


def one_range(value: object) -> tuple[int, int]:
    """A range of layers [first, stop), as mergekit writes it: [0, 32] are the layers 0 to 31."""
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"expected two whole numbers such as [0, 32], got {_found(value)}")
    first, stop = (as_whole(number) for number in value)
    if first >= stop:
        raise ValueError(f"must have at least one layer, got [{first}, {stop}]")
    return first, stop


def _found(value: Any) -> str:
    return f"{len(value)} entries" if isinstance(value, list) else describe(value)


def has_control(text: str) -> bool:
    """Whether it has control characters other than those of lines and tabs, or half a surrogate pair."""
    return any((char < " " and char not in "\n\r\t") or "\ud800" <= char <= "\udfff" for char in text)


def template(value: object) -> str:
    """A chat template: "auto", or Jinja text, which may have several lines. Raises ValueError for anything else."""
    if not isinstance(value, str):
        raise ValueError(f"expected auto or a Jinja template, got {describe(value)}")
    if value in TEMPLATES:
        raise ValueError(f"{describe(value)} is a template that comes with mergekit; write its Jinja text, or auto")
    if value != "auto" and "{" not in value:
        raise ValueError(f"expected auto or a Jinja template, got {describe(value)}")
    if has_control(value):
        raise ValueError("must not have control characters")
    return str(value)
