"""adapter_config.json: which kinds of adapters are refused, by name, and what patterns of modules mean."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftType
from peft.utils.other import get_pattern_key

from cpimerge.adapter_config import HARMLESS, USED, VARIANTS, AdapterConfig, read_config
from cpimerge.checkpoint import is_unicode
from cpimerge.errors import CheckpointError

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


def read(directory: Path, **config: Any) -> AdapterConfig:
    (directory / "adapter_config.json").write_text(json.dumps(PLAIN | config))
    return read_config(directory)


def problems(directory: Path, **config: Any) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        read(directory, **config)
    file = f"{directory / 'adapter_config.json'}: "
    assert all(problem.startswith(file) for problem in caught.value.problems)
    return [problem.removeprefix(file) for problem in caught.value.problems]


def test_what_peft_saves(tmp_path: Path) -> None:
    LoraConfig(r=3, lora_alpha=6, use_rslora=True, target_modules=["q"], bias="all").save_pretrained(str(tmp_path))
    config = read_config(tmp_path)
    assert (config.rank, config.alpha, config.use_rslora, config.use_dora) == (3, 6.0, True, False)
    assert config.scale_of("q") == 6 / math.sqrt(3)


def test_every_key_of_peft_is_known() -> None:
    """A new one must be looked at before it is ignored."""
    keys = {field.name for field in dataclasses.fields(LoraConfig)}
    assert keys <= HARMLESS | USED | VARIANTS.keys()


@pytest.mark.parametrize("kind", [kind.value for kind in PeftType if kind != PeftType.LORA])
def test_other_kinds_of_adapters(tmp_path: Path, kind: str) -> None:
    assert problems(tmp_path, peft_type=kind, r="x") == [
        f"peft_type is {kind!r}; only LORA can be merged. Merge it into its base first (PEFT)"
    ]


@pytest.mark.parametrize("key", VARIANTS)
def test_variants_are_refused_by_name(tmp_path: Path, key: str) -> None:
    assert problems(tmp_path, **{key: [1]}) == [
        f"{key}: {VARIANTS[key]} cannot be merged here. Merge the adapter into its base first (PEFT)"
    ]
    every: tuple[Any, ...] = (None, False, [], {})
    for off in every:
        read(tmp_path, **{key: off})


@pytest.mark.parametrize(
    ("start", "name"),
    [
        *(("pissa", "PiSSA"), ("pissa_niter_16", "PiSSA"), ("olora", "OLoRA"), ("OLoRA", "OLoRA")),
        *(("corda", "CorDA"), ("loftq", "LoftQ"), ("lora_ga", "LoRA-GA")),
    ],
)
def test_starts_that_change_the_base(tmp_path: Path, start: str, name: str) -> None:
    (problem,) = problems(tmp_path, init_lora_weights=start)
    assert problem.startswith(f"init_lora_weights: {name} changed the base's weights before training")


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_do_not(tmp_path: Path, start: bool | str | None) -> None:
    read(tmp_path, init_lora_weights=start)


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    many = {"use_xyz": {"a": 1}, "init_lora_weights": "magic", "use_dora": "yes", "bias": "some", "r": 0}
    many |= {"lora_alpha": True, "rank_pattern": {"q": 1.5}, "alpha_pattern": {"(": 1, "(?=x)": 2, "q*" * 101: 3}}
    base = "Merge the adapter into its base"
    assert problems(tmp_path, **many) == [
        f"'use_xyz': not known, and it may change what the weights mean. {base}",
        f"init_lora_weights: 'magic' is not known. {base}",
        "r must be a whole number from 1 on, got 0",
        "lora_alpha must be a number, got True",
        "use_dora must be true or false, got 'yes'",
        "bias must be none, all or lora_only, got 'some'",
        "rank_pattern must map at most 10000 names of modules to numbers, got {'q': 1.5}",
        "alpha_pattern: '(': not a regular expression that can be matched in bounded time",
        "alpha_pattern: '(?=x)': not a regular expression that can be matched in bounded time",
        f"alpha_pattern: {repr('q*' * 50)[:60]}…: longer than 200 characters",
    ]


@pytest.mark.parametrize("rank", [None, 0, -1, 2.0, True, "8", 1 << 40, [8]])
def test_ranks(tmp_path: Path, rank: Any) -> None:
    assert len(problems(tmp_path, r=rank)) == 1


@pytest.mark.parametrize("alpha", ["1e999", "-1e39", "NaN", "Infinity", "1" + "0" * 400, "null", '"8"'])
def test_alphas(tmp_path: Path, alpha: str) -> None:
    (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": "LORA", "r": 8, "lora_alpha": {alpha}}}')
    with pytest.raises(CheckpointError, match="lora_alpha must be a number"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": 1, "r": 2}', "[" * 100_000])
def test_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: "):
        read_config(tmp_path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "adapter_config.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="larger than 10000000 bytes"):
        read_config(tmp_path)


# --- patterns ---------------------------------------------------------------------------------------

MODULES = [
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.mlp.down_proj",
    "xq_proj",
    "a.bq_proj",
    "q.proj",
]
PATTERNS = [
    *("q_proj", "self_attn.q_proj", "^model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj", "^q_proj"),
    *(r"layers\.0\.self_attn\.q_proj", r"^model\.layers.0.self_attn\.q_proj", r"q\.proj", "^self_attn.q_proj"),
    *(r".*\.layers\.(0|10)\..*", "q_proj|down_proj", "(k|q)_proj", "[a-q]+_proj", "layers.1.mlp.down_proj", "q.proj"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_mean_what_they_mean_to_peft(tmp_path: Path, pattern: str) -> None:
    config = read(tmp_path, rank_pattern={pattern: 3}, alpha_pattern={pattern: 5})
    for module in MODULES:
        meant = get_pattern_key([pattern], module) == pattern and re.match(rf"(.*\.)?({pattern})$", module)
        assert config.rank_of(module) == (3 if meant else 8)
        assert config.scale_of(module) == (5 / 3 if meant else 2)


@given(st.permutations(PATTERNS))
def test_the_first_pattern_counts(order: list[str]) -> None:
    patterns = {pattern: number for number, pattern in enumerate(order, 1)}
    config = AdapterConfig(Path(), 8, 8, patterns, {}, False, False, False, False)
    for module in MODULES:
        assert config.rank_of(module) == patterns.get(get_pattern_key(list(patterns), module), 8)


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|aa)+b", "(.*a){20}b", "(a*)*b"])
def test_hostile_patterns_do_not_take_forever(tmp_path: Path, pattern: str) -> None:
    begin = time.monotonic()
    assert read(tmp_path, rank_pattern={pattern: 3}).rank_of("a" * 900) == 8
    assert time.monotonic() - begin < 20  # Python's own expressions would take years


@pytest.mark.parametrize("pattern", ["((a?){60}){60}b", r"(\w{2}){900}", "\ud800", "[", "(?=a)", "(a{1000}){1000}"])
def test_patterns_that_are_refused(tmp_path: Path, pattern: str) -> None:
    assert problems(tmp_path, rank_pattern={pattern: 3}) == [
        f"rank_pattern: {pattern!r}: not a regular expression that can be matched in bounded time"
    ]


def test_a_pattern_for_every_module_is_usual_and_many_expressions_are_not(tmp_path: Path) -> None:
    names = {f"^model.layers.{layer}.mlp.{part}": 1 + layer for layer in range(900) for part in ("up", "down")}
    config = read(tmp_path, rank_pattern=names)
    assert [config.rank_of(f"model.layers.{layer}.mlp.down") for layer in (0, 17, 899)] == [1, 18, 900]
    assert problems(tmp_path, rank_pattern={f"(a|b){number}": 1 for number in range(33)}) == [
        "rank_pattern: 33 regular expressions; at most 32 are matched. Name modules instead"
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(USED | HARMLESS | VARIANTS.keys())) | st.text(max_size=5), JSON))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_stands_in_it(tmp_path: Path, config: dict[str, Any]) -> None:
    """It is read, or refused in words."""
    told: tuple[str, ...] = ()
    try:
        found = read(tmp_path, **config)
        assert found.rank_of("x") > 0
        assert math.isfinite(found.scale_of("x"))
    except CheckpointError as error:
        told = error.problems or ("",)
    assert all(problem and is_unicode(problem) for problem in told)
