"""The plan directory: everything that `fuse` obeys, as files that a person can read, compare and edit.

    plan.json           this module's `Plan`; a line for each tensor
    cores/00.roaring    the core of the first task: a serialised Roaring bitmap (portable format) a chunk
    cores/00.npy        where each of them begins: uint64 [chunks + 1], bytes
    coefficients.npy    only for granularity row: float32 [rows, members], rows of all blended tensors in order

Where a tensor's chunks and rows begin stands in its entry; their order depends on the scope.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import xxhash
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator

from .checkpoint import COPIED_BYTES, FLOAT_BYTES, MAX_SIZE
from .errors import PlanError
from .ordinary import read_ordinary
from .plain_json import is_writable, most_keys, parse_object, shown
from .plan_checks import plan_faults
from .references import Reference, planned_place
from .writer import OutputTensor

__all__ = [
    "Blend",
    "Input",
    "JoinedToken",
    "Pair",
    "Plan",
    "Settings",
    "ShardIdentity",
    "Task",
    "TaskTensor",
    "TensorPlan",
    "Vocabulary",
]

Value = TypeVar("Value")


class _First(FailFast):
    """Of a million wrong entries, one is enough to say."""

    def __hash__(self) -> int:
        return 0  # which a union of types asks for


Many = Annotated[list[Value], _First()]
Size = Annotated[int, Field(ge=0, lt=MAX_SIZE)]  # or another count
Mode = Literal["base", "union"]  # of vocabularies that differ

PLAN_FILE = "plan.json"
COEFFICIENTS_FILE = "coefficients.npy"
VERSION = 1
MAX_KEYS = 10_000  # of an object: names of tasks, or of layers
MAX_BYTES = 512_000_000  # of plan.json: a million tensors


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ShardIdentity(_Model):
    """A file as it was when planned: size in bytes, xxh3-128 of its header, sha256 where the Hub cache names it."""

    file: str
    size: Size
    header_xxh3: str
    sha256: str | None = None


class Input(_Model):
    """One checkpoint. `name`: "base", a task's name, or "backbone" where the recipe gives the backbone by path.

    `path` is its directory, or `org/name@commit` where it was read from the Hub; `adapter`, in the same way, that of
    the adapter on it. A thread that reads it holds up to `scratch_bytes` beside its buffers.
    """

    name: str
    path: str
    adapter: str | None = None
    scratch_bytes: Size = 0
    shards: Many[ShardIdentity]

    @property
    def reference(self) -> Reference:
        """Where it was when it was planned."""
        return Reference(planned_place(self.path), planned_place(self.adapter) if self.adapter else None)


class Settings(_Model):
    """The recipe's settings that `fuse` needs, as resolved. METHOD's names."""

    space: Literal["weights", "delta"]
    conflict: Literal["last", "first", "largest", "mean", "elect"]
    granularity: Literal["tensor", "row"]
    scope: Literal["tensor", "layer", "global"]
    tau: float | Literal["auto"]
    rest: float


class JoinedToken(_Model):
    """A token that the base's tokenizer gets, with the flags that tokenizers knows."""

    id: Size
    content: str
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


class Vocabulary(_Model):
    """The one vocabulary of the output, where those of the inputs differ; `tensors` have a row a token.

    `joined` are tokens new to the base's tokenizer. `tokens_xxh3` identifies the tokens of the base and of each input
    whose tokens are not the base's.
    """

    mode: Mode
    base_rows: Size
    rows: Size
    tensors: Many[str]
    joined: Many[JoinedToken]
    tokens_xxh3: dict[str, str]


class TaskTensor(_Model):
    """One task's update of one tensor: counts of elements, and mean magnitudes in and out of the core."""

    dtype: str  # the task's stored dtype, to read the counts by
    changed: Size  # m > 0
    near: Size  # m ≤ 1e-5
    rounding: Size  # m within half a unit in the last place of the base's dtype
    core: Size
    sum_in: float
    sum_out: float


class Task(_Model):
    """One task over the whole model; the counts are sums of `TaskTensor`'s over floating-point tensors."""

    name: str
    core_file: str
    core_xxh3: str
    elements: Size
    changed: Size
    near: Size
    rounding: Size
    core: Size
    mean_in: float
    mean_out: float


class Pair(_Model):
    """How far two cores overlap. `layers`: Jaccard index by layer; `lift` is null where chance is 0.

    `compared`: elements in both cores, of the tensors in layers (of all where there are no layers); `aligned`: how many
    of them both tasks moved in the same direction; `expected`: how many of them would be so by chance.
    """

    a: str
    b: str
    shared: Size
    union: Size
    jaccard: float
    chance: float
    lift: float | None
    compared: Size
    aligned: Size
    expected: Annotated[float, Field(ge=0)]
    layers: dict[str, float]

    @property
    def kappa(self) -> float:
        """Cohen's kappa of the directions: 1 where all are the same, 0 for chance or where it cannot be told."""
        room = self.compared - self.expected
        return (self.aligned - self.expected) / room if room > 0 else 0.0


class Blend(_Model):
    """The non-core elements of one tensor: Σ coefficient·vector over the plan's `fold`, in its order.

    `coefficients` [members] and `angles` [members − 1] (degrees between the running vector and the next member; null
    where a norm is 0) are given here for granularity tensor; for row they are in coefficients.npy and `angles` holds
    the smallest, mean and largest angle. `slerped` of `steps` were slerp, not lerp.
    `levelled`: how far the singular values of what is folded are made level, 0 to 1.
    """

    coefficients: Many[float] | None
    angles: Many[float | None]
    steps: Size
    slerped: Size
    levelled: Annotated[float, Field(ge=0, le=1)] = 0.0


class TensorPlan(_Model):
    """What happens to one tensor.

    copy: not floating-point, equal everywhere. identical: the same bytes everywhere, copied. blend: all else.
    `xxh3` identifies its content in each checkpoint: xxh3-64 of the xxh3-64 digests (little-endian) of its chunks.
    """

    name: str
    shape: Many[Size]
    dtype: str  # of the output
    base_dtype: str
    action: Literal["copy", "identical", "blend"]
    first_chunk: Size
    first_row: Size
    xxh3: dict[str, str]
    claimed: Size  # elements in any task's core
    tasks: dict[str, TaskTensor]
    blend: Blend | None

    @property
    def output(self) -> OutputTensor:
        return OutputTensor(self.name, self.dtype, tuple(self.shape))

    @property
    def is_levelled(self) -> bool:
        return self.blend is not None and self.blend.levelled > 0

    @model_validator(mode="after")
    def _sound(self) -> TensorPlan:
        if (self.blend is not None) != (self.action == "blend"):
            raise ValueError("`blend` belongs to the action blend, and only to it")
        if unknown := {self.dtype, self.base_dtype} - FLOAT_BYTES.keys() - COPIED_BYTES.keys():
            raise ValueError(f"{shown(min(unknown))} is no dtype of an output")
        if self.dtype != self.base_dtype and not {self.dtype, self.base_dtype} <= FLOAT_BYTES.keys():
            raise ValueError(f"{self.base_dtype} cannot become {self.dtype}")
        return self


class Plan(_Model):
    """A whole plan; `fold` lists the members of every blend in fold order, the backbone first."""

    format: Literal["cpimerge plan"] = "cpimerge plan"
    version: Literal[1] = 1
    cpimerge: str
    recipe: str  # the YAML as the user wrote it
    settings: Settings
    inputs: Many[Input]
    tasks: Many[Task]
    pairs: Many[Pair]
    stages: Many[Many[str]]
    backbone: str
    fold: Many[str]
    layers: dict[str, Size] = Field(default_factory=dict)  # how many are called alike: {"model.layers.*": 32}
    notes: Many[str]
    vocabulary: Vocabulary | None = None  # None: that of every input
    chat_template: str | None = None  # of the output; None: the base's
    coefficients_xxh3: str | None
    seal: str = ""  # xxh3-128 over what must not be edited; `sealed` sets it, `load` checks it
    tensors: Many[TensorPlan] = Field(repr=False)

    @model_validator(mode="after")
    def _sound(self) -> Plan:
        """What an edited plan must keep to, so that `fuse` can rely on it."""
        tasks = [task.name for task in self.tasks]
        if sorted(self.order) != sorted(tasks):
            raise ValueError("`stages` must have each task once")
        if sorted(self.fold) != sorted({*tasks, self.backbone}) or self.fold[0] != self.backbone:
            raise ValueError("`fold` must be the backbone and then each other task once")
        known = {entry.name for entry in self.inputs}
        if known != {"base", *self.fold}:
            raise ValueError("`inputs` must be the base and the members of `fold`")
        by_row = self.coefficients_xxh3 is not None
        for tensor in self.tensors:
            given = None if tensor.blend is None else tensor.blend.coefficients
            if tensor.blend is not None and (given is None) != by_row:
                raise ValueError(f"tensor {tensor.name!r}: coefficients belong here or into {COEFFICIENTS_FILE}")
            if given is not None and len(given) != len(self.fold):
                raise ValueError(f"tensor {tensor.name!r}: {len(given)} coefficients for {len(self.fold)} members")
            if tensor.xxh3.keys() != known:
                raise ValueError(f"tensor {tensor.name!r}: `xxh3` must have every input")
        return self

    @property
    def order(self) -> list[str]:
        """All tasks in stage order."""
        return [task for stage in self.stages for task in stage]

    @property
    def actions(self) -> Mapping[str, int]:
        """How many tensors are copied, identical, blended by lerp alone, and blended with at least one slerp."""
        counts = Counter({"copy": 0, "identical": 0, "lerp": 0, "slerp": 0})
        for tensor in self.tensors:
            blend = tensor.blend
            counts[tensor.action if blend is None else "slerp" if blend.slerped else "lerp"] += 1
        return dict(counts)

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(tensor.output.nbytes for tensor in self.tensors)

    def sealed(self) -> Plan:
        """This plan with its seal, as `load` will want it."""
        return self.model_copy(update={"seal": _seal(self)})

    def save(self, directory: Path) -> None:
        """Write plan.json, a tensor a line. Tensors come last, so that the summary is at the top."""
        head = self.model_dump_json(exclude={"tensors"}, indent=1)
        lines = ",\n  ".join(tensor.model_dump_json() for tensor in self.tensors)
        text = f'{head[:-2]},\n "tensors": [\n  {lines}\n ]\n}}\n'
        (directory / PLAN_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> Plan:
        """Read plan.json. Raises PlanError saying which entries are wrong."""
        file = directory / PLAN_FILE
        raw = _parsed(file)
        _check_version(file, raw)
        try:
            plan = cls.model_validate(raw)
        except ValidationError as error:
            raise PlanError(f"{file}: {_words(entry)}" for entry in error.errors(include_url=False)) from error
        if plan.seal != _seal(plan):
            raise PlanError(
                f"{file}: entries were edited that must not be (see docs/plan.md). Run `cpimerge plan` again"
            )
        if faults := [f"{file}: {fault}. Run `cpimerge plan` again" for fault in plan_faults(plan)]:
            raise PlanError(faults)
        return plan


def _parsed(file: Path) -> dict[str, Any]:
    """plan.json as JSON. Raises PlanError."""
    try:
        raw = read_ordinary(file, MAX_BYTES)
        value = parse_object(raw)
    except FileNotFoundError as error:
        raise PlanError(f"{file}: not found. Make a plan with `cpimerge plan RECIPE -o {file.parent}`") from error
    except OSError as error:
        raise PlanError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise PlanError(f"{file}: {error}. Run `cpimerge plan` again") from error
    if most_keys(value) > MAX_KEYS:
        raise PlanError(f"{file}: has an object of more than {MAX_KEYS} keys. Run `cpimerge plan` again")
    if not is_writable(raw, value):
        raise PlanError(f"{file}: has text that is not Unicode. Run `cpimerge plan` again")
    return value


def _words(entry: Mapping[str, Any]) -> str:
    """What pydantic finds wrong with an entry, and where."""
    place = ".".join(map(str, entry["loc"]))
    return (f"{place}: " if place else "") + str(entry["msg"]).removeprefix("Value error, ")


def _seal(plan: Plan) -> str:
    """xxh3-128 of all that describes the inputs and the cores; the rest of a plan may be edited.

    Whatever the order of keys, which tools that edit JSON may change.
    """
    tensors = [
        tensor.model_copy(update={key: dict(sorted(getattr(tensor, key).items())) for key in ("xxh3", "tasks")})
        for tensor in plan.tensors
    ]
    vocabulary = plan.vocabulary
    if vocabulary is not None:
        vocabulary = vocabulary.model_copy(update={"tokens_xxh3": dict(sorted(vocabulary.tokens_xxh3.items()))})
    fixed = plan.model_copy(update={"tensors": tensors, "vocabulary": vocabulary}).model_dump_json(
        include={
            "inputs": True,
            "tasks": True,
            "coefficients_xxh3": True,
            "vocabulary": True,
            "settings": {"granularity", "scope"},
            "tensors": {"__all__": SEALED_OF_A_TENSOR},
        }
    )
    return xxhash.xxh3_128_hexdigest(fixed.encode())


SEALED_OF_A_TENSOR: Any = dict.fromkeys(TensorPlan.model_fields.keys() - {"dtype", "blend"}, True) | {
    "blend": {"levelled"}
}


def _check_version(file: Path, raw: Mapping[str, Any]) -> None:
    if raw.get("format") != "cpimerge plan":
        raise PlanError(f"{file}: is not a cpimerge plan")
    version = raw.get("version")
    if type(version) is not int or version != VERSION:
        raise PlanError(
            f"{file}: plan version {shown(version)}, this cpimerge reads version {VERSION}. Run `cpimerge plan` again"
        )


def plan_hash(directory: Path) -> str:
    """xxh3-128 of plan.json, which holds those of the other files: identifies the whole plan."""
    return xxhash.xxh3_128_hexdigest((directory / PLAN_FILE).read_bytes())
