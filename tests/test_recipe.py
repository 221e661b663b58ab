"""Recipes: what they mean, exactly, and what is said of wrong ones, word for word."""

from __future__ import annotations

import dataclasses
import string
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpimerge.errors import RecipeError
from cpimerge.recipe import Exclude, Recipe, Rule, Setting, Slice, Task, load_recipe, matches, parse_recipe
from cpimerge.references import Place, Reference
from cpimerge.yamltree import as_number

DIRECTORY = Path("/recipes")

# Five lines; what a test adds begins in line 6.
HEAD = """\
merge_method: cpi
base_model: ./base
models:
  - model: ./math
  - model: ./code
"""

FULL = """\
merge_method: cpi
base_model: ./base
models:
  - model: ./math
    name: arithmetic
    parameters: {density: 0.02, weight: 2}
  - model: /elsewhere/code/
parameters:
  density: 0.29
  scope: layer
  tau: .25
  stages: [[code], [arithmetic]]
  backbone: ../other/./run
  conflict: elect
  space: delta
  rest: 5E-1
  granularity: row
  exclude: ["*.bias", norm]
dtype: bfloat16
vocabulary: union
"""


def directory(path: str) -> Reference:
    return Reference(Place(Path(path)))


def parse(text: str) -> Recipe:
    return parse_recipe(text, Path("recipe.yml"), DIRECTORY)


def problems(text: str) -> list[str]:
    """What is said of a wrong recipe, without the file's name."""
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert all(line.startswith("recipe.yml:") for line in caught.value.problems)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return [line.removeprefix("recipe.yml:") for line in caught.value.problems]


def constant(key: str, value: Fraction | int, line: int) -> Setting:
    return Setting(key, (Rule(None, (Fraction(value),), line),))


# ---- What a right recipe means.


def test_every_key() -> None:
    recipe = parse(FULL)
    assert dataclasses.replace(recipe, lines={}) == Recipe(
        file=Path("recipe.yml"),
        base=directory("/recipes/base"),
        tasks=(
            Task(
                name="arithmetic",
                model=directory("/recipes/math"),
                line=4,
                density=constant("density", Fraction(1, 50), 6),
                weight=constant("weight", 2, 6),
                t=None,
            ),
            Task("code", directory("/elsewhere/code"), 7, None, None, None),
        ),
        density=constant("density", Fraction(29, 100), 9),
        weight=None,
        t=None,
        scope="layer",
        tau=Fraction(1, 4),
        order="recipe",
        stages=(("code",), ("arithmetic",)),
        backbone=directory("/other/run"),
        conflict="elect",
        space="delta",
        rest=Fraction(1, 2),
        granularity="row",
        exclude=(Exclude("*.bias", 18), Exclude("norm", 18)),
        dtype="bfloat16",
        vocabulary="union",
        lines={},
        text=FULL,
    )


def test_defaults_are_those_of_the_method() -> None:
    recipe = parse(HEAD)
    task = recipe.tasks[0]
    assert [task.name for task in recipe.tasks] == ["math", "code"]
    assert (recipe.scope, recipe.order, recipe.stages) == ("tensor", "recipe", None)
    assert (recipe.backbone, recipe.conflict, recipe.space) == ("last", "mean", "delta")
    assert (recipe.granularity, recipe.exclude, recipe.dtype, recipe.vocabulary) == ("tensor", (), None, None)
    assert (recipe.tau, recipe.rest) == ("auto", Fraction(1))
    assert recipe.density_of(task, "w", Fraction(0)) == Fraction(1, 100)
    assert recipe.weight_of(task, "w", Fraction(0)) == 1
    assert recipe.t_of(task, "w", Fraction(0)) is None


def test_lines_of_keys_and_entries() -> None:
    lines = parse(FULL).lines
    assert lines["merge_method"] == 1
    assert lines["models"] == 3
    assert lines["models[0].name"] == 5
    assert lines["models[1].model"] == 7
    assert lines["parameters.backbone"] == 13
    assert lines["parameters.exclude[1]"] == 18
    assert "" not in lines


def test_a_seed_orders_at_random() -> None:
    assert parse(HEAD + "parameters: {order: {seed: 7}}").order == 7
    assert parse(HEAD + "parameters: {order: recipe}").order == "recipe"
    assert parse(HEAD + "parameters: {order: {seed: 0}}").order == 0
    assert parse(HEAD + f"parameters: {{order: {{seed: {2**64 - 1}}}}}").order == 2**64 - 1


@pytest.mark.parametrize("name", ["x" * 100, "é" * 100])
def test_the_longest_names(name: str) -> None:
    assert parse(HEAD + f"  - {{model: ./x, name: {name}}}").tasks[2].name == name


def test_the_longest_number() -> None:
    assert parse(HEAD + "parameters: {tau: auto}").tau == "auto"
    recipe = parse(HEAD + f"parameters: {{tau: 0.{'1' * 98}}}")
    assert recipe.tau == Fraction(int("1" * 98), 10**98)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("last", "last"),
        ("base", "base"),
        ("math", "math"),
        ("./last", directory("/recipes/last")),
        (".hidden", directory("/recipes/.hidden")),
        ("org/name", directory("/recipes/org/name")),
        ("/a/../b", directory("/b")),
    ],
)
def test_backbone(written: str, meant: str | Reference) -> None:
    assert parse(HEAD + f"parameters: {{backbone: {written}}}").backbone == meant


def test_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = parse("merge_method: cpi\nbase_model: ~/base\nmodels: [{model: ~}]\nparameters: {backbone: ~/x}")
    assert recipe.base.model.path == Path("/home/someone/base")
    assert recipe.tasks[0] == Task("someone", directory("/home/someone"), 3)
    assert recipe.backbone == directory("/home/someone/x")


@pytest.mark.parametrize("name", ["on", "no", "123", "1e3", "0x10", "1:30", "null", "true", ".5", "2024-1-1", "é"])
def test_text_is_what_was_written(name: str) -> None:
    recipe = parse(
        f"merge_method: cpi\nbase_model: {name}\nmodels: [{{model: x, name: {name}}}, {{model: {name}2}}]\n"
        f"parameters: {{exclude: [{name}], stages: [[{name}, {name}2]], backbone: {name}}}"
    )
    assert recipe.base.model.path == DIRECTORY / name
    assert [task.name for task in recipe.tasks] == [name, f"{name}2"]
    assert recipe.tasks[1].model.model.path == DIRECTORY / f"{name}2"
    assert recipe.stages == ((name, f"{name}2"),)
    assert recipe.exclude == (Exclude(name, 4),)
    assert recipe.backbone == name


def test_one_directory_may_serve_two_tasks() -> None:
    recipe = parse("merge_method: cpi\nbase_model: b\nmodels: [{model: x, name: one}, {model: x, name: two}]")
    assert {task.name: task.model.model.path for task in recipe.tasks} == {
        "one": DIRECTORY / "x",
        "two": DIRECTORY / "x",
    }


def test_symlinks_are_kept(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    recipe = parse_recipe(
        "merge_method: cpi\nbase_model: link\nmodels: [{model: ./link/../link, name: x}]", None, tmp_path
    )
    assert recipe.base.model.path == recipe.tasks[0].model.model.path == tmp_path / "link"


def test_a_file_with_byte_order_mark_is_relative_to_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "r.yml"
    path.parent.mkdir()
    path.write_bytes(b"\xef\xbb\xbf" + HEAD.replace("./base", "../base").encode())
    recipe = load_recipe(str(path))
    assert recipe.file == path
    assert recipe.base.model.path == tmp_path / "base"
    assert recipe.tasks[0].model.model.path == tmp_path / "sub" / "math"


def test_a_relative_recipe_gives_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.yml").write_text(HEAD)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("r.yml")
    assert recipe.base.model.path == tmp_path / "base"
    assert recipe.file == Path("r.yml")


def test_a_document_may_have_its_marks() -> None:
    assert parse("%YAML 1.1\n--- # mine\n" + HEAD + "...\n").lines["merge_method"] == 3


# ---- Numbers, gradients and filters.


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("0.29", Fraction(29, 100)),
        ("1e-3", Fraction(1, 1000)),
        ("1E-3", Fraction(1, 1000)),
        (".5", Fraction(1, 2)),
        ("2", Fraction(2)),
        ("2.", Fraction(2)),
        ("+1.50e+1", Fraction(15)),
        ("-0.0", Fraction(0)),
        ("0.1000000000000000055511151231257827", Fraction(1000000000000000055511151231257827, 10**34)),
    ],
)
def test_a_number_is_the_decimal_as_written(written: str, value: Fraction) -> None:
    recipe = parse(HEAD + f"parameters: {{weight: {written}}}")
    assert recipe.weight == constant("weight", value, 6)


NOT_NUMBERS = ["0x10", "1_000", "1:30", ".inf", "-.INF", ".nan", "010", "0o17", "00.5", "1e", ".", "1e9999"]
NOT_NUMBERS += ["true", "null", "50%", "1/2", "٣", "0b1", "--1", "1 0", "inf", "nan"]


@pytest.mark.parametrize("written", NOT_NUMBERS)
def test_what_is_no_number(written: str) -> None:
    assert problems(HEAD + f"parameters: {{weight: {written}}}") == [
        f"6: parameters.weight: expected a decimal number such as 0.01 or 1e-3, got {written!r}"
    ]


@given(st.integers(-(10**30), 10**30), st.integers(0, 40), st.integers(-30, 30))
def test_any_decimal_is_exact(digits: int, places: int, exponent: int) -> None:
    text = str(abs(digits)).rjust(places + 1, "0")
    point = len(text) - places
    sign = "-" if digits < 0 else ""
    assert as_number(f"{sign}{text[:point]}.{text[point:]}e{exponent}") == Fraction(digits, 10**places) * (
        Fraction(10) ** exponent
    )


shares = st.fractions(0, 1)


@given(st.lists(shares, min_size=1, max_size=9), shares)
def test_a_gradient_is_linear_between_its_values(values: list[Fraction], depth: Fraction) -> None:
    got = Rule(None, tuple(values), 1).at(depth)
    # The same as a sum of hat functions, one a value.
    hats = (max(Fraction(0), 1 - abs(depth * (len(values) - 1) - index)) for index in range(len(values)))
    assert got == sum(hat * value for hat, value in zip(hats, values, strict=True))
    assert min(values) <= got <= max(values)


@given(st.lists(shares, min_size=2, max_size=9))
def test_a_gradient_passes_through_its_values(values: list[Fraction]) -> None:
    rule = Rule(None, tuple(values), 1)
    assert [rule.at(Fraction(index, len(values) - 1)) for index in range(len(values))] == values


@pytest.mark.parametrize("depth", [Fraction(-1, 10), Fraction(11, 10)])
def test_depth_outside_the_model(depth: Fraction) -> None:
    with pytest.raises(ValueError, match=r"^depth must be from 0 to 1, got (-1/10|11/10)$"):
        Rule(None, (Fraction(1),), 1).at(depth)


@pytest.mark.parametrize(
    ("filter", "tensor", "expected"),
    [
        ("bias", "layers.0.bias", True),
        ("bias", "layers.0.weight", False),
        ("*.bias", "layers.0.bias", True),
        ("*.bias", "layers.0.bias_scale", False),
        ("layers.?.w", "layers.3.w", True),
        ("layers.?.w", "layers.30.w", False),
        ("layers.[01].*", "layers.1.w", True),
        ("layers.[01].*", "layers.2.w", False),
        ("layers.1.", "layers.11.w", False),
        ("BIAS", "bias", False),
        ("*BIAS", "bias", False),
        ("*", "anything", True),
    ],
)
def test_matches(filter: str, tensor: str, expected: bool) -> None:
    assert matches(filter, tensor) is expected


@given(st.text(string.ascii_letters + string.digits + "._", min_size=1), st.text(string.ascii_letters + "._"))
def test_a_plain_word_matches_like_a_glob_around_it(word: str, tensor: str) -> None:
    assert matches(word, tensor) == matches(f"*{word}*", tensor) == (word in tensor)


RULES = """\
  - model: ./third
    parameters:
      density:
        - filter: mlp
          value: [0, 0.5, 1]
        - {filter: "*.bias", value: 1}
parameters:
  density:
    - {filter: embed, value: 0.3}
    - value: [0.1, 0.2]
  weight: [1, 3]
"""


@pytest.mark.parametrize(
    ("task", "tensor", "depth", "density"),
    [
        (2, "layers.0.mlp.w", Fraction(1, 4), Fraction(1, 4)),  # its own, as a gradient
        (2, "layers.0.mlp.bias", Fraction(3, 4), Fraction(3, 4)),  # the first match, not the best
        (2, "layers.0.attn.bias", Fraction(3, 4), Fraction(1)),
        (2, "layers.0.attn.w", Fraction(1, 2), Fraction(15, 100)),  # its own rules are silent: the recipe's
        (2, "embed.w", Fraction(1, 2), Fraction(3, 10)),
        (0, "layers.0.mlp.w", Fraction(1), Fraction(2, 10)),
        (0, "embed.w", Fraction(0), Fraction(3, 10)),
    ],
)
def test_overrides(task: int, tensor: str, depth: Fraction, density: Fraction) -> None:
    recipe = parse(HEAD + RULES)
    assert recipe.density_of(recipe.tasks[task], tensor, depth) == density
    assert recipe.weight_of(recipe.tasks[task], tensor, depth) == 1 + 2 * depth
    assert recipe.t_of(recipe.tasks[task], tensor, depth) is None


def test_rules_know_their_lines() -> None:
    recipe = parse(HEAD + RULES)
    own = recipe.tasks[2].density
    assert own == Setting(
        "density",
        (Rule("mlp", (Fraction(0), Fraction(1, 2), Fraction(1)), 9), Rule("*.bias", (Fraction(1),), 11)),
    )
    assert recipe.density == Setting(
        "density",
        (Rule("embed", (Fraction(3, 10),), 14), Rule(None, (Fraction(1, 10), Fraction(1, 5)), 15)),
    )
    assert recipe.weight == Setting("weight", (Rule(None, (Fraction(1), Fraction(3)), 16),))


def test_zero_overrides_a_setting() -> None:
    recipe = parse(HEAD + "    parameters: {density: 0, t: 0}\nparameters: {density: 0.5, t: 0.25}")
    start = Fraction(0)
    assert [recipe.density_of(task, "w", start) for task in recipe.tasks] == [Fraction(1, 2), 0]
    assert [recipe.t_of(task, "w", start) for task in recipe.tasks] == [Fraction(1, 4), 0]


def test_no_rule_matches() -> None:
    recipe = parse(HEAD + "parameters: {density: [{filter: a, value: 1}], t: [{filter: a, value: 1}]}")
    assert recipe.density is not None
    assert recipe.density.at("b", Fraction(0)) is None
    assert recipe.density_of(recipe.tasks[0], "b", Fraction(0)) == Fraction(1, 100)
    assert recipe.t_of(recipe.tasks[0], "b", Fraction(0)) is None


# ---- Slices, and what else mergekit's recipes say.

SLICES = """\
merge_method: cpi
base_model: ./base
slices:
  - sources:
      - model: ./math
        layer_range: [0, 2]
        parameters:
          density: {filter: mlp, value: [0, 1]}
      - {model: ./code, layer_range: [0, 2], name: python}
    parameters:
      density: 0.5
  - sources:
      - model: ./math
        layer_range: [2, 6]
      - model: ./code
        layer_range: [2, 6]
        parameters: {weight: 3}
    base_model: ../recipes/base
parameters:
  weight: [1, 2]
  density: 0.25
"""


def test_slices() -> None:
    """A source's parameters come first, then its slice's, then the recipe's; all go by the depth in the slice."""
    recipe = parse(SLICES)
    assert recipe.slices == (Slice(0, 2, 6), Slice(2, 6, 14))
    assert [(task.name, task.line) for task in recipe.tasks] == [("math", 5), ("python", 9)]
    math, python = recipe.tasks
    half = Fraction(1, 2)
    mlp, other = "layers.0.mlp.w", "layers.0.attn.w"
    assert [recipe.density_of(math, name, half, 0) for name in (mlp, other)] == [half, half]
    assert recipe.density_of(math, mlp, Fraction(1), 0) == 1
    assert recipe.density_of(python, mlp, Fraction(1), 0) == half
    assert [recipe.density_of(task, mlp, half, 1) for task in recipe.tasks] == [Fraction(1, 4)] * 2
    assert [recipe.weight_of(task, mlp, half, 0) for task in recipe.tasks] == [Fraction(3, 2)] * 2
    assert [recipe.weight_of(task, mlp, half, 1) for task in recipe.tasks] == [Fraction(3, 2), 3]


def test_rules_know_their_keys_and_slices() -> None:
    math, python = parse(SLICES).tasks
    assert math.density is not None
    assert python.weight is not None
    assert [(rule.key, rule.slice, rule.line) for rule in (*math.density.rules, *python.weight.rules)] == [
        ("slices[0].sources[0].parameters.density", 0, 8),
        ("slices[0].parameters.density", 0, 11),
        ("slices[1].sources[1].parameters.weight", 1, 17),
    ]
    own = parse(HEAD + RULES).tasks[2].density
    assert own is not None
    assert {rule.key for rule in own.rules} == {"models[2].parameters.density"}


def test_the_base_among_the_models_is_no_task() -> None:
    recipe = parse(HEAD.replace("./math", "../recipes/base"))
    assert [task.name for task in recipe.tasks] == ["code"]
    assert recipe.notes == ("recipe.yml:4: models[0]: is the base, which is read anyway; it is no task",)


def test_the_base_with_a_name_is_a_task_too() -> None:
    recipe = parse(HEAD + "  - {model: ./base, name: start, parameters: {density: 0}}")
    assert [task.name for task in recipe.tasks] == ["math", "code", "start"]
    assert recipe.notes == ()


def test_a_lone_filtered_value_needs_no_list() -> None:
    recipe = parse(shared("density: {filter: mlp, value: [0, 1]}"))
    assert recipe.density == Setting("density", (Rule("mlp", (Fraction(0), Fraction(1)), 7),))


@pytest.mark.parametrize(
    ("written", "dtype"),
    [
        ("dtype: float32\nout_dtype: bfloat16", "bfloat16"),
        ("out_dtype: float16", "float16"),
        ("dtype: bfloat16", "bfloat16"),
        ("", None),
    ],
)
def test_the_dtype_of_the_output(written: str, dtype: str | None) -> None:
    assert parse(HEAD + written).dtype == dtype


@pytest.mark.parametrize(
    ("written", "vocabulary"),
    [
        ("tokenizer_source: base", "base"),
        ("tokenizer_source: union", "union"),
        ("tokenizer_source: ../recipes/base", "base"),
        ("tokenizer: {source: base}", "base"),
        ("tokenizer: {source: ./base}", "base"),
        ("tokenizer: {}", "union"),  # mergekit's default
        ("vocabulary: base", "base"),
        ("", None),
    ],
)
def test_the_vocabulary_of_the_output(written: str, vocabulary: str | None) -> None:
    assert parse(HEAD + written).vocabulary == vocabulary


@pytest.mark.parametrize(
    ("written", "template"),
    [
        ("chat_template: auto", "auto"),
        ('chat_template: "{{ messages }}"', "{{ messages }}"),
        ("chat_template: |\n  {% if x %}\n  \u00e9\n  {% endif %}\n", "{% if x %}\n\u00e9\n{% endif %}\n"),
        ("", None),
    ],
)
def test_the_chat_template_of_the_output(written: str, template: str | None) -> None:
    assert parse(HEAD + written).chat_template == template


def test_what_is_done_anyway_may_be_said() -> None:
    recipe = parse(shared("normalize: true\n  int8_mask: True"))
    assert recipe.notes == ("recipe.yml:8: parameters.int8_mask: changes nothing; cores are stored as bitmaps anyway",)
    in_slice = parse(SLICES.replace("density: 0.5", "int8_mask: false"))
    assert in_slice.notes == (
        "recipe.yml:11: slices[0].parameters.int8_mask: changes nothing; cores are stored as bitmaps anyway",
    )


# ---- What is said of a wrong recipe.


def entry(text: str) -> str:
    """A recipe with one more model, which begins in line 6."""
    return HEAD + text


def shared(text: str) -> str:
    """A recipe whose `parameters`, in line 6, have `text` in line 7."""
    return f"{HEAD}parameters:\n  {text}\n"


LONG = "x" * 101
WIDE = "\u8a9e" * 67

TOP_KEYS = (
    "merge_method, base_model, models, slices, parameters, dtype, out_dtype, vocabulary, tokenizer_source, tokenizer, "
    "chat_template"
)

WRONG: dict[str, tuple[str, list[str]]] = {
    # Keys
    "unknown top key": (
        HEAD + "dtyp: float16",
        ["6: dtyp: unknown key; did you mean 'dtype'?"],
    ),
    "unknown key with nothing near": (
        HEAD + "zzz: 1",
        [f"6: zzz: unknown key; valid keys: {TOP_KEYS}"],
    ),
    "unknown parameter": (
        shared("densty: 0.1"),
        ["7: parameters.densty: unknown key; did you mean 'density'?"],
    ),
    "unknown key of a model": (
        entry("  - {model: ./x, nam: y}"),
        ["6: models[2].nam: unknown key; did you mean 'name'?"],
    ),
    "unknown parameter of a model": (
        entry("  - model: ./x\n    parameters:\n      wieght: 2"),
        ["8: models[2].parameters.wieght: unknown key; did you mean 'weight'?"],
    ),
    "unknown key of a rule": (
        shared("t: [{filtr: a, value: 1}]"),
        ["7: parameters.t[0].filtr: unknown key; did you mean 'filter'?"],
    ),
    "unknown key of order": (
        shared("order: {sead: 1}"),
        [
            "7: parameters.order.seed: is missing; give a whole number",
            "7: parameters.order.sead: unknown key; did you mean 'seed'?",
        ],
    ),
    "odd unknown key": (
        HEAD + '"a.b\\n": 1',
        [f"6: 'a.b\\n': unknown key; valid keys: {TOP_KEYS}"],
    ),
    "key named as an inner tag": (
        shared("t: 1\n  <list>: 2"),
        [
            "8: parameters.'<list>': unknown key; valid keys: density, weight, t, normalize, int8_mask, scope, "
            "tau, stages, order, backbone, conflict, space, rest, singular_values, granularity, exclude"
        ],
    ),
    "global parameter under a model": (
        entry("  - model: ./x\n    parameters: {tau: 0.1}"),
        ["7: models[2].parameters.tau: belongs under the recipe's parameters; a model's own are density, weight, t"],
    ),
    "parameter beside a model": (
        entry("  - {model: ./x, density: 0.1}"),
        ["6: models[2].density: belongs under models[2].parameters"],
    ),
    "global parameter beside a model": (
        entry("  - {model: ./x, scope: layer}"),
        ["6: models[2].scope: belongs under the recipe's parameters"],
    ),
    "parameter at the top": (
        HEAD + "tau: 0.1",
        ["6: tau: belongs under the recipe's parameters"],
    ),
    "top key among the parameters": (
        shared("dtype: float16"),
        ["7: parameters.dtype: belongs at the top level of the recipe"],
    ),
    # mergekit's keys
    "keys of mergekit that mean nothing here": (
        HEAD + "modules: {text: 1}\nparameters: {lambda: 1, rescale: false, gamma: 0.1}\ntokenizer: {tokens: {a: 1}}",
        [
            "6: modules: is not supported; list whole checkpoints under models; all their modules are merged",
            "7: parameters.lambda: is not supported; cores are taken whole, as at 1; rest is the factor on the "
            "non-core with space: delta",
            "7: parameters.rescale: is not supported; remove it; what is kept is not scaled",
            "7: parameters.gamma: is not supported; it belongs to another merge method; remove it",
            "8: tokenizer.tokens: is not supported; remove it; a row that a model lacks is the base's, and one that "
            "the base lacks the others' mean",
        ],
    ),
    "weights that are not made into shares": (
        shared("normalize: false"),
        [
            "7: parameters.normalize: false is not supported; shares by weight always add up to 1. Remove it",
        ],
    ),
    "a mask that is neither": (
        shared("int8_mask: 1"),
        ["7: parameters.int8_mask: expected true or false, got '1'"],
    ),
    "normalize of a model": (
        entry("  - {model: ./x, parameters: {normalize: true}}"),
        [
            "6: models[2].parameters.normalize: belongs under the recipe's parameters; a model's own are density, "
            "weight, t"
        ],
    ),
    "another tokenizer": (
        HEAD + "tokenizer_source: ./math",
        ["6: tokenizer_source: another model's tokenizer is not supported; write base or union"],
    ),
    "two words on the tokenizer": (
        HEAD + "tokenizer_source: base\ntokenizer: {source: ./math}\nvocabulary: base",
        [
            "6: tokenizer_source: vocabulary, line 8, says already which tokens the output has; remove one",
            "7: tokenizer: vocabulary, line 8, says already which tokens the output has; remove one",
            "7: tokenizer.source: another model's tokenizer is not supported; write base or union",
        ],
    ),
    "a template of mergekit's": (
        HEAD + "chat_template: chatml",
        ["6: chat_template: 'chatml' is a template that comes with mergekit; write its Jinja text, or auto"],
    ),
    "a template that is none": (
        HEAD + "chat_template: automatic",
        ["6: chat_template: expected auto or a Jinja template, got 'automatic'"],
    ),
    "a template as a list": (
        HEAD + "chat_template: [auto]",
        ["6: chat_template: expected auto or a Jinja template, got a list"],
    ),
    "a template with a control character": (
        HEAD + 'chat_template: "{{ x }}\\0"',
        ["6: chat_template: must not have control characters"],
    ),
    "float64": (
        HEAD + "out_dtype: float64",
        ["6: out_dtype: unknown value 'float64'; sums are computed in float32 or better; did you mean 'float32'?"],
    ),
    # Slices
    "models and slices": (
        HEAD + "slices: [{sources: [{model: ./math, layer_range: [0, 2]}]}]",
        ["6: slices: the checkpoints are listed under models already, line 3; remove one"],
    ),
    "a frankenmerge": (
        SLICES.replace("[0, 2], name", "[1, 3], name").replace("[2, 6]", "[1, 5]"),
        [
            "9: slices[0].sources[1].layer_range: differs from that of sources[0], [0, 2]: layers would change places, "
            "which is not supported; use mergekit for a merge of parts",
            "14: slices[1].sources[0].layer_range: begins at layer 1, where 2 is next: that repeats layers, which is "
            "not supported; use mergekit for a merge of parts",
        ],
    ),
    "slices that do not begin at the first layer": (
        SLICES.replace("[0, 2]", "[1, 2]"),
        [
            "6: slices[0].sources[0].layer_range: begins at layer 1, where 0 is next: that leaves out layers, which is "
            "not supported; use mergekit for a merge of parts"
        ],
    ),
    "other models in another slice": (
        SLICES.replace("      - model: ./code", "      - model: ./law"),
        [
            "12: slices[1].sources: must be the models of slices[0], line 4, in their order and with their names; "
            "use mergekit for a merge of parts"
        ],
    ),
    "another name in another slice": (
        SLICES.replace("weight: 3}", "weight: 3}\n        name: code"),
        [
            "12: slices[1].sources: must be the models of slices[0], line 4, in their order and with their names; "
            "use mergekit for a merge of parts"
        ],
    ),
    "another base in a slice": (
        SLICES.replace("../recipes/base", "./math"),
        ["18: slices[1].base_model: is not the recipe's base_model; use mergekit for a merge of parts"],
    ),
    "ranges that are none": (
        SLICES.replace("layer_range: [0, 2], name", "layer_range: 2, name")
        .replace("[0, 2]", "[2, 2]")
        .replace("layer_range: [2, 6]\n        parameters", "layer_range: [2, x]\n        parameters")
        .replace("[2, 6]", "[2]"),
        [
            "6: slices[0].sources[0].layer_range: must have at least one layer, got [2, 2]",
            "9: slices[0].sources[1].layer_range: expected two whole numbers such as [0, 32], got '2'",
            "14: slices[1].sources[0].layer_range: expected two whole numbers such as [0, 32], got 1 entries",
            "16: slices[1].sources[1].layer_range: expected a decimal number such as 0.01 or 1e-3, got 'x'",
        ],
    ),
    "keys of slices in wrong places": (
        SLICES.replace("layer_range: [0, 2]\n", "layer_rang: [0, 2]\n")
        .replace("density: 0.5", "tau: 0.5")
        .replace("    base_model: ../recipes/base", "    weight: 1\n    scope: layer\n    residual_weight: 1"),
        [
            "5: slices[0].sources[0].layer_range: is missing; give the layers that the slice takes of every model, "
            "such as [0, 32]",
            "6: slices[0].sources[0].layer_rang: unknown key; did you mean 'layer_range'?",
            "11: slices[0].parameters.tau: belongs under the recipe's parameters; a slice's own are density, weight, t",
            "18: slices[1].weight: belongs under slices[1].parameters",
            "19: slices[1].scope: belongs under the recipe's parameters",
            "20: slices[1].residual_weight: is not supported; remove it; mergekit does not use it either",
        ],
    ),
    "a slice without sources": (
        "merge_method: cpi\nbase_model: b\nslices:\n  - parameters: {density: 0}",
        [
            "4: slices[0].sources: is missing; list the models of the slice, each as '- model: DIRECTORY' with a "
            "layer_range"
        ],
    ),
    "a slice without sources before another": (
        "merge_method: cpi\nbase_model: b\nslices:\n  - parameters: {density: 0}\n"
        "  - sources: [{model: a, layer_range: [0, 2]}]",
        [
            "4: slices[0].sources: is missing; list the models of the slice, each as '- model: DIRECTORY' with a "
            "layer_range"
        ],
    ),
    "fewer models in another slice": (
        SLICES.replace("      - model: ./code\n        layer_range: [2, 6]\n        parameters: {weight: 3}\n", ""),
        [
            "12: slices[1].sources: must be the models of slices[0], line 4, in their order and with their names; "
            "use mergekit for a merge of parts"
        ],
    ),
    "slices as a mapping": (
        "merge_method: cpi\nbase_model: b\nslices: {sources: []}",
        ["3: slices: expected a list ([a, b], or lines that begin with '- '), got a mapping"],
    ),
    "no slices": (
        "merge_method: cpi\nbase_model: b\nslices: []",
        ["3: slices: is an empty list; give it an entry or remove it"],
    ),
    "t of a slice and weight of a source": (
        SLICES.replace("density: 0.5", "t: 0.5"),
        ["11: slices[0].parameters.t: sets a constant factor, so weight has no effect; remove one"],
    ),
    "parameters of the base": (
        entry("  - {model: ./base, parameters: {weight: 1}}"),
        ["6: models[2].parameters: the base is no task; remove them, or give the base a name: to make it one too"],
    ),
    "only the base": (
        "merge_method: cpi\nbase_model: ./base\nmodels: [{model: base}]",
        ["3: models: has only the base; list its fine-tunes"],
    ),
    "another method": (
        HEAD.replace("cpi", "ties"),
        [
            "1: merge_method: 'ties' is not supported; cpimerge has one method, cpi: with equal weights and lambda 1 "
            "it is cpi with conflict: elect, space: delta and rest: 0, see recipes/ties.yml"
        ],
    ),
    "an unknown method": (
        HEAD.replace("cpi", "cip"),
        ["1: merge_method: 'cip' is not supported; cpimerge has one method, cpi"],
    ),
    "duplicate key": (
        shared("tau: 0.1\n  rest: 1\n  tau: 0.1"),
        ["9: parameters.tau: given twice, first in line 7; remove one"],
    ),
    "duplicate section": (
        HEAD + "parameters: {tau: 0.1}\nparameters: {tau: 0.1, tau: 7}",
        ["7: parameters: given twice, first in line 6; remove one"],
    ),
    "missing keys": (
        "parameters:\n  tau: 0.1",
        [
            "1: merge_method: is missing; write merge_method: cpi",
            "1: base_model: is missing; give the directory of the models' common base checkpoint",
            "1: models: is missing; list the fine-tuned checkpoints, each as '- model: DIRECTORY'",
        ],
    ),
    "missing model": (
        entry("  - name: x"),
        ["6: models[2].model: is missing; give the directory of a fine-tuned checkpoint"],
    ),
    "missing value": (
        shared("weight:\n    - filter: a"),
        ["8: parameters.weight[0].value: is missing; give a number or a list of numbers"],
    ),
    # Structure
    "no models": (
        "merge_method: cpi\nbase_model: b\nmodels: []",
        ["3: models: is an empty list; give it an entry or remove it"],
    ),
    "models as a mapping": (
        "merge_method: cpi\nbase_model: b\nmodels:\n  model: x",
        ["3: models: expected a list ([a, b], or lines that begin with '- '), got a mapping"],
    ),
    "a model as text": (
        entry("  - ./x"),
        ["6: models[2]: expected keys with values, such as 'key: value', got './x'"],
    ),
    "a model's path as a mapping": (
        entry("  - model: {path: x}"),
        ["6: models[2].model: expected text, got a mapping"],
    ),
    "parameters as a list": (
        HEAD + "parameters:\n  - tau: 0.1",
        ["6: parameters: expected keys with values, such as 'key: value', got a list"],
    ),
    "a number as a mapping": (
        shared("tau: {filter: a, value: 1}"),
        ["7: parameters.tau: expected a decimal number such as 0.01 or 1e-3, got a mapping"],
    ),
    "numbers and rules mixed": (
        shared("density: [0.1, {value: 0.2}]"),
        ["7: parameters.density[0]: expected keys with values, such as 'key: value', got '0.1'"],
    ),
    "an empty gradient": (
        shared("density: []"),
        ["7: parameters.density: is an empty list; give it an entry or remove it"],
    ),
    "an empty gradient in a rule": (
        shared("density: [{value: []}]"),
        ["7: parameters.density[0].value: is an empty list; give it an entry or remove it"],
    ),
    "nested gradients": (
        shared("density: [[0.1]]"),
        ["7: parameters.density[0]: expected a decimal number such as 0.01 or 1e-3, got a list"],
    ),
    "a rule's value as a mapping": (
        shared("density: [{value: {a: 1}}]"),
        ["7: parameters.density[0].value: expected a number or a list of numbers, got a mapping"],
    ),
    "a key without value": (
        shared("density:\n  tau: 0.1"),
        ["7: parameters.density: has no value; give it one or remove it"],
    ),
    "all parameters commented out": (
        HEAD + "parameters:\n#  tau: 0.1",
        ["6: parameters: has no value; give it one or remove it"],
    ),
    "an entry without value": (
        entry("  -"),
        ["6: models[2]: has no value; give it one or remove it"],
    ),
    "exclude as text": (
        shared("exclude: '*.bias'"),
        ["7: parameters.exclude: expected a list ([a, b], or lines that begin with '- '), got '*.bias'"],
    ),
    # Values
    "density above 1": (
        shared("density: 5"),
        ["7: parameters.density: must be from 0 to 1 (a share: 1 % is 0.01), got 5"],
    ),
    "density of a model below 0": (
        entry("  - model: ./x\n    parameters:\n      density: [0.5, -1e-9]"),
        ["8: models[2].parameters.density[1]: must be from 0 to 1 (a share: 1 % is 0.01), got -1e-9"],
    ),
    "negative weight": (
        shared("weight: [{filter: a, value: -1}]"),
        ["7: parameters.weight[0].value: must be 0 or more, got -1"],
    ),
    "t above 1": (
        shared("t: 1.0001"),
        ["7: parameters.t: must be from 0 to 1, got 1.0001"],
    ),
    "tau above 1": (
        shared("tau: 2"),
        ["7: parameters.tau: must be from 0 to 1, got 2"],
    ),
    "a word for tau": (
        shared("tau: Auto"),
        ["7: parameters.tau: unknown value 'Auto'; write auto, or a number from 0 to 1"],
    ),
    "rest above 1": (
        shared("rest: 1.5\n  space: delta"),
        ["7: parameters.rest: must be from 0 to 1, got 1.5"],
    ),
    "a quoted number": (
        shared('tau: "0.1"'),
        ["7: parameters.tau: expected a number, got the quoted text '0.1'; remove the quotes"],
    ),
    "a very long number": (
        shared("tau: 0." + "1" * 99),
        [f"7: parameters.tau: expected a number of at most 100 characters, got '0.{'1' * 58}…'"],
    ),
    "hexadecimal": (
        shared("tau: 0x1"),
        ["7: parameters.tau: expected a decimal number such as 0.01 or 1e-3, got '0x1'"],
    ),
    "a seed that is not whole": (
        shared("order: {seed: 1.5}"),
        [f"7: parameters.order.seed: must be a whole number from 0 to {2**64 - 1}, got 1.5"],
    ),
    "a negative seed": (
        shared("order: {seed: -1}"),
        [f"7: parameters.order.seed: must be a whole number from 0 to {2**64 - 1}, got -1"],
    ),
    "a seed too large": (
        shared(f"order: {{seed: {2**64}}}"),
        [f"7: parameters.order.seed: must be a whole number from 0 to {2**64 - 1}, got {2**64}"],
    ),
    "a seed without its key": (
        shared("order: 7"),
        ["7: parameters.order: unknown value '7'; valid values: recipe"],
    ),
    "order as a list": (
        shared("order: [math, code]"),
        ["7: parameters.order: expected recipe or {seed: a whole number}, got a list"],
    ),
    "unknown scope": (
        shared("scope: tensors"),
        ["7: parameters.scope: unknown value 'tensors'; did you mean 'tensor'?"],
    ),
    "unknown conflict with nothing near": (
        shared("conflict: vote"),
        ["7: parameters.conflict: unknown value 'vote'; valid values: last, first, largest, mean, elect"],
    ),
    "unknown space": (
        shared("space: Delta"),
        ["7: parameters.space: unknown value 'Delta'; did you mean 'delta'?"],
    ),
    "a value as long as is shown": (
        shared("scope: " + "x" * 60),
        [f"7: parameters.scope: unknown value '{'x' * 60}'; valid values: tensor, layer, global"],
    ),
    "a value longer than is shown": (
        shared("scope: " + "x" * 61),
        [f"7: parameters.scope: unknown value '{'x' * 60}…'; valid values: tensor, layer, global"],
    ),
    "unknown granularity": (
        shared("granularity: rows"),
        ["7: parameters.granularity: unknown value 'rows'; did you mean 'row'?"],
    ),
    "unknown vocabulary": (
        HEAD + "vocabulary: all",
        ["6: vocabulary: unknown value 'all'; valid values: base, union"],
    ),
    "bf16": (HEAD + "dtype: bf16", ["6: dtype: unknown value 'bf16'; did you mean 'bfloat16'?"]),
    "fp16": (HEAD + "dtype: fp16", ["6: dtype: unknown value 'fp16'; did you mean 'float16'?"]),
    "fp32": (HEAD + "dtype: fp32", ["6: dtype: unknown value 'fp32'; did you mean 'float32'?"]),
    "auto": (
        HEAD + "dtype: auto",
        ["6: dtype: unknown value 'auto'; leave dtype out to keep the dtypes of the base"],
    ),
    "an empty filter": (shared('exclude: ["", a]'), ["7: parameters.exclude[0]: must not be empty"]),
    "a control character": (
        HEAD.replace("./base", '"a\\0b"'),
        ["2: base_model: must not have control characters or line breaks, got 'a\\x00b'"],
    ),
    "half a surrogate": (
        HEAD.replace("./base", '"~\\ud800"'),
        ["2: base_model: must not have control characters or line breaks, got '~\\ud800'"],
    ),
    "a path over two lines": (
        HEAD.replace("./base", "|\n  a\n  b"),
        ["2: base_model: must not have control characters or line breaks, got 'a\\nb\\n'"],
    ),
    # Names
    "one default name twice": (
        entry("  - model: ../code/"),
        ["6: models[2].model: a task is named 'code' already, line 5; set name: for this model"],
    ),
    "one name twice": (
        entry("  - model: ./x\n    name: math"),
        ["7: models[2].name: a task is named 'math' already, line 4; give another name"],
    ),
    "a reserved directory": (
        entry("  - model: ../base"),
        [
            "6: models[2].model: 'base' cannot be a task's name, as it is reserved for the backbone; "
            "set name: for this model"
        ],
    ),
    "a reserved name": (
        entry("  - {model: ./x, name: last}"),
        ["6: models[2].name: 'last' cannot be a task's name, as it is reserved for the backbone; give another name"],
    ),
    "the name of an external backbone": (
        entry("  - {model: ./x, name: backbone}"),
        [
            "6: models[2].name: 'backbone' cannot be a task's name, as it is reserved for the backbone; "
            "give another name"
        ],
    ),
    "a name with a slash": (
        entry("  - {model: ./x, name: a/b}"),
        ["6: models[2].name: 'a/b' cannot be a task's name, as it is not usable as a file name; give another name"],
    ),
    "two dots as a name": (
        entry("  - {model: ./x, name: ..}"),
        ["6: models[2].name: '..' cannot be a task's name, as it is not usable as a file name; give another name"],
    ),
    "no name to be had": (
        entry("  - model: /"),
        [
            "6: models[2].model: '' cannot be a task's name, as it is not usable as a file name; "
            "set name: for this model"
        ],
    ),
    "a long name": (
        entry(f"  - {{model: ./x, name: {LONG}}}"),
        [
            f"6: models[2].name: '{LONG[:60]}…' cannot be a task's name, as it is longer than 100 characters or "
            "200 bytes; give another name"
        ],
    ),
    "a name of many bytes": (
        entry(f"  - {{model: ./x, name: {WIDE}}}"),
        [
            f"6: models[2].name: '{WIDE[:60]}…' cannot be a task's name, as it is longer than 100 characters or "
            "200 bytes; give another name"
        ],
    ),
    "an empty name": (
        entry("  - {model: ./x, name: ''}"),
        ["6: models[2].name: must not be empty"],
    ),
    # Values that do not go together
    "stages and order": (
        shared("stages: [[math, code]]\n  order: recipe"),
        ["8: parameters.order: stages, line 7, give the order already; remove one"],
    ),
    "an unknown task in the stages": (
        shared("stages: [[maht, code]]"),
        [
            "7: parameters.stages[0][0]: no task is named 'maht'; did you mean 'math'?",
            "7: parameters.stages: must have every task; missing: math",
        ],
    ),
    "an unknown task with nothing near": (
        shared("stages: [[math, code], [zzz]]"),
        ["7: parameters.stages[1][0]: no task is named 'zzz'; tasks: math, code"],
    ),
    "a task twice in the stages": (
        shared("stages:\n    - [math, code]\n    - [math]"),
        ["9: parameters.stages[1][0]: 'math' is in a stage already, line 8; remove one"],
    ),
    "a task in no stage": (
        entry("  - model: ./law\nparameters:\n  stages: [[code]]"),
        ["8: parameters.stages: must have every task; missing: math, law"],
    ),
    "stages as one list": (
        shared("stages: [math, code]"),
        [
            f"7: parameters.stages[{index}]: expected a list ([a, b], or lines that begin with '- '), got {name!r}"
            for index, name in enumerate(("math", "code"))
        ],
    ),
    "stages where a model's name is not known": (
        entry("  - ./x\nparameters: {stages: [[math, x]], backbone: x}"),
        ["6: models[2]: expected keys with values, such as 'key: value', got './x'"],
    ),
    "stages without models": (
        "merge_method: cpi\nbase_model: b\nparameters: {stages: [[x]], backbone: x}",
        ["1: models: is missing; list the fine-tuned checkpoints, each as '- model: DIRECTORY'"],
    ),
    "an empty stage": (
        shared("stages: [[math, code], []]"),
        ["7: parameters.stages[1]: is an empty list; give it an entry or remove it"],
    ),
    "an unknown backbone": (
        shared("backbone: coed"),
        ["7: parameters.backbone: no task is named 'coed'; did you mean 'code'? (a path needs a '/', such as ./coed)"],
    ),
    "an unknown backbone with nothing near": (
        shared("backbone: zzz"),
        [
            "7: parameters.backbone: no task is named 'zzz'; valid names: base, last, math, code "
            "(a path needs a '/', such as ./zzz)"
        ],
    ),
    "a backbone given by a task's path": (
        shared("backbone: ../recipes/math"),
        ["7: parameters.backbone: is the directory of 'math'; write backbone: math"],
    ),
    "a backbone given by the base's path": (
        shared("backbone: ./base"),
        ["7: parameters.backbone: is the directory of 'base'; write backbone: base"],
    ),
    "rest of weights": (
        shared("space: weights\n  rest: 0"),
        ["8: parameters.rest: scales deltas, and space is weights; remove one of the two"],
    ),
    "t and weight": (
        shared("t: 0.5\n  weight: 2"),
        ["7: parameters.t: sets a constant factor, so weight has no effect; remove one"],
    ),
    "t of a model and weight of another": (
        entry("    parameters: {weight: 2}\n  - model: ./x\n    parameters: {t: 0.5}"),
        ["8: models[2].parameters.t: sets a constant factor, so weight has no effect; remove one"],
    ),
    "a rule after one without filter": (
        shared("weight:\n    - value: 1\n    - {filter: a, value: 2}\n    - {filter: b, value: 3}"),
        ["9: parameters.weight[1]: never applies, as the entry in line 8 matches every tensor; put that one last"],
    ),
    "a model's rule after a star": (
        entry('  - model: ./x\n    parameters:\n      t: [{filter: "*", value: 1}, {value: 0}]'),
        ["8: models[2].parameters.t[1]: never applies, as the entry in line 8 matches every tensor; put that one last"],
    ),
    # Not one YAML document
    "empty": ("", ["1: the recipe is empty"]),
    "only a comment": ("# to do\n", ["1: the recipe is empty"]),
    "only a mark": ("---\n", ["1: the recipe is empty"]),
    "a list": ("\n- a\n", ["2: expected keys and values such as 'merge_method: cpi', got a list"]),
    "text": ("hello", ["1: expected keys and values such as 'merge_method: cpi', got 'hello'"]),
    "two documents": (
        HEAD + "---\na: 1",
        ["6: a second YAML document starts here; a recipe is one document"],
    ),
    "a tab": (
        HEAD + "parameters:\n\ttau: 0.1",
        ["7: has a tab where YAML allows only spaces; replace it by spaces"],
    ),
    "a star without quotes": (
        shared("exclude: [*.bias]"),
        ['7: a value that starts with * must be in quotes, such as "*.bias"'],
    ),
    "wrong indentation": (
        HEAD + " dtype: float16",
        [
            "6: not valid YAML: expected <block end>, but found '<block mapping start>' "
            "(while parsing a block mapping that starts in line 1)"
        ],
    ),
    "an open quote": (
        HEAD + "dtype: 'float16\n",
        ["7: not valid YAML: found unexpected end of stream (while scanning a quoted scalar that starts in line 6)"],
    ),
    "an open bracket": (
        HEAD + "x: {a: 1",
        [
            "6: not valid YAML: expected ',' or '}', but got '<stream end>' "
            "(while parsing a flow mapping that starts in line 6)"
        ],
    ),
    "two colons": (HEAD + "dtype: a: b", ["6: not valid YAML: mapping values are not allowed here"]),
    "a raw control character": (HEAD + "dtype: \x07", ["6: has the control character U+0007; remove it"]),
    "a control character after an empty line": (
        "\n" + HEAD + "dtype: \x07",
        ["7: has the control character U+0007; remove it"],
    ),
    "as deep as allowed": (
        HEAD + "dtype: " + "[" * 19 + "]" * 19,
        ["6: dtype: expected text, got a list"],
    ),
    "one deeper": (HEAD + "dtype: " + "[" * 20 + "]" * 20, ["6: values are nested more than 20 deep"]),
    "an abyss": (HEAD + "dtype: " + "[" * 100_000, ["6: values are nested more than 20 deep"]),
    # YAML that a recipe does without
    "an anchor": (
        HEAD.replace("./base", "&here ./base"),
        ["2: base_model: YAML anchors such as '&here' are not supported; remove it"],
    ),
    "an alias": (
        HEAD + "dtype: *here",
        ["6: dtype: '*here' is a YAML alias; put it in quotes, or write the value out"],
    ),
    "a merge key": (
        HEAD + "parameters:\n  <<: {tau: 0.1}",
        ["7: parameters: YAML merge keys (<<) are not supported; write the keys out"],
    ),
    "a tag": (
        shared("tau: !!float 0.1"),
        ["7: parameters.tau: YAML tags such as 'tag:yaml.org,2002:float' are not supported; remove it"],
    ),
    "a tagged key": (
        shared("!a tau: 0.1"),
        ["7: parameters: YAML anchors and tags are not supported; remove it"],
    ),
    "a tag that would run code": (
        HEAD + 'dtype: !!python/object/apply:os.system ["true"]',
        [
            "6: dtype: YAML tags such as 'tag:yaml.org,2002:python/object/apply:os.system' are not "
            "supported; remove it",
            "6: dtype: expected text, got a list",
        ],
    ),
    "a list as a key": (HEAD + "[a, [b]]: 1", ["6: a key must be a word"]),
    "no key": (HEAD + "? \n: 1", ["6: a key must be a word"]),
}


@pytest.mark.parametrize(("text", "expected"), WRONG.values(), ids=WRONG.keys())
def test_wrong_recipe(text: str, expected: list[str]) -> None:
    assert problems(text) == expected


def test_all_problems_come_at_once_and_in_order() -> None:
    assert problems("""\
merge_method: cpi
base_model: ./base
models:
  - model: ./math
    naem: x
  - model: ./other/math
    parameters: {density: 2, scope: layer}
parameters:
  order: recipe
  stages: [[math], [cod]]
  tau: 0.1
  tau: x
  rest: 0
  t: 1
  weight:
  space: weights
dtype: bf16
""") == [
        "5: models[0].naem: unknown key; did you mean 'name'?",
        "6: models[1].model: a task is named 'math' already, line 4; set name: for this model",
        "7: models[1].parameters.density: must be from 0 to 1 (a share: 1 % is 0.01), got 2",
        "7: models[1].parameters.scope: belongs under the recipe's parameters; a model's own are density, weight, t",
        "9: parameters.order: stages, line 10, give the order already; remove one",
        "10: parameters.stages[1][0]: no task is named 'cod'; tasks: math",
        "12: parameters.tau: given twice, first in line 11; remove one",
        "13: parameters.rest: scales deltas, and space is weights; remove one of the two",
        "14: parameters.t: sets a constant factor, so weight has no effect; remove one",
        "15: parameters.weight: has no value; give it one or remove it",
        "17: dtype: unknown value 'bf16'; did you mean 'bfloat16'?",
    ]


def test_without_a_file_the_recipe_is_called_so() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe("a: 1", None, DIRECTORY)
    assert caught.value.problems[0] == "recipe:1: merge_method: is missing; write merge_method: cpi"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\n" + HEAD.encode() + b"# caf\xe9", ":7: is not UTF-8 text; save the recipe as UTF-8"),
        (HEAD.encode("utf-16"), ":1: is not UTF-8 text; save the recipe as UTF-8"),
        (b"#" * 1_000_001, ": is larger than 1 MB; a recipe is a short YAML file"),
        (b"#" * 1_000_000, ":1: the recipe is empty"),
    ],
    ids=["latin 1", "utf-16", "too large", "as large as allowed"],
)
def test_unreadable_file(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "r.yml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.problems == (f"{path}{expected}",)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "none.yml")
    assert caught.value.problems == (f"{tmp_path / 'none.yml'}: cannot be read: No such file or directory",)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path)
    assert caught.value.problems == (f"{tmp_path}: cannot be read: Is a directory",)


# ---- Any text either is a recipe or is a RecipeError: never another exception.


def parse_or_explain(text: str) -> None:
    told: tuple[str, ...] = ()
    try:
        parse(text)
    except RecipeError as error:
        told = error.problems or ("nothing is told",)
    assert all(line.startswith("recipe.yml:") and "\n" not in line for line in told)


WORDS = ["merge_method", "base_model", "models", "model", "name", "parameters", "density", "weight", "stages"]
WORDS += ["order", "seed", "backbone", "rest", "filter", "value", "cpi", "0.5", "-1", "*", "'*'", "~", "&a", "!b"]
WORDS += ["<<", "[", "]", "{", "}", "'", '"', "#", "|", "é", "\\0", "/", ":"]
words = st.sampled_from([*WORDS, ": ", "- ", ", ", "\n", "\n  ", "\n    ", "\t"])


@given(st.lists(words, max_size=60).map("".join), st.booleans())
def test_any_text(text: str, headed: bool) -> None:
    parse_or_explain(HEAD + text if headed else text)


scalars = st.sampled_from(["0.5", "2", "math", "base", "''", "", '"0.1"', "cpi", "delta", '"~\\0"', "./math"])
inner_keys = st.sampled_from(["filter", "value", "seed", "model", "name", "t"])
outer_keys = ["density", "weight", "t", "stages", "order", "backbone", "rest", "exclude", "models", "dtype"]


def collections(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.tuples(inner_keys, inner).map(": ".join)
    lists = st.lists(inner, max_size=3).map(lambda entries: f"[{', '.join(entries)}]")
    return lists | st.lists(pairs, max_size=3).map(lambda entries: f"{{{', '.join(entries)}}}")


values = st.recursive(scalars, collections, max_leaves=8)


@given(st.dictionaries(st.sampled_from(outer_keys), values, max_size=4), st.none() | values)
def test_any_structure(items: dict[str, str], model: str | None) -> None:
    text = HEAD + (f"  - {model}\n" if model is not None else "")
    parse_or_explain(text + "parameters:\n" + "".join(f"  {key}: {value}\n" for key, value in items.items()))


top_keys = ["slices", "tokenizer", "tokenizer_source", "chat_template", "out_dtype", "vocabulary", "models"]
slice_values = st.recursive(
    scalars | st.sampled_from(["[0, 2]", "[2, 4]", "[2, 1]", "[x, 4]", "base"]),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda entries: f"[{', '.join(entries)}]")
        | st.lists(
            st.tuples(
                st.sampled_from(["sources", "layer_range", "model", "name", "parameters", "base_model"]), inner
            ).map(": ".join),
            max_size=3,
        ).map(lambda entries: f"{{{', '.join(entries)}}}")
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(st.sampled_from(top_keys), values | slice_values, max_size=3),
    st.lists(st.lists(st.none() | slice_values, max_size=2), max_size=3),
)
def test_any_slices(items: dict[str, str], sources: list[list[str | None]]) -> None:
    """Sources as they should be (None) among others that are anything."""
    text = "merge_method: cpi\nbase_model: ./base\n" + "".join(f"{key}: {value}\n" for key, value in items.items())
    if sources:
        right = "{model: ./math, layer_range: [0, 2]}"
        lists = (", ".join(right if source is None else source for source in group) for group in sources)
        text += "slices: [" + ", ".join(f"{{sources: [{group}]}}" for group in lists) + "]\n"
    parse_or_explain(text)


def test_importing_recipes_is_light() -> None:
    heavy = "torch", "numpy", "numba", "transformers", "click", "rich"
    code = f"import sys, cpimerge.recipe; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
