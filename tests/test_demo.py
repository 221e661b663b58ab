"""The demo: its model against transformers', its data, its numbers, and the command that shows them."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
from torch import Tensor, nn

from cpimerge import cli, demo, tinylm
from cpimerge.demo import DemoResult, Effort, run_demo
from cpimerge.demo_data import TASKS, tables
from cpimerge.tinylm import Schedule, Shape, Table, TinyLlama

SMALL = Shape(hidden=16, layers=2, heads=2, intermediate=24)
TINY = Effort(
    shape=SMALL,
    base=Schedule(steps=3, rate=3e-3, warmup=1, tokens=400),
    expert=Schedule(steps=2, rate=3e-3, warmup=1, tokens=400),
    test_rows=8,
)
# Enough that every expert gets something right, as shares of its score are taken.
SHORT = Effort(
    shape=SMALL,
    base=Schedule(steps=10, rate=1e-2, warmup=2, tokens=400),
    expert=Schedule(steps=30, rate=1e-2, warmup=2, tokens=400),
    test_rows=8,
)
MODELS = ["base", *TASKS, "plain average", "fused", "fused, paper"]


def model(seed: int = 0) -> TinyLlama:
    return tinylm.new(SMALL, torch.Generator().manual_seed(seed))


def lines(*texts: str) -> Table:
    """A row a text, of equal lengths; what follows `=` is asked for."""
    tokens = torch.tensor([list(text.encode()) for text in texts], dtype=torch.uint8)
    asked = torch.tensor([[at > text.index("=") for at in range(len(text))] for text in texts])
    return Table(tokens, asked)


class Says(nn.Module):
    """A model whose likeliest next byte is given for each row, whatever it reads."""

    def __init__(self, *texts: str) -> None:
        super().__init__()
        self.next = torch.tensor([list(text.encode()) for text in texts])

    def forward(self, tokens: Tensor) -> Tensor:
        assert tokens.shape == self.next.shape
        return nn.functional.one_hot(self.next, 256).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_the_llama_of_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    tinylm.save(model(), tmp_path, dtype)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert loaded.dtype == dtype
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(256, (3, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = loaded.float()(tokens).logits
        got = tinylm.load(tmp_path)(tokens)
    assert expected.std() > 0.1  # else the comparison says nothing
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    before = model()
    tinylm.save(before, tmp_path, torch.float32)
    after = tinylm.load(tmp_path)
    assert after.shape == SMALL
    assert after.state_dict().keys() == before.state_dict().keys()
    for name, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], value), name


def test_a_model_sees_only_what_came_before() -> None:
    tokens = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 256
    with torch.no_grad():
        before, after = model()(tokens), model()(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_the_loss_counts_the_bytes_asked_for_and_no_others() -> None:
    table = lines("1+2=3\n", "4+4=8\n")
    with torch.no_grad():
        logits = model()(table.tokens)
        asked = [-logits[row, at - 1].log_softmax(-1)[int(table.tokens[row, at])] for row in (0, 1) for at in (4, 5)]
        torch.testing.assert_close(tinylm.loss(model(), table), torch.stack(asked).mean())


def test_the_score_is_the_share_of_asked_bytes_that_are_right() -> None:
    table = lines("1+2=3\n", "4+4=8\n")
    # A row lists the guesses for columns 1 to 5; only columns 4 and 5 are asked for: right right, wrong right.
    assert tinylm.score(Says("???3\n", "???9\n"), table) == 3 / 4  # type: ignore[arg-type]
    assert tinylm.score(Says("+2=??", "+4=??"), table) == 0  # type: ignore[arg-type]


def test_a_table_cannot_ask_for_what_nothing_precedes() -> None:
    tokens = torch.zeros(1, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="column 0"):
        Table(tokens, torch.tensor([[True, True, True]]))
    with pytest.raises(ValueError, match="one shape"):
        Table(tokens, torch.tensor([[False, True]]))


def test_the_rate_rises_and_falls() -> None:
    schedule = Schedule(steps=12, rate=1.0, warmup=2)
    assert [round(schedule.rate_at(step), 3) for step in (0, 1, 2, 7)] == [0.5, 1.0, 1.0, 0.5]
    assert 0 < schedule.rate_at(11) < 0.05


def test_training_lowers_the_loss() -> None:
    table = lines("1+2=3\n", "4+4=8\n")
    learner = model()
    before = tinylm.loss(learner, table).item()
    tinylm.train(learner, [table], Schedule(steps=40, rate=1e-2, warmup=5, tokens=48), torch.Generator().manual_seed(1))
    assert tinylm.loss(learner, table).item() < before / 4


@pytest.mark.parametrize("task", TASKS)
def test_no_test_row_was_trained_on(task: str) -> None:
    train, test = tables(task, 0, 64)
    seen = {bytes(row.tolist()) for row in train.tokens}
    held_out = {bytes(row.tolist()) for row in test.tokens}
    assert len(held_out) == 64
    assert len(seen) > 500
    assert not seen & held_out


@pytest.mark.parametrize("task", TASKS)
def test_tables_depend_on_the_seed_alone(task: str) -> None:
    first, again, other = (tables(task, seed, 8)[1].tokens for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def solve(question: str) -> str:
    if question.startswith("sort "):
        return "".join(sorted(question.removeprefix("sort ").removesuffix(": ")))
    return str(sum(int(part) for part in question.removesuffix("=").split("+")))


@pytest.mark.parametrize("task", ["sums", "sorting"])
def test_questions_ask_for_their_answers(task: str) -> None:
    _, test = tables(task, 0, 64)
    for tokens, asked in zip(test.tokens, test.asked, strict=True):
        text = bytes(tokens.tolist()).decode()
        start = int(asked.nonzero()[0])
        answer = bytes(tokens[asked].tolist()).decode()
        assert answer == solve(text[:start]) + "\n"
        assert not text[start + len(answer) :].strip("\n")


@pytest.mark.parametrize("task", ["english", "python"])
def test_running_text_asks_for_every_byte_but_the_first(task: str) -> None:
    _, test = tables(task, 0, 8)
    assert not test.asked[:, 0].any()
    assert test.asked[:, 1:].all()


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*.safetensors"))}


def test_the_demo_is_reproducible_and_scores_everything(tmp_path: Path) -> None:
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    told: list[str] = []
    first = run_demo(tmp_path / "a", effort=TINY, log=told.append)
    again = run_demo(tmp_path / "b", effort=TINY)
    other = run_demo(tmp_path / "c", seed=1, effort=TINY)
    assert list(first.scores) == MODELS
    assert all(list(row) == list(TASKS) for row in first.scores.values())
    assert told
    assert first.scores == again.scores
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a").keys() == files(tmp_path / "c").keys()
    assert files(tmp_path / "a") != files(tmp_path / "c")
    assert other.directory == tmp_path / "c"
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_the_plain_average_is_the_average_of_the_experts(tmp_path: Path) -> None:
    run_demo(tmp_path, effort=TINY)
    average = tinylm.load(tmp_path / "plain-average").state_dict()
    experts = [tinylm.load(tmp_path / task).state_dict() for task in TASKS]
    for name, value in average.items():
        mean = torch.stack([expert[name].double() for expert in experts]).mean(0)
        ulp = 2.0 ** (torch.frexp(mean).exponent - 8)  # bfloat16 has 8 significant bits
        assert ((value - mean).abs() <= ulp).all(), name


def result(fused: tuple[float, float], average: tuple[float, float]) -> DemoResult:
    rows = {"a": (0.5, 0.0), "b": (0.1, 0.8), "plain average": average, "fused": fused}
    return DemoResult(Path(), ["a", "b"], {name: dict(zip("ab", row, strict=True)) for name, row in rows.items()}, {})


def test_the_verdict_follows_the_numbers() -> None:
    ahead = result(fused=(0.4, 0.6), average=(0.45, 0.4))  # (0.8 + 0.75) / 2 against (0.9 + 0.5) / 2
    assert ahead.relative("fused") == pytest.approx(0.775)
    assert ahead.relative("plain average") == pytest.approx(0.7)
    assert ahead.verdict() == "fused is 7.5 points ahead of plain averaging in the mean; plain averaging is better on a"
    behind = result(fused=(0.25, 0.4), average=(0.5, 0.4))
    assert behind.verdict() == "fused is 25.0 points behind plain averaging in the mean; plain averaging is better on a"


# --- the command ------------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[DemoResult]:
    """What `run_demo` returned to the command, which does it with a small effort here."""
    results: list[DemoResult] = []

    def run_short(directory: Path, **options: Any) -> DemoResult:
        results.append(run_demo(directory, effort=SHORT, **options))
        return results[-1]

    monkeypatch.setattr(demo, "run_demo", run_short)
    return results


def run(*arguments: str | Path) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli.main, ["demo", *map(str, arguments)], prog_name="cpimerge")


def test_the_command_shows_what_was_measured(ran: list[DemoResult], tmp_path: Path) -> None:
    shown = run("--output", tmp_path / "my demo")
    assert (shown.exit_code, shown.exception) == (0, None)
    result = ran[0]
    title, headings, _, *rest = shown.stdout.splitlines()
    table, text = rest[: len(MODELS)], rest[len(MODELS) :]
    assert title == "Scores: share of the next bytes that are right, on test data held out of training"
    assert re.split(r"  +", headings.strip()) == ["model", *TASKS, "of experts"]
    for model, line in zip(MODELS, table, strict=True):
        values = [*result.scores[model].values(), result.relative(model)]
        assert re.split(r"  +", line.strip()) == [model, *(f"{value:.1%}" for value in values)]
    assert text[2] == result.verdict()
    assert re.fullmatch(r"took [\d.]+ s: training [\d.]+ s, merging [\d.]+ s, scoring [\d.]+ s", text[3])
    directory = f"{tmp_path}/my demo"
    assert text[-1] == f"checkpoints: '{directory}'   next: cpimerge plan '{directory}/fused.yml' -o PLAN_DIR"
    assert (tmp_path / "my demo" / "fused" / "model.safetensors").is_file()
    progress = shown.stderr.splitlines()
    assert len(progress) == 5 + 3 + len(MODELS)  # trained, merged, scored
    assert progress[-len(MODELS) :] == [f"scoring: {model}" for model in MODELS]


def test_the_command_as_json_leaves_nothing_behind(
    ran: list[DemoResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shown = run("--json", "--quiet", "--seed", "2")
    assert (shown.exit_code, shown.stderr) == (0, "")
    result = ran[0]
    assert json.loads(shown.stdout) == {
        "scores": result.scores,
        "relative": {model: result.relative(model) for model in MODELS},
        "verdict": result.verdict(),
        "seconds": result.seconds,
        "directory": None,
    }
    assert result.directory.parent == tmp_path
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_the_command_refuses_a_directory_with_something_in_it(
    ran: list[DemoResult], tmp_path: Path, options: tuple[str, ...]
) -> None:
    (tmp_path / "file").touch()
    shown = run("-o", tmp_path, *options)
    problem = f"{tmp_path}: not empty. Give another output directory"
    assert (shown.exit_code, shown.stderr) == (1, f"error: {problem}\n")
    assert shown.stdout == (json.dumps({"errors": [problem]}, indent=1) + "\n" if options else "")
    assert not ran
    assert os.listdir(tmp_path) == ["file"]


def test_the_command_says_why_a_directory_cannot_be_made(ran: list[DemoResult], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    shown = run("-o", tmp_path / "file" / "demo")
    cause = f"cannot be made, as {tmp_path}/file is no directory. Give another output directory"
    assert (shown.exit_code, shown.stderr) == (1, f"error: {tmp_path}/file/demo: {cause}\n")
    assert not ran
