"""The benchmark's own parts: what it draws, what it computes from scores, and that its page has what was measured."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, PreTrainedModel

from cpimerge import levelling
from cpimerge.checkpoint import layer_of
from cpimerge.levelling import can_level
from cpimerge.plan_file import Plan
from cpimerge.recipe import Recipe, parse_recipe
from seesaw import candidates, constants, methods, results, spectral, staging, tables
from seesaw.__main__ import PARTS, parse
from seesaw.bench import Bench
from seesaw.merging import DEFAULTS, PAPER, Parameters, mergekits, recipe, save_like, written
from seesaw.tasks import Row, Task, half, split
from seesaw.training import Schedule, batches


def texts(count: int) -> list[tuple[str, str, str]]:
    """Three texts a document, of two classes, one three times as frequent."""
    draw = random.Random(5)
    return [(f"d{i // 3}", draw.choice(("a", "a", "a", "b")), f"text {i}") for i in range(count)]


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """`make seesaw` names no part, and does all of them."""
    assert parse([]).parts == PARTS
    assert parse(["rates", "tables", "--seeds", "0", "2"]).parts == ["rates", "tables"]
    with pytest.raises(SystemExit):
        parse(["rate"])
    assert "no part is called 'rate'. The parts are: encoder, causal," in capsys.readouterr().err


def test_no_document_is_in_two_splits_and_classes_are_balanced() -> None:
    rows = texts(9000)
    document = {text: name for name, _, text in rows}
    task = split("t", rows)
    parts = [{document[row.text] for row in part} for part in (task.train, task.validation, task.test)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert [len(task.train), len(task.validation), len(task.test)] == [2000, 300, 1000]
    assert Counter(row.label for row in task.test) == {0: 500, 1: 500}
    label = {text: ("a", "b").index(name) for _, name, text in rows}
    assert all(label[row.text] == row.label for row in task.train)
    assert task == split("t", rows)


def test_halves_share_no_row_and_miss_none() -> None:
    task = split("t", texts(900))
    first, second = half(task, 0), half(task, 1)
    assert not set(first.train) & set(second.train)
    assert set(first.train) | set(second.train) == set(task.train)
    assert (first.name, second.test) == ("t-a", task.test)


def test_every_task_gets_as_many_batches() -> None:
    tasks = [replace(split(name, texts(300)), name=name) for name in ("x", "y", "z")]
    drawn = list(batches(tasks, Schedule(steps=32, batch=4, rate=1.0), seed=1))
    assert sorted(Counter(name for name, _ in drawn).values()) == [10, 11, 11]
    assert all(len(rows) == 4 for _, rows in drawn)
    rows = {task.name: set(task.train) for task in tasks}
    assert all(set(batch) <= rows[name] for name, batch in drawn)
    assert drawn == list(batches(tasks, Schedule(steps=32, batch=4, rate=1.0), seed=1))
    assert drawn != list(batches(tasks, Schedule(steps=32, batch=4, rate=1.0), seed=2))
    assert drawn != list(batches(tasks, Schedule(steps=32, batch=4, rate=1.0, again=True), seed=1))


def test_figures_by_hand() -> None:
    base = results.Line("base", "reference", [{"a": 0.5, "b": 0.2}, {"a": 0.5, "b": 0.2}])
    experts = results.Line("experts", "reference", [{"a": 0.8, "b": 0.5}, {"a": 1.0, "b": 0.4}])
    line = results.Line("m", "merge", [{"a": 0.4, "b": 0.5}, {"a": 0.9, "b": 0.3}])
    shown = results.figures(line, base, experts)
    # seed 1: 50 % and 100 %; seed 2: 90 % and 75 %. Means of accuracies: 0.45 of 0.35 to 0.65; 0.6 of 0.35 to 0.7.
    assert shown.normalised == pytest.approx((78.75, 5.303301))
    assert shown.worst == pytest.approx((62.5, 17.67767))
    assert shown.closed == pytest.approx(((100 / 3 + 500 / 7) / 2, abs(100 / 3 - 500 / 7) / 2**0.5))


@pytest.mark.parametrize("name", candidates.OWN)
def test_every_candidate_is_a_recipe(name: str, tmp_path: Path) -> None:
    keys = set()
    for parameters in candidates.MERGES[name].settings:
        path = written(recipe(tmp_path, {"a": tmp_path, "b": tmp_path}, parameters), tmp_path)
        parse_recipe(path.read_text(), path, tmp_path)
        keys.add(candidates.key(name, parameters))
    assert len(keys) == len(candidates.MERGES[name].settings)


def test_the_defaults_are_the_tools(tmp_path: Path) -> None:
    def parsed(parameters: Parameters) -> Recipe:
        path = written(recipe(tmp_path, {"a": tmp_path, "b": tmp_path}, parameters), tmp_path)
        return parse_recipe(path.read_text(), None, tmp_path)

    bare, full = parsed({}), parsed(DEFAULTS)
    densities = [each.density_of(each.tasks[0], "w", Fraction(0)) for each in (bare, full)]
    assert densities[0] == densities[1]
    assert replace(full, density=None, lines={}, text="") == replace(bare, lines={}, text="")


def test_singular_vectors_of_tasks() -> None:
    """Tasks whose vectors are orthogonal already are summed as they are; others are pulled apart."""
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(40, 36))
    v, _ = torch.linalg.qr(torch.randn(36, 36))
    values = 1 + torch.rand(36)
    apart = torch.stack([(u[:, half] * values[half]) @ v[:, half].T for half in (slice(18), slice(18, 36))])
    torch.testing.assert_close(spectral.tsv(apart), apart.sum(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(spectral.iso(apart), values.mean() * _polar(apart.sum(0)), atol=1e-4, rtol=0)
    alike = torch.stack([apart[0] + 0.1 * torch.randn(40, 36), apart[0] + 0.1 * torch.randn(40, 36)])
    kept = torch.linalg.svdvals(alike)[:, :18].flatten().sort().values
    found = torch.linalg.svdvals(spectral.tsv(alike)).sort().values
    torch.testing.assert_close(found, kept, atol=1e-4, rtol=0)  # orthogonal vectors leave every value what it was


def _polar(matrix: torch.Tensor) -> torch.Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    polar: torch.Tensor = left @ right
    return polar


def test_mergekits_methods_by_formula(tmp_path: Path) -> None:
    torch.manual_seed(0)
    paths = [tmp_path / name for name in ("base", "x", "y")]
    for path in paths:
        path.mkdir()
    held = [{"w": torch.randn(5, 4), "n": torch.arange(3)} for _ in paths]
    for path, tensors in zip(paths, held, strict=True):
        save_like(tensors, tmp_path, path)
    base, x, y = (tensors["w"] for tensors in held)
    experts = {"x": paths[1], "y": paths[2]}
    average = mergekits("task_arithmetic", paths[0], experts, {"normalize": True})
    torch.testing.assert_close(average["w"], (x + y) / 2)
    assert torch.equal(average["n"], torch.arange(3))
    arithmetic = mergekits("task_arithmetic", paths[0], experts, {"lambda": 0.3})
    torch.testing.assert_close(arithmetic["w"], base + 0.3 * (x - base + y - base))
    ties = mergekits("ties", paths[0], experts, {"density": 1.0, "normalize": True})["w"]
    for place in range(20):
        b, u, v = (float(t.flatten()[place]) for t in (base, x - base, y - base))
        kept = [each for each in (u, v) if each * (u + v) > 0]
        assert float(ties.flatten()[place]) == pytest.approx(b + sum(kept) / max(len(kept), 1), abs=1e-6)


SEPARATE = PAPER | {"density": 0.2, "stages": [["movies"], ["scripture"]]}


ATTENTION = ("output.dense", "self.key", "self.query", "self.value")


class Toy:
    """A learner of seconds: the mean state of a tiny BERT must point to the class."""

    name = "toy"
    dtype = torch.float32
    limit = 10

    def __init__(self, base: Path, width: int = 8) -> None:
        self.base = base
        config = BertConfig(
            vocab_size=16, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
        )
        torch.manual_seed(0)
        BertModel(config).save_pretrained(base)

    def companions(self) -> list[Path]:
        return []

    def load(self, path: Path) -> PreTrainedModel:
        model: PreTrainedModel = BertModel.from_pretrained(path)
        return model

    def loss(self, model: PreTrainedModel, task: str, rows: Sequence[Row]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self._logits(model, rows), torch.tensor([row.label for row in rows]))

    def predict(self, model: PreTrainedModel, task: str, rows: Sequence[Row]) -> torch.Tensor:
        return self._logits(model, rows).argmax(dim=1)

    def _logits(self, model: PreTrainedModel, rows: Sequence[Row]) -> torch.Tensor:
        tokens = torch.tensor([[ord(c) % 16 for c in row.text[-4:].rjust(4)] for row in rows])
        states: torch.Tensor = model(tokens).last_hidden_state
        return states.mean(dim=1)[:, :2]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    tasks: dict[str, Task] = {name: replace(split(name, texts(240)), name=name) for name in ("movies", "scripture")}
    return Bench(Toy(tmp_path / "base"), tasks, Schedule(steps=6, batch=4, rate=1e-2), 0, tmp_path / "bench")


def test_cpi_ft_trains_in_stages_and_keeps_the_first_core(bench: Bench) -> None:
    fused = load_file(methods.merged(bench, SEPARATE) / "model.safetensors")
    fused = {name: tensor.clone() for name, tensor in fused.items()}
    done = load_file(methods.cpi_ft(bench, SEPARATE) / "model.safetensors")
    plan = Plan.load(methods.planned(bench, methods.experts(bench), SEPARATE))
    assert plan.stages == [["movies"], ["scripture"]]
    starts = load_file(bench.learner.base / "model.safetensors")
    expert = load_file(bench.expert(bench.tasks["movies"]) / "model.safetensors")
    update = torch.cat([(expert[name] - starts[name]).flatten() for name in sorted(starts)])
    core = update.abs() >= update.abs().sort().values[-int(0.1 * len(update))]  # well within the 20 % core
    before, after = (torch.cat([t[name].flatten() for name in sorted(starts)]) for t in (fused, done))
    first_stage = methods.staged(bench, "first", bench.learner.base, [["movies"]], methods.THIRD)
    assert first_stage.is_dir()
    moved = before != after
    assert moved[~core].float().mean() > 0.5
    # The movies' core moves in its own stage and is held in the next; trained alone, that stage gives the same.
    schedule = replace(bench.steps(methods.THIRD), again=True)
    alone = bench.trained(_fused_again(bench), [bench.tasks["movies"]], schedule)
    kept = torch.cat([alone.state_dict()[name].flatten() for name in sorted(starts)])
    assert torch.equal(after[core], kept[core])


def _fused_again(bench: Bench) -> Path:
    return methods.merged(bench, SEPARATE)


@pytest.mark.parametrize("space", ["weights", "delta"])
def test_without_slerps_what_is_outside_the_cores_is_the_average(bench: Bench, space: str) -> None:
    parameters = SEPARATE | {"density": 0.02, "space": space, "singular_values": "keep"}
    found = load_file(methods.unslerped(bench, parameters) / "model.safetensors")
    experts = [load_file(path / "model.safetensors") for path in methods.experts(bench).values()]
    moved = averaged = 0
    for name, values in found.items():
        average = torch.stack([expert[name] for expert in experts]).mean(dim=0)
        near = (values - average).abs() <= 1e-6
        core = torch.stack([values == expert[name] for expert in experts]).any(dim=0)
        assert (near | core).all(), name
        apart = experts[0][name] != experts[1][name]
        moved, averaged = moved + int(apart.sum()), averaged + int((apart & near).sum())
    cores = 2 * int(0.02 * sum(values.numel() for values in found.values()))
    assert averaged >= moved - cores > 0.5 * moved
    slerped = load_file(methods.merged(bench, parameters) / "model.safetensors")
    assert any(not torch.equal(slerped[name], values) for name, values in found.items())


def test_models_of_cpi_ft_have_a_name_each(bench: Bench) -> None:
    """What has the same stages and cores is one model, whatever made the stages; all else are several."""
    alone = methods.cpi_ft_name(bench, SEPARATE | {"tau": 0})
    assert methods.cpi_ft_name(bench, SEPARATE | {"tau": 0.1}) == alone
    others = [
        methods.cpi_ft_name(bench, SEPARATE | {"stages": [["scripture"], ["movies"]]}),
        methods.cpi_ft_name(bench, SEPARATE | {"stages": [["movies", "scripture"]]}),
        methods.cpi_ft_name(bench, SEPARATE | {"density": 0.3}),
        methods.cpi_ft_name(bench, SEPARATE, methods.FROM_AVERAGE),
        methods.cpi_ft_name(bench, SEPARATE, methods.FROM_UNSLERPED),
        methods.cpi_ft_name(bench, SEPARATE, freeze=False),
    ]
    assert len({alone, *others}) == 7


def test_scores_are_measured_once(bench: Bench) -> None:
    calls = []

    def get() -> Path:
        calls.append(1)
        return bench.learner.base

    first = bench.scores("base", "test", get)
    assert first == bench.scores("base", "test", get)
    assert len(calls) == 1
    right = [
        int(bench.learner.predict(bench.learner.load(bench.learner.base), "movies", [row])) == row.label
        for row in bench.tasks["movies"].test[:10]
    ]
    assert first["movies"] == sum(right) / 10
    with pytest.raises(ValueError, match=r"base\.test\.json: of another schedule or other rows"):
        replace(bench, schedule=Schedule(steps=7, batch=4, rate=1e-2)).scores("base", "test", get)


class Asked:
    """A bench whose scores are given; it notes what is asked for."""

    def __init__(self, scores: dict[str, float]) -> None:
        self.asked: list[str] = []
        self._given = scores

    def scores(self, name: str, split: str, get: Callable[[], Path]) -> dict[str, float]:
        self.asked.append(split)
        return {"a": self._given[name]}


def test_settings_are_chosen_on_validation_rows() -> None:
    best = DEFAULTS | {"density": 0.1, "conflict": "largest"}
    every = candidates.MERGES["fusion, chosen"].settings
    given = {candidates.key("fusion, chosen", each): 0.5 for each in every}
    assert best in every
    benches = [Asked(given | {candidates.key("fusion, chosen", best): share}) for share in (0.3, 0.9)]
    assert candidates.chosen(cast("Sequence[Bench]", benches), [], "fusion, chosen") == best
    assert {split for bench in benches for split in bench.asked} == {"validation"}


def test_density_and_threshold_are_chosen_on_validation_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        staging, "cpi_ft_name", lambda bench, parameters: f"{parameters['density']}-{parameters['tau']}"
    )
    given = {f"{each['density']}-{each['tau']}": 0.5 for each in staging.GRID}
    benches = [Asked(given | {"0.3-auto": share}) for share in (0.3, 0.9)]
    assert staging.chosen(cast("Sequence[Bench]", benches)) == PAPER | {"density": 0.3, "tau": "auto"}
    assert {split for bench in benches for split in bench.asked} == {"validation"}


def test_updates_cut_to_a_low_rank(bench: Bench, tmp_path: Path) -> None:
    """The strongest directions of matrices of layers are what is left; nothing else moves."""
    wide = replace(bench, learner=Toy(tmp_path / "wide", 40), folder=tmp_path / "low")
    low = constants.of_low_rank(wide)
    for task in wide.tasks.values():
        base, whole, cut = (
            load_file(path / "model.safetensors") for path in (wide.learner.base, wide.expert(task), low.expert(task))
        )
        levelled = {name for name in base if can_level(base[name].shape, layer_of(name))}
        assert levelled == {f"encoder.layer.0.attention.{name}.weight" for name in ATTENTION}
        for name, start in base.items():
            left, values, right = np.linalg.svd(
                (whole[name] - start).double().reshape(len(start), -1).numpy(), full_matrices=False
            )
            strongest = (left[:, : constants.RANK] * values[: constants.RANK]) @ right[: constants.RANK]
            wanted = torch.from_numpy(strongest).reshape(start.shape) if name in levelled else torch.zeros_like(start)
            torch.testing.assert_close((cut[name] - start).double(), wanted.double(), atol=1e-6, rtol=0)
            assert not torch.equal(whole[name], start) or name.startswith("pooler") or "position_ids" in name


def test_constants_are_in_force_while_they_are_tried(bench: Bench, tmp_path: Path) -> None:
    wide = replace(bench, learner=Toy(tmp_path / "wide", 40), folder=tmp_path / "bench")
    made = [
        load_file(constants.fused_with(wide, constants.Constants(limit=limit)) / "model.safetensors")
        for limit in (0.001, 0.002)
    ]
    base = load_file(wide.learner.base / "model.safetensors")
    name = "encoder.layer.0.attention.self.query.weight"
    core = Plan.load(methods.planned(wide, methods.experts(wide), DEFAULTS)).tensors
    assert {tensor.name: tensor.is_levelled for tensor in core}[name]
    moved = [float((tensors[name] - base[name]).norm() / base[name].norm()) for tensors in made]
    assert 0.001 <= moved[0] < moved[1]
    assert constants.Constants().limit == levelling.LIMIT


def test_the_constants_are_those_that_were_chosen() -> None:
    """The best mean over all kinds of experts, of the mean of tasks and the worst one alike, over the seeds."""
    rows = json.loads((results.RESULTS / "constants.json").read_text())
    for tried in (constants.USUAL, constants.LOW_RANK):
        kinds: dict[constants.Constants, dict[str, float]] = {these: {} for these in tried}
        for row in rows:
            these = constants.Constants(**row["constants"])
            if these in kinds and row["experts"].endswith(f"rank {constants.RANK}") == (tried is constants.LOW_RANK):
                assert len(row["means"]) == len(row["worst"]) == 3
                kinds[these][row["experts"]] = (sum(row["means"]) + sum(row["worst"])) / 6
        assert len({frozenset(found) for found in kinds.values()}) == 1
        means = {these: sum(found.values()) / len(found) for these, found in kinds.items()}
        assert max(means, key=means.__getitem__) == constants.Constants()


def test_both_models_have_the_same_settings() -> None:
    """They are chosen on the encoder, or on both: results of two different choices must not stand side by side."""
    chosen = [
        {line.name: line.settings for line in results.load(learner) if line.settings}
        for learner in ("encoder", "causal")
    ]
    assert chosen[0] == chosen[1]
    assert set(candidates.MERGES) < set(chosen[0])


def test_the_pages_have_what_was_measured(tmp_path: Path) -> None:
    pages = ("seesaw.md", "grouping.md", "payoff.md")
    for page in pages:
        (tmp_path / page).write_bytes((tables.DOCS / page).read_bytes())
    tables.write_pages(tmp_path)
    for page in pages:
        assert (tmp_path / page).read_bytes() == (tables.DOCS / page).read_bytes()


def test_a_table_without_its_place_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for text, found in (("none", 0), ("<!-- rows -->\n| b |\n<!-- /rows -->\n" * 2, 2)):
        page.write_text(text)
        with pytest.raises(ValueError, match=f"{found} places for the table 'rows'; one is needed"):
            tables.write_tables(page, {"rows": ["| a |"]})
        assert page.read_text() == text
