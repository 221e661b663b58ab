"""What may be written where in a recipe, and what to do about the rest, in words.

mergekit's recipes are read as they are, as far as their words have a meaning here: see dialect.py for the others.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, PlainValidator, Tag

from . import dialect
from .yamltree import Some, Text, Where, Whole, as_number, choice, describe, key_text, nearest, number, written

Scope = Literal["tensor", "layer", "global"]
Conflict = Literal["last", "first", "largest", "mean", "elect"]
Space = Literal["weights", "delta"]
Granularity = Literal["tensor", "row"]
SingularValues = Literal["level", "keep"]
Dtype = Literal["float32", "float16", "bfloat16"]
Vocabulary = Literal["base", "union"]

BACKBONE_WORDS = ("base", "last")
RESERVED_NAMES = (*BACKBONE_WORDS, "backbone")  # "backbone": how the plan calls one that is given by path
KEYS_OF_A_MODEL = ("density", "weight", "t")

# The schema: what may be written where.

N = TypeVar("N")
R = TypeVar("R")
Share = Annotated[Fraction, number(0, 1)]
Density = Annotated[Fraction, number(0, 1, " (a share: 1 % is 0.01)")]
Weight = Annotated[Fraction, number(0)]
Gradient = Annotated[
    Annotated[N, Tag("<scalar>")] | Annotated[Some[N], Tag("<list>")],
    written("a number or a list of numbers"),
]
Numbers = Annotated[
    Annotated[N, Tag("<scalar>")]
    | Annotated[Some[N], Tag("<list>")]
    | Annotated[R, Tag("<mapping>")]
    | Annotated[Some[R], Tag("<mappings>")],
    written("a number, a list of numbers or a list of {filter, value}"),
]


def _tau(value: object) -> Fraction | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, str) and value.isalpha():
        raise ValueError(f"unknown value {describe(value)}; write auto, or a number from 0 to 1")
    tau = as_number(value)
    if not 0 <= tau <= 1:
        raise ValueError(f"must be from 0 to 1, got {value}")
    return tau


Tau = Annotated[Fraction | Literal["auto"], PlainValidator(_tau)]
DTYPE_HINTS = {
    "bf16": "did you mean 'bfloat16'?",
    "fp16": "did you mean 'float16'?",
    "half": "did you mean 'float16'?",
    "fp32": "did you mean 'float32'?",
    "float": "did you mean 'float32'?",
    "float64": "sums are computed in float32 or better; did you mean 'float32'?",
    "auto": "leave dtype out to keep the dtypes of the base",
}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class FilteredValue(_Strict):
    """An entry {filter, value} of a setting; its kinds differ in the numbers they allow."""

    filter: Text | None = None


class _DensityRule(FilteredValue):
    value: Gradient[Density]


class _WeightRule(FilteredValue):
    value: Gradient[Weight]


class _ShareRule(FilteredValue):
    value: Gradient[Share]


class Seeded(_Strict):
    """The random `order`."""

    seed: Whole


Order = Annotated[
    Annotated[Literal["recipe"], choice(Literal["recipe"]), Tag("<scalar>")] | Annotated[Seeded, Tag("<mapping>")],
    written("recipe or {seed: a whole number}"),
]


class OwnSettings(_Strict):
    """A model's `parameters`."""

    density: Numbers[Density, _DensityRule] | None = None
    weight: Numbers[Weight, _WeightRule] | None = None
    t: Numbers[Share, _ShareRule] | None = None


class SliceSettings(OwnSettings):
    """A slice's `parameters`; with what mergekit's recipes say beside them, as far as it is what is done anyway."""

    normalize: Annotated[bool, PlainValidator(dialect.true)] | None = None
    int8_mask: Annotated[bool, PlainValidator(dialect.truth)] | None = None


class _Shared(SliceSettings):
    """The recipe's `parameters`."""

    scope: Annotated[Scope, choice(Scope)] | None = None
    tau: Tau | None = None
    stages: Some[Some[Text]] | None = None
    order: Order | None = None
    backbone: Text | None = None
    conflict: Annotated[Conflict, choice(Conflict)] | None = None
    space: Annotated[Space, choice(Space)] | None = None
    rest: Share | None = None
    singular_values: Annotated[SingularValues, choice(SingularValues)] | None = None
    granularity: Annotated[Granularity, choice(Granularity)] | None = None
    exclude: list[Text] | None = None


class _Model(_Strict):
    model: Text
    name: Text | None = None
    parameters: OwnSettings = OwnSettings()


class Source(_Model):
    """A model in a slice."""

    layer_range: Annotated[tuple[int, int], PlainValidator(dialect.one_range)]


class Slice(_Strict):
    """The same range of layers of every model, with parameters of its own."""

    sources: Some[Source]
    base_model: Text | None = None
    parameters: SliceSettings = SliceSettings()


class Tokenizer(_Strict):
    """What mergekit's newer recipes say of the tokenizer."""

    source: Text = "union"


class Document(_Strict):
    """The whole recipe. One of `models` and `slices` is given; see recipe_checks.py."""

    merge_method: Annotated[str, PlainValidator(dialect.only_method)]
    base_model: Text
    models: Some[_Model] | None = None
    slices: Some[Slice] | None = None
    parameters: _Shared = _Shared()
    dtype: Annotated[Dtype, choice(Dtype, DTYPE_HINTS)] | None = None
    out_dtype: Annotated[Dtype, choice(Dtype, DTYPE_HINTS)] | None = None
    vocabulary: Annotated[Vocabulary, choice(Vocabulary)] | None = None
    tokenizer_source: Text | None = None
    tokenizer: Tokenizer | None = None
    chat_template: Annotated[str, PlainValidator(dialect.template)] | None = None


# What to do about a key that is missing or does not belong where it is.

MISSING_HINTS = {
    "merge_method": "write merge_method: cpi",
    "base_model": "give the directory of the models' common base checkpoint",
    "sources": "list the models of the slice, each as '- model: DIRECTORY' with a layer_range",
    "layer_range": "give the layers that the slice takes of every model, such as [0, 32]",
    "model": "give the directory of a fine-tuned checkpoint",
    "value": "give a number or a list of numbers",
    "seed": "give a whole number",
}


def key_hint(where: Where, missing: bool) -> str:
    """What to say of a key that is missing, or of one that the schema does not have there."""
    key, parent = str(where[-1]), where[:-1]
    if missing:
        return f"is missing; {MISSING_HINTS[key]}"
    schema = _schema_at(parent)
    if schema in (_Model, Source, Slice) and key in KEYS_OF_A_MODEL:
        return f"belongs under {key_text((*parent, 'parameters'))}"
    if schema in (Document, _Model, Source, Slice) and key in _Shared.model_fields:
        return "belongs under the recipe's parameters"
    if schema in (OwnSettings, SliceSettings) and key in _Shared.model_fields:
        whose = "model" if schema is OwnSettings else "slice"
        return f"belongs under the recipe's parameters; a {whose}'s own are {', '.join(KEYS_OF_A_MODEL)}"
    if schema is not Document and key in Document.model_fields:
        return "belongs at the top level of the recipe"
    if key in dialect.NOT_SUPPORTED:
        return f"is not supported; {dialect.NOT_SUPPORTED[key]}"
    return f"unknown key; {nearest(key, schema.model_fields, 'valid keys')}"


def _schema_at(where: Where) -> type[BaseModel]:
    """The schema of the mapping at a place."""
    match [step for step in where if isinstance(step, str)]:
        case []:
            return Document
        case ["models"]:
            return _Model
        case ["slices"]:
            return Slice
        case ["slices", "sources"]:
            return Source
        case ["models", "parameters"] | ["slices", "sources", "parameters"]:
            return OwnSettings
        case ["slices", "parameters"]:
            return SliceSettings
        case ["tokenizer"]:
            return Tokenizer
        case ["parameters"]:
            return _Shared
        case [*_, "order"]:
            return Seeded
    return _ShareRule
