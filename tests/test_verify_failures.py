"""verify says no to what is spoilt, and says which: flipped bits, wrong cores under right hashes, changed inputs."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import reference
import torch
import xxhash
from checkpoints import Case, save, write_case, write_recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_semantics import fine_tunes
from trees import files
from verified import edit, flip, read_cores, write_cores

import cpimerge
from cpimerge import verify_sources, verifying
from cpimerge.card import recipe_without_places
from cpimerge.plan_file import Plan, plan_hash
from cpimerge.verify_results import Failure, Verification

LIMITS: dict[str, Any] = {"threads": 1}
MANIFEST = "cpimerge_manifest.json"
SETTINGS = {
    "plain": reference.Settings(density=Fraction(3, 10)),
    "by row": reference.Settings(density=Fraction(3, 10), granularity="row", space="delta", scope="layer"),
    "elect": reference.Settings(density=Fraction(1, 2), conflict="elect", scope="global", dtype=torch.float32),
}
few = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each of SETTINGS a directory with inputs, `plan` and `out` in shards. Not to be changed."""
    made = {}
    for number, (name, s) in enumerate(SETTINGS.items()):
        made[name] = tmp_path_factory.mktemp(f"made{number}")
        make(made[name], fine_tunes(["a", "b", "c"]), s, shard_size="150B")
    return made


def make(directory: Path, case: Case, s: reference.Settings, **options: Any) -> Path:
    cpimerge.plan(write_case(directory, case, s), directory / "plan", **LIMITS)
    cpimerge.fuse(directory / "plan", directory / "out", **LIMITS, **options)
    assert cpimerge.verify(directory / "out", **LIMITS).ok
    return directory


@pytest.fixture
def home(originals: dict[str, Path], tmp_path: Path) -> Path:
    """One of them, to be spoilt. Its inputs stay where they are."""
    return copied(originals["plain"], tmp_path)


def copied(original: Path, to: Path) -> Path:
    for name in ("plan", "out"):
        shutil.rmtree(to / name, ignore_errors=True)
        shutil.copytree(original / name, to / name)
    return to


def verify(home: Path, **options: Any) -> Verification:
    return cpimerge.verify(home / "out", home / "plan", **LIMITS, **options)


def refuse(home: Path, **options: Any) -> tuple[Failure, ...]:
    failures = verify(home, **options).failures
    assert failures
    return failures


def verify_or_error(home: Path) -> tuple[Failure, ...] | None:
    """The failures; None where the manifest is told to be none, or of another plan."""
    try:
        return verify(home).failures
    except (cpimerge.OutputError, cpimerge.PlanError) as error:
        return None if MANIFEST in str(error) else ()


def only(failures: tuple[Failure, ...]) -> Failure:
    assert len(failures) == 1, failures
    return failures[0]


# --- any bit ----------------------------------------------------------------------------------------


def element_at(file: Path, byte: int) -> tuple[str, int] | None:
    """The tensor and flat index of a byte of a safetensors file; None in its header."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    entries = json.loads(raw[8 : 8 + length])
    place = byte - 8 - length
    for name, entry in entries.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            elements = int(np.prod(entry["shape"]))
            if begin <= place < end:
                return name, (place - begin) * elements // (end - begin)
    return None


def names(file: Path) -> set[str]:
    """The tensors that the header of a safetensors file names; none where it cannot be read."""
    raw = file.read_bytes()
    try:
        entries = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]].decode("utf-8"))
    except ValueError:
        return set()
    return {*entries} - {"__metadata__"} if isinstance(entries, dict) else set()


def elsewhere(file: Path) -> set[tuple[str, str]]:
    """File and problem of what is said elsewhere than of `file`, where it has got a name that another has, too.

    That name is told of the later of the two, and the tensor that `file` had is nowhere any more.
    """
    others = [other for other in file.parent.glob("*.safetensors") if other != file and names(file) & names(other)]
    told = {(other.name, f"is in {file.name}, too") for other in others if other.name > file.name}
    return told | {(file.parent.name, "missing: no file of weights has it")} if others else set()


def said_elsewhere(file: Path, failures: tuple[Failure, ...]) -> set[tuple[str, str]]:
    told = {(Path(failure.file).name, failure.problem) for failure in failures}
    return {(name, problem) for name, problem in told if name != file.name}


@pytest.mark.parametrize("later", [False, True])
def test_a_tensor_with_the_name_of_one_in_another_file(originals: dict[str, Path], tmp_path: Path, later: bool) -> None:
    """The name that two have is told of the later one, and what no file has any more."""
    home = copied(originals["elect"], tmp_path / "spoilt")
    held = {path: load_file(path) for path in sorted((home / "out").glob("*.safetensors"), reverse=later)}
    file, other, own, taken = next(
        (file, other, own, taken)
        for file, other in itertools.combinations(held, 2)
        for own in held[file]
        for taken in held[other]
        if len(own) == len(taken) and held[file][own].shape == held[other][taken].shape
    )
    held.clear()  # they are the files' memory
    file.write_bytes(file.read_bytes().replace(f'"{own}"'.encode(), f'"{taken}"'.encode(), 1))
    failures = refuse(home)
    missing = ("out", "missing: no file of weights has it")
    assert said_elsewhere(file, failures) == (
        {missing} if later else {(other.name, f"is in {file.name}, too"), missing}
    )
    assert said_elsewhere(file, failures) == elsewhere(file)
    twice = only(tuple(failure for failure in failures if failure.problem.endswith(", too")))
    assert (Path(twice.file), twice.tensor) == (max(file, other), taken)
    assert [failure.tensor for failure in failures if Path(failure.file).name == "out"] == [own]


@few
@pytest.mark.parametrize("name", SETTINGS)
@given(data=st.data())
def test_any_bit_of_the_output(
    originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    """Whatever bit of whatever file is flipped, verify says no, and names the file; of an element, exactly that."""
    home = copied(originals[name], tmp_path_factory.mktemp("spoilt"))
    file = home / "out" / data.draw(st.sampled_from(sorted(files(home / "out"))))
    bit = data.draw(st.integers(0, 8 * file.stat().st_size - 1))
    element = element_at(file, bit // 8) if file.suffix == ".safetensors" else None
    flip(file, bit)
    failures = verify_or_error(home)
    if failures is None:  # no JSON, or of no plan
        assert file.name == MANIFEST
        return
    assert failures
    if file.name == MANIFEST:  # or the file that it describes
        return
    assert file.name in {Path(failure.file).name for failure in failures}
    in_header = file.suffix == ".safetensors" and element is None
    assert said_elsewhere(file, failures) == (elsewhere(file) if in_header else set())
    if element is not None:
        assert [(failure.tensor, failure.index) for failure in failures if failure.tensor] == [element]
        assert [failure.problem for failure in failures if not failure.tensor] == ["its sha256 is not the manifest's"]


@few
@pytest.mark.parametrize("name", SETTINGS)
@given(data=st.data())
def test_any_bit_of_cores_and_coefficients(
    originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    home = copied(originals[name], tmp_path_factory.mktemp("spoilt"))
    every = [path for path in files(home / "plan") if path != "plan.json"]
    file = home / "plan" / data.draw(st.sampled_from(every))
    offset = 0 if file.suffix == ".roaring" else 128  # before it stands the header of .npy, which need not be canonical
    flip(file, data.draw(st.integers(8 * offset, 8 * file.stat().st_size - 1)))
    failures = refuse(home)
    assert {Path(failure.file).stem for failure in failures} == {file.stem}
    assert not any(failure.tensor for failure in failures)


@pytest.mark.parametrize("name", SETTINGS)
def test_any_element_under_right_hashes(originals: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Every single element of every tensor, its lowest bit flipped: named with what it should be."""
    home = copied(originals[name], tmp_path)
    for file in sorted((home / "out").glob("*.safetensors")):
        tensors = {tensor: values.clone() for tensor, values in load_file(file).items()}  # not the file's memory
        whole = file.read_bytes()
        begin = 8 + struct.unpack("<Q", whole[:8])[0]
        entries = json.loads(whole[8:begin])
        for tensor, values in tensors.items():
            for index in range(values.numel()):
                flip(file, 8 * (begin + entries[tensor]["data_offsets"][0] + index * values.element_size()))
                reseal(home)
                failure = only(refuse(home))
                assert (Path(failure.file), failure.tensor, failure.index) == (file, tensor, index)
                assert str(values.reshape(-1)[index].item())[:4] in str(failure.expected)
                file.write_bytes(whole)


def reseal(home: Path) -> None:
    """The manifest's hashes and sizes become those of the files."""
    file = home / "out" / MANIFEST
    manifest = json.loads(file.read_bytes())
    for group in ("shards", "files"):
        for name, described in manifest[group].items():
            raw = (home / "out" / name).read_bytes()
            described.update(size=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    file.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def entries(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of every leaf of some JSON."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    empty = True
    for key, child in children:
        empty = False
        yield from entries(child, (*path, key))
    if empty:
        yield path


def other(value: Any) -> Any:
    """Something else of the same kind."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return f"{value}0"
        case None:
            return 1
        case list():
            return [0]
        case _:
            return {"x": 0}


def test_every_entry_of_the_manifest(home: Path) -> None:
    """All that it says is compared with something."""
    file = home / "out" / MANIFEST
    whole = file.read_text(encoding="utf-8")
    for path in entries(json.loads(whole)):
        manifest = json.loads(whole)
        node = manifest
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = other(node[path[-1]])
        file.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        failures = verify_or_error(home)
        assert (failures is None) == (path[0] in ("format", "version", "plan_xxh3")), path
        if failures is None:
            continue
        failure = only(failures)
        if path[0] in ("shards", "files"):
            assert failure.file == str(home / "out" / path[1])
        else:
            assert (failure.file, failure.problem.split(":")[0]) == (str(file), ".".join(map(str, path)))


def test_a_manifest_that_is_written_otherwise(home: Path) -> None:
    """The same JSON: no byte of an output goes unchecked."""
    file = home / "out" / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_bytes()), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    assert only(refuse(home)) == Failure(str(file), "is not written as fuse writes it")


@pytest.mark.parametrize("place", ["files", "shards", "recipe"])
def test_a_manifest_with_half_a_surrogate_pair(home: Path, place: str) -> None:
    """JSON can say it, and no file can hold it."""
    file = home / "out" / MANIFEST
    manifest = json.loads(file.read_bytes())
    manifest[place] = "\ud800" if place == "recipe" else manifest[place] | {"\ud800": {"size": 1, "sha256": "0"}}
    file.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    with pytest.raises(cpimerge.OutputError, match=r"cpimerge_manifest\.json: is not a manifest: .*not Unicode"):
        verify(home)


def test_a_manifest_that_is_too_deep(home: Path) -> None:
    """Python's writer gives up before its reader does, or at another depth."""
    file = home / "out" / MANIFEST
    whole = file.read_text(encoding="utf-8")
    for depth in (70, 300, *range(sys.getrecursionlimit() - 120, sys.getrecursionlimit(), 2), 2000, 5000):
        file.write_text(whole.replace('"stages": [', f'"stages": [{"[" * depth}{"]" * depth},', 1), encoding="utf-8")
        with pytest.raises(cpimerge.OutputError, match=r"cpimerge_manifest\.json: is not a manifest: "):
            verify(home)


# --- files ------------------------------------------------------------------------------------------


def test_what_is_missing(home: Path) -> None:
    first, second = sorted((home / "out").glob("*.safetensors"))[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    (home / "out" / "config.json").unlink()
    told = {(Path(failure.file).name, failure.problem.split(",")[0]) for failure in refuse(home)}
    assert (first.name, "missing") in told
    assert ("config.json", "missing") in told
    assert any(name == second.name and "bytes" in problem for name, problem in told)


def test_pipes_are_not_waited_for(home: Path) -> None:
    """In the place of any file of the output or the plan."""
    every = [*(home / "out").iterdir(), home / "plan" / "cores" / "00.roaring", home / "plan" / "plan.json"]
    for file in every:
        raw = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        failures: tuple[object, ...] = ()
        try:
            failures = cpimerge.verify(home / "out", home / "plan", **LIMITS).failures
        except cpimerge.CpimergeError as error:
            failures = error.problems
        assert any(str(file) in str(failure) for failure in failures)
        file.unlink()
        file.write_bytes(raw)
    assert verify(home).ok


@pytest.mark.parametrize("suffix", [".safetensors", ".roaring"])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_disk_that_cannot_be_read(home: Path, suffix: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From some read on: what cannot be read is told by its name."""
    real, reads = os.pread, itertools.count()
    broken = {(at.st_dev, at.st_ino) for at in map(os.stat, home.glob(f"*/**/*{suffix}"))}

    def pread(handle: int, *where: int) -> bytes:
        at = os.fstat(handle)
        if (at.st_dev, at.st_ino) in broken and next(reads) >= after:
            raise OSError(errno.EIO, "Input/output error")
        return real(handle, *where)

    monkeypatch.setattr(os, "pread", pread)
    failures: tuple[object, ...] = ()
    try:
        failures = verify(home).failures
    except cpimerge.OutputError as error:
        failures = error.problems
    assert any(f"{suffix}: " in str(told) and "cannot be read: Input/output error" in str(told) for told in failures)


def test_a_file_that_goes_meanwhile(home: Path) -> None:
    first = min((home / "out").glob("*.safetensors"))
    opened = verify_sources.open_inputs

    def open_inputs(*given: Any) -> Any:
        first.unlink(missing_ok=True)
        return opened(*given)

    with (
        mock.patch.object(verifying, "open_inputs", open_inputs),
        pytest.raises(cpimerge.OutputError, match=rf"{first.name}: cannot be read: No such file"),
    ):
        verify(home)


def test_names_that_lead_out(home: Path) -> None:
    (home / "secret").write_text("x")
    file = home / "out" / MANIFEST
    manifest = json.loads(file.read_bytes())
    for name in ("../secret", "/etc/passwd", "a//b", ".", "a\0b"):
        manifest["files"][name] = {"size": 1, "sha256": "0"}
    file.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    problems = [failure.problem for failure in refuse(home)]
    assert len(problems) == 5
    assert all("which is no file of the output" in problem for problem in problems)


@pytest.mark.parametrize("place", ["files", "shards"])
@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000 + "y", "README.md/x", "config.json/", "é" * 200])
def test_names_that_no_file_can_have(home: Path, place: str, name: str) -> None:
    file = home / "out" / MANIFEST
    manifest = json.loads(file.read_bytes())
    manifest[place][name] = {"size": 1, "sha256": "0"}
    file.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert any(name in failure.file + failure.problem for failure in refuse(home))


def test_a_file_that_may_not_be_seen(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, closed = os.stat, str(home / "out" / "config.json")

    def refused(path: Any, *more: Any, **named: Any) -> os.stat_result:
        if str(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", closed)
        return real(path, *more, **named)

    monkeypatch.setattr(os, "stat", refused)
    assert only(refuse(home)) == Failure(closed, "cannot be read: Permission denied")


def test_no_manifest(home: Path) -> None:
    (home / "out" / MANIFEST).unlink()
    with pytest.raises(cpimerge.OutputError, match=r"has no cpimerge_manifest.json. Give a directory that `cpimerge"):
        verify(home)


@pytest.mark.parametrize("text", ["", "{}", "[]", "nan", "[" * 100_000, '{"format": 1, "format": 2}', "\ud800"])
def test_no_manifest_at_all(home: Path, text: str) -> None:
    (home / "out" / MANIFEST).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(cpimerge.OutputError, match=r"cpimerge_manifest\.json: is not a manifest"):
        verify(home)


def _replace(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(raw: bytes) -> bytes:
        (length,) = struct.unpack("<Q", raw[:8])
        header = raw[8 : 8 + length].replace(old, new)
        assert header != raw[8 : 8 + length]
        return struct.pack("<Q", len(header)) + header + raw[8 + length :]

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_replace(b'"format":"pt"', b'"format":"np"'), "has not the metadata"),
        (_replace(b'{"__metadata__":{"format":"pt"},', b"{"), "has not the metadata"),
        (_replace(b'"dtype":"BF16"', b'"dtype":"F16"'), "its header says"),
        (_replace(b'"shape":[9,4]', b'"shape":[4,9]'), "its header says"),
        (_replace(b'"data_offsets":[0,', b'"data_offsets":[2,'), "its header says"),
        (_replace(b"embed.weight", b"embed.height"), "is not in the plan"),
        (_replace(b'"format":"pt"', b'"format": "pt"'), "its header is not written as safetensors writes it"),
        (_replace(b"}}", b"}}  "), "its header is not written as safetensors writes it"),
        (_replace(b"{", b"}"), "its header is no JSON object"),
        (lambda raw: raw + b"\0", "its tensors end at"),
        (lambda raw: raw[:-2], "its tensors end at"),
        (lambda raw: b"\xff" * 8 + raw[8:], "its header does not fit it"),
        (lambda raw: b"", "its header does not fit it"),
    ],
)
def test_headers_under_right_hashes(
    tmp_path: Path, originals: dict[str, Path], change: Callable[[bytes], bytes], problem: str
) -> None:
    home = copied(originals["plain"], tmp_path)
    file = next(x for x in (home / "out").glob("*.safetensors") if b"embed" in x.read_bytes())
    file.write_bytes(change(file.read_bytes()))
    reseal(home)
    failures = refuse(home)
    assert any(problem in failure.problem and failure.file == str(file) for failure in failures), failures
    assert {Path(failure.file).name for failure in failures} <= {file.name, "out", "model.safetensors.index.json"}


def test_tensors_that_are_elsewhere(home: Path) -> None:
    """A file twice under two names: what it has is there twice, what the other had is missing."""
    first, second = sorted((home / "out").glob("*.safetensors"))[:2]
    with safe_open(first, "pt") as one, safe_open(second, "pt") as two:
        twice, gone = list(one.keys()), list(two.keys())
    shutil.copyfile(first, second)
    reseal(home)
    told = {(failure.tensor, failure.problem) for failure in refuse(home)}
    assert {(name, f"is in {first.name}, too") for name in twice} <= told
    assert {(name, "missing: no file of weights has it") for name in gone} <= told


@pytest.mark.parametrize(
    ("key", "value"),
    [("metadata", {"total_parameters": 1, "total_size": 2}), ("weight_map", {}), ("more", 1)],
)
def test_the_index(home: Path, key: str, value: Any) -> None:
    file = home / "out" / "model.safetensors.index.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {key: value}))
    reseal(home)
    failure = only(refuse(home))
    assert failure.file == str(file)
    assert key in failure.problem or key == "more"


# --- elements ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0])
def test_what_is_not_finite(home: Path, bits: int) -> None:
    file = next(x for x in (home / "out").glob("*.safetensors") if b"scale" in x.read_bytes())
    raw = file.read_bytes()
    entry = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])["model.scale"]
    place = 8 + struct.unpack("<Q", raw[:8])[0] + entry["data_offsets"][0]
    file.write_bytes(raw[:place] + struct.pack("<H", bits) + raw[place + 2 :])
    reseal(home)
    failure = only(refuse(home))
    assert (failure.tensor, failure.index) == ("model.scale", 0)
    assert failure.found is not None
    assert failure.found.endswith(f"(0x{bits:04x})")
    assert any(word in failure.found for word in ("inf", "nan"))


def test_a_result_that_overflows_is_told_even_where_it_is_what_the_plan_gives(tmp_path: Path) -> None:
    """fuse refuses such a plan, so its output is made by hand: both the blend and the file are Inf."""
    large = torch.tensor([3e38, -3e38, 1.0])
    save(tmp_path / "base", {"w": torch.zeros(3)})
    for task in ("a", "b"):
        save(tmp_path / task, {"w": large})
    models = [{"model": tmp_path / "a"}, {"model": tmp_path / "b"}]
    recipe = write_recipe(
        tmp_path / "recipe.yml", base_model=tmp_path / "base", models=models, parameters={"density": 0}
    )
    cpimerge.plan(recipe, tmp_path / "plan", **LIMITS)
    cpimerge.fuse(tmp_path / "plan", tmp_path / "out", **LIMITS)
    assert verify(tmp_path).ok
    edit(tmp_path / "plan", lambda raw: raw["tensors"][0]["blend"].update(coefficients=[1.0, 1.0]))
    shutil.copyfile(tmp_path / "out" / "model.safetensors", tmp_path / "kept")
    file = tmp_path / "out" / "model.safetensors"
    header = (tmp_path / "kept").read_bytes()[:-12]
    file.write_bytes(header + np.array([np.inf, -np.inf, 2], np.float32).tobytes())
    reseal(tmp_path)
    change_manifest(tmp_path)
    failure = only(refuse(tmp_path))
    assert (failure.tensor, failure.index, failure.problem) == ("w", 0, "is not finite")


def change_manifest(home: Path) -> None:
    """The manifest says what follows from the plan as it is now."""
    file = home / "out" / MANIFEST
    plan = Plan.load(home / "plan")
    manifest = json.loads(file.read_bytes())
    manifest["plan_xxh3"] = plan_hash(home / "plan")
    manifest["recipe"] = recipe_without_places(plan)
    manifest["tensors"] = {tensor.name: disposition(tensor) for tensor in plan.tensors}
    for entry in manifest["inputs"]:
        contents = json.dumps([[tensor.name, tensor.xxh3[entry["name"]]] for tensor in plan.tensors])
        entry["content_xxh3"] = xxhash.xxh3_128_hexdigest(contents.encode())
    file.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def disposition(tensor: Any) -> dict[str, Any]:
    if tensor.blend is None:
        return {"action": tensor.action}
    action = "slerp" if tensor.blend.slerped else "lerp"
    share = tensor.claimed / max(1, int(np.prod(tensor.shape)))
    return {
        "action": action,
        "transplanted": share,
        "angles": tensor.blend.angles,
        "levelled": tensor.blend.levelled,
    }


def test_several_tensors_one_failure_each(home: Path) -> None:
    """The first element of each that is wrong, not all."""
    for file in (home / "out").glob("*.safetensors"):
        raw = file.read_bytes()
        begin = 8 + struct.unpack("<Q", raw[:8])[0]
        file.write_bytes(raw[:begin] + bytes(byte ^ 1 for byte in raw[begin:]))
    reseal(home)
    failures = refuse(home)
    names = {tensor.name for tensor in Plan.load(home / "plan").tensors}
    assert {failure.tensor for failure in failures} == names
    assert len(failures) == len(names)
    assert {failure.index for failure in failures} == {0}


# --- cores that are wrong, under right hashes and counts --------------------------------------------

Spoil = Callable[[list[float], set[int]], None]  # of one task: magnitudes by flat index, and the core


def magnitudes(home: Path, task: str) -> dict[str, list[float]]:
    base, expert = load_file(home / "base" / "model.safetensors"), load_file(home / task / "model.safetensors")
    return {name: reference.magnitude(expert[name], base[name]).tolist() for name in base if name != "ids"}


def spoilt(home: Path, task: int, tensor: str, change: Callable[[list[float], set[int]], None]) -> Path:
    """Change one core, by the magnitudes; then fuse, which cannot know better."""
    plan = Plan.load(home / "plan")
    entry = next(entry for entry in plan.tensors if entry.name == tensor)
    cores = read_cores(home / "plan")
    change(magnitudes(home, plan.tasks[task].name)[tensor], cores[task][entry.first_chunk])
    write_cores(home / "plan", cores)
    shutil.rmtree(home / "out", ignore_errors=True)
    cpimerge.fuse(home / "plan", home / "out", **LIMITS)
    return home


def judged(home: Path, **options: Any) -> list[Failure]:
    """What is said of cores; sums of magnitudes in plan.json no longer agree either."""
    return [failure for failure in refuse(home, **options) if failure.file.endswith(".roaring")]


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A plan of updates that are often equal."""
    case = fine_tunes(["a", "b"])
    recipe = write_case(tmp_path, case, reference.Settings(density=Fraction(3, 10)))
    cpimerge.plan(recipe, tmp_path / "plan", **LIMITS)
    return tmp_path


WEIGHT = "model.layers.0.mlp.weight"


def test_a_tie_swapped_for_a_later_one(tied: Path) -> None:
    moved: list[int] = []

    def swap(m: list[float], core: set[int]) -> None:
        least = min(m[i] for i in core)
        first = max(i for i in core if m[i] == least)
        later = next(i for i in range(len(m)) if m[i] == least and i not in core)
        core ^= {first, later}
        moved.extend((later, first))

    (failure,) = judged(spoilt(tied, 0, WEIGHT, swap))
    assert failure.file == str(tied / "plan" / "cores" / "00.roaring")
    assert (failure.tensor, failure.index) == (WEIGHT, moved[0])
    assert f"as the earlier flat index {moved[1]} of {WEIGHT!r}" in failure.problem
    (again,) = judged(tied, sample="1%")
    assert again == failure


def test_a_larger_one_swapped_for_a_smaller_one(tied: Path) -> None:
    moved: list[int] = []

    def swap(m: list[float], core: set[int]) -> None:
        largest = max(core, key=lambda i: m[i])
        smaller = max((i for i in range(len(m)) if 0 < m[i] < min(m[j] for j in core)), key=lambda i: m[i])
        core ^= {largest, smaller}
        moved.extend((smaller, largest))

    (failure,) = judged(spoilt(tied, 1, WEIGHT, swap))
    assert (failure.tensor, failure.index) == (WEIGHT, moved[0])
    assert f"less than flat index {moved[1]} of {WEIGHT!r}" in failure.problem


def test_one_element_less(tied: Path) -> None:
    def drop(m: list[float], core: set[int]) -> None:
        core.remove(min(core, key=lambda i: (m[i], -i)))

    for options in ({}, {"sample": "1%"}):
        (failure,) = judged(spoilt(tied, 0, WEIGHT, drop) if not options else tied, **options)
        assert (failure.tensor, failure.index) == (WEIGHT, None)
        assert failure.problem.startswith("its core has 8 of 30 elements; 0.3 of them are 9")


def test_one_element_more(tied: Path) -> None:
    def add(m: list[float], core: set[int]) -> None:
        core.add(min((i for i in range(len(m)) if i not in core), key=lambda i: (-m[i], i)))

    (failure,) = judged(spoilt(tied, 0, WEIGHT, add))
    assert failure.problem.startswith("its core has 10 of 30 elements; 0.3 of them are 9")


def test_an_element_that_did_not_change(tied: Path) -> None:
    still: list[int] = []

    def swap(m: list[float], core: set[int]) -> None:
        still.append(next(i for i in range(len(m)) if m[i] == 0))
        core ^= {still[0], min(core, key=lambda i: (m[i], -i))}

    failures = judged(spoilt(tied, 0, WEIGHT, swap))
    assert {(failure.tensor, failure.index) for failure in failures} == {(WEIGHT, still[0])}
    assert any(failure.problem == "is in the core, and did not change" for failure in failures)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_ties_across_tensors_go_to_the_earlier_tensor(tmp_path: Path, scope: str) -> None:
    names = ["model.layers.2.a", "model.layers.2.b", "model.layers.10.b"]
    save(tmp_path / "base", {name: torch.zeros(4) for name in names})
    save(tmp_path / "x", {name: torch.tensor([0.0, 1.0, 0.0, 1.0]) for name in names})
    keys: dict[str, Any] = {"base_model": tmp_path / "base", "models": [{"model": tmp_path / "x"}]}
    density = {"layer": 0.25, "global": 0.34}[scope]
    recipe = write_recipe(tmp_path / "recipe.yml", **keys, parameters={"density": density, "scope": scope})
    plan = cpimerge.plan(recipe, tmp_path / "plan", **LIMITS)
    cpimerge.fuse(tmp_path / "plan", tmp_path / "out", **LIMITS)
    assert verify(tmp_path).ok
    cores = read_cores(tmp_path / "plan")
    chunk = {tensor.name: tensor.first_chunk for tensor in plan.tensors}
    early, late = (names[0], names[1]) if scope == "layer" else (names[1], names[2])
    last = max(cores[0][chunk[early]])
    cores[0][chunk[early]].remove(last)
    cores[0][chunk[late]].add(1)
    write_cores(tmp_path / "plan", cores)
    cpimerge.fuse(tmp_path / "plan", tmp_path / "out", force=True, **LIMITS)
    failure = next(iter(judged(tmp_path)))
    assert (failure.tensor, failure.index) == (late, 1)
    assert f"as the earlier flat index {last} of {early!r}" in failure.problem


def test_an_excluded_tensor_with_a_core(tmp_path: Path) -> None:
    recipe = write_case(
        tmp_path, fine_tunes(["a", "b"]), reference.Settings(density=Fraction(3, 10), exclude=["embed"])
    )
    cpimerge.plan(recipe, tmp_path / "plan", **LIMITS)
    (failure,) = judged(spoilt(tmp_path, 1, "model.embed.weight", lambda m, core: core.add(3)))
    assert (failure.tensor, failure.problem) == (
        "model.embed.weight",
        "has a core of 1 elements, and is excluded",
    )


def test_an_output_of_other_cores_is_told_by_its_elements(home: Path) -> None:
    """Elements that the plan has no core for, and the output has a task's value of."""
    entry = next(entry for entry in Plan.load(home / "plan").tensors if entry.name == WEIGHT)
    whole = read_cores(home / "plan")
    chunks = [core[entry.first_chunk] for core in whole]
    alone = [(task, i) for task, chunk in enumerate(chunks) for i in chunk if sum(i in one for one in chunks) == 1]
    told = 0
    for task, gone in alone:
        cores = [[set(chunk) for chunk in core] for core in whole]
        cores[task][entry.first_chunk].remove(gone)
        write_cores(home / "plan", cores)
        change_manifest(home)
        elements = [
            failure for failure in refuse(home) if failure.problem == "is not the blend that its coefficients give"
        ]
        told += len(elements)
        assert {(failure.tensor, failure.index) for failure in elements} <= {(WEIGHT, gone)}
    assert told > len(alone) / 2  # of the others the blend is the same number


# --- the plan's numbers -----------------------------------------------------------------------------

CHANGED_NUMBERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "claimed": lambda raw: raw["tensors"][1].update(claimed=raw["tensors"][1]["claimed"] + 1),
    "tasks.b.changed": lambda raw: raw["tensors"][1]["tasks"]["b"].update(changed=1),
    "tasks.b.near": lambda raw: raw["tensors"][1]["tasks"]["b"].update(near=29),
    "tasks.b.rounding": lambda raw: raw["tensors"][1]["tasks"]["b"].update(rounding=28),
    "tasks.b.sum_in": lambda raw: raw["tensors"][1]["tasks"]["b"].update(sum_in=1.25),
    "tasks.b.sum_out": lambda raw: raw["tensors"][1]["tasks"]["b"].update(sum_out=1.25),
    "tasks.1.elements": lambda raw: raw["tasks"][1].update(elements=5),
    "tasks.1.mean_in": lambda raw: raw["tasks"][1].update(mean_in=5.0),
    "pairs.a+c.shared": lambda raw: raw["pairs"][1].update(shared=5),
    "pairs.a+c.union": lambda raw: raw["pairs"][1].update(union=5),
    "pairs.a+c.jaccard": lambda raw: raw["pairs"][1].update(jaccard=0.5),
    "pairs.a+c.chance": lambda raw: raw["pairs"][1].update(chance=0.5),
    "pairs.a+c.lift": lambda raw: raw["pairs"][1].update(lift=0.5),
    "pairs.a+c.layers.model.layers.1.": lambda raw: raw["pairs"][1]["layers"].update({"model.layers.1.": 0.75}),
    "changed since it was planned": lambda raw: raw["tensors"][1]["xxh3"].update(b="0" * 16),
    "says F32 of 'b'": lambda raw: raw["tensors"][1]["tasks"]["b"].update(dtype="F32"),
}


@pytest.mark.parametrize("what", CHANGED_NUMBERS)
def test_a_number_of_the_plan(home: Path, what: str) -> None:
    edit(home / "plan", CHANGED_NUMBERS[what])
    change_manifest(home)
    failures = refuse(home)
    assert any(what in failure.problem for failure in failures), failures
    plan = Plan.load(home / "plan")
    assert {failure.tensor for failure in failures} <= {None, plan.tensors[1].name}


def test_an_action_that_the_inputs_belie(home: Path) -> None:
    plan = Plan.load(home / "plan")
    last = max((entry for entry in plan.tensors if entry.blend), key=lambda entry: entry.first_chunk)
    number = plan.tensors.index(last)
    edit(home / "plan", lambda raw: raw["tensors"][number].update(action="identical", blend=None))
    write_cores(home / "plan", [core[: last.first_chunk] for core in read_cores(home / "plan")])
    change_manifest(home)
    failures = [failure for failure in refuse(home) if failure.tensor == last.name]
    assert "its action is 'identical', and its inputs differ" in {failure.problem for failure in failures}
    assert ("an input differs from the base", 0) in {(failure.problem, failure.index) for failure in failures}


def test_a_recipe_that_is_another(home: Path) -> None:
    """The recipe in a plan may be edited, and then contradicts it."""
    for old, new, problem in (
        ("density: 0.3", "density: 0.4", "of 30 elements; 0.4 of them are 12"),
        ("scope: tensor", "scope: layer", "settings.scope is tensor, in its recipe layer"),
        ("name: a", "name: z", "the recipe in it cannot be read, or is not that of these tasks"),
        ("models:", "modells:", "the recipe in it cannot be read"),
    ):
        text = Plan.load(home / "plan").recipe
        assert old in text
        edit(home / "plan", partial(write_recipe_into, text.replace(old, new)))
        change_manifest(home)
        assert any(problem in failure.problem for failure in refuse(home))
        edit(home / "plan", partial(write_recipe_into, text))


@pytest.mark.parametrize("order", [[0, 2, 1, 3], [1, 2, 3, 0]])
def test_inputs_in_another_order(home: Path, order: list[int]) -> None:
    """None that `plan` would write, and each would be taken for another."""
    edit(home / "plan", lambda raw: raw.update(inputs=[raw["inputs"][number] for number in order]))
    cpimerge.fuse(home / "plan", home / "again", **LIMITS)
    found = cpimerge.verify(home / "again", home / "plan", **LIMITS)
    assert [failure.problem for failure in found.failures] == [
        "its inputs are not the base and then its tasks, in their order"
    ]


def test_a_path_without_end(home: Path) -> None:
    """The recipe is not looked for in each of its parents."""

    def change(raw: dict[str, Any]) -> None:
        raw["inputs"][1]["path"] = "/a" * 200_000

    edit(home / "plan", change)
    change_manifest(home)
    with mock.patch("cpimerge.recipe.parse_recipe", side_effect=AssertionError):
        found = verify(home)
    assert any(failure.file == "input 'a'" for failure in found.failures)
    assert found.elements == found.cores == 0
    assert found.notes[-1].startswith("the elements were not compared")


def write_recipe_into(text: str, raw: dict[str, Any]) -> None:
    raw["recipe"] = text


def test_chunks_that_are_elsewhere(home: Path) -> None:
    edit(home / "plan", lambda raw: raw["tensors"][2].update(first_chunk=raw["tensors"][2]["first_chunk"] + 1))
    change_manifest(home)
    assert any("first_chunk" in failure.problem for failure in refuse(home))


# --- inputs -----------------------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """Inputs, plan and output, all to be spoilt."""
    return make(tmp_path, fine_tunes(["a", "b"]), reference.Settings(density=Fraction(3, 10)))


@few
@given(data=st.data())
def test_any_bit_of_an_input(whole: Path, data: st.DataObject) -> None:
    """In a header it is the file that changed; in an element, that tensor of that input."""
    name = data.draw(st.sampled_from(["base", "a", "b"]))
    file = whole / name / "model.safetensors"
    raw = file.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    element = element_at(file, bit // 8)
    flip(file, bit)
    try:
        found = cpimerge.verify_inputs(whole / "plan", **LIMITS)
        assert not found.ok
        assert not verify(whole).ok
    finally:
        file.write_bytes(raw)
    if element is not None:
        failure = only(found.failures)
        assert (failure.file, failure.tensor) == (str(whole / name), element[0])
        assert failure.problem == "changed since it was planned"
    elif name != "base":  # without which others cannot be opened
        assert all(str(whole / name) in str(failure) for failure in found.failures)


@pytest.mark.parametrize("name", ["plain", "by row"])
@pytest.mark.parametrize("model", ["base", "a", "b"])
def test_inputs_that_became_infinite(originals: dict[str, Path], tmp_path: Path, name: str, model: str) -> None:
    """Without a warning of numpy's, which pytest makes an error."""

    def move(raw: dict[str, Any]) -> None:
        for entry in raw["inputs"]:
            entry["path"] = str(tmp_path / entry["name"])

    shutil.copytree(originals[name], tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "plan", move)
    change_manifest(tmp_path)
    assert verify(tmp_path).ok
    file = tmp_path / model / "model.safetensors"
    tensors = load_file(file)
    tensor = max((x for x in tensors.values() if x.is_floating_point()), key=torch.numel)
    tensor.view(-1)[:3] = torch.tensor([math.inf, -math.inf, math.nan])
    tensor.view(-1)[-3:] = torch.tensor([math.nan, math.inf, -math.inf])
    save_file(tensors, file, metadata={"format": "pt"})
    assert any(failure.problem == "changed since it was planned" for failure in refuse(tmp_path))


def test_coefficients_beyond_float32(home: Path) -> None:
    """None that `fuse` would take."""

    def change(raw: dict[str, Any]) -> None:
        for tensor in raw["tensors"]:
            if tensor["blend"]:
                tensor["blend"]["coefficients"] = [1e300, -1e300, 0.0]

    edit(home / "plan", change)
    change_manifest(home)
    assert any(failure.problem == "is not the blend that its coefficients give" for failure in refuse(home))


def test_all_inputs_that_changed_are_listed(whole: Path) -> None:
    flip(whole / "a" / "model.safetensors", 8 * ((whole / "a" / "model.safetensors").stat().st_size - 1))
    (whole / "b" / "model.safetensors").unlink()
    first, second = cpimerge.verify_inputs(whole / "plan", **LIMITS).failures
    assert {first.file, second.file} == {"input 'b'", str(whole / "a")}


def test_an_input_of_another_size(whole: Path) -> None:
    tensors = load_file(whole / "a" / "model.safetensors")
    save(whole / "a", tensors | {"more": torch.zeros(3)})
    problems = [failure.problem for failure in cpimerge.verify_inputs(whole / "plan", **LIMITS).failures]
    assert any("when planned" in problem for problem in problems)
    assert any("its header changed" in problem or "bytes" in problem for problem in problems)


def test_no_plan(tmp_path: Path) -> None:
    with pytest.raises(cpimerge.PlanError, match=r"plan.json: not found"):
        cpimerge.verify_inputs(tmp_path, **LIMITS)


# --- a sample ---------------------------------------------------------------------------------------


def test_a_sample_finds_what_it_reads_and_nothing_else(home: Path) -> None:
    """One chunk a tensor is all of these small ones; but hashes of weights are not taken."""
    file = next(x for x in (home / "out").glob("*.safetensors") if b"scale" in x.read_bytes())
    flip(file, 8 * (file.stat().st_size - 1))
    failure = only(refuse(home, sample=0.01))
    assert failure.tensor is not None
    (home / "out" / "config.json").write_text("{}\n")
    assert len(refuse(home, sample=0.01)) == 2
