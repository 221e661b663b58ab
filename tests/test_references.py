"""What a recipe may call a model, and what a plan calls it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpimerge.references import HubModel, Place, Reference, parse_reference, planned_path, planned_place

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "hub"),
    [
        ("org/name", HubModel("org/name")),
        ("org/name@v1.0", HubModel("org/name", "v1.0")),
        ("org/name@refs/pr/3", HubModel("org/name", "refs/pr/3")),
        ("Org-1/na.me_2", HubModel("Org-1/na.me_2")),
        ("./org/name", None),
        ("../name", None),
        ("/org/name", None),
        ("~/name", None),
        ("name", None),
        ("a/b/c", None),
        ("org/name@", None),
    ],
)
def test_what_may_be_a_model_on_the_hub(text: str, hub: HubModel | None, tmp_path: Path) -> None:
    place = parse_reference(text, tmp_path).model
    assert place.hub == hub
    assert place.is_local == (hub is None)


@pytest.mark.parametrize("text", ["model+", "+model", "+", "org/model+"])
def test_half_a_pair_is_a_directory_of_that_name(text: str, tmp_path: Path) -> None:
    assert parse_reference(text, tmp_path) == Reference(Place(tmp_path / text))


def test_a_directory_of_that_name_comes_first(tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert parse_reference("org/name", tmp_path).model.is_local
    assert not parse_reference("org/other+org/name", tmp_path).model.is_local


def test_a_name_too_long_for_a_directory_is_none(tmp_path: Path) -> None:
    assert not parse_reference("org/" + "x" * 5000, tmp_path).model.is_local


@pytest.mark.parametrize("cache", ["/home/me/.cache/huggingface/hub", "/data/.out.stream"])
def test_a_plan_finds_again_what_it_names(cache: str) -> None:
    snapshot = Path(f"{cache}/models--org--a--b/snapshots/{COMMIT}")
    streamed = cache.endswith(".stream")
    text = planned_path(snapshot)
    assert text == (f"org/a--b@{COMMIT}" if streamed else str(snapshot))
    place = planned_place(text)
    assert place.hub == HubModel("org/a--b", COMMIT)
    assert place.path == (Path("/") / text if streamed else snapshot)


@pytest.mark.parametrize("path", ["/models/org/name", "/models--org--name/snapshots/main", "/x.stream/model"])
def test_a_plain_directory_stays_one(path: str) -> None:
    assert planned_path(Path(path)) == path
    assert planned_place(path) == Place(Path(path))
    assert planned_place(path).hub is None


def test_what_no_path_can_hold_is_no_directory(tmp_path: Path) -> None:
    for place in (planned_place("~\0"), parse_reference("~\0", tmp_path).model):
        assert place.hub is None
        assert not place.path.exists()


def test_what_a_plan_names_does_not_depend_on_where_one_is() -> None:
    snapshot = f"../models--org--a/snapshots/{COMMIT}"
    assert planned_place(snapshot).path == Path(f"/models--org--a/snapshots/{COMMIT}")
