"""Plans that a stranger wrote, whose seal agrees with whatever they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save

from attacks.attack import Spoil, both, check, fifo, link, refused, run, sparse, text
from attacks.conftest import model
from attacks.sealing import edited, tensor
from cpimerge.checkpoint import read_header
from cpimerge.plan_file import Plan

PLAN = "plan/plan.json"
AGAIN = "Run `cpimerge plan` again"
OTHERS = "plan.json: tensors are not the base's"
CONSTANTS = {"AGAIN": AGAIN, "OTHERS": OTHERS}
PLAN_AGAIN = "The inputs are not those that were planned: run `cpimerge plan` again"


def task(**entries: Any) -> Spoil:
    return edited(lambda plan: plan["tasks"][0].update(entries))


def math(**entries: Any) -> Spoil:
    """The entry of an input."""
    return edited(lambda plan: plan["inputs"][1].update(entries))


def called(name: str) -> Spoil:
    """A task with another name wherever it is named."""
    return edited(lambda plan: plan.update(json.loads(json.dumps(plan).replace('"math"', json.dumps(name)))))


def thousands(plan: dict[str, Any]) -> None:
    names = [f"t{number}" for number in range(5000)]
    plan["tasks"] += [plan["tasks"][0] | {"name": name} for name in names]
    plan["inputs"] += [plan["inputs"][1] | {"name": name} for name in names]
    plan["stages"].append(names)
    plan["fold"] += names


def key_twice(home: Path) -> None:
    written = (home / PLAN).read_text()
    (home / PLAN).write_text(written.replace('"backbone":', '"backbone":"base","backbone":', 1))


FILES: dict[str, tuple[Spoil, list[str]]] = {
    "cut": (
        text(PLAN, '{"format":"cpimerge pl'),
        [f"plan/plan.json: not valid JSON: Unterminated string starting at: line 1 column 11 (char 10). {AGAIN}"],
    ),
    "a hole of a terabyte": (
        sparse(PLAN),
        ["plan/plan.json: cannot be read: is larger than 512 MB, as no such file is"],
    ),
    "an abyss": (text(PLAN, '{"a":' * 100_000), [f"plan/plan.json: its JSON is nested too deeply. {AGAIN}"]),
    "a number without end": (
        text(PLAN, f'{{"format":"cpimerge plan","version":{"9" * 5000}}}'),
        [f"plan/plan.json: not valid JSON: a number of more than 4300 digits. {AGAIN}"],
    ),
    "a key twice": (key_twice, [f"plan/plan.json: 'backbone' stands twice in one JSON object. {AGAIN}"]),
    "a pipe": (fifo(PLAN), ["plan/plan.json: cannot be read: is no ordinary file"]),
    "a device": (link(PLAN, "/dev/zero"), ["plan/plan.json: cannot be read: is no ordinary file"]),
    "another file of this machine": (
        link(PLAN, "OUTSIDE/secret.txt"),
        [f"plan/plan.json: not valid JSON: Expecting value: line 1 column 1 (char 0). {AGAIN}"],
    ),
    "another encoding": (
        text(PLAN, '{"format":"cpimerge plan"}'.encode("utf-16")),
        [
            "plan/plan.json: not valid JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start "
            f"byte. {AGAIN}"
        ],
    ),
    "half a surrogate pair": (
        edited(lambda plan: plan.update(recipe="\ud800")),
        [f"plan/plan.json: has text that is not Unicode. {AGAIN}"],
    ),
    "half a surrogate pair in a name": (called("\ud800"), [f"plan/plan.json: has text that is not Unicode. {AGAIN}"]),
    "true for a version": (
        edited(lambda plan: plan.update(version=True)),
        [f"plan/plan.json: plan version True, this cpimerge reads version 1. {AGAIN}"],
    ),
    "1.0 for a version": (
        edited(lambda plan: plan.update(version=1.0)),
        [f"plan/plan.json: plan version 1.0, this cpimerge reads version 1. {AGAIN}"],
    ),
    "a version that writes on the terminal": (
        edited(lambda plan: plan.update(version="\x1b[2J" * 1000)),
        [
            "plan/plan.json: plan version '\\x1b[2J\\x1b[2J\\x1b[2J\\x1b[2J\\x1b[2J\\x1b[2J\\x1b[2J\\x1b[2J\\x1"
            "b[2J\\x1b[2J\\x1b[2J\\x1b[2J\\x1b[2J\\x1b[2...\\x1b[2J\\x1b[2J\\x1b[2J\\x1b[2J\\x1b[2J\\x1b[2J\\x1"
            "b[2J\\x1b[2J\\x1b[2J\\x1b[2J\\x1b[2J\\x1b[2J\\x1b[2J\\x1b[2J', this cpimerge reads version 1. "
            f"{AGAIN}"
        ],
    ),
    "a key that writes on the terminal": (
        edited(lambda plan: plan.update({"\x1b[31m\n": 1})),
        ["plan/plan.json: \\x1b[31m\\n: Extra inputs are not permitted"],
    ),
    "a program that writes into the card": (
        edited(lambda plan: plan.update(cpimerge="1\n# <script>")),
        [f"plan/plan.json: cpimerge: '1\\n# <script>' is no version. {AGAIN}"],
    ),
    "a recipe without end": (
        edited(lambda plan: plan.update(recipe="a" * 1_000_001)),
        [f"plan/plan.json: recipe: longer than 1000000 characters. {AGAIN}"],
    ),
    "a recipe that writes on the terminal": (
        edited(lambda plan: plan.update(recipe="# \x1b[2J")),
        [f"plan/plan.json: recipe: has control characters. {AGAIN}"],
    ),
    "a chat template of other characters": (
        edited(lambda plan: plan.update(chat_template="{{x}}\0")),
        [f"plan/plan.json: chat_template: has control characters. {AGAIN}"],
    ),
}

NAMES: dict[str, tuple[Spoil, list[str]]] = {
    "a core above": (
        task(core_file="../../outside/secret.txt"),
        [f"plan/plan.json: tasks.0.core_file: must be cores/00.roaring, got '../../outside/secret.txt'. {AGAIN}"],
    ),
    "an absolute core": (
        task(core_file="/etc/passwd"),
        [f"plan/plan.json: tasks.0.core_file: must be cores/00.roaring, got '/etc/passwd'. {AGAIN}"],
    ),
    "NUL in a core": (
        task(core_file="cores/00.roaring\0"),
        [f"plan/plan.json: tasks.0.core_file: must be cores/00.roaring, got 'cores/00.roaring\\x00'. {AGAIN}"],
    ),
    "no core": (task(core_file=""), [f"plan/plan.json: tasks.0.core_file: must be cores/00.roaring, got ''. {AGAIN}"]),
    "another task's core": (
        task(core_file="cores/01.roaring"),
        [f"plan/plan.json: tasks.0.core_file: must be cores/00.roaring, got 'cores/01.roaring'. {AGAIN}"],
    ),
    "a task that writes on the terminal": (
        called("a\x1b[31m\nb"),
        [
            "plan/plan.json: tasks.0.name: must not have control characters or line breaks, got "
            f"'a\\x1b[31m\\nb'. {AGAIN}"
        ],
    ),
    "a task above": (
        called("../x"),
        [f"plan/plan.json: tasks.0.name: '../x' cannot be a task's name, as it is not usable as a file name. {AGAIN}"],
    ),
    "a task twice": (
        edited(lambda plan: plan["tasks"].append(plan["tasks"][1])),
        ["plan/plan.json: `stages` must have each task once"],
    ),
    "an input twice": (
        edited(lambda plan: plan["inputs"].append(plan["inputs"][1])),
        [f"plan/plan.json: inputs: 'math' stands there twice. {AGAIN}"],
    ),
    "a shard above": (
        edited(lambda plan: plan["inputs"][1]["shards"][0].update(file="../../x\x1b[31m")),
        [f"plan/plan.json: inputs: 'math': '../../x\\x1b[31m' is not the name of a file. {AGAIN}"],
    ),
    "NUL in a path": (math(path="a\0b"), [f"plan/plan.json: inputs: 'math': 'a\\x00b' is no directory. {AGAIN}"]),
    "no path": (math(path=""), [f"plan/plan.json: inputs: 'math': '' is no directory. {AGAIN}"]),
    "NUL in an adapter's path": (
        math(adapter="\0"),
        [f"plan/plan.json: inputs: 'math': '\\x00' is no directory. {AGAIN}"],
    ),
    "five thousand tasks": (edited(thousands), ["plan/plan.json: tensor 'embed.weight': `xxh3` must have every input"]),
    "a stage of nothing": (
        edited(lambda plan: plan["stages"].insert(0, [])),
        [f"plan/plan.json: stages: one of them is empty. {AGAIN}"],
    ),
    "a stage in a stage": (
        edited(lambda plan: plan.update(stages=[[["math"]], ["code"]])),
        ["plan/plan.json: stages.0.0: Input should be a valid string"],
    ),
    "no members": (
        edited(lambda plan: plan.update(fold=[])),
        ["plan/plan.json: `fold` must be the backbone and then each other task once"],
    ),
    "a tensor twice": (
        edited(lambda plan: plan["tensors"].append(plan["tensors"][0])),
        [f"plan/plan.json: tensor 'embed.weight' stands there twice. {AGAIN}"],
    ),
    "a tensor less": (edited(lambda plan: plan["tensors"].pop(0)), [f"{OTHERS}. Run `cpimerge plan` again"]),
    "a tensor with another name": (
        tensor(lambda it: it.update(name="../x\x1b[2J")),
        [f"{OTHERS}. Run `cpimerge plan` again"],
    ),
    "a tensor with an endless name": (
        tensor(lambda it: it.update(name="x" * 100_000)),
        [
            "plan/plan.json: tensor 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
            "xxxxxxxxxxxxxxxxxxxxxxx...xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
            "xxxxxxxxxxxxxxxxxxxxxxxxxx': its name is not Unicode of at most 1000 characters. Save the "
            f"checkpoint with another name for it. {AGAIN}"
        ],
    ),
}

NUMBERS: dict[str, tuple[Spoil, list[str]]] = {
    "a negative size": (
        edited(lambda plan: plan["inputs"][1]["shards"][0].update(size=-1)),
        ["plan/plan.json: inputs.1.shards.0.size: Input should be greater than or equal to 0"],
    ),
    "memory beyond all": (
        math(scratch_bytes=10**400),
        ["plan/plan.json: inputs.1.scratch_bytes: Input should be less than 9223372036854775808"],
    ),
    "less than no memory": (
        math(scratch_bytes=-(10**12)),
        ["plan/plan.json: inputs.1.scratch_bytes: Input should be greater than or equal to 0"],
    ),
    "not a number": (
        edited(lambda plan: plan["settings"].update(tau=float("nan"))),
        [
            "plan/plan.json: settings.tau.float: Input should be a finite number",
            "plan/plan.json: settings.tau.literal['auto']: Input should be 'auto'",
        ],
    ),
    "an infinite angle": (
        tensor(lambda it: it["blend"].update(angles=[float("inf")])),
        ["plan/plan.json: tensors.2.blend.angles.0: Input should be a finite number"],
    ),
    "a shape beyond all": (
        tensor(lambda it: it.update(shape=[2**62] * 100_000)),
        [
            "plan/plan.json: tensor 'layers.0.w': [4611686018427387904, 4611686018427387904, "
            "4611686018427387904, 4611686018427387904, 4611686018427387904, 4611686018427387904, "
            f"4611686018427387904, 4611686018427387904, ...] is larger than any file. {AGAIN}"
        ],
    ),
    "a negative shape": (
        tensor(lambda it: it.update(shape=[-2, -3])),
        ["plan/plan.json: tensors.2.shape.0: Input should be greater than or equal to 0"],
    ),
    "another shape": (tensor(lambda it: it.update(shape=[3, 2])), [f"{OTHERS}. Run `cpimerge plan` again"]),
    "an unknown dtype": (
        tensor(lambda it: it.update(dtype="XX", base_dtype="XX")),
        ["plan/plan.json: tensors.2: 'XX' is no dtype of an output"],
    ),
    "a dtype of no output": (
        tensor(lambda it: it.update(dtype="F64", base_dtype="F64")),
        ["plan/plan.json: tensors.2: 'F64' is no dtype of an output"],
    ),
    "another dtype of the base": (
        tensor(lambda it: it.update(dtype="BF16", base_dtype="BF16")),
        [f"{OTHERS}. Run `cpimerge plan` again"],
    ),
    "integers of other bytes": (
        tensor(lambda it: it.update(dtype="I32", base_dtype="I32"), "ids"),
        [f"{OTHERS}. Run `cpimerge plan` again"],
    ),
    "integers that are floats": (
        tensor(lambda it: it.update(dtype="F32", base_dtype="F32"), "ids"),
        [f"plan/plan.json: tensor 'ids': F32 is not for the action copy. {AGAIN}"],
    ),
    "floats that are copied": (
        tensor(lambda it: it.update(action="copy", blend=None)),
        [f"plan/plan.json: tensor 'layers.0.w': F32 is not for the action copy. {AGAIN}"],
    ),
    "integers that are blended": (
        tensor(
            lambda it: it.update(action="blend", blend={"coefficients": None, "angles": [], "steps": 0, "slerped": 0}),
            "ids",
        ),
        [f"plan/plan.json: tensor 'ids': I64 is not for the action blend. {AGAIN}"],
    ),
    "a chunk before the first": (
        tensor(lambda it: it.update(first_chunk=-1)),
        ["plan/plan.json: tensors.2.first_chunk: Input should be greater than or equal to 0"],
    ),
    "a chunk beyond numbers": (
        tensor(lambda it: it.update(first_chunk=2**70)),
        ["plan/plan.json: tensors.2.first_chunk: Input should be less than 9223372036854775808"],
    ),
    "a row before the first": (
        tensor(lambda it: it.update(first_row=-1)),
        ["plan/plan.json: tensors.2.first_row: Input should be greater than or equal to 0"],
    ),
    "a row beyond numbers": (
        tensor(lambda it: it.update(first_row=2**70)),
        ["plan/plan.json: tensors.2.first_row: Input should be less than 9223372036854775808"],
    ),
    "no hashes": (
        tensor(lambda it: it.update(xxh3={})),
        ["plan/plan.json: tensor 'layers.0.w': `xxh3` must have every input"],
    ),
    "no tasks": (
        tensor(lambda it: it.update(tasks={})),
        [f"plan/plan.json: tensor 'layers.0.w': `tasks` must have every task. {AGAIN}"],
    ),
    "other tasks": (
        tensor(lambda it: it.update(tasks={"x": it["tasks"]["math"]})),
        [f"plan/plan.json: tensor 'layers.0.w': `tasks` must have every task. {AGAIN}"],
    ),
    "fewer claims than none": (
        tensor(lambda it: it.update(claimed=-5)),
        ["plan/plan.json: tensors.2.claimed: Input should be greater than or equal to 0"],
    ),
    "a count beyond numbers": (
        tensor(lambda it: it["tasks"]["math"].update(core=2**80)),
        ["plan/plan.json: tensors.2.tasks.math.core: Input should be less than 9223372036854775808"],
    ),
    "more steps than numbers": (
        tensor(lambda it: it["blend"].update(steps=-1, slerped=10**30)),
        [
            "plan/plan.json: tensors.2.blend.steps: Input should be greater than or equal to 0",
            "plan/plan.json: tensors.2.blend.slerped: Input should be less than 9223372036854775808",
        ],
    ),
    "coefficients here, too": (
        tensor(lambda it: it["blend"].update(coefficients=[1.0, 1.0])),
        ["plan/plan.json: tensor 'layers.0.w': coefficients belong here or into coefficients.npy"],
    ),
    "rows that there are not": (
        edited(lambda plan: plan.update(coefficients_xxh3=None)),
        ["plan/plan.json: tensor 'embed.weight': coefficients belong here or into coefficients.npy"],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files(planned: Path, case: str) -> None:
    check(planned, *FILES[case], command="fuse")


@pytest.mark.parametrize("case", NAMES)
def test_names(planned: Path, case: str) -> None:
    check(planned, *NAMES[case], command="fuse")


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers(planned: Path, case: str) -> None:
    check(planned, *NUMBERS[case], command="fuse")


@pytest.mark.parametrize("place", ["first_chunk", "first_row"])
def test_what_lies_beyond_the_files(planned: Path, place: str) -> None:
    """It is found when the tensor's turn comes, and what there is of the output goes."""
    tensor(lambda it: it.update({place: 99}))(planned)
    problem = {
        "first_chunk": f"plan/cores/00.roaring: has no chunk 99, which plan.json refers to. {AGAIN}",
        "first_row": f"coefficients.npy: has no row 100. {AGAIN}",
    }[place]
    assert refused(planned, "fuse") == [problem]


def replanned(home: Path, name: str) -> None:
    """Says in the plan that this is how the input always was."""
    shard = read_header(home / name / "model.safetensors")
    identity = {"file": shard.file.name, "size": shard.size, "header_xxh3": shard.header_xxh3}
    number = [entry.name for entry in Plan.load(home / "plan").inputs].index(name)
    edited(lambda plan: plan["inputs"][number].update(shards=[identity]))(home)


EXPECTED = "math: tensor 'layers.0.w': expected float32 [2, 3] (as in base), got "
MISFITS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "missing": (
        {"layers.0.w": None},
        "math: tensor 'layers.0.w': missing, though base has it. It is no fine-tune of this base as it stands",
    ),
    "smaller": (
        {"layers.0.w": torch.ones(1)},
        f"{EXPECTED}float32 [1]. It is no fine-tune of this base as it stands",
    ),
    "integers": (
        {"layers.0.w": torch.ones(2, 3, dtype=torch.int64)},
        f"{EXPECTED}I64 [2, 3]. Save it with the base's dtype",
    ),
    "float64": (
        {"layers.0.w": torch.ones(2, 3, dtype=torch.float64)},
        "math: tensor 'layers.0.w': F64 cannot be merged. Convert the checkpoint to bfloat16 or float32",
    ),
    "other integers": (
        {"ids": torch.arange(3, dtype=torch.int8)},
        "math: tensor 'ids': expected I64 [3] (as in base), got I8 [3]. Save it with the base's dtype",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_inputs_that_plan_would_have_refused(planned: Path, case: str) -> None:
    """The plan says that they are as planned, and it never was a plan of `cpimerge plan`."""
    changes, problem = MISFITS[case]
    tensors = model(0.5) | changes
    save(planned / "math", {name: it for name, it in tensors.items() if it is not None})
    replanned(planned, "math")
    assert refused(planned, "fuse") == [problem, PLAN_AGAIN]


def test_a_plan_that_names_other_places_reads_no_more_than_models(planned: Path) -> None:
    """It may name any directory; what is there must be the model that it describes."""
    (planned / "secret").mkdir()
    (planned / "secret/model.safetensors").symlink_to(planned.parent / "outside/secret.txt")
    math(path=f"{planned}/secret")(planned)
    assert refused(planned, "fuse") == [
        "secret/model.safetensors: incomplete: 8 bytes, shorter than its own header. Download or save it again"
    ]


def test_coefficients_are_free_and_their_results_are_not(planned: Path) -> None:
    """Whoever edits a plan may ask for any blend, but gets no Inf."""
    both(edited(lambda plan: plan["settings"].update(rest=1e308)))(planned)
    assert run(planned, "fuse", "{home}/plan", "-o", "{home}/out", "--threads", "1").exit_code == 0
