"""mergekit's recipes: what comes of its own examples, and that what is read means what it means in mergekit 0.1.5."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mergekit_oracle import load
from mergekit_oracle import merge as mergekit

import cpimerge
from cpimerge import dialect
from cpimerge.depths import _outer_slices, positions
from cpimerge.errors import RecipeError
from cpimerge.recipe import Recipe, parse_recipe
from cpimerge.recipe_schema import Document, Slice, Source, Tokenizer, _Model, _Shared

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "tests" / "data" / "mergekit_examples"
DOCS = (ROOT / "docs" / "mergekit.md").read_text(encoding="utf-8")

Tensors = Mapping[str, torch.Tensor]


# --- mergekit's own examples ------------------------------------------------------------------------


def outcome(text: str) -> str:
    """What comes of a recipe: `read`, or line and key of everything that is refused, as the table has it."""
    try:
        parse_recipe(text, None, Path("/"))
    except RecipeError as error:
        places = (re.match(r"recipe:(\d+): (?:([\w.\[\]]+): )?", problem) for problem in error.problems)
        return ", ".join(f"{found[1]} `{found[2]}`" if found[2] else found[1] for found in places if found)
    return "read"


def table() -> dict[str, tuple[str, str]]:
    """The documents' table of outcomes, by example."""
    rows = re.findall(r"^\| `([\w-]+\.yml)`[^|]*\| ([^|]*) \| ([^|]*) \|$", DOCS, re.MULTILINE)
    return {name: (as_it_is, as_cpi) for name, as_it_is, as_cpi in rows}


def test_the_table_has_every_example() -> None:
    assert list(table()) == sorted(file.name for file in EXAMPLES.glob("*.yml"))


@pytest.mark.parametrize("example", [file.name for file in sorted(EXAMPLES.glob("*.yml"))])
def test_outcomes_are_those_of_the_table(example: str) -> None:
    text = (EXAMPLES / example).read_text(encoding="utf-8")
    as_cpi = re.sub(r"^merge_method: \w+$", "merge_method: cpi", text, flags=re.MULTILINE)
    assert (outcome(text), outcome(as_cpi)) == table()[example]


def test_another_method_is_refused_with_what_to_do() -> None:
    text = (EXAMPLES / "bio-merge.yml").read_text(encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, Path("bio-merge.yml"), Path("/"))
    assert caught.value.problems == (
        "bio-merge.yml:1: merge_method: 'ties' is not supported; cpimerge has one method, cpi: with equal weights and "
        "lambda 1 it is cpi with conflict: elect, space: delta and rest: 0, see recipes/ties.yml",
        "bio-merge.yml:9: parameters.normalize: false is not supported; shares by weight always add up to 1. Remove it",
    )


def test_the_recipe_in_the_documents_is_read() -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", DOCS, re.DOTALL | re.MULTILINE)
    recipe = parse_recipe(text, None, Path("/"))
    assert f"{recipe.conflict} {recipe.space} {recipe.rest} {recipe.dtype}" == "elect delta 0 float16"


# --- every word of mergekit 0.1.5 -------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _mergekit() -> None:
    """Its import takes seconds and warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mergekit.merge
        import mergekit.merge_methods.registry  # noqa: F401


def methods() -> list[Any]:
    from mergekit.merge_methods.registry import registered_methods

    return list(registered_methods())


def test_every_method_is_known_and_documented() -> None:
    names = {method.spec.name for method in methods()}
    assert dialect.METHODS.keys() == names
    rows = re.findall(r"^\|(.*?)\|", DOCS.split("Other methods")[1].split("\n## ")[0], re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(names)


def test_every_parameter_is_read_or_refused_by_name() -> None:
    parameters = {
        p.name for method in methods() for p in (*method.spec.shared_parameters, *method.spec.input_parameters)
    }
    assert {"weight", "gamma", "select_topk"} < parameters
    assert parameters <= _Shared.model_fields.keys() | dialect.NOT_SUPPORTED.keys()


def test_every_key_is_read_or_refused_by_name() -> None:
    from mergekit import config
    from mergekit.tokenizer.config import TokenizerConfig

    pairs: list[tuple[Any, Any]] = [
        (config.MergeConfiguration, Document),
        (config.OutputSliceDefinition, Slice),
        (config.InputSliceDefinition, Source),
        (config.InputModelDefinition, _Model),
        (TokenizerConfig, Tokenizer),
    ]
    for theirs, ours in pairs:
        assert theirs.model_fields.keys() <= ours.model_fields.keys() | dialect.NOT_SUPPORTED.keys()


def test_every_template_is_refused_by_name() -> None:
    templates = files("mergekit._data.chat_templates").iterdir()
    assert {file.name.removesuffix(".jinja") for file in templates if file.name.endswith(".jinja")} == set(
        dialect.TEMPLATES
    )


# --- where tensors outside the layers go ------------------------------------------------------------


def architectures() -> Iterator[tuple[str, dict[str, Any]]]:
    """Those with one stack of layers; mergekit refuses slices of the others."""
    for file in files("mergekit._data.architectures").iterdir():
        if file.name.endswith(".json"):
            content = json.loads(file.read_text(encoding="utf-8"))
            if "modules" not in content:
                yield file.name, content


def test_the_side_of_a_tensor_is_that_of_the_architecture() -> None:
    """The name tells it for all that mergekit knows, but for one of which it does not tell."""
    found = dict(architectures())
    assert len(found) > 40
    for side, key in enumerate(("pre_weights", "post_weights")):
        for file, content in found.items():
            for weight in content[key]:
                known = (0, 1) if weight["name"].startswith("layers.") else (side,)
                assert _outer_slices(weight["name"], 2) in (known, (side,)), (file, weight["name"])


# --- parameters at every level ----------------------------------------------------------------------

MODELS = ("base", "one", "two")
MOST_LAYERS = 5


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each number of layers (a directory each) a base and two fine-tunes of it."""
    root = tmp_path_factory.mktemp("llamas")
    for layers in range(1, MOST_LAYERS + 1):
        for seed, name in enumerate(MODELS):
            save(root / str(layers) / name, weights(layers, seed), config=config(layers))
    return root


def config(layers: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": layers,
        "vocab_size": 32,
        "tie_word_embeddings": False,
    }


def weights(layers: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {
        "model.embed_tokens.weight": random(32, 8),
        "model.norm.weight": random(8),
        "lm_head.weight": random(32, 8),
    }
    for number in range(layers):
        layer = f"model.layers.{number}"
        for part in ("q", "k", "v", "o"):
            tensors[f"{layer}.self_attn.{part}_proj.weight"] = random(8, 8)
        tensors[f"{layer}.mlp.gate_proj.weight"] = random(16, 8)
        tensors[f"{layer}.mlp.up_proj.weight"] = random(16, 8)
        tensors[f"{layer}.mlp.down_proj.weight"] = random(8, 16)
        tensors[f"{layer}.input_layernorm.weight"] = random(8)
        tensors[f"{layer}.post_attention_layernorm.weight"] = random(8)
    return tensors


number = st.sampled_from([0, 0.1, 0.25, 0.5, 0.75, 1])
gradient = st.one_of(number, st.lists(number, min_size=1, max_size=4))
FILTERS = ["mlp", "self_attn", "embed", "norm", "lm_head", "layers.1.", "q_proj.weight"]
filtered = st.builds(lambda word, value: {"filter": word, "value": value}, st.sampled_from(FILTERS), gradient)
last = st.one_of(
    st.builds(lambda value: {"value": value}, gradient),
    st.builds(lambda value: {"filter": "*", "value": value}, gradient),
    filtered,
)
setting = st.one_of(gradient, filtered, st.builds(lambda some, end: [*some, end], st.lists(filtered, max_size=2), last))
own = st.fixed_dictionaries({}, optional={"density": setting, "weight": setting})


@st.composite
def recipes(draw: st.DrawFn) -> tuple[int, dict[str, Any]]:
    """How many layers the models have, and a recipe for both programs, but for the method."""
    layers = draw(st.integers(1, MOST_LAYERS))
    shared = {key: [*draw(st.lists(filtered, max_size=1)), {"value": draw(gradient)}] for key in ("density", "weight")}
    recipe: dict[str, Any] = {"base_model": "base", "parameters": shared}
    if draw(st.booleans()):
        return layers, recipe | {"models": [{"model": name, "parameters": draw(own)} for name in MODELS[1:]]}
    cuts = sorted(draw(st.sets(st.integers(1, layers - 1))) if layers > 1 else ())
    slices = []
    for span in pairwise([0, *cuts, layers]):
        sources: list[dict[str, Any]] = [{"model": "base", "layer_range": list(span)}]
        sources += [{"model": name, "layer_range": list(span), "parameters": draw(own)} for name in MODELS[1:]]
        slices.append({"sources": sources, "parameters": draw(own)})
    return layers, recipe | {"slices": slices}


def in_mergekit(recipe: dict[str, Any], directory: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Density and weight of each tensor and model, as mergekit plans them."""
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    text = json.dumps({"merge_method": "ties"} | recipe)
    for name in MODELS:
        text = text.replace(f'"{name}"', f'"{directory / name}"')
    options = MergeOptions()
    LoaderCache().loaders.clear()
    LoaderCache().setup(options)
    merge = MergeConfiguration.model_validate_json(text)
    assert merge.base_model is not None
    planner = MergePlanner(merge, get_architecture_info(merge, options), options, merge.base_model.config())
    planner._plan()
    return {
        weight.name: {
            Path(model.model.path).name: dict(parameters)
            for model, parameters in task.input_parameters.items()
            if model != merge.base_model
        }
        for weight, task in planner._tensors
    }


def in_cpimerge(recipe: Recipe, names: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    places = positions(names, recipe.slices)
    assert all(len(place.slices) == 1 for place in places.values())
    return {
        name: {
            task.name: {
                "density": float(recipe.density_of(task, name, place.depth, place.slices[0])),
                "weight": float(recipe.weight_of(task, name, place.depth, place.slices[0])),
            }
            for task in recipe.tasks
        }
        for name, place in places.items()
    }


@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
@given(case=recipes())
def test_parameters_are_mergekits(llamas: Path, case: tuple[int, dict[str, Any]]) -> None:
    """At each level, with gradients and filters, for every tensor of every model."""
    layers, written = case
    theirs = in_mergekit(written, llamas / str(layers))
    text = yaml.safe_dump({"merge_method": "cpi"} | written)
    ours = in_cpimerge(parse_recipe(text, None, llamas / str(layers)), list(theirs))
    assert ours.keys() == weights(layers, 0).keys()
    for name, of_models in ours.items():
        for model, parameters in of_models.items():
            assert parameters == pytest.approx(dict(theirs[name][model]) | {}, abs=1e-12), (name, model)


# --- whole merges -----------------------------------------------------------------------------------

SLERP = """\
slices:
  - sources:
      - {{model: {base}, layer_range: [0, 3]}}
      - {{model: {one}, layer_range: [0, 3]}}
    parameters:
      t:
        - {{filter: self_attn, value: [0, 0.5, 1]}}
        - {{filter: mlp, value: [1, 0.3]}}
        - value: 0.5
  - sources:
      - {{model: {base}, layer_range: [3, 5]}}
      - {{model: {one}, layer_range: [3, 5]}}
base_model: {base}
parameters:
  t: [0.2, 0.8]
dtype: float32
"""


def both(
    llamas: Path, tmp_path: Path, text: str, theirs: dict[str, Any], ours: dict[str, Any]
) -> tuple[Tensors, Tensors]:
    """What mergekit and cpimerge make of one recipe with what each needs beside it."""
    content: dict[str, Any] = yaml.safe_load(text.format(**{name: llamas / "5" / name for name in MODELS}))

    def with_its_own(extra: dict[str, Any]) -> dict[str, Any]:
        shared = content.get("parameters", {}) | extra.get("parameters", {})
        return content | extra | ({"parameters": shared} if shared else {})

    tmp_path.mkdir(exist_ok=True)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump(with_its_own({"merge_method": "cpi"} | ours)), encoding="utf-8")
    cpimerge.merge(recipe, tmp_path / "ours")
    return mergekit(with_its_own(theirs), tmp_path / "theirs"), load(tmp_path / "ours")


def assert_close(theirs: Tensors, ours: Tensors) -> None:
    assert theirs.keys() == ours.keys()
    for name, expected in theirs.items():
        wrong = (ours[name] - expected).abs() > 1e-6 + 1e-5 * expected.abs()
        assert not wrong.any(), f"{name}: {ours[name][wrong][:5]} against {expected[wrong][:5]}"


def test_slices_with_gradients_and_filters_are_mergekits_slerp(llamas: Path, tmp_path: Path) -> None:
    """As the hint for slerp says: one model besides the base, density 0, weights and the base as the backbone."""
    ours = {"parameters": {"density": 0, "space": "weights", "backbone": "base"}}
    theirs, found = both(llamas, tmp_path, SLERP, {"merge_method": "slerp"}, ours)
    assert_close(theirs, found)
    base = load(llamas / "5" / "base")
    assert torch.equal(found["model.layers.0.self_attn.q_proj.weight"], base["model.layers.0.self_attn.q_proj.weight"])


ONE_SLICE = """\
merge_method: cpi
base_model: {base}
slices:
  - sources:
      - {{model: {base}, layer_range: [0, 5]}}
      - model: {one}
        layer_range: [0, 5]
        parameters: {{density: {{filter: mlp, value: [0.5, 0.1]}}}}
      - {{model: {two}, layer_range: [0, 5]}}
    parameters: {{weight: [1, 3], density: 0.2}}
"""
AS_MODELS = """\
merge_method: cpi
base_model: {base}
models:
  - model: {one}
    parameters: {{density: [{{filter: mlp, value: [0.5, 0.1]}}, {{value: 0.2}}]}}
  - {{model: {two}}}
parameters: {{weight: [1, 3], density: 0.2}}
"""


def planned(llamas: Path, tmp_path: Path, name: str, text: str) -> cpimerge.Plan:
    recipe = tmp_path / f"{name}.yml"
    recipe.write_text(text.format(**{model: llamas / "5" / model for model in MODELS}), encoding="utf-8")
    return cpimerge.plan(recipe, tmp_path / f"{name}-plan")


def test_a_slice_of_all_layers_is_the_model(llamas: Path, tmp_path: Path) -> None:
    sliced, whole = (planned(llamas, tmp_path, *pair) for pair in (("sliced", ONE_SLICE), ("whole", AS_MODELS)))
    assert sliced.tensors == whole.tensors
    assert [task.core_xxh3 for task in sliced.tasks] == [task.core_xxh3 for task in whole.tasks]
    file = tmp_path / "sliced.yml"
    assert sliced.notes == [
        f"{file}:5: slices[0].sources[0]: is the base, which is read anyway; it is no task",
        *whole.notes,
    ]


def test_slices_that_are_not_the_whole_model(llamas: Path, tmp_path: Path) -> None:
    """Only the checkpoint tells."""
    with pytest.raises(RecipeError) as caught:
        planned(llamas, tmp_path, "parts", ONE_SLICE.replace("[0, 5]", "[0, 4]"))
    file = tmp_path / "parts.yml"
    assert caught.value.problems == (
        f"{file}:5: slices: leave out layers: they stop before layer 4, and the base has 5. Give them [0, 5] "
        "together, or use mergekit for a merge of parts",
    )
    assert not (tmp_path / "parts-plan").exists()


def test_filters_and_densities_in_slices_have_their_keys(llamas: Path, tmp_path: Path) -> None:
    text = ONE_SLICE.replace("filter: mlp", "filter: mpl")
    with pytest.raises(RecipeError) as caught:
        planned(llamas, tmp_path, "typo", text)
    file = tmp_path / "typo.yml"
    assert caught.value.problems == (
        f"{file}:8: slices[0].sources[1].parameters.density: filter 'mpl' matches no tensor of the base; "
        "did you mean 'mlp'?",
    )
    with pytest.raises(RecipeError) as caught:
        planned(llamas, tmp_path, "scope", ONE_SLICE + "parameters: {{scope: layer}}")
    (problem,) = caught.value.problems
    assert problem.startswith(f"{tmp_path / 'scope.yml'}:8: slices[0].sources[1].parameters.density: differs within")


TWO = """\
base_model: {base}
models:
  - model: {one}
    parameters: {{weight: 0.25}}
  - model: {two}
    parameters: {{weight: 0.75}}
dtype: float32
"""


def test_nuslerp_is_density_0_with_deltas(llamas: Path, tmp_path: Path) -> None:
    """Its weights divide the angle, as `t` does; ours divide the sum, which is the same where they are equal."""
    one = {"model": str(llamas / "5" / "one"), "parameters": {"t": 0.25}}  # folded into the last, the backbone
    angles = [one, {"model": str(llamas / "5" / "two")}]
    ours = {"parameters": {"density": 0, "space": "delta"}}
    assert_close(*both(llamas, tmp_path / "t", TWO, {"merge_method": "nuslerp"}, ours | {"models": angles}))
    equal = TWO.replace("0.25", "1").replace("0.75", "1")
    assert_close(*both(llamas, tmp_path / "equal", equal, {"merge_method": "nuslerp"}, ours))


def test_ram_is_density_1_with_means(llamas: Path, tmp_path: Path) -> None:
    """At epsilon 0. Both change most elements; some are changed by one alone, or by none."""
    text = TWO.replace("    parameters: {{weight: 0.25}}\n", "").replace("    parameters: {{weight: 0.75}}\n", "")
    base = load(llamas / "5" / "base")
    for seed, name in enumerate(("one", "two"), 50):
        expert = load(llamas / "5" / name)
        mask = torch.Generator().manual_seed(seed)
        mixed = {k: torch.where(torch.rand(x.shape, generator=mask) < 0.5, x, base[k]) for k, x in expert.items()}
        save(tmp_path / "5" / name, mixed, config=config(5))
    save(tmp_path / "5" / "base", base, config=config(5))
    theirs = {"merge_method": "ram", "parameters": {"epsilon": 0}}
    ours = {"parameters": {"density": 1, "conflict": "mean", "space": "delta", "rest": 0}}
    assert_close(*both(tmp_path, tmp_path, text, theirs, ours))


def test_task_arithmetic_with_shares_is_averaging(llamas: Path, tmp_path: Path) -> None:
    """As long as the models are as near as fine-tunes are, so that the folds are lerps."""
    base = load(llamas / "5" / "base")
    for name in ("one", "two"):
        update = load(llamas / "5" / name)
        near = {key: base[key] + 0.01 * x for key, x in update.items()}
        save(tmp_path / "5" / name, near, config=config(5))
    save(tmp_path / "5" / "base", base, config=config(5))
    ours = {"parameters": {"density": 0, "space": "weights"}}
    assert_close(*both(tmp_path, tmp_path, TWO, {"merge_method": "task_arithmetic"}, ours))


def test_out_dtype_is_the_outputs(llamas: Path, tmp_path: Path) -> None:
    extra = {"out_dtype": "bfloat16", "parameters": {"density": 0, "space": "delta"}}
    theirs, found = both(llamas, tmp_path, TWO, {"merge_method": "nuslerp", "out_dtype": "bfloat16"}, extra)
    assert {tensor.dtype for tensor in (*theirs.values(), *found.values())} == {torch.bfloat16}
    written = json.loads((tmp_path / "ours" / "config.json").read_text(encoding="utf-8"))
    assert written.get("dtype", written.get("torch_dtype", "bfloat16")) == "bfloat16"
