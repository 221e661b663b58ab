"""What `cpimerge inspect` prints, as text; and the command."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save
from click.testing import CliRunner, Result
from rich.cells import cell_len

import cpimerge
from cpimerge import cli, tinylm
from cpimerge.report import render
from cpimerge.report_inspect import MAX_LISTED, MAX_ROWS, _cosine, _short, inspect_report

BASE = {
    "embed.weight": torch.arange(12).reshape(4, 3).bfloat16(),
    "layers.0.mlp.weight": torch.tensor([[1.0, -2.0], [3.0, 4.0]]).bfloat16(),
    "layers.0.norm": torch.ones(2),
    "layers.1.mlp.weight": torch.tensor([[1.0, -2.0], [3.0, 4.0]]).bfloat16(),
    "layers.1.norm": torch.ones(2),
    "ids": torch.arange(3),
}
CONFIG = {"model_type": "tiny", "architectures": ["TinyModel"], "vocab_size": 4, "tie_word_embeddings": True}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`base`, and `tuned`, in the working directory."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "base", BASE, config=CONFIG)
    tuned = {name: tensor.clone() for name, tensor in BASE.items()}
    tuned["layers.0.mlp.weight"][1, 1] = 4.5
    tuned["layers.0.norm"][0] = 1 + 2e-6
    tuned["layers.1.mlp.weight"] *= 2
    save(tmp_path / "tuned", tuned, config=CONFIG)
    return tmp_path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, ["inspect", *map(str, arguments)], prog_name="cpimerge")


def text(report: Any, width: int | None = None) -> str:
    return render(report, width, color=False)


def stripped(shown: str) -> list[str]:
    return [line.rstrip() for line in shown.splitlines()]


# --- the text ---------------------------------------------------------------------------------------


def test_one_checkpoint(models: Path) -> None:
    result = run("base")
    assert (result.exit_code, result.stderr) == (0, "")
    assert stripped(result.stdout) == [
        "base: tiny (TinyModel), safetensors",
        f"files: 1 file, {(models / 'base' / 'model.safetensors').stat().st_size} B (model.safetensors)",
        "tensors: 6, 27 elements, 80 B",
        "dtypes: BF16 74.07% (3 tensors), F32 14.81% (2 tensors), I64 11.11% (1 tensor)",
        "layers: layers.* (2: 0–1); 2 tensors outside",
        "output head: tied to the embeddings; none stored",
        "vocabulary: embed.weight 4 rows; vocab_size 4",
        "tokenizer: none",
        "",
        "Tensors by kind",
        "kind          tensors  shape  dtype  elements   share",
        "─────────────────────────────────────────────────────",
        "embed.weight        1    4×3   BF16        12  44.44%",
        "ids                 1      3    I64         3  11.11%",
        "layers.*            4                      12  44.44%",
        " mlp.weight         2    2×2   BF16         8  29.63%",
        " norm               2      2    F32         4  14.81%",
    ]


TWO = """\
base: base, tiny, 6 tensors, 80 B
other: tuned, tiny, 6 tensors, 80 B

Difference by kind of tensor
             elems changed ≤ 1e-5 ≤ ½ ulp  rel |Δ|    cosine  max |Δ|   dtypes
──────────────────────────────────────────────────────────────────────────────
embed.weight    12      0%   100%    100%        0         1        0     BF16
layers.*        12  50.00% 58.33%  50.00%    0.688  0.953914        4 BF16/F32
 mlp.weight      8  62.50% 37.50%  37.50%     0.71  0.956312        4     BF16
 norm            4  25.00%   100%  75.00% 1.01e-06 >0.999999 2.03e-06      F32
total           24  25.00% 79.17%  75.00%     0.23  0.978348        4 BF16/F32

Difference by layer
                   elems changed ≤ 1e-5 ≤ ½ ulp rel |Δ|   cosine max |Δ|   dtypes
─────────────────────────────────────────────────────────────────────────────────
outside the layers    12      0%   100%    100%       0        1       0     BF16
layers.0               6  33.33% 83.33%  66.67%  0.0884 0.998274     0.5 BF16/F32
layers.1               6  66.67% 33.33%  33.33%   0.968 0.992286       4 BF16/F32
elems: elements; rel |Δ|: ‖other − base‖ / ‖base‖; dtypes: of both, or base→other

2 of 5 floating-point tensors identical, byte for byte; 25.00% of the elements changed
largest |Δ|: 4 at layers.1.mlp.weight, flat index 3
not floating-point: 1 of 1 tensor equal
note: stored in 16 bits, an update below ½ ulp is lost: part of what is unchanged is rounding
"""


def test_two_checkpoints(models: Path) -> None:
    result = run("base", "tuned", "--threads", "1", "--memory", "1GB")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (0, "inspect: 100% of 160 B")
    assert stripped(result.stdout) == TWO.splitlines()


def test_findings(tmp_path: Path) -> None:
    other = {name: tensor.clone() for name, tensor in BASE.items() if name != "layers.1.norm"}
    other["ids"][2] = 7
    other["embed.weight"] = torch.zeros(6, 3)
    other["layers.0.norm"] = torch.tensor([math.nan, 2])
    other["layers.1.mlp.weight"] = torch.ones(3)
    save(tmp_path / "base", BASE)
    save(tmp_path / "other", other | {"more": torch.ones(1)})
    lines = stripped(text(inspect_report(cpimerge.inspect(tmp_path / "base", tmp_path / "other", threads=1))))
    assert lines[-16:] == [
        "",
        "1 of 3 floating-point tensors identical, byte for byte; 70.59% of the elements changed",
        "largest |Δ|: 11 at embed.weight, flat index 11",
        "not floating-point: 0 of 1 tensor equal",
        "not floating-point, not equal: 1",
        "  ids (I64): 1 of 3 elements, first at flat index 2",
        "only in the base: 1",
        "  layers.1.norm",
        "only in the other: 1",
        "  more",
        "another shape or dtype: 2",
        "  embed.weight: base BF16 [4, 3], other F32 [6, 3]; the first 4 rows were compared",
        "  layers.1.mlp.weight: base BF16 [2, 2], other F32 [3]; not compared",
        "not finite, and left out: 1",
        "  layers.0.norm: NaN or Inf in the other: 1 element, first at flat index 0",
        "note: stored in 16 bits, an update below ½ ulp is lost: part of what is unchanged is rounding",
    ]
    assert any(line.startswith("embed.weight") and line.endswith("BF16→F32") for line in lines)


def test_nothing_in_common(tmp_path: Path) -> None:
    save(tmp_path / "base", {"a": torch.ones(1)})
    save(tmp_path / "other", {"b": torch.ones(1)})
    lines = stripped(text(inspect_report(cpimerge.inspect(tmp_path / "base", tmp_path / "other"))))
    assert lines[2:] == [
        "",
        "0 of 0 floating-point tensors identical, byte for byte; 0% of the elements changed",
        "only in the base: 1",
        "  a",
        "only in the other: 1",
        "  b",
    ]


def test_a_model_of_the_usual_names_fits_80_columns(tmp_path: Path) -> None:
    inside = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "input_layernorm")
    names = [f"model.layers.{i}.{kind}.weight" for i in range(32) for kind in inside]
    base = {name: torch.randn(30, 40).bfloat16() for name in ("lm_head.weight", "model.embed_tokens.weight", *names)}
    save(tmp_path / "base", base, config=CONFIG)
    save(tmp_path / "other", {name: tensor * 1.125 for name, tensor in base.items()}, config=CONFIG)
    one, two = cpimerge.inspect(tmp_path / "base"), cpimerge.inspect(tmp_path / "base", tmp_path / "other")
    for report, rows in ((inspect_report(one), 8), (inspect_report(two), 9 + 33)):
        tables = [line for line in text(report, 80).splitlines() if line.count("%") and "elements" not in line][-rows:]
        assert [line.split()[0] for line in tables if "weight" in line] == [
            "lm_head.weight",
            "model.embed_tokens.weight",
            *(f"{kind}.weight" for kind in sorted(inside)),
        ]
        assert len(tables) == rows
        assert max(map(cell_len, tables)) <= 80


def test_names_from_files_are_escaped(tmp_path: Path) -> None:
    evil = "a\x1b[31m\nb"
    config = {"model_type": evil, "architectures": [evil]}
    tensors = {evil: torch.ones(2), f"{evil}.0.x": torch.ones(2), "n": torch.arange(2), f"{evil}.ids": torch.arange(2)}
    save(tmp_path / "base", tensors | {f"{evil}.1": torch.ones(1), f"{evil}.2": torch.ones(1)}, config=config)
    other = tensors | {evil: torch.tensor([math.inf, 1]), f"{evil}.ids": torch.zeros(2).long()}
    save(tmp_path / "other", other | {f"{evil}.1": torch.ones(2, 2), f"{evil}.3": torch.ones(1)}, config=config)
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps({"model": {"type": evil, "vocab": {}}}))
    one = inspect_report(cpimerge.inspect(tmp_path / "base"))
    two = inspect_report(cpimerge.inspect(tmp_path / "base", tmp_path / "other"))
    for report in (one, two):
        shown = text(report)
        assert "\x1b" not in shown
        assert "\\x1b[31m\\nb" in shown
    assert "\\x1b[31m\\nb, 0 tokens" in text(inspect_report(cpimerge.inspect(tmp_path / "base")))


def test_long_lists_and_tables_are_cut(tmp_path: Path) -> None:
    base = {f"layer{i}.{i}": torch.ones(1) for i in range(MAX_ROWS + 5)}
    save(tmp_path / "base", base)
    save(tmp_path / "other", {f"x{i}": torch.ones(1) for i in range(MAX_LISTED + 7)} | {"layer0.0": torch.ones(1)})
    one = stripped(text(inspect_report(cpimerge.inspect(tmp_path / "base"))))
    assert one[-1] == f"and {2 * len(base) - MAX_ROWS} more rows: --json has all"
    assert f"{len(base) - MAX_LISTED} more such stacks; 0 tensors outside" in one[4]
    two = stripped(text(inspect_report(cpimerge.inspect(tmp_path / "base", tmp_path / "other"))))
    assert two[two.index(f"only in the other: {MAX_LISTED + 7}") + MAX_LISTED + 1] == "  and 7 more: --json has all"


def test_layers_that_are_missing_are_not_counted(tmp_path: Path) -> None:
    save(tmp_path, {f"h.{i}.w": torch.ones(1) for i in (0, 3, 7)} | {"x.5": torch.ones(())}, config={})
    lines = stripped(text(inspect_report(cpimerge.inspect(tmp_path))))
    assert lines[4] == "layers: h.* (3 of 0–7), x.* (1: 5); 0 tensors outside"
    assert lines[5] == "output head: the config does not say if tied; none stored"
    assert lines[-1].split() == ["x.*", "1", "scalar", "F32", "1", "25.00%"]


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1K"),
        (1234, "1.23K"),
        (999_499, "999K"),
        (999_500, "1M"),
        (67_108_864, "67.1M"),
        (8_030_261_248, "8.03G"),
        (1_234_567_890_123, "1T"),
        (12_345_678_901_234_567, "12,346T"),
    ],
)
def test_numbers_in_three_digits(count: int, shown: str) -> None:
    assert _short(count) == shown


@pytest.mark.parametrize(
    ("cosine", "shown"), [(None, "–"), (1.0, "1"), (1 - 1e-9, ">0.999999"), (0.9999, "0.999900"), (-0.25, "-0.250000")]
)
def test_only_1_is_1(cosine: float | None, shown: str) -> None:
    assert _cosine(cosine) == shown


# --- the command ------------------------------------------------------------------------------------


def test_json_is_what_the_library_returns(models: Path) -> None:
    one, two = run("base", "--json"), run("base", "tuned", "--json", "-q")
    assert json.loads(one.stdout) == json.loads(json.dumps(cpimerge.inspect("base").as_dict()))
    assert json.loads(two.stdout) == json.loads(json.dumps(cpimerge.inspect("base", "tuned").as_dict()))
    assert json.loads(two.stdout)["tensors"]["layers.0.norm"]["changed"] == 1
    assert two.stderr == ""


def test_errors_of_both_checkpoints(models: Path) -> None:
    result = run("nowhere", "neither")
    assert (result.exit_code, result.stdout) == (1, "")
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["error"] * 2
    assert run().exit_code == 2


def test_headers_need_no_numeric_libraries(models: Path) -> None:
    code = """
import sys
from cpimerge import cli
try:
    cli.main(["inspect", "base"])
finally:
    print(sorted({"torch", "numba", "numpy", "huggingface_hub", "tokenizers"} & sys.modules.keys()), file=sys.stderr)
"""
    environment = {"PYTHONPATH": str(Path(cpimerge.__file__).parents[1]), "PATH": "", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stderr == "[]\n"


# --- docs/inspect.md --------------------------------------------------------------------------------

DOCUMENT = (Path(__file__).parent.parent / "docs" / "inspect.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```text\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE)


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models of the demo's shape, though not trained, in `demo`."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    model = tinylm.new(tinylm.Shape(), generator)
    tinylm.save(model, tmp_path / "demo" / "base", torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 50)
    tinylm.save(model, tmp_path / "demo" / "python", torch.bfloat16)
    return tmp_path


def test_the_example_of_one_is_what_is_printed(demo: Path) -> None:
    assert EXAMPLES[0].splitlines() == stripped(run("demo/base").stdout)


def test_the_example_of_two_has_the_lines_that_are_printed(demo: Path) -> None:
    """The numbers differ with the training."""

    def fixed(lines: list[str]) -> list[list[str]]:
        return [line.split() if "%" not in line else line.split()[:1] for line in lines if line]

    shown, example = stripped(run("demo/base", "demo/python").stdout), EXAMPLES[1].splitlines()
    for lines in (shown, example):
        lines[:] = [line for line in lines if not line.startswith(("largest", "─"))]
    assert fixed(example) == fixed(shown)
    assert len([line for line in example if line.count("%") > 2]) == 14 + 4


def test_every_key_is_in_the_document(demo: Path) -> None:
    found = cpimerge.inspect("demo/base", "demo/python").as_dict()
    for key in [*found, *found["total"], *found["total"]["largest"]]:
        assert f"`{key}`" in DOCUMENT


def test_the_documents_python_runs(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE)
    exec(compile(code, "inspect.md", "exec"), {})
    assert "model.layers.*" in capsys.readouterr().out
