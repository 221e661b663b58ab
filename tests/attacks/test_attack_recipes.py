"""Recipes that are bombs, that hide something, or that name what a recipe should not name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attacks.attack import Spoil, check, done, folder, sparse, text
from cpimerge.recipe_schema import Document

RECIPE = "recipe.yml"
SOUND = "merge_method: cpi\nbase_model: ./base\nmodels:\n  - model: ./math\n  - model: ./code\n"
MISSING = "base_model: is missing; give the directory of the models' common base checkpoint"
KEYS = ", ".join(Document.model_fields)
LONG = "a/" * 1500 + "a"
NO_DIRECTORY = "no such directory. Correct the path; a model on the Hugging Face Hub is written org/name"
CONSTANTS = {"MISSING": MISSING, "KEYS": KEYS, "NO_DIRECTORY": NO_DIRECTORY}


def recipe(content: str | bytes) -> Spoil:
    return text(RECIPE, content)


def more(content: str) -> Spoil:
    """A sound recipe and something more."""
    return recipe(SOUND + content)


def parameter(content: str) -> Spoil:
    return more(f"parameters:\n  {content}\n")


def base(path: str) -> Spoil:
    """A recipe with this base, as JSON writes it."""
    return recipe(SOUND.replace("./base", json.dumps(path)))


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 30))

BOMBS: dict[str, tuple[Spoil, list[str]]] = {
    "a billion laughs": (
        recipe(LAUGHS),
        [
            "recipe.yml:1: a0: YAML anchors such as '&a0' are not supported; remove it",
            "recipe.yml:1: merge_method: is missing; write merge_method: cpi",
            "...",
        ],
    ),
    "a billion laughs in a value": (
        more(LAUGHS),
        [
            "recipe.yml:6: a0: YAML anchors such as '&a0' are not supported; remove it",
            f"recipe.yml:6: a0: unknown key; valid keys: {KEYS}",
            "...",
        ],
    ),
    "a list in itself": (
        recipe("&a [*a]"),
        ["recipe.yml:1: expected keys and values such as 'merge_method: cpi', got a list"],
    ),
    "a mapping in itself": (
        recipe("a: &a {b: *a}"),
        [
            "recipe.yml:1: a: YAML anchors such as '&a' are not supported; remove it",
            "recipe.yml:1: a.b: '*a' is a YAML alias; put it in quotes, or write the value out",
            "...",
        ],
    ),
    "merged keys": (
        more("<<: {dtype: float32}\n"),
        ["recipe.yml:6: YAML merge keys (<<) are not supported; write the keys out"],
    ),
    "lists in lists": (recipe("a: " + "[" * 100_000), ["recipe.yml:1: values are nested more than 20 deep"]),
    "mappings in mappings": (recipe("{a: " * 100_000), ["recipe.yml:1: values are nested more than 20 deep"]),
    "lines in lines": (
        recipe("".join(" " * depth + "a:\n" for depth in range(900))),
        ["recipe.yml:21: values are nested more than 20 deep"],
    ),
    "dashes": (recipe("- " * 100_000), ["recipe.yml:1: values are nested more than 20 deep"]),
    "an abyss for a key": (
        more("? " + "[" * 100_000 + "]" * 100_000 + "\n: 1\n"),
        ["recipe.yml:6: values are nested more than 20 deep"],
    ),
    "an abyss given twice": (
        more("dtype: float32\ndtype: " + "[" * 100_000),
        ["recipe.yml:7: values are nested more than 20 deep"],
    ),
    "keys in keys": (recipe("? " * 100_000 + "a"), ["recipe.yml:1: values are nested more than 20 deep"]),
    "more than a recipe has": (
        recipe("a: " + "x" * 1_000_001),
        ["recipe.yml: is larger than 1 MB; a recipe is a short YAML file"],
    ),
    "a hole of a terabyte": (sparse(RECIPE), ["recipe.yml: is larger than 1 MB; a recipe is a short YAML file"]),
    "a long number": (
        parameter("density: 0." + "1" * 100_000),
        [
            "recipe.yml:7: parameters.density: expected a number of at most 100 characters, got "
            "'0.1111111111111111111111111111111111111111111111111111111111…'"
        ],
    ),
    "an exponent without end": (
        parameter("density: 1e-999999999"),
        ["recipe.yml:7: parameters.density: expected a decimal number such as 0.01 or 1e-3, got '1e-999999999'"],
    ),
    "a large exponent": (
        parameter("density: 1e999"),
        ["recipe.yml:7: parameters.density: must be from 0 to 1 (a share: 1 % is 0.01), got 1e999"],
    ),
    "a large seed": (
        parameter(f"order: {{seed: {10**30}}}"),
        [
            "recipe.yml:7: parameters.order.seed: must be a whole number from 0 to 18446744073709551615, got "
            "1000000000000000000000000000000"
        ],
    ),
    "patterns that backtrack": (
        parameter("exclude: ['" + "*a" * 30 + "b']"),
        [
            "recipe.yml:7: parameters.exclude: filter "
            "'*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*ab' matches no tensor of the base; "
            "the first is 'embed.weight'"
        ],
    ),
    "a long pattern": (
        parameter("exclude: ['" + "*a" * 100_000 + "']"),
        [
            "recipe.yml:7: parameters.exclude: filter "
            "'*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*"
            "...*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*"
            "a*a' matches no tensor of the base; the first is 'embed.weight'"
        ],
    ),
    "a long word": (
        recipe("merge_method: " + "x" * 900_000),
        [
            (
                "recipe.yml:1: merge_method: 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…' is "
                "not supported; cpimerge has one method, cpi"
            ),
            f"recipe.yml:1: {MISSING}",
            "recipe.yml:1: models: is missing; list the fine-tuned checkpoints, each as '- model: DIRECTORY'",
        ],
    ),
    "a long key": (
        more("? " + "base_model" * 90_000 + "\n: 1\n"),
        [
            "recipe.yml:6: 'base_modelbase_modelbase_modelbase_modelbase_modelbase_model…': unknown key; valid "
            f"keys: {KEYS}"
        ],
    ),
    "a long anchor": (
        more("dtype: &" + "a" * 900_000 + " float32\n"),
        [
            "recipe.yml:6: dtype: YAML anchors such as "
            "'&aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa…' are not supported; remove it"
        ],
    ),
    "a long alias": (
        more("dtype: *" + "a" * 900_000 + "\n"),
        [
            "recipe.yml:6: dtype: '*aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa…' is a YAML "
            "alias; put it in quotes, or write the value out"
        ],
    ),
    "a long name": (
        recipe(SOUND + "    name: " + "x" * 100_000),
        [
            "recipe.yml:6: models[1].name: 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…' "
            "cannot be a task's name, as it is longer than 100 characters or 200 bytes; give another name"
        ],
    ),
    "a hundred thousand stages": (
        parameter("stages: [" + "[math]," * 100_000 + "]"),
        [
            "recipe.yml:7: parameters.stages[1][0]: 'math' is in a stage already, line 7; remove one",
            "recipe.yml:7: parameters.stages[2][0]: 'math' is in a stage already, line 7; remove one",
            "...",
        ],
    ),
    "layers without end": (
        recipe(
            "merge_method: cpi\nbase_model: ./base\nslices:\n  - sources:\n"
            + "".join(f"      - {{model: ./{name}, layer_range: [0, {2**64 - 1}]}}\n" for name in ("math", "code"))
        ),
        [
            "recipe.yml:5: slices: have layers too many: they stop before layer 18446744073709551615, and the "
            "base has 2. Give them [0, 2] together, or use mergekit for a merge of parts"
        ],
    ),
}

HIDDEN: dict[str, tuple[Spoil, list[str]]] = {
    "an object": (
        recipe("!!python/object/apply:os.system ['touch mark']"),
        ["recipe.yml:1: expected keys and values such as 'merge_method: cpi', got a list"],
    ),
    "an object in a value": (
        more("dtype: !!python/object/apply:os.system ['touch mark']\n"),
        [
            (
                "recipe.yml:6: dtype: YAML tags such as 'tag:yaml.org,2002:python/object/apply:os.system' are not "
                "supported; remove it"
            ),
            "recipe.yml:6: dtype: expected text, got a list",
        ],
    ),
    "a name of Python's": (
        more("dtype: !!python/name:planted.X x\n"),
        [
            (
                "recipe.yml:6: dtype: YAML tags such as 'tag:yaml.org,2002:python/name:planted.X' are not "
                "supported; remove it"
            ),
            "recipe.yml:6: dtype: unknown value 'x'; valid values: float32, float16, bfloat16",
        ],
    ),
    "a tag in full": (
        more("dtype: !<tag:yaml.org,2002:python/module:planted> x\n"),
        [
            (
                "recipe.yml:6: dtype: YAML tags such as 'tag:yaml.org,2002:python/module:planted' are not "
                "supported; remove it"
            ),
            "recipe.yml:6: dtype: unknown value 'x'; valid values: float32, float16, bfloat16",
        ],
    ),
    "tags of its own": (
        recipe("%TAG ! tag:evil,2000:\n---\n!x merge_method: cpi"),
        [
            "recipe.yml:3: YAML anchors and tags are not supported; remove it",
            "recipe.yml:3: merge_method: is missing; write merge_method: cpi",
            f"recipe.yml:3: {MISSING}",
            "recipe.yml:3: models: is missing; list the fine-tuned checkpoints, each as '- model: DIRECTORY'",
        ],
    ),
    "another version": (
        recipe("%YAML 9.9\n---\n" + SOUND),
        ["recipe.yml:1: not valid YAML: found incompatible YAML document (version 1.* is required)"],
    ),
    "a second document": (
        more("---\nmerge_method: cpi\n"),
        ["recipe.yml:6: a second YAML document starts here; a recipe is one document"],
    ),
    "a key twice": (
        more("dtype: float32\ndtype: float16\n"),
        ["recipe.yml:7: dtype: given twice, first in line 6; remove one"],
    ),
    "a key twice, once in quotes": (
        more('dtype: float32\n"dtype": float16\n'),
        ["recipe.yml:7: dtype: given twice, first in line 6; remove one"],
    ),
    "NUL": (recipe(SOUND.encode() + b"\0"), ["recipe.yml:6: has the control character U+0000; remove it"]),
    "an escape": (recipe(SOUND + "# \x1b[2J"), ["recipe.yml:6: has the control character U+001B; remove it"]),
    "half a surrogate pair": (
        recipe(SOUND + "# \ud800"),
        ["recipe.yml:6: is not UTF-8 text; save the recipe as UTF-8"],
    ),
    "another encoding": (recipe(SOUND.encode("utf-16")), ["recipe.yml:1: is not UTF-8 text; save the recipe as UTF-8"]),
    "other digits": (
        parameter("density: ٠.١"),
        ["recipe.yml:7: parameters.density: expected a decimal number such as 0.01 or 1e-3, got '٠.١'"],
    ),
    "wide digits": (
        parameter("density: ０.１"),
        ["recipe.yml:7: parameters.density: expected a decimal number such as 0.01 or 1e-3, got '０.１'"],
    ),
    "hexadecimal": (
        parameter("density: 0x1"),
        ["recipe.yml:7: parameters.density: expected a decimal number such as 0.01 or 1e-3, got '0x1'"],
    ),
    "a base of sixty": (
        parameter("density: 0:30"),
        ["recipe.yml:7: parameters.density: expected a decimal number such as 0.01 or 1e-3, got '0:30'"],
    ),
    "infinity": (
        parameter("tau: .inf"),
        ["recipe.yml:7: parameters.tau: expected a decimal number such as 0.01 or 1e-3, got '.inf'"],
    ),
    "a name that writes on the terminal": (
        recipe(SOUND + '    name: "a\\e[31mb"\n'),
        ["recipe.yml:6: models[1].name: must not have control characters or line breaks, got 'a\\x1b[31mb'"],
    ),
    "a name of two lines": (
        recipe(SOUND + '    name: "a\\u2028b"\n'),
        ["recipe.yml:6: models[1].name: must not have control characters or line breaks, got 'a\\u2028b'"],
    ),
    "a name that is a path": (
        recipe(SOUND + "    name: ../../x\n"),
        [
            "recipe.yml:6: models[1].name: '../../x' cannot be a task's name, as it is not usable as a file "
            "name; give another name"
        ],
    ),
    "a reserved name": (
        recipe(SOUND + "    name: base\n"),
        [
            "recipe.yml:6: models[1].name: 'base' cannot be a task's name, as it is reserved for the backbone; "
            "give another name"
        ],
    ),
}

PATHS: dict[str, tuple[Spoil, list[str]]] = {
    "a line break": (
        base("./ba\nse"),
        ["recipe.yml:2: base_model: must not have control characters or line breaks, got './ba\\nse'"],
    ),
    "NUL": (
        base("./ba\0se"),
        ["recipe.yml:2: base_model: must not have control characters or line breaks, got './ba\\x00se'"],
    ),
    "what cannot be seen": (
        base("./ba\U000e0041\u202ese"),
        [
            "recipe.yml:2: base_model: must not have control characters or line breaks, got "
            "'./ba\\udb40\\udc41\\u202ese'"
        ],
    ),
    "a long path": (base("./" + LONG), [f"{LONG}: {NO_DIRECTORY}"]),
    "somebody's home": (base("~nosuchuser/x"), [f"~nosuchuser/x: {NO_DIRECTORY}"]),
    "a device": (base("/dev/zero"), ["/dev/zero: not a directory. Give the directory that holds model.safetensors"]),
    "above, like a name on the Hub": (
        base("org/.."),
        [
            "HOME: neither model.safetensors nor model.safetensors.index.json in it. Give the directory of a "
            "checkpoint in safetensors"
        ],
    ),
    "a revision above": (
        base("org/name@../../../etc"),
        [
            "org/name@../../../etc: not in the Hugging Face cache, and etc is no directory. Add --download to "
            "fetch the model from the Hub, or correct the path"
        ],
    ),
    "a directory": (
        folder(RECIPE),
        ["recipe.yml: cannot be read: Is a directory"],
    ),
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs(home: Path, case: str) -> None:
    check(home, *BOMBS[case])


@pytest.mark.parametrize("case", HIDDEN)
def test_what_a_recipe_hides(home: Path, case: str) -> None:
    check(home, *HIDDEN[case])


@pytest.mark.parametrize("case", PATHS)
def test_paths(home: Path, case: str) -> None:
    check(home, *PATHS[case])


@pytest.mark.parametrize(
    "content",
    [
        parameter("density: 1e-999"),
        parameter("density: [" + "0.1," * 50_000 + "0.1]"),
        more("#" * 900_000),
        more("chat_template: \"{% for i in range(10**9) %}{{ ''.__class__.__mro__ }}{% endfor %}\"\n"),
        recipe(b"\xef\xbb\xbf" + SOUND.encode()),
    ],
    ids=["a small number", "a long gradient", "a long comment", "a template that is a program", "a byte order mark"],
)
def test_odd_recipes_that_are_sound(home: Path, content: Spoil) -> None:
    """No template is rendered, whatever it would do."""
    content(home)
    done(home)
