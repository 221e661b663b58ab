"""What an output holds beside its weights: the base's other files, config, card and manifest."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoints import save, write_json, write_recipe
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from cpimerge import ResourceError, fuse, merge, plan
from cpimerge.card import model_name, recipe_without_places
from cpimerge.companions import companion_bytes, companion_files, config_with_dtype, unreadable
from cpimerge.plan_file import Plan

COMMIT = "0123456789abcdef" * 2 + "01234567"
CONFIG = {"model_type": "test", "torch_dtype": "float32", "text_config": {"dtype": "float32", "layers": 2}}

# --- which files are copied -------------------------------------------------------------------------

COPIED = [
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "2_Dense/pytorch_model.bin",
    "LICENSE",
    "USE_POLICY.md",
    "additional_chat_templates/tool.jinja",
    "chat_template.jinja",
    "config.json",
    "config_sentence_transformers.json",
    "generation_config.json",
    "merges.txt",
    "modeling_custom.py",
    "modules.json",
    "sentence_bert_config.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
]
NOT_COPIED = [
    ".cache/huggingface/download/config.json.metadata",
    ".gitattributes",
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "all_results.json",
    "another/config.json",
    "another/model.safetensors",
    "another-in-a-pickle/config.json",
    "another-in-a-pickle/pytorch_model.bin",
    "checkpoint-500/config.json",
    "checkpoint-500/optimizer.pt",
    "consolidated.00.pth",
    "cpimerge_manifest.json",
    "flax_model.msgpack",
    "global_step500/zero.json",
    "latest",
    "lora/adapter_config.json",
    "lora/tokenizer.json",
    "mergekit_config.yml",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "model.gguf",
    "onnx/config.json",
    "onnx/model.onnx",
    "optimizer.pt",
    "original/params.json",
    "pytorch_model.bin",
    "rng_state_0.pth",
    "runs/events.out.tfevents.1",
    "scheduler.pt",
    "tf_model.h5",
    "trainer_state.json",
    "training_args.bin",
    "zero_to_fp32.py",
]
MODULES = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "3_Normalize"}]


def furnish(base: Path) -> None:
    """Give a checkpoint every kind of file that repositories have."""
    for name in COPIED + NOT_COPIED:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(json.dumps({"file": name, "dtype": "float32"}))
    (base / "modules.json").write_text(json.dumps(MODULES))
    write_json(base / "config.json", CONFIG)


def test_companion_files(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(1)})
    furnish(tmp_path)
    assert sorted(str(file.relative_to(tmp_path)) for file in companion_files(tmp_path)) == COPIED


def test_without_modules_json_weights_stay(tmp_path: Path) -> None:
    furnish(tmp_path)
    for text in ("{}", "[1]", "not json", None):
        (tmp_path / "modules.json").write_text(text) if text else (tmp_path / "modules.json").unlink()
        found = {str(file.relative_to(tmp_path)) for file in companion_files(tmp_path)}
        assert "1_Pooling/config.json" in found
        assert not {name for name in found if "2_Dense" in name}  # it looks like another model


def test_linked_folders_are_followed_but_not_in_circles_nor_out(tmp_path: Path) -> None:
    base = tmp_path / "base"
    (base / ".blobs").mkdir(parents=True)
    (base / ".blobs" / "config.json").write_text("{}")
    (base / "1_Pooling").symlink_to(".blobs")
    (base / "circle").symlink_to(".")
    (base / ".blobs" / "back").symlink_to("../../base")
    (base / "above").symlink_to("..")
    assert list(companion_files(base)) == [base / "1_Pooling" / "config.json"]
    assert list(unreadable(base)) == [
        f"{base}/above: is a link out of its directory, and the output would get what it leads to. "
        "Put the file itself there"
    ]


@pytest.mark.parametrize("name", ["README.md", "readme.MD", "config.json", "model-00001-of-00002.safetensors"])
def test_a_folder_in_the_place_of_a_file_of_the_output(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / "2_Dense" / name).mkdir(parents=True)
    assert list(unreadable(tmp_path)) == [
        f"{tmp_path}/{name}: is a folder, and the output has a file of this name. Rename or remove it"
    ]


# --- config.json ------------------------------------------------------------------------------------

ODDLY_WRITTEN = b'{"a":1e-05,\n   "torch_dtype" :"bfloat16", "b":[{"dtype": "torch.bfloat16"}], "c": "\\u00e9"}'


@pytest.mark.parametrize("dtypes", [["bfloat16"], [], ["bfloat16", "float32"]])
def test_a_config_that_agrees_is_kept_verbatim(dtypes: list[str]) -> None:
    assert config_with_dtype(ODDLY_WRITTEN, dtypes) == ODDLY_WRITTEN


def test_every_dtype_in_a_config_is_rewritten() -> None:
    assert json.loads(config_with_dtype(ODDLY_WRITTEN, ["float16"])) == {
        "a": 1e-5,
        "torch_dtype": "float16",
        "b": [{"dtype": "float16"}],
        "c": "é",
    }


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"dtype": "auto"},
        {"dtype": None, "torch_dtype": 16},
        {"quantization_config": {"dtype": "int8"}},
        {"dtype": {"inner": "float32"}},
    ],
)
def test_what_is_no_float_dtype_stays(config: dict[str, Any]) -> None:
    raw = json.dumps(config).encode()
    assert config_with_dtype(raw, ["bfloat16"]) == raw


@pytest.mark.parametrize(
    ("dtypes", "whole", "text", "vision"),
    [
        (["bfloat16", "float32"], "bfloat16", "bfloat16", "float32"),  # as it was
        (["bfloat16"], "bfloat16", "bfloat16", "bfloat16"),
        (["float16", "float32"], "float16", "float16", "float32"),
        (["float32", "bfloat16"], "float32", "float32", "float32"),
        (["float16", "bfloat16"], "float16", "float16", "float16"),
    ],
)
def test_parts_of_a_model_may_have_their_own_dtype(dtypes: list[str], whole: str, text: str, vision: str) -> None:
    config = {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}, "vision_config": {"torch_dtype": "float32"}}
    assert json.loads(config_with_dtype(json.dumps(config).encode(), dtypes)) == {
        "dtype": whole,
        "text_config": {"dtype": text},
        "vision_config": {"torch_dtype": vision},
    }


# --- a whole output ---------------------------------------------------------------------------------


def model(task: int) -> dict[str, torch.Tensor]:
    """The base (task 0) or a fine-tune of it."""
    rng = torch.Generator().manual_seed(0)
    noise = torch.Generator().manual_seed(task)
    floats = {name: torch.randn(4, 5, generator=rng) for name in ("embed", "layers.0.w", "layers.1.w")}
    if task:
        floats = {name: tensor + 0.1 * torch.randn(4, 5, generator=noise) for name, tensor in floats.items()}
    return {name: tensor.bfloat16() for name, tensor in floats.items()} | {
        "norm": torch.ones(3),
        "ids": torch.arange(3),
    }


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output in three shards, `out`, with its plan and inputs beside it."""
    home = tmp_path_factory.mktemp("home")
    snapshot = home / "models--org--math--v2" / "snapshots" / COMMIT
    furnish(home / "base")
    save(home / "base", model(0), shards=2, config=CONFIG)
    save(snapshot, model(1), config=CONFIG)
    save(home / "code", model(2), config=CONFIG)
    write_recipe(
        home / "recipe.yml",
        base_model=home / "base",
        models=[{"model": str(snapshot), "name": "math"}, {"model": str(home / "code")}],
        parameters={"density": 0.25, "space": "delta"},
    )
    plan(home / "recipe.yml", home / "plan", threads=1)
    fuse(home / "plan", home / "out", threads=1, shard_size=90)
    return home


def test_everything_of_the_base_is_there(fused: Path) -> None:
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    made = ["README.md", "cpimerge_manifest.json", "model.safetensors.index.json", *shards]
    out = fused / "out"
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == sorted(COPIED + made)
    for name in COPIED:
        if name != "config.json":
            assert (out / name).read_bytes() == (fused / "base" / name).read_bytes()


def test_config_agrees_with_the_tensors(fused: Path) -> None:
    """Most elements are bfloat16, and the config said float32; the norm stays float32 as in the base."""
    written = json.loads((fused / "out/config.json").read_bytes())
    assert written == CONFIG | {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "layers": 2}}


def test_modules_weights_are_a_note(fused: Path) -> None:
    notes = Plan.load(fused / "plan").notes
    assert [note for note in notes if "another module" in note] == [
        f"{fused}/base/2_Dense/{name}: weights of another module, which are not merged; the output takes the base's"
        for name in ("model.safetensors", "pytorch_model.bin")
    ]


def test_manifest(fused: Path) -> None:
    out = fused / "out"
    manifest = json.loads((out / "cpimerge_manifest.json").read_bytes())
    planned = Plan.load(fused / "plan")
    assert {key: manifest[key] for key in ("format", "version", "stages", "backbone")} == {
        "format": "cpimerge manifest",
        "version": 1,
        "stages": planned.stages,
        "backbone": planned.backbone,
    }
    assert manifest["shards"] == {file.name: described(file) for file in sorted(out.glob("*.safetensors"))}
    others = sorted({*COPIED, "README.md", "model.safetensors.index.json"})
    assert manifest["files"] == {name: described(out / name) for name in others}
    assert list(manifest["files"]) == others
    assert [(entry["name"], entry["model"], entry["revision"]) for entry in manifest["inputs"]] == [
        ("base", "base", None),
        ("math", "org/math--v2", COMMIT),
        ("code", "code", None),
    ]
    base = {shard["file"]: shard["size"] for shard in manifest["inputs"][0]["shards"]}
    assert base == {
        file.name: file.stat().st_size for file in (fused / "base").glob("*.safetensors") if "-of-" in file.name
    }


def described(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_an_input_is_known_by_its_content(fused: Path, tmp_path: Path) -> None:
    """The same tensors in other files are the same content; another value, or another name, is not."""
    shutil.copytree(fused / "base", tmp_path / "same")
    renamed = {f"x{name}" if name == "norm" else name: tensor for name, tensor in model(0).items()}
    changed = model(0) | {"norm": torch.full((3,), 2.0)}
    save(tmp_path / "one", model(0), config=CONFIG)
    save(tmp_path / "renamed", renamed, config=CONFIG)
    save(tmp_path / "changed", changed, config=CONFIG)
    content = {name: content_of(tmp_path, name) for name in ("same", "one", "renamed", "changed")}
    manifest = json.loads((fused / "out/cpimerge_manifest.json").read_bytes())
    assert content["same"] == content["one"] == manifest["inputs"][0]["content_xxh3"]
    assert len({*content.values(), *(entry["content_xxh3"] for entry in manifest["inputs"])}) == 5


def content_of(home: Path, name: str) -> str:
    """What the manifest of a merge calls the content of the checkpoint `name`, which is its base and its only task."""
    recipe = write_recipe(home / "recipe.yml", base_model=home / name, models=[{"model": home / name, "name": "task"}])
    first, second = merge(recipe, home / f"{name}-out", threads=1)["inputs"]
    assert first["content_xxh3"] == second["content_xxh3"]
    digest: str = first["content_xxh3"]
    return digest


def test_what_the_other_files_take_is_known_before(fused: Path) -> None:
    out = fused / "out"
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    tensors = Plan.load(fused / "plan").output_bytes
    assert written <= tensors + companion_bytes(fused / "base", 5, 2) <= written + 20_000


def test_a_disk_too_small_for_the_other_files(fused: Path, tmp_path: Path) -> None:
    needed = Plan.load(fused / "plan").output_bytes + companion_bytes(fused / "base", 5, 2)
    with mock.patch("shutil.disk_usage", return_value=mock.Mock(free=needed - 1)), pytest.raises(ResourceError):
        fuse(fused / "plan", tmp_path / "out", threads=1)
    with mock.patch("shutil.disk_usage", return_value=mock.Mock(free=needed)):
        fuse(fused / "plan", tmp_path / "out", threads=1)


def test_a_name_that_json_cannot_hold_is_found_before(fused: Path, tmp_path: Path) -> None:
    """The manifest lists every file, so that a strange name would end a merge at its very end."""
    shutil.copytree(fused / "base", tmp_path / "base")
    (tmp_path / "base" / os.fsdecode(b"caf\xe9.txt")).touch()
    (problem,) = unreadable(tmp_path / "base")
    assert problem.startswith(f"'{tmp_path}/base/caf\\udce9.txt': its name is not Unicode")


def test_dispositions(fused: Path) -> None:
    manifest = json.loads((fused / "out/cpimerge_manifest.json").read_bytes())
    tensors = manifest["tensors"]
    assert list(tensors) == ["embed", "ids", "layers.0.w", "layers.1.w", "norm"]
    assert tensors["ids"] == {"action": "copy"}
    assert tensors["norm"] == {"action": "identical"}
    for tensor in Plan.load(fused / "plan").tensors:
        if tensor.blend is not None:
            assert tensors[tensor.name] == {
                "action": "slerp",
                "transplanted": tensor.claimed / 20,
                "angles": tensor.blend.angles,
                "levelled": False,
            }
            assert 5 <= tensor.claimed <= 10  # two cores of five elements
            (angle,) = tensor.blend.angles
            assert angle is not None
            assert 45 < angle < 135  # the updates are independent


def test_no_directory_of_this_machine_is_published(fused: Path) -> None:
    for name in ("README.md", "cpimerge_manifest.json"):
        text = (fused / "out" / name).read_text()
        assert str(fused) not in text
        assert not re.search(r"(?<![\w.:/])/(tmp|home|root|work)\b", text)


def test_card(fused: Path) -> None:
    card = ModelCard.load(fused / "out/README.md")
    assert card.data.to_dict() == {
        "base_model": ["org/math--v2"],
        "base_model_relation": "merge",
        "library_name": "sentence-transformers",
        "tags": ["merge", "cpimerge"],
    }
    planned = Plan.load(fused / "plan")
    assert "# base, fused" in card.text
    assert f"- **math** (`org/math--v2`): {planned.tasks[0].core} core elements" in card.text
    assert "1. math" in card.text
    assert (
        "Backbone: code. Tensors: 3 blended with slerp, 0 with lerp alone,\n1 identical everywhere, 1 not" in card.text
    )
    recipe = re.search(r"```yaml\n(.*?)\n```", card.text, re.DOTALL)
    assert recipe is not None
    assert recipe[1].splitlines()[:5] == [
        "merge_method: cpi",
        "base_model: base",
        "models:",
        "- model: org/math--v2",
        "  name: math",
    ]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama"}, {"library_name": "transformers", "tags": ["merge", "cpimerge"]}),
        ({"architectures": ["X"]}, {"library_name": "transformers", "tags": ["merge", "cpimerge"]}),
        ({"embed_dim": 512}, {"tags": ["merge", "cpimerge"]}),
    ],
)
def test_card_of_what_the_hub_does_not_know(tmp_path: Path, config: dict[str, Any], expected: dict[str, Any]) -> None:
    """A directory's name is no model on the Hub, even if there is one called so."""
    for shift, name in enumerate(("gpt2", "math")):
        save(tmp_path / name, {"w": torch.full((2, 2), float(shift))}, config=config)
    recipe = write_recipe(tmp_path / "r.yml", base_model=tmp_path / "gpt2", models=[{"model": tmp_path / "math"}])
    merge(recipe, tmp_path / "out", threads=1)
    assert ModelCard.load(tmp_path / "out/README.md").data.to_dict() == expected


def test_two_runs_write_the_same_bytes(fused: Path) -> None:
    fuse(fused / "plan", fused / "again", threads=2, shard_size="90B")
    for file in (fused / "out").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (fused / "again" / file.relative_to(fused / "out")).read_bytes(), file


def test_transformers_loads_it(tmp_path: Path) -> None:
    """A tied model in shards: no key is missing or unexpected, and the dtype is that of the recipe."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    for seed, name in enumerate(("base", "math", "code")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name, max_shard_size="4KB")
    models = [{"model": tmp_path / "math"}, {"model": tmp_path / "code"}]
    recipe = write_recipe(tmp_path / "recipe.yml", base_model=tmp_path / "base", models=models, dtype="bfloat16")
    plan(recipe, tmp_path / "plan", threads=1)
    fuse(tmp_path / "plan", tmp_path / "out", threads=1, shard_size="2kB")
    loaded: Any
    info: dict[str, Any]
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)  # type: ignore[misc]
    assert not any(info.values())
    expected: dict[str, torch.Tensor] = {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        expected |= load_file(shard)
    state = loaded.state_dict()
    assert state.keys() == expected.keys() | {"lm_head.weight"}
    assert all(torch.equal(state[name], tensor) and tensor.dtype == torch.bfloat16 for name, tensor in expected.items())


# --- names and recipes in public --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/data/models/math", "math"),
        ("/cache/hub/models--org--name/snapshots/" + COMMIT, "org/name"),
        (f"org/name@{COMMIT}", "org/name"),  # streamed, and in no directory
        ("/cache/hub/models--org--name--2/snapshots/" + COMMIT, "org/name--2"),
        ("/cache/hub/models--gpt2/snapshots/" + COMMIT, "gpt2"),
        (f"/cache/hub/models--gpt2/snapshots/{COMMIT}/sub", "sub"),
        ("/data/models--org--name", "models--org--name"),
    ],
)
def test_model_names(path: str, name: str) -> None:
    assert model_name(path) == name


@pytest.mark.parametrize(
    ("written", "published"),
    [
        ("base_model: /data/base", "base_model: base"),
        ("base_model: '/data/base/'  # here", "base_model: 'base'  # here"),
        ("models: [{model: /my data/b, name: b}]", "models: [{model: b, name: b}]"),  # a known input, with a space
        ("backbone: ~/models/x", "backbone: x"),
        ("backbone: ~me/models/x", "backbone: x"),
        ("base_model: ./data/base", "base_model: ./data/base"),
        ("base_model: ../data/base", "base_model: ../data/base"),
        ("base_model: data/base", "base_model: data/base"),
        (f"base_model: org/b@{COMMIT}", f"base_model: org/b@{COMMIT}"),
        ("exclude: ['*/bias', a/b]", "exclude: ['*/bias', a/b]"),
        ("# as in https://arxiv.org/abs/2508.21741", "# as in https://arxiv.org/abs/2508.21741"),
        ("density: 1/100", "density: 1/100"),
    ],
)
def test_recipes_lose_absolute_paths_only(written: str, published: str) -> None:
    inputs = [mock.Mock(path="/my data/b", adapter=None), mock.Mock(path=f"org/b@{COMMIT}", adapter=None)]
    assert recipe_without_places(mock.Mock(recipe=written, inputs=inputs)) == published
