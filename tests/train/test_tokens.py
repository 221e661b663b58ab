"""Which tokens are trained on: compared with labels written down by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import ByteLevel as ByteLevelOffsets
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast
from worlds import PROMPTED, TEMPLATE, tokenizer

from cpimerge import CheckpointError, DataError
from cpimerge.train.examples import Example, Turn
from cpimerge.train.settings import Settings
from cpimerge.train.tokens import Encoded, encode, encode_all, padded

FILE = Path("d.jsonl")
SAYS = "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}{% else %}"
MARKED = (
    "{% for message in messages %}<{{ message.role }}> " + SAYS + "{{ message.content }}{% endif %} </s> {% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content if loop.last or m.role == 'user' else '' }} {% endfor %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + PROMPTED


def said(text: str, template: str = PROMPTED) -> tuple[str, str]:
    """A conversation (`role: words; role: words`) as tokens, and those that are trained on, `.` for others."""
    turns = tuple(Turn(*part.strip().split(": ")) for part in text.split(";"))
    return shown(tokenizer(template), *encode(tokenizer(template), Example(FILE, 1, turns=turns)))


def completed(prompt: str, completion: str, coder: PreTrainedTokenizerFast | None = None) -> tuple[str, str]:
    coder = coder or tokenizer()
    return shown(coder, *encode(coder, Example(FILE, 1, prompt, completion)))


def shown(coder: Any, ids: Sequence[int], labels: Sequence[int]) -> tuple[str, str]:
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    words = coder.convert_ids_to_tokens(ids)
    return " ".join(words), " ".join(word if label >= 0 else "." for word, label in zip(words, labels, strict=True))


# --- prompt and completion --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("w1 w2 ", "w3", ("<s> w1 w2 w3 </s>", ". . . w3 </s>")),
        ("w1", " w3 w1", ("<s> w1 w3 w1 </s>", ". . w3 w1 </s>")),
        ("w1 ", "w1 w1", ("<s> w1 w1 w1 </s>", ". . w1 w1 </s>")),
        ("", "w1 w2", ("<s> w1 w2 </s>", ". w1 w2 </s>")),
        ("w1 ", "w2 </s>", ("<s> w1 w2 </s>", ". . w2 </s>")),
        ("w1 </s> ", "w2", ("<s> w1 </s> w2 </s>", ". . . w2 </s>")),
        ("w1", "2 w3", ("<s> w12 w3 </s>", ". w12 w3 </s>")),  # one token of both: it is not what the prompt gives
    ],
)
def test_the_completion_and_the_end_are_asked_for(prompt: str, completion: str, expected: tuple[str, str]) -> None:
    assert completed(prompt, completion) == expected


def test_where_tokens_join_across_the_border() -> None:
    model = BPE({"a": 0, "b": 1, "ab": 2, "c": 3}, [("a", "b")])
    coder = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))  # type: ignore[no-untyped-call]
    assert completed("ca", "bc", coder) == ("c ab c", ". ab c")
    assert completed("cc", "ab", coder) == ("c c ab", ". . ab")
    assert completed("", "cab", coder) == ("c ab", ". ab")  # nothing precedes the first, nor is there an end of text


def test_nothing_to_learn() -> None:
    model = BPE({"a": 0}, [])
    coder = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match="has no token to learn"):
        encode(coder, Example(FILE, 1, "", "a"))


# --- conversations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "user: w1 w2; assistant: w3",
            ("<user> w1 w2 </s> <assistant> w3 </s>", ". . . . . w3 </s>"),
        ),
        (
            "system: w9; user: w1; assistant: w3 w4; user: w3; assistant: w5",
            (
                "<system> w9 </s> <user> w1 </s> <assistant> w3 w4 </s> <user> w3 </s> <assistant> w5 </s>",
                ". . . . . . . w3 w4 </s> . . . . w5 </s>",
            ),
        ),
        (
            "user: w1; assistant: w3; user: w1",
            ("<user> w1 </s> <assistant> w3 </s> <user> w1 </s>", ". . . . w3 </s> . . ."),
        ),
        ("assistant: w1", ("<assistant> w1 </s>", ". w1 </s>")),  # what comes first has nothing before it
    ],
)
def test_the_assistants_turns_are_asked_for(text: str, expected: tuple[str, str]) -> None:
    assert said(text) == expected


def test_a_template_without_a_prompt_for_the_answer() -> None:
    """Who speaks is part of what the turn adds to the text, then."""
    assert said("user: w1; assistant: w3", TEMPLATE)[1] == ". . . <assistant> w3 </s>"


@pytest.mark.parametrize("tag", ["{% generation %}", "{%generation%}", "{%- generation -%}", "{%-  generation%}"])
def test_a_template_that_marks_the_assistants_words(tag: str) -> None:
    """Written as transformers takes it."""
    template = MARKED.replace("{% generation %}", tag)
    found = said("user: w1; assistant: w3 w4; user: w5; assistant: w6", template)
    assert found == (
        "<user> w1 </s> <assistant> w3 w4 </s> <user> w5 </s> <assistant> w6 </s>",
        ". . . . w3 w4 . . . . . w6 .",
    )


def test_a_template_that_forgets_earlier_answers() -> None:
    assert said("user: w1; assistant: w3", FORGETFUL)[1].endswith("w3")
    with pytest.raises(
        ValueError, match=r"message 2: the model's chat template writes it otherwise where more follows"
    ):
        said("user: w1; assistant: w3; user: w1; assistant: w2", FORGETFUL)


def test_a_template_that_refuses() -> None:
    with pytest.raises(ValueError, match="the model's chat template refuses it: begin with the user"):
        said("assistant: w1", STRICT)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_tokens_of_bytes(trim_offsets: bool) -> None:
    """A character may be many tokens, and a token of spaces has no width where offsets are trimmed."""
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=290,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["user assistant so on\n\n"] * 20, trainer)
    inner.post_processor = ByteLevelOffsets(trim_offsets=trim_offsets)
    inner.decoder = ByteLevelDecoder()
    coder = PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=CHATML)  # type: ignore[no-untyped-call]
    turns = (Turn("user", "é  so"), Turn("assistant", "  so\n\n本 "), Turn("user", "\n"), Turn("assistant", "\n\n"))
    ids, labels = encode(coder, Example(FILE, 1, turns=turns))
    assert coder.decode(ids).count("<|im_end|>") == 4
    learnt = coder.decode([label for label in labels if label != -100])
    # The last answer begins in one token with the line break before it.
    assert learnt == "  so\n\n本 <|im_end|>\n" + "\n\n\n<|im_end|>\n"


# --- all of them ------------------------------------------------------------------------------------

LONG = Example(FILE, 7, "w1 w2 w3 w4 w5 ", "w6 w7")  # 9 tokens, of which 3 are the answer
SHORT = Example(FILE, 8, "w1 ", "w2")


def words(encoded: Encoded) -> tuple[str, str]:
    return shown(tokenizer(), encoded.ids, encoded.labels)


def test_longer_examples_are_errors_that_name_their_lines() -> None:
    with pytest.raises(DataError) as raised:
        encode_all(tokenizer(), {"a": [SHORT, LONG], "b": [LONG]}, Settings(max_length=8))
    line = "d.jsonl:7: has 9 tokens, more than --max-length 8. Raise it, or cut with --truncate"
    assert raised.value.problems == (line, line)
    with pytest.raises(DataError) as raised:
        encode_all(tokenizer(), {"a": [LONG] * 30}, Settings(max_length=8))
    assert raised.value.problems == (*[line] * 20, "and 10 more examples like these")


def test_longer_examples_lose_their_beginning_where_that_is_wanted() -> None:
    encoded, cut = encode_all(tokenizer(), {"a": [SHORT, LONG], "b": [LONG]}, Settings(max_length=5, truncate=True))
    assert cut == {"a": 1, "b": 1}
    assert [words(example) for example in encoded["a"]] == [
        ("<s> w1 w2 </s>", ". . w2 </s>"),
        ("w4 w5 w6 w7 </s>", ". . w6 w7 </s>"),
    ]
    assert [example.task for task in encoded.values() for example in task] == [0, 0, 1]
    assert encode_all(tokenizer(), {"a": [LONG]}, Settings(max_length=9))[1] == {}


def test_an_answer_that_does_not_fit_by_itself() -> None:
    assert encode_all(tokenizer(), {"a": [LONG]}, Settings(max_length=4, truncate=True))[1] == {"a": 1}
    with pytest.raises(DataError, match="its answer alone has 3 tokens; --max-length 3 leaves no prompt"):
        encode_all(tokenizer(), {"a": [LONG]}, Settings(max_length=3, truncate=True))


def test_the_first_token_that_is_left_is_not_asked_for() -> None:
    turns = tuple(Turn(role, content) for role, content in [("user", "w1"), ("assistant", "w2 w3 w4")] * 2)
    encoded, _ = encode_all(
        tokenizer(PROMPTED), {"a": [Example(FILE, 1, turns=turns)]}, Settings(max_length=11, truncate=True)
    )
    assert words(encoded["a"][0]) == (
        "w3 w4 </s> <user> w1 </s> <assistant> w2 w3 w4 </s>",
        ". w4 </s> . . . . w2 w3 w4 </s>",
    )


CONVERSATION = Example(FILE, 9, turns=(Turn("user", "w1"), Turn("assistant", "w2")))


def test_conversations_need_a_chat_template() -> None:
    with pytest.raises(CheckpointError, match=r"its tokenizer has no chat template, which d.jsonl:9 needs"):
        encode_all(tokenizer(), {"a": [SHORT], "b": [SHORT, CONVERSATION]}, Settings())
    coder = tokenizer(PROMPTED)
    coder.chat_template = {"default": PROMPTED, "tools": TEMPLATE}
    with pytest.raises(CheckpointError, match="its tokenizer has several chat templates"):
        encode_all(coder, {"b": [CONVERSATION]}, Settings())
    assert encode_all(tokenizer(), {"a": [SHORT]}, Settings())[1] == {}


def test_batches_are_padded_at_the_end() -> None:
    batch = [Encoded([5, 6, 7], [-100, 6, 7], 2), Encoded([8], [-100], 0)]
    assert padded(batch, 3) == {
        "input_ids": [[5, 6, 7], [8, 3, 3]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 6, 7], [-100, -100, -100]],
        "task": [[2], [0]],
    }
