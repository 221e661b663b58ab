"""What people read: tables and sentences, compared as text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest
from rich.cells import cell_len

from cpimerge.needs import Needs
from cpimerge.plan_file import Blend, Pair, Plan, Settings, Task, TaskTensor, TensorPlan
from cpimerge.report import fuse_report, needs_report, plan_report, plan_summary, printable, render, share

ELEMENTS = 2000
NEEDS = Needs(
    threads=2,
    memory_bytes=528_000_000,
    input_bytes=6_300_000,
    plan_bytes=72_000,
    scratch_bytes=0,
    output_bytes=1_600_000,
    companion_bytes=0,
)


def task(name: str, **changes: Any) -> Task:
    counts = {"elements": ELEMENTS, "changed": 1500, "near": 501, "rounding": 1999, "core": 20}
    values: dict[str, Any] = counts | {"mean_in": 0.0056512, "mean_out": 1.2345e-05} | changes
    return Task(name=name, core_file="", core_xxh3="", **values)


def tensor(name: str, blend: Blend | None, tasks: Sequence[str], stored: str = "BF16", **changes: Any) -> TensorPlan:
    update = TaskTensor(dtype=stored, changed=0, near=0, rounding=0, core=0, sum_in=0, sum_out=0)
    fields: dict[str, Any] = {
        "name": name,
        "shape": [2],
        "dtype": "BF16",
        "base_dtype": "F32",
        "action": "identical" if blend is None else "blend",
        "first_chunk": 0,
        "first_row": 0,
        "xxh3": {},
        "claimed": 0,
        "tasks": dict.fromkeys(tasks, update),
        "blend": blend,
    }
    return TensorPlan.model_construct(**(fields | changes))


def blend(angles: Sequence[float | None], slerped: int, row: bool = False, steps: int = 2) -> Blend:
    return Blend(coefficients=None if row else [], angles=list(angles), steps=steps, slerped=slerped)


def plan(tasks: Sequence[Task], **changes: Any) -> Plan:
    """A plan whose pairs share 2 of 38 core elements, ten times chance; one tensor of each kind."""
    names = [task.name for task in tasks]
    fields: dict[str, Any] = {
        "cpimerge": "0.1.0",
        "recipe": "",
        "settings": settings(),
        "inputs": [],
        "tasks": list(tasks),
        "pairs": [pair(a, b, 2) for a, b in combinations(names, 2)],
        "stages": [[name] for name in names],
        "backbone": names[-1],
        "fold": [names[-1], *names[:-1]],
        "notes": [],
        "coefficients_xxh3": None,
        "tensors": [
            tensor("a", blend([90.0, 10.0], slerped=1), names),
            tensor("b", blend([None, 1.0], slerped=0), names),
            tensor("c", None, names),
            tensor("d", None, [], action="copy", base_dtype="I64", dtype="I64"),
        ],
    }
    return Plan.model_construct(**(fields | changes))


def settings(**changes: Any) -> Settings:
    values = {"conflict": "last", "granularity": "tensor", "scope": "tensor", "tau": 0.1, "rest": 1.0}
    return Settings(**{"space": "weights", **values, **changes})


def pair(a: str, b: str, shared: int, **changes: Any) -> Pair:
    union = 40 - shared
    values = {"shared": shared, "union": union, "jaccard": shared / union, "chance": shared / union / 10, "lift": 10.0}
    values |= {"compared": shared, "aligned": shared, "expected": shared / 2}
    return Pair(a=a, b=b, layers={}, **{**values, **changes})


def text(plan: Plan, width: int | None = None) -> list[str]:
    return [line.rstrip() for line in render(plan_report(plan), width, color=False).splitlines()]


def notes(plan: Plan) -> list[str]:
    return [line.removeprefix("note: ") for line in text(plan) if line.startswith("note: ")]


def test_a_whole_report() -> None:
    tasks = [task("math"), task("code", changed=1, mean_in=0.0), task("chat", core=123_456, changed=ELEMENTS)]
    pairs = [pair("math", "code", 8), pair("math", "chat", 2, lift=1234.5), pair("code", "chat", 0, lift=None)]
    whole = plan(tasks, pairs=pairs, stages=[["math", "code"], ["chat"]], notes=["configs\ndiffer"])
    assert text(whole, 80) == [
        "Tasks: 2,000 elements, mean update |Δ|",
        "#  task  changed     core  |Δ| in core  |Δ| outside",
        "───────────────────────────────────────────────────",
        "1  math   75.00%       20      0.00565     1.23e-05",
        "2  code    0.05%       20            0     1.23e-05",
        "3  chat     100%  123,456      0.00565     1.23e-05",
        "",
        "Update sparsity: share of elements",
        "#  task  |Δ| = 0  ≤ 1e-5  ≤ ½ ulp  dtype  base",
        "──────────────────────────────────────────────",
        "1  math   25.00%  25.05%   99.95%   BF16   F32",
        "2  code   99.95%  25.05%   99.95%   BF16   F32",
        "3  chat       0%  25.05%   99.95%   BF16   F32",
        "",
        "Overlap of cores: Jaccard index above the diagonal, × chance below",
        "# task      1      2     3",
        "──────────────────────────",
        "1 math      · 25.00% 5.26%",
        "2 code  ×10.0      ·    0%",
        "3 chat ×1,234      –     ·",
        "",
        "Stages: groups of cores that overlap by tau = 0.1 or more",
        " 1  math, code",
        " 2  chat",
        "Backbone: chat   Fold: chat ← math ← code",
        "",
        "Blend",
        "tensors  outside the cores   slerp steps  angle min    mean     max",
        "───────────────────────────────────────────────────────────────────",
        "      1  slerp                    1 of 2     10.00°  50.00°  90.00°",
        "      1  lerp                     0 of 2      1.00°   1.00°   1.00°",
        "      1  identical, copied",
        "      1  not floats, copied",
        "",
        "Layers, by their names: none; 4 tensors outside",
        "note: stored in 16 bits, an update below ½ ulp is lost: part of |Δ| = 0 is rounding, not sparsity",
        "note: configs\\ndiffer",
    ]


def test_layers() -> None:
    tensors = [tensor(name, None, ["a"]) for name in ("h.0.w", "h.1.w", "v.0.w", "norm")]
    found = text(plan([task("a")], tensors=tensors, layers={"h.*": 2, "v.\n*": 1}))
    assert "Layers, by their names: h.* (2), v.\\n* (1); 1 tensor outside" in found


@pytest.mark.parametrize("count", [2, 4, 10])
def test_tables_fit_80_columns_with_their_headings_on_one_line(count: int) -> None:
    large = {"core": 70_000_000_000, "elements": 7_000_000_000_000, "changed": 6_999_999_999_999}
    tasks = [task(f"a-long-name-of-a-fine-tune-that-says-everything-{i}", **large) for i in range(count)]
    lines = text(plan(tasks), 80)
    tables = [line for line in lines if not line.startswith(("note:", "Backbone:", "By overlap"))]
    assert max(map(cell_len, tables)) <= 80
    assert sum(line.split()[:2] == ["#", "task"] for line in lines) == 3
    assert any(line.endswith("|Δ| in core  |Δ| outside") for line in lines)
    assert any(line.endswith("|Δ| = 0  ≤ 1e-5  ≤ ½ ulp  dtype  base") for line in lines)
    jaccards = " ".join(["5.26%"] * (count - 1))
    assert any(line.startswith(" 1 " if count == 10 else "1 ") and line.endswith(jaccards) for line in lines)


def test_without_a_width_names_are_whole() -> None:
    name = "x" * 300
    lines = text(plan([task(name), task("b")]))
    assert sum(line.startswith(f"1  {name} ") for line in lines) == 2
    assert sum(line.startswith(f"1 {name} ") for line in lines) == 1


def test_a_narrow_terminal_does_not_cut_numbers() -> None:
    assert text(plan([task("a"), task("b")]), 20) == text(plan([task("a"), task("b")]), 80)


def test_more_tasks_than_fit_a_matrix_are_listed_pair_by_pair() -> None:
    tasks = [task(f"t{i}") for i in range(11)]
    pairs = [pair(a.name, b.name, 0) for a, b in combinations(tasks, 2)]
    pairs[7] = pair("t0", "t8", 2, lift=3.0)
    lines = text(plan(tasks, pairs=pairs), 80)
    start = lines.index("Overlap of cores (20 highest of 55 pairs)")
    assert lines[start + 1].split() == ["#", "tasks", "Jaccard", "×", "chance"]
    assert lines[start + 3] == " 1, 9  t0, t8     5.26%      ×3.0"
    assert lines[start + 4] == " 1, 2  t0, t1        0%     ×10.0"
    assert lines[start + 3 + 20] == ""


def test_one_task_has_no_overlap() -> None:
    lines = text(plan([task("only")], tensors=[tensor("a", blend([], 0, steps=0), ["only"])]))
    assert not [line for line in lines if "verlap of cores" in line]
    assert "Backbone: only   Fold: only" in lines
    assert lines[lines.index("Blend") + 3 :][:2] == ["      0  slerp", "      1  lerp                     0 of 0"]
    assert notes(plan([task("only")]))[0] == "nothing is blended: outside the cores the result is only"


def test_rows_give_the_angles_that_the_plan_summed_up() -> None:
    names = ["a", "b"]
    tensors = [
        tensor("x", blend([10.0, 20.0, 90.0], 7, row=True, steps=1000), names),
        tensor("y", blend([5.0, 40.0, 50.0], 1, row=True, steps=500), names),
        tensor("z", blend([], 0, row=True, steps=5), names),
    ]
    lines = text(plan([task("a"), task("b")], tensors=tensors))
    assert lines[lines.index("Blend") + 3 :][:2] == [
        "      2  slerp                8 of 1,500      5.00°  30.00°  90.00°",
        "      1  lerp                     0 of 5",
    ]


def test_stages_by_hand_stand_beside_the_groups_by_overlap() -> None:
    three = [task("a"), task("b"), task("c")]
    pairs = [pair("a", "b", 8), pair("a", "c", 0), pair("b", "c", 8)]
    by_hand = plan(three, pairs=pairs, stages=[["c"], ["a", "b"]])
    lines = text(by_hand)
    start = lines.index("Stages: as the recipe states them")
    assert lines[start + 1 : start + 4] == [
        " 1  c",
        " 2  a, b",
        "By overlap (tau = 0.1) the groups would be: {a, b, c}",
    ]
    grouped = text(plan(three, pairs=pairs, stages=[["c", "b", "a"]]))
    assert "Stages: groups of cores that overlap by tau = 0.1 or more" in grouped


def test_tau_auto_shows_the_directions() -> None:
    three = [task("a"), task("b"), task("c")]
    pairs = [
        pair("a", "b", 2, compared=10_000, aligned=9_600, expected=9_500.0),  # both shrank
        pair("a", "c", 8, compared=12_000, aligned=11_400, expected=6_000.0),
        pair("b", "c", 0, compared=0, aligned=0, expected=0.0),
    ]
    auto = {"pairs": pairs, "settings": settings(tau="auto")}
    lines = text(plan(three, stages=[["a", "c"], ["b"]], **auto))
    start = lines.index("Directions in what cores share")
    assert lines[start + 1].split() == ["#", "tasks", "shared", "in", "layers", "same", "direction", "by", "chance"]
    assert lines[start + 3 : start + 6] == [
        "1, 3  a, c             12,000          95.00%     50.00%",
        "1, 2  a, b             10,000          96.00%     95.00%",
        "2, 3  b, c                  0               –          –",
    ]
    assert "Stages: groups of tasks that move what their cores share in the same direction" in lines
    by_hand = text(plan(three, stages=[["a"], ["b"], ["c"]], **auto))
    assert "By agreement (tau: auto) the groups would be: {a, c}  {b}" in by_hand


def test_an_overlap_of_exactly_tau_groups() -> None:
    exact = pair("a", "b", 2, union=20, jaccard=0.1)
    grouped = plan([task("a", core=11), task("b", core=11)], pairs=[exact], stages=[["a", "b"]])
    assert "Stages: groups of cores that overlap by tau = 0.1 or more" in text(grouped)


LERPS = [tensor("a", blend([1.0], slerped=0), [])]
PARALLEL = "what is blended is so nearly parallel (or zero) that every slerp is in effect a lerp"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tensors": []}, []),
        ({"tensors": LERPS}, [f"{PARALLEL}. Updates hardly ever are: try space: delta"]),
        ({"tensors": LERPS, "settings": settings(space="delta")}, [PARALLEL]),
        ({"tensors": [tensor("a", blend([], 0, steps=0), [])]}, []),
        (
            {"tensors": [], "pairs": [], "tasks": [task("a", core=0), task("b", core=0)]},
            ["no task has a core: nothing is transplanted"],
        ),
        (
            {"tensors": [], "pairs": [], "tasks": [task("a", core=7, changed=7), task("b")]},
            ["a: every element that changed is in the core"],
        ),
    ],
)
def test_remarks(changes: dict[str, Any], expected: list[str]) -> None:
    assert notes(plan(**{"tasks": [task("a"), task("b")], **changes})) == expected


@pytest.mark.parametrize(("own", "remarked"), [("BF16", True), ("F16", True), ("F32", False)])
def test_rounding_is_remarked_where_an_expert_is_stored_in_16_bits(own: str, remarked: bool) -> None:
    found = notes(plan([task("a")], tensors=[tensor("x", None, ["a"], stored=own)]))
    assert any(note.startswith("stored in 16 bits") for note in found) == remarked


def test_all_dtypes_of_a_task_and_of_the_base_are_named() -> None:
    tensors = [
        tensor("x", None, ["a"], base_dtype="F32"),
        tensor("y", None, ["a"], base_dtype="BF16"),
        tensor("ids", None, [], base_dtype="I64", action="copy"),
    ]
    line = next(line for line in text(plan([task("a")], tensors=tensors)) if "½ ulp" not in line and "BF16" in line)
    assert line.endswith("   BF16  BF16/F32")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("[red]:bug:[/red] [link=x]", "[red]:bug:[/red] [link=x]"),
        ("a\x1b[31mb\nc\td", "a\\x1b[31mb\\nc\\td"),
        ("\u202eevil\u200b", "\\u202eevil\\u200b"),
        ("\udcff", "\\udcff"),
        ("Größe 数学 ½", "Größe 数学 ½"),
    ],
)
def test_names_are_never_markup_and_never_control_the_terminal(name: str, shown: str) -> None:
    assert printable(name) == shown
    lines = text(plan([task(name), task("b")]))
    assert sum(f" {shown} " in line for line in lines) == 3
    assert f" 1  {shown}" in lines
    assert f"Backbone: b   Fold: b ← {shown}" in lines
    assert fuse_report({"tensors": {}, "shards": {}}, name).startswith(f"fused: {shown} ")


def test_colour_only_where_asked() -> None:
    plain, coloured = (render(["x", *plan_report(plan([task("a")]))], 80, color) for color in (False, True))
    assert "\x1b" not in plain
    assert coloured.replace("\x1b[1m", "").replace("\x1b[0m", "") == plain


@pytest.mark.parametrize(
    ("count", "of", "expected"),
    [
        (0, 7, "0%"),
        (0, 0, "0%"),
        (7, 7, "100%"),
        (1, 3, "33.33%"),
        (1, 10**9, "<0.01%"),
        (10**9 - 1, 10**9, ">99.99%"),
        (1, 10_000, "0.01%"),
        (9_999, 10_000, "99.99%"),
    ],
)
def test_share(count: int, of: int, expected: str) -> None:
    assert share(count, of) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            [
                "plan: reads 6.3 MB, writes at most 72.0 kB",
                "fuse: reads 6.3 MB, writes 1.6 MB",
                "both: on 2 threads, in at most 528.0 MB of memory",
            ],
        ),
        (
            {"scratch_bytes": 5_000_000, "plan_seconds": 100.4, "fuse_seconds": 150.0, "threads": 1},
            [
                "plan: reads 6.3 MB, writes at most 72.0 kB (and about 5.0 MB that goes again), takes about 100 s",
                "fuse: reads 6.3 MB, writes 1.6 MB, takes about 2 min",
                "both: on 1 thread, in at most 528.0 MB of memory",
            ],
        ),
        (
            {"plan_seconds": 9000.0, "fuse_seconds": 0.2},
            [
                "plan: reads 6.3 MB, writes at most 72.0 kB, takes about 2.5 h",
                "fuse: reads 6.3 MB, writes 1.6 MB, takes less than 1 s",
                "both: on 2 threads, in at most 528.0 MB of memory",
            ],
        ),
    ],
)
def test_needs(changes: dict[str, Any], expected: list[str]) -> None:
    assert needs_report(Needs(**(NEEDS.as_dict() | changes))).splitlines() == expected


@pytest.mark.parametrize(
    ("shards", "actions", "expected"),
    [
        (1, ["slerp", "lerp", "slerp"], "fused: out   1 file; tensors: 2 slerp, 1 lerp"),
        (2, ["copy", "identical"], "fused: out   2 files; tensors: 1 identical everywhere, 1 not floating-point"),
    ],
)
def test_what_was_fused(shards: int, actions: list[str], expected: str) -> None:
    tensors = {str(number): {"action": action} for number, action in enumerate(actions)}
    assert fuse_report({"shards": dict.fromkeys(range(shards)), "tensors": tensors}, "out") == expected


def test_the_summary_for_machines_has_all_but_recipe_and_tensors() -> None:
    some = plan([task("a"), task("b")])
    summary = plan_summary(some, NEEDS)
    assert summary.keys() == Plan.model_fields.keys() - {"recipe", "tensors"} | {"actions", "needs"}
    assert summary["actions"] == {"copy": 1, "identical": 1, "lerp": 1, "slerp": 1}
    assert summary["needs"] == NEEDS.as_dict()
    assert [entry["name"] for entry in summary["tasks"]] == ["a", "b"]
