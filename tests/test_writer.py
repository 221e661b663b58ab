"""Files byte by byte as the reference writers', and directories that appear only when they are complete."""

from __future__ import annotations

import hashlib
import json
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from files import DTYPES, stored_bytes, tensors
from huggingface_hub import save_torch_state_dict
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from cpimerge import OutputError
from cpimerge.checkpoint import natural_key
from cpimerge.directory import open_checkpoint
from cpimerge.writer import (
    OutputTensor,
    ShardLayout,
    ShardWriter,
    index_json,
    shard_layouts,
    shard_limit,
)

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def outputs(content: dict[str, torch.Tensor]) -> list[OutputTensor]:
    return [OutputTensor(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in content.items()]


def write(directory: Path, layout: ShardLayout, content: dict[str, torch.Tensor]) -> str:
    """Write a shard in pieces of up to three bytes; returns its sha256."""
    with closing(ShardWriter(directory / layout.filename, layout.header())) as file:
        for tensor in layout.tensors:
            data = stored_bytes(content[tensor.name])
            for start in range(0, len(data), 3):
                file.append(memoryview(data[start : start + 3]))
        return file.finish()


# --- files ------------------------------------------------------------------------------------------


@given(tensors())
@example({dtype: torch.ones(2, dtype=DTYPES[dtype]) for dtype in DTYPES})
@example({'\x00\n\x1f\x7f"\\/\u2028é😀': torch.ones(())})
def test_files_are_the_reference_writers(content: dict[str, torch.Tensor]) -> None:
    (layout,) = shard_layouts(outputs(content))
    with tempfile.TemporaryDirectory() as directory:
        digest = write(Path(directory), layout, content)
        written = Path(directory, "model.safetensors").read_bytes()
    assert written == to_bytes(content, {"format": "pt"})
    assert digest == hashlib.sha256(written).hexdigest()


@given(tensors(min_size=2, max_size=8), st.integers(1, 40))
def test_shards_are_those_of_hugging_face(content: dict[str, torch.Tensor], limit: int) -> None:
    """File names, split, every byte of every shard, and what the index says."""
    content = {name: content[name] for name in sorted(content, key=natural_key)}
    with tempfile.TemporaryDirectory() as temporary:
        ours, theirs = Path(temporary, "ours"), Path(temporary, "theirs")
        ours.mkdir()
        theirs.mkdir()
        save_torch_state_dict(content, theirs, max_shard_size=limit)
        layouts = shard_layouts(outputs(content), limit)
        for layout in layouts:
            write(ours, layout, content)
        if len(layouts) > 1:
            (ours / "model.safetensors.index.json").write_text(index_json(layouts))
        check_same(ours, theirs, content)


def check_same(ours: Path, theirs: Path, content: dict[str, torch.Tensor]) -> None:
    files = sorted(file.name for file in ours.iterdir())
    assert files == sorted(file.name for file in theirs.iterdir())
    for name in files:
        if name.endswith(".json"):
            index, expected = (json.loads((directory / name).read_bytes()) for directory in (ours, theirs))
            count = sum(tensor.numel() for tensor in content.values())
            assert index == expected | {"metadata": expected["metadata"] | {"total_parameters": count}}
        else:
            assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    assert {name: info.nbytes for name, info in open_checkpoint(ours).tensors.items()} == {
        name: tensor.nbytes for name, tensor in content.items()
    }


@pytest.mark.parametrize("limit", ["2kB", "6KB", "1MB"])
def test_shards_are_those_of_transformers(tmp_path: Path, limit: str) -> None:
    """The same split, file names and index as save_pretrained, tensors taken in its order."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3, tie_word_embeddings=False))
    model.save_pretrained(tmp_path, max_shard_size=limit)
    layouts = shard_layouts(outputs(dict(model.state_dict())), shard_limit(limit))
    assert {layout.filename: {tensor.name for tensor in layout.tensors} for layout in layouts} == {
        file.name: load_file(file).keys() for file in tmp_path.glob("*.safetensors")
    }
    assert len(layouts) == {"2kB": 6, "6KB": 2, "1MB": 1}[limit]
    if len(layouts) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())
        assert json.loads(index_json(layouts)) == index


@pytest.mark.parametrize(
    ("size", "limit"),
    [(None, 5_000_000_000), ("5GB", 5_000_000_000), ("1.5 MB", 1_500_000), ("2GiB", 2 << 30), ("7", 7), (7, 7)],
)
def test_shard_limit(size: int | str | None, limit: int) -> None:
    assert shard_limit(size) == limit


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        (0, "a file of 0 bytes holds nothing: write it like 5GB"),
        ("0GB", "a file of 0 bytes holds nothing: write it like 5GB"),
        ("0.4B", "a file of 0 bytes holds nothing: write it like 5GB"),
        (-5, "-5 is not a size: write it like 512MB or 2GiB"),
        ("5 gigs", "'5 gigs' is not a size: write it like 512MB or 2GiB"),
        ("", "'' is not a size: write it like 512MB or 2GiB"),
    ],
)
def test_nonsense_shard_sizes(size: int | str, problem: str) -> None:
    with pytest.raises(OutputError) as raised:
        shard_limit(size)
    assert str(raised.value) == f"shard_size: {problem}"


def test_an_exception_closes_the_file(tmp_path: Path) -> None:
    """An unclosed file would be a ResourceWarning, and so an error."""
    layout = ShardLayout("model.safetensors", [OutputTensor("w", "F32", (2,))])
    with pytest.raises(ZeroDivisionError), closing(ShardWriter(tmp_path / layout.filename, layout.header())):
        _ = 1 / 0
    assert (tmp_path / "model.safetensors").read_bytes() == layout.header()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "model.safetensors").symlink_to("precious")
    with pytest.raises(OSError, match="symbolic links"):
        ShardWriter(tmp_path / "model.safetensors", b"")
    assert (tmp_path / "precious").read_text() == "mine"
