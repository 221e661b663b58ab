"""The tokens of a checkpoint, read from files as they are about, and from such as nobody should write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from cpimerge import tokenizer_files
from cpimerge.errors import CheckpointError
from cpimerge.tokenizer_files import Tokens, find_tokenizer, read_tokens

TEXT = ["these are a few words, and words again, to train on: über, naïve, 日本"] * 5
NOT_SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


def tokens(directory: Path) -> Tokens:
    files = find_tokenizer([directory])
    assert files is not None
    return read_tokens(files)


def write(directory: Path, files: Mapping[str, Any]) -> Path:
    """Each as JSON, text or bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        (directory / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return directory


# --- what tokenizers and transformers write ---------------------------------------------------------


def bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=120, special_tokens=["<s>"]))
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]"]))
    return tokenizer


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXT, trainers.WordLevelTrainer(special_tokens=["[UNK]"]))
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=40, special_tokens=["<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


@pytest.mark.parametrize("train", [bpe, word_piece, word_level, unigram])
def test_every_kind_of_tokenizer(tmp_path: Path, train: Callable[[], Tokenizer]) -> None:
    tokenizer = train()
    tokenizer.add_tokens(["<added>", "ü"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = tokens(tmp_path)
    assert found.ids == tokenizer.get_vocab(with_added_tokens=True)
    assert found.added["<added>"] == NOT_SPECIAL
    assert {*found.added} >= {"<added>"}
    tokenizer.add_tokens(["<next>"])
    assert found.free == tokenizer.token_to_id("<next>")
    assert find_tokenizer([tmp_path / "nowhere", tmp_path]) is not None


def test_added_tokens_do_not_change_the_core(tmp_path: Path) -> None:
    tokenizer = bpe()
    tokenizer.save(str(write(tmp_path / "one", {}) / "tokenizer.json"))
    tokenizer.add_tokens(["<added>"])
    tokenizer.save(str(write(tmp_path / "two", {}) / "tokenizer.json"))
    one, two = tokens(tmp_path / "one"), tokens(tmp_path / "two")
    assert one.core == two.core
    assert one.xxh3 != two.xxh3


def test_merges_of_both_spellings_are_the_same_core(tmp_path: Path) -> None:
    """Newer files have a list where older ones have text."""
    bpe().save(str(write(tmp_path / "new", {}) / "tokenizer.json"))
    content = json.loads((tmp_path / "new" / "tokenizer.json").read_bytes())
    assert isinstance(content["model"]["merges"][0], list)
    older = {
        **content,
        "model": {**content["model"], "merges": [" ".join(pair) for pair in content["model"]["merges"]]},
    }
    fewer = {**content, "model": {**content["model"], "merges": content["model"]["merges"][1:]}}
    write(tmp_path / "old", {"tokenizer.json": older})
    write(tmp_path / "fewer", {"tokenizer.json": fewer})
    new, old, other = (tokens(tmp_path / name) for name in ("new", "old", "fewer"))
    assert new.core == old.core != other.core


def test_the_files_of_slow_tokenizers(tmp_path: Path) -> None:
    """vocab.json and merges.txt are the core of tokenizer.json."""
    tokenizer = bpe()
    tokenizer.save(str(write(tmp_path / "fast", {}) / "tokenizer.json"))
    slow = write(tmp_path / "slow", {"added_tokens.json": {"<added>": 200}})
    tokenizer.model.save(str(slow))
    assert sorted(file.name for file in slow.iterdir()) == ["added_tokens.json", "merges.txt", "vocab.json"]
    fast, found = tokens(tmp_path / "fast"), tokens(slow)
    assert found.core == fast.core
    assert found.ids == {**fast.ids, "<added>": 200}
    assert found.added == {"<added>": NOT_SPECIAL}


def test_a_token_a_line(tmp_path: Path) -> None:
    tokenizer = word_piece()
    tokenizer.save(str(write(tmp_path / "fast", {}) / "tokenizer.json"))
    tokenizer.model.save(str(write(tmp_path / "slow", {})))
    assert tokens(tmp_path / "slow").ids == tokens(tmp_path / "fast").ids
    assert tokens(tmp_path / "slow").core == tokens(tmp_path / "fast").core
    odd = write(tmp_path / "odd", {"vocab.txt": "a\r\nb\u2028c\n\x0bd\ne"})
    assert tokens(odd).names == {0: "a", 1: "b\u2028c", 2: "\x0bd", 3: "e"}


def test_what_the_config_adds(tmp_path: Path) -> None:
    decoder = {"5": {"content": "<x>", "special": True, "lstrip": True}, "0": {"content": "a", "special": False}}
    config = {"added_tokens_decoder": decoder}
    vocabulary = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}}}
    files = {"tokenizer.json": vocabulary, "tokenizer_config.json": config, "added_tokens.json": {"<y>": 6}}
    found = tokens(write(tmp_path, files))
    assert found.names == {0: "a", 1: "b", 5: "<x>", 6: "<y>"}
    assert found.added["<x>"] == {**NOT_SPECIAL, "lstrip": True, "normalized": False, "special": True}
    assert found.free == 2  # what tokenizer.json alone says


def test_what_tells_nothing(tmp_path: Path) -> None:
    assert find_tokenizer([write(tmp_path, {"tokenizer.model": b"\x0a\x05", "vocab.json": {"a": 0}})]) is None


# --- the same -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"tokenizer_config.json": {"chat_template": "x"}}, True),
        ({"added_tokens.json": {"<x>": 9}}, False),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"9": {"content": "<x>"}}}}, False),
        ({"tokenizer.json": {"model": {"type": "WordLevel", "vocab": {"b": 0}}}}, False),
    ],
)
def test_same_files(tmp_path: Path, change: Mapping[str, Any], same: bool) -> None:
    plain = {"tokenizer.json": {"model": {"type": "WordLevel", "vocab": {"a": 0}}}}
    one, two = write(tmp_path / "one", plain), write(tmp_path / "two", {**plain, **change})
    ours, theirs = find_tokenizer([one]), find_tokenizer([two])
    assert ours is not None
    assert theirs is not None
    assert ours.same(theirs) is same


# --- what nobody should write -----------------------------------------------------------------------


def of(vocab: Any = None, added: Any = None, **more: Any) -> dict[str, Any]:
    return {"model": {"type": "BPE", "vocab": {"a": 0} if vocab is None else vocab, **more}, "added_tokens": added}


MEND = "Save the tokenizer again with transformers"
WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    "no text": (b"\xff", "is not UTF-8 text"),
    "no object": ([], "expected a JSON object, got list"),
    "an abyss": (b'{"a":' + b"[" * 200_000, "its JSON is nested too deeply"),
    "no model": ({}, "has no vocabulary where tokenizers puts it (model.vocab)"),
    "a model that is none": ({"model": 1}, "has no vocabulary where tokenizers puts it (model.vocab)"),
    "a list without scores": (of(["a"]), "has no vocabulary where tokenizers puts it (model.vocab)"),
    "a huge score": (of([["a", 10**400]]), "has no vocabulary where tokenizers puts it (model.vocab)"),
    "an id that is none": (of({"a": -1}), "token 'a': its id is -1, not a row's number"),
    "a huge id": (of({"a": 1 << 22}), "token 'a': its id is 4194304, not a row's number"),
    "a true id": (of({"a": True}), "token 'a': its id is True, not a row's number"),
    "one id of two tokens": (of({"a": 0, "\x1b": 0}), "id 0 is both 'a' and '\\x1b'"),
    "two ids of one token": (of({"a": 0}, [{"id": 3, "content": "a"}]), "token 'a' has the ids 0 and 3"),
    "an id taken by an added token": (of({"a": 0}, [{"id": 0, "content": "b"}]), "id 0 is both 'a' and 'b'"),
    "added tokens that are none": (of(None, {"a": 1}), "'added_tokens' is not a list"),
    "an added token without text": (of(None, [{"id": 1}]), "an added token has no 'content'"),
    "an added token without id": (of(None, [{"content": "b"}]), "token 'b': its id is None, not a row's number"),
    "a flag that is none": (
        of(None, [{"id": 1, "content": "b", "special": 1}]),
        "added token 'b': a flag is not true or false",
    ),
    "a long token": (of({"x" * 99: -1}), f"token '{'x' * 58}…: its id is -1, not a row's number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_tokenizer(tmp_path: Path, case: str) -> None:
    content, problem = WRONG[case]
    write(tmp_path, {"tokenizer.json": content})
    with pytest.raises(CheckpointError) as caught:
        tokens(tmp_path)
    assert caught.value.problems == (f"{tmp_path}/tokenizer.json: {problem}. {MEND}",)


@pytest.mark.parametrize(
    ("number", "shown"), [("x", "'x'"), ("9" * 5000, f"'{'9' * 58}…"), ("-1", "'-1'"), ("2147483648", "2147483648")]
)
def test_ids_of_the_config_that_are_none(tmp_path: Path, number: str, shown: str) -> None:
    config = {"added_tokens_decoder": {number: {"content": "<x>"}}}
    write(tmp_path, {"tokenizer.json": of(), "tokenizer_config.json": config})
    with pytest.raises(CheckpointError) as caught:
        find_tokenizer([tmp_path])
    problem = f"token '<x>': its id is {shown}, not a row's number"
    assert caught.value.problems == (f"{tmp_path}/tokenizer_config.json: {problem}. {MEND}",)


def test_a_file_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_files, "MAX_BYTES", 1_000_000)
    write(tmp_path, {"tokenizer.json": of({"a" * 1_000_000: 0})})
    with pytest.raises(CheckpointError, match="is larger than 1 MB, as no such file is"):
        tokens(tmp_path)


def test_half_a_surrogate_pair_is_a_token_like_others(tmp_path: Path) -> None:
    """JSON can say that; whether it can be written is for those to find out who write."""
    found = tokens(write(tmp_path, {"tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"\\ud800": 0}}}'}))
    assert found.names == {0: "\ud800"}
    assert found.xxh3 == tokens(tmp_path).xxh3
