"""`pytorch_model.bin`: torch's own loader as the oracle, and files that no honest writer would write."""

from __future__ import annotations

import collections
import importlib
import io
import logging
import os
import pickle
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import save, write_json, write_recipe
from files import stored_bytes, tensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_checkpoint import read

import cpimerge
from cpimerge import CheckpointError
from cpimerge.checkpoint import Shard, StoredTensor, read_header
from cpimerge.directory import open_checkpoint
from cpimerge.pickled import read_pickled

CONVERT = "Load it with transformers and save it as safetensors"
AGAIN = "Download or save it again"


def by_name(shard: Shard) -> dict[str, StoredTensor]:
    return {info.name: info for info in shard.tensors}


def refusals(file: Path) -> list[str]:
    """What is wrong with a file, without its name."""
    with pytest.raises(CheckpointError) as error:
        read_pickled(file)
    assert all(problem.startswith(f"{file}: ") and "\n" not in problem for problem in error.value.problems)
    return [problem.removeprefix(f"{file}: ") for problem in error.value.problems]


# --- what torch saves -------------------------------------------------------------------------------


@given(tensors(min_size=0), st.booleans())
def test_tensors_are_read_as_torch_loads_them(content: dict[str, torch.Tensor], as_parameters: bool) -> None:
    if as_parameters:
        content = {name: torch.nn.Parameter(tensor, tensor.is_floating_point()) for name, tensor in content.items()}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "pytorch_model.bin")
        torch.save(content, file)
        found = by_name(read_pickled(file))
        loaded = torch.load(file, weights_only=True)
        assert found.keys() == loaded.keys()
        save_file({name: tensor.detach().clone() for name, tensor in loaded.items()}, Path(directory, "twin"))
        expected = by_name(read_header(Path(directory, "twin")))
        for name, info in found.items():
            assert (info.dtype, info.shape) == (expected[name].dtype, expected[name].shape)
            assert read(info) == stored_bytes(loaded[name].detach())


def test_views_and_shared_storages(tmp_path: Path) -> None:
    """Tensors that share memory lie at one place; a contiguous part of a larger one lies inside it."""
    whole = torch.arange(24.0).reshape(4, 6)
    content = collections.OrderedDict(a=whole, b=whole, rows=whole[1:3], scalar=whole[2, 5], column=whole[:, :1][:1])
    torch.save(content, tmp_path / "m")
    found = by_name(read_pickled(tmp_path / "m"))
    assert found["a"].offset == found["b"].offset
    assert found["rows"].offset == found["a"].offset + 24
    for name, tensor in content.items():
        assert read(found[name]) == stored_bytes(tensor)


def test_a_models_state_dict(tmp_path: Path) -> None:
    """Also a tensor without dimensions that counts batches."""
    torch.manual_seed(0)
    state = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict()
    state = {"0.bias": state.pop("0.bias")} | state
    torch.save(state, tmp_path / "m")
    found = by_name(read_pickled(tmp_path / "m"))
    assert list(found) == list(state)
    assert {name: read(info) for name, info in found.items()} == {
        name: stored_bytes(tensor) for name, tensor in state.items()
    }


def test_nothing_of_the_tensors_is_read(tmp_path: Path) -> None:
    """A file of 5 GB, most of it a hole in a file system that has holes, opens at once and reads at its end."""
    file, last = tmp_path / "m", torch.arange(4.0)
    with torch.serialization.skip_data():
        torch.save({"big": torch.empty(5 << 28), "last": last}, file)
    big, end = read_pickled(file).tensors
    assert (big.nbytes, big.offset + big.nbytes <= end.offset, file.stat().st_size > 5 << 30) == (5 << 30, True, True)
    with open(file, "r+b") as stream:
        stream.seek(end.offset)
        stream.write(stored_bytes(last))
    assert read(end) == stored_bytes(last)
    assert read(big, 4096, (5 << 30) - 4096) == bytes(4096)


def test_a_pickle_is_known_by_its_hash(tmp_path: Path) -> None:
    def digest(name: str, value: float) -> str:
        torch.save({name: torch.full((2,), value)}, tmp_path / "file")
        return read_pickled(tmp_path / "file").header_xxh3

    assert digest("w", 1) == digest("w", 2)
    assert digest("w", 1) != digest("v", 1)


# --- directories ------------------------------------------------------------------------------------


def pickled(directory: Path, *, keep: bool = False) -> Path:
    """A checkpoint rewritten in the other format, its shards and their index too."""
    for file in sorted(directory.glob("*.safetensors")):
        torch.save(load_file(file), directory / f"pytorch_{file.stem}.bin")
    index = directory / "model.safetensors.index.json"
    if index.exists():
        text = re.sub(r'"(model-[0-9of-]+).safetensors"', r'"pytorch_\1.bin"', index.read_text())
        (directory / "pytorch_model.bin.index.json").write_text(text)
    for file in [] if keep else [*directory.glob("*.safetensors*")]:
        file.unlink()
    return directory


def model(shift: float = 0.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    floats = {f"layers.{number}.w": torch.randn(5, 3, generator=generator) + shift for number in range(3)}
    return floats | {"layers.0.half": torch.ones(4).bfloat16() + shift, "ids": torch.arange(3)}


@pytest.mark.parametrize("shards", [1, 3])
def test_both_formats_give_the_same_model(tmp_path: Path, shards: int) -> None:
    outputs = []
    for name in ("safe", "pickled"):
        home = tmp_path / name
        for number, expert in enumerate(("base", "a", "b")):
            save(home / expert, model(number / 4), shards=shards)
            if name == "pickled":
                pickled(home / expert)
        models = [{"model": home / "a"}, {"model": home / "b"}]
        write_recipe(home / "recipe.yml", base_model=home / "base", models=models, parameters={"density": 0.3})
        cpimerge.plan(home / "recipe.yml", home / "plan", threads=1)
        cpimerge.fuse(home / "plan", home / "out", threads=1)
        outputs.append((home / "out" / "model.safetensors").read_bytes())
        assert sorted(path.name for path in (home / "out").iterdir()) == [
            *("README.md", "config.json", "cpimerge_manifest.json", "model.safetensors"),
        ]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("base_pickled", [False, True])
def test_a_tied_model_of_transformers(tmp_path: Path, base_pickled: bool) -> None:
    """torch.save keeps both names of what is tied, save_pretrained one: they go together either way."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=None,
    )  # fmt: skip
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        llama = transformers.LlamaForCausalLM(config)
        llama.save_pretrained(tmp_path / name)
        if (name == "base") == base_pickled:
            torch.save(llama.state_dict(), tmp_path / name / "pytorch_model.bin")
            (tmp_path / name / "model.safetensors").unlink()
    models = [{"model": tmp_path / "a"}, {"model": tmp_path / "b"}]
    recipe = write_recipe(tmp_path / "recipe.yml", base_model=tmp_path / "base", models=models)
    cpimerge.merge(recipe, tmp_path / "out", threads=1)
    loaded: Any = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    merged, loading = loaded
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    files = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in files) == base_pickled
    state = merged.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in files.items())


def test_safetensors_are_preferred_and_that_is_noted(tmp_path: Path) -> None:
    directory = pickled(save(tmp_path / "m", {"w": torch.ones(1)}), keep=True)
    torch.save({"other": torch.ones(1)}, directory / "pytorch_model.bin")
    found = open_checkpoint(directory)
    assert list(found.tensors) == ["w"]
    assert found.notes == (f"{directory}: pytorch_model.bin is not read, because model.safetensors is there, too",)
    assert open_checkpoint(save(tmp_path / "n", {"w": torch.ones(1)})).notes == ()


def test_incomplete_shards(tmp_path: Path) -> None:
    directory = pickled(save(tmp_path / "m", model(), shards=3))
    (directory / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(directory)
    assert str(error.value) == (
        f"{directory}/pytorch_model-00002-of-00003.bin: missing, though pytorch_model.bin.index.json names it. "
        "Complete the download"
    )


def test_a_tensor_in_another_shard(tmp_path: Path) -> None:
    directory = pickled(save(tmp_path / "m", {"a": torch.ones(1), "b": torch.ones(1)}, shards=2))
    one, two = (f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2))
    write_json(directory / "pytorch_model.bin.index.json", {"weight_map": {"a": one, "b": one}})
    torch.save({"b": torch.ones(1)}, directory / two)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(directory)
    assert str(error.value).endswith(
        f"tensor 'b': listed in '{one}', found in no shard. Download or save all of them again"
    )


# --- what is refused --------------------------------------------------------------------------------


class Evil:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.reduced


@pytest.mark.parametrize("function", [os.system, eval, exec, importlib.import_module, bytearray, collections.Counter])
def test_nothing_is_executed(tmp_path: Path, function: Callable[..., object]) -> None:
    mark = tmp_path / "mark"
    arguments: list[object] = [f"touch {mark}"]
    if function in (eval, exec):
        arguments = [f"open({str(mark)!r}, 'w')"]
    if function is bytearray:
        arguments = [10**15]
    torch.save({"w": torch.ones(1), "x": Evil(function, *arguments)}, tmp_path / "m")
    (problem,) = refusals(tmp_path / "m")
    module = function.__module__.replace("builtins", "__builtin__")  # as protocol 2 calls it
    assert problem == (
        f"its pickle wants '{module}.{function.__name__}', which is no part of plain tensors; nothing of it was run. "
        "Take the safetensors of this model. Only if you trust the file: load it with transformers and save it"
    )
    assert not mark.exists()


def test_every_name_is_listed(tmp_path: Path) -> None:
    torch.save({"a": Evil(os.system, "true"), "b": Evil(eval, "1"), "c": Evil(eval, "2")}, tmp_path / "m")
    assert [re.findall("wants '(.*?)'", problem) for problem in refusals(tmp_path / "m")] == [
        ["posix.system"],
        ["__builtin__.eval"],
    ]


def archive(file: Path, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """An archive with these records in `archive/`."""
    with zipfile.ZipFile(file, "w", compression) as out:
        for name, content in records.items():
            out.writestr(f"archive/{name}", content)
    return file


def records_of(content: object) -> dict[str, bytes]:
    """What torch writes of it."""
    stream = io.BytesIO()
    torch.save(content, stream)
    with zipfile.ZipFile(stream) as saved:
        return {name.partition("/")[2]: saved.read(name) for name in saved.namelist()}


def without(records: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {key: content for key, content in records.items() if key != name}


PLAIN = records_of({"w": torch.arange(8.0), "v": torch.ones(2)})
NO_ARCHIVE = f"is not an archive as torch.save writes it. {AGAIN}, or l{CONVERT[1:]}"
BF16 = "Give the checkpoint in bfloat16 or float32 that it was made from"

# How a file comes about; what is wrong with it.
REFUSED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "empty": (
        lambda file: file.write_bytes(b""),
        [NO_ARCHIVE],
    ),
    "git lfs pointer": (
        lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n"),
        ["is a Git LFS pointer, not the weights. Fetch them with `git lfs pull`"],
    ),
    "legacy": (
        lambda file: torch.save({"w": torch.ones(1)}, file, _use_new_zipfile_serialization=False),
        [f"was written as PyTorch did before 1.6. {CONVERT}"],
    ),
    "plain pickle": (
        lambda file: file.write_bytes(pickle.dumps({"w": 1})),
        [NO_ARCHIVE],
    ),
    "cut": (
        lambda file: file.write_bytes(archive(file, PLAIN).read_bytes()[:-30]),
        ["incomplete: 1221 bytes, and no end of the archive. " + AGAIN],
    ),
    "no pickle": (
        lambda file: archive(file, {"version": b"3"}),
        [f"is not an archive as torch.save writes it: it has no pickle. {CONVERT}"],
    ),
    "torchscript": (
        lambda file: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file),
        ["is a TorchScript program, not weights. Give the weights it was made from"],
    ),
    "big-endian": (
        lambda file: archive(file, PLAIN | {"byteorder": b"big"}),
        [f"was saved on a big-endian machine. {CONVERT}"],
    ),
    "compressed": (
        lambda file: archive(file, PLAIN, zipfile.ZIP_DEFLATED),
        [f"is compressed or encrypted. {CONVERT}"],
    ),
    "damaged pickle": (
        lambda file: archive(file, PLAIN | {"data.pkl": b"\x80\x02}\xff."}),
        [f"its pickle is damaged: at position 3, opcode b'\\xff' unknown. {AGAIN}"],
    ),
    "pickle that ends": (
        lambda file: archive(file, PLAIN | {"data.pkl": PLAIN["data.pkl"][:-1]}),
        [f"its pickle is damaged: pickle exhausted before seeing STOP. {AGAIN}"],
    ),
    "newer protocol": (
        lambda file: torch.save({"w": torch.ones(1)}, file, pickle_protocol=4),
        [f"its pickle has MEMOIZE, which no state dict saved as usual has. {CONVERT}"],
    ),
    "no storage": (
        lambda file: archive(file, without(PLAIN, "data/1")),
        ["PyTorch refuses it: PytorchStreamReader failed locating file data/1: file not found. " + AGAIN],
    ),
    "short storage": (
        lambda file: archive(file, PLAIN | {"data/0": bytes(31)}),
        [f"tensor 'w': needs 32 bytes of a record that has 31. {AGAIN}"],
    ),
    "no state dict": (
        lambda file: torch.save([torch.ones(1)], file),
        [f"holds a list, not tensors by name. {CONVERT}"],
    ),
    "training checkpoint": (
        lambda file: torch.save({"epoch": 3, "state_dict": {"w": torch.ones(1)}, "optimizer": {}}, file),
        [
            "is a training checkpoint, with its tensors inside 'state_dict'. "
            "Take from it the state dict of the model alone, and save that"
        ],
    ),
    "a module": (
        lambda file: torch.save(torch.nn.Linear(2, 2), file),
        [
            f"its pickle wants '{name}', which is no part of plain tensors; nothing of it was run. "
            "Take the safetensors of this model. Only if you trust the file: load it with transformers and save it"
            for name in ("torch.nn.modules.linear.Linear", "__builtin__.set")
        ],
    ),
    "what is no tensor": (
        lambda file: torch.save({"step": 3, "w": torch.ones(1), 7: torch.ones(1)}, file),
        [
            "tensor 'step': is no tensor but a int. Remove it, and save the tensors alone",
            f"tensor 7: its name is not text of at most 1000 characters. {CONVERT}",
        ],
    ),
    "views": (
        lambda file: torch.save(
            {"t": torch.ones(2, 3).t(), "e": torch.ones(1).expand(3), "c": torch.ones(4, 4)[:, 1:3]}, file
        ),
        [
            f"tensor 't': is not stored row by row (strides [1, 3]). {CONVERT}",
            f"tensor 'e': is not stored row by row (strides [0]). {CONVERT}",
            f"tensor 'c': is not stored row by row (strides [4, 1]). {CONVERT}",
        ],
    ),
    "sparse": (
        lambda file: torch.save({"s": torch.eye(2).to_sparse()}, file),
        [
            f"its pickle wants '{name}', which is no part of plain tensors; nothing of it was run. "
            "Take the safetensors of this model. Only if you trust the file: load it with transformers and save it"
            for name in ("torch._utils._rebuild_sparse_tensor", "torch.serialization._get_layout", "torch.Size")
        ],
    ),
    "complex": (
        lambda file: torch.save({"c": torch.ones(2, dtype=torch.complex128)}, file),
        ["tensor 'c': dtype complex128 cannot be merged. Convert the checkpoint to bfloat16 or float32"],
    ),
    "quantised": (
        lambda file: archive(file, PLAIN | {"data.pkl": b"\x80\x02ctorch._utils\n_rebuild_qtensor\n."}),
        [f"holds tensors that PyTorch quantised. {BF16}"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript
def test_refusals(tmp_path: Path, case: str) -> None:
    write, problems = REFUSED[case]
    write(tmp_path / "m")
    assert refusals(tmp_path / "m") == problems


def test_refused_dtypes_are_those_of_safetensors(tmp_path: Path) -> None:
    """They are named together with all other problems of the checkpoint."""
    kinds = {"F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    torch.save({name: torch.ones(2).to(dtype) for name, dtype in kinds.items()}, tmp_path / "m")
    assert {name: info.dtype for name, info in by_name(read_pickled(tmp_path / "m")).items()} == {n: n for n in kinds}


def check_verdict(file: Path) -> None:
    """Either it is refused, in lines of text, or all that it names lies inside it."""
    problems: tuple[str, ...] = ()
    try:
        found = read_pickled(file)
    except CheckpointError as error:
        problems = error.problems
    assert all(problem.startswith(f"{file}: ") and "\n" not in problem for problem in problems)
    assert problems or all(0 <= info.offset <= found.size - info.nbytes for info in found.tensors)


@given(st.integers(0, 10**9), st.integers(0, 255), st.sampled_from(["change", "cut", "insert"]))
def test_damaged_bytes(place: int, byte: int, damage: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = archive(Path(directory, "m"), PLAIN)
        good = file.read_bytes()
        place %= len(good)
        tail = {"change": good[place + 1 :], "cut": b"", "insert": good[place:]}[damage]
        file.write_bytes(good[:place] + bytes([byte]) + tail)
        check_verdict(file)


def test_damage_that_python_warns_of(tmp_path: Path) -> None:
    """Text with an unknown escape is refused without a warning (which is an error in these tests)."""
    archive(tmp_path / "m", PLAIN | {"data.pkl": b"\x80\x02}S'\\8'\nK\x01s."})
    assert len(refusals(tmp_path / "m")) == 1


@given(st.integers(0, len(PLAIN["data.pkl"]) - 1), st.integers(0, 255))
def test_damaged_pickles(place: int, byte: int) -> None:
    damaged = PLAIN["data.pkl"][:place] + bytes([byte]) + PLAIN["data.pkl"][place + 1 :]
    with tempfile.TemporaryDirectory() as directory:
        check_verdict(archive(Path(directory, "m"), PLAIN | {"data.pkl": damaged}))


def bomb(container: str) -> bytes:
    """A pickle of 40 containers, each with the one before it twice: 2**40 leaves to whoever looks at all of them."""
    empty = {"tuple": b")", "list": b"]", "dict": b"}", "OrderedDict": b"ccollections\nOrderedDict\n)R"}[container]
    text = b"\x80\x02" + (b"K\x01K\x01\x86" if container == "tuple" else empty) + b"q\x00"
    for number in range(40):
        old, new = bytes([ord("h"), number]), bytes([ord("q"), number + 1])
        text += {
            "tuple": old * 2 + b"\x86" + new,
            "list": empty + new + b"(" + old * 2 + b"e",
            "dict": empty + new + b"(K\x01" + old + b"K\x02" + old + b"u",
            "OrderedDict": empty + new + b"(K\x01" + old + b"K\x02" + old + b"u",
        }[container]
    return text + b"}" + b"h\x28K\x01s."


@pytest.mark.parametrize("container", ["tuple", "list", "dict", "OrderedDict"])
def test_containers_in_containers_without_end(tmp_path: Path, container: str) -> None:
    archive(tmp_path / "m", PLAIN | {"data.pkl": bomb(container)})
    assert refusals(tmp_path / "m") == [
        f"its pickle has one list in two places, which no state dict saved as usual has. {CONVERT}"
    ]


def test_torch_reports_nothing_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It logs a traceback of a shape that cannot be; what is to be said is in the error."""
    shouted: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.Handler, "handle", lambda _, record: shouted.append(record))
    records = records_of({"w": torch.zeros(4)})
    name = next(name for name in records if name.endswith("data.pkl"))
    records[name] = records[name].replace(b"K\x04\x85", b"\x8a\x08" + (-5).to_bytes(8, "little", signed=True) + b"\x85")
    assert refusals(archive(tmp_path / "m.bin", records)) == [
        "PyTorch refuses it: numel: integer multiplication overflow. Download or save it again"
    ]
    assert not shouted


def test_files_of_older_versions(tmp_path: Path) -> None:
    """They have fewer records beside the tensors."""
    records = {name: content for name, content in PLAIN.items() if not name.startswith((".", "byteorder"))}
    found = by_name(read_pickled(archive(tmp_path / "m", records)))
    assert read(found["w"]) == stored_bytes(torch.arange(8.0))


def test_a_pickle_of_more_than_any_tensors_need(tmp_path: Path) -> None:
    archive(tmp_path / "m", PLAIN | {"data.pkl": PLAIN["data.pkl"] + bytes((1 << 24) + 1 - len(PLAIN["data.pkl"]))})
    assert refusals(tmp_path / "m") == [
        f"'archive/data.pkl' has {(1 << 24) + 1} bytes. Load it with transformers and save it as safetensors"
    ]


def test_too_many_records(tmp_path: Path) -> None:
    """Their list is not even read: it would take far more memory than the file has bytes."""
    names = {f"data/{'x' * 900}{number}": b"" for number in range(20_000)}
    archive(tmp_path / "m", PLAIN | names)
    (problem,) = refusals(tmp_path / "m")
    assert re.fullmatch(f"an archive of too many records: their list has [0-9]+ bytes. {CONVERT}", problem)


def test_a_record_of_two_dtypes(tmp_path: Path) -> None:
    """PyTorch never writes it, and reads it as the first one says."""
    records = records_of({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int32)})
    twice = records["data.pkl"].replace(b"\1\0\0\x001q", b"\1\0\0\x000q")
    file = archive(tmp_path / "x.bin", records | {"data.pkl": twice})
    assert torch.load(file, weights_only=True)["b"].dtype == torch.float32
    assert refusals(file) == [f"tensor 'b': has another dtype than 'a', which is stored in the same place. {CONVERT}"]


def test_empty_tensors_of_any_dtype(tmp_path: Path) -> None:
    torch.save({"a": torch.empty(0), "b": torch.empty(0, dtype=torch.int32)}, tmp_path / "x.bin")
    assert [info.dtype for info in read_pickled(tmp_path / "x.bin").tensors] == ["F32", "I32"]


def test_without_torch(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "m")
    code = (
        "import sys, pathlib; sys.modules['torch'] = None; from cpimerge.pickled import read_pickled\n"
        "try: read_pickled(pathlib.Path(sys.argv[1]))\nexcept Exception as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "m"], capture_output=True, text=True, check=True)
    assert run.stdout == (
        f"{tmp_path}/m: is a pickle, which needs PyTorch to read. Install 'cpimerge[pickled]', "
        "or take the safetensors of this model\n"
    )
