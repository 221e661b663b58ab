"""What passes preflight: the tensors to merge, with the recipe's numbers settled. What does not: test_bad_inputs."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction as Q
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from checkpoints import save, write_recipe
from hypothesis import given
from hypothesis import strategies as st

from cpimerge import IncompatibleError, load_recipe, preflight
from cpimerge.checkpoint import StoredTensor, natural_key
from cpimerge.preflight import Inputs, TensorSpec, pools

TENSORS = {
    "embed": torch.zeros(4, 2),
    "layers.0.w": torch.zeros(2),
    "layers.1.w": torch.zeros(2),
    "layers.2.w": torch.zeros(2, dtype=torch.bfloat16),
    "layers.2.bias": torch.zeros(3),
    "ids": torch.arange(3),
    "other.10.w": torch.zeros(()),
    "other.5.w": torch.zeros(0),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints with equal headers: base, a, b, c."""
    directory = tmp_path_factory.mktemp("home")
    for name in ("base", "a", "b", "c"):
        save(directory / name, TENSORS)
    return directory


def check(home: Path, tmp_path: Path, parameters: dict[str, Any] | None = None, **more: Any) -> Inputs:
    """Preflight of a recipe with the tasks a and b."""
    keys: dict[str, Any] = {"base_model": home / "base", "models": [{"model": home / "a"}, {"model": home / "b"}]}
    if parameters:
        keys["parameters"] = parameters
    return preflight.check(load_recipe(write_recipe(tmp_path / "recipe.yml", **keys | more)))


def test_inputs(home: Path, tmp_path: Path) -> None:
    found = check(home, tmp_path)
    assert found.names == ("base", "a", "b")
    assert [checkpoint.path for checkpoint in found.checkpoints] == [home / name for name in found.names]
    assert [spec.name for spec in found.tensors] == sorted(TENSORS, key=natural_key)
    assert found.nbytes == 3 * sum(tensor.nbytes for tensor in TENSORS.values())
    assert found.notes == ()
    for spec in found.tensors:
        assert spec.shape == tuple(TENSORS[spec.name].shape)
        assert (spec.elements, spec.is_float) == (TENSORS[spec.name].numel(), spec.name != "ids")
        assert spec.source_bytes == 3 * TENSORS[spec.name].nbytes
        assert [info.file.parent for info in spec.sources if isinstance(info, StoredTensor)] == [
            home / name for name in found.names
        ]
        assert {info.name for info in spec.sources} == {spec.name}


@pytest.mark.parametrize(
    ("backbone", "names", "first_member"),
    [
        ("last", ["base", "a", "b"], 1),
        ("a", ["base", "a", "b"], 1),
        ("base", ["base", "a", "b"], 0),
        ("./c", ["base", "a", "b", "backbone"], 1),
    ],
)
def test_backbones(home: Path, tmp_path: Path, backbone: str, names: list[str], first_member: int) -> None:
    written = str(home / "c") if backbone == "./c" else backbone
    found = check(home, tmp_path, {"backbone": written})
    assert (list(found.names), found.first_member) == (names, first_member)
    assert {len(spec.sources) for spec in found.tensors} == {len(names)}


def test_one_directory_may_serve_twice(home: Path, tmp_path: Path) -> None:
    """Also the base itself may be a task."""
    models = [{"model": home / "a", "name": name} for name in ("x", "y")] + [{"model": home / "base", "name": "z"}]
    found = check(home, tmp_path, models=models)
    assert [checkpoint.path.name for checkpoint in found.checkpoints] == ["base", "a", "a", "base"]


def by_name(found: Inputs) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in found.tensors}


def test_dtypes_and_excludes(home: Path, tmp_path: Path) -> None:
    found = by_name(check(home, tmp_path, {"exclude": ["*.bias", "other"]}, dtype="float16"))
    assert {name for name, spec in found.items() if spec.dtype != "F16"} == {"ids"}
    assert {name for name, spec in found.items() if not spec.eligible} == {
        "layers.2.bias",
        "other.5.w",
        "other.10.w",
        "ids",
    }
    assert by_name(check(home, tmp_path))["layers.2.w"].dtype == "BF16"


def test_numbers_are_settled_for_each_tensor_and_task(home: Path, tmp_path: Path) -> None:
    """A gradient runs over the layers of each stack; its first value serves all that is in no layer."""
    models: list[dict[str, Any]] = [
        {"model": home / "a", "parameters": {"density": 0.29, "weight": [{"filter": "embed", "value": 7}]}},
        {"model": home / "b"},
    ]
    found = by_name(check(home, tmp_path, {"density": [0, 0.3, 1], "weight": 2}, models=models))
    third = Q(3, 10)
    densities = {
        "embed": 0,
        "ids": 0,
        "layers.0.w": 0,
        "layers.1.w": third,
        "layers.2.w": 1,
        "layers.2.bias": 1,
        "other.5.w": third,
        "other.10.w": 1,
    }
    assert {name: spec.density for name, spec in found.items()} == {
        name: (Q(29, 100), density) for name, density in densities.items()
    }
    assert {name: spec.weight for name, spec in found.items() if 7 in spec.weight} == {"embed": (Q(7), Q(2))}
    assert {spec.t for spec in found.values()} == {(None, None)}


def test_defaults(home: Path, tmp_path: Path) -> None:
    for spec in check(home, tmp_path).tensors:
        assert (spec.density, spec.weight, spec.t) == ((Q(1, 100),) * 2, (Q(1),) * 2, (None, None))


@pytest.mark.parametrize("parameters", [{"weight": 0, "backbone": "base"}, {"t": 0}])
def test_weights_of_0_that_are_sound(home: Path, tmp_path: Path, parameters: dict[str, Any]) -> None:
    """The base weighs 1 as a backbone, and a constant t needs no weights."""
    assert len(check(home, tmp_path, parameters).tensors) == len(TENSORS)


@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
@given(names=st.lists(st.sampled_from([*TENSORS, "the model", "layers.0.", "'embed'", "0"]), unique=True))
def test_pools_are_the_references(scope: str, names: list[str]) -> None:
    def spec(name: str) -> TensorSpec:
        info = StoredTensor(name, "F32", (1,), 4, Path(), 0)
        return TensorSpec(name, (1,), (info,), "F32", name not in ("embed", "the model", "layers.0."), (), (), ())

    names = sorted(names, key=natural_key)
    found = [[spec.name for spec in pool] for pool in pools(map(spec, names), scope).values()]
    eligible = [name for name in names if spec(name).eligible]
    expected = reference.pools(eligible, scope) + [[name] for name in names if name not in eligible]
    assert sorted(found) == sorted(expected)


def test_many_differing_names_take_no_search(tmp_path: Path) -> None:
    """Names that differ by the thousand are listed without looking for the nearest, which would take minutes."""
    zero = torch.zeros(1)
    save(tmp_path / "base", {f"layers.{number}.w": zero for number in range(1500)})
    save(tmp_path / "a", {f"layers.{number}.v": torch.zeros(2) for number in range(1500)})
    recipe = write_recipe(tmp_path / "recipe.yml", base_model=tmp_path / "base", models=[{"model": tmp_path / "a"}])
    with pytest.raises(IncompatibleError) as error:
        preflight.check(load_recipe(recipe))
    assert len(error.value.problems) == 3000
    assert error.value.problems[2].endswith("It is no fine-tune of this base as it stands")


def test_preflight_needs_no_numeric_library() -> None:
    """Mistakes are shown before torch and numba are loaded, which takes seconds."""
    code = "import sys, cpimerge.preflight; print(sorted({'torch', 'numba', 'numpy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
