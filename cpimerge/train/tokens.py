"""Examples as token ids, and which of them a model must predict: those of completions, or of the assistant's turns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, DataError
from .examples import Example
from .settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "Encoded", "encode_all", "padded"]

IGNORED = -100  # the label of a token that nobody asks for, as everywhere in PyTorch
# Marks the assistant's words in a chat template, where transformers looks for them.
GENERATION = re.compile(r"\{\%-?\s*generation\s*-?\%\}")
LISTED = 20  # examples that are named one by one


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example: `ids` and `labels` of one length; a label is the token's id, or IGNORED. `task` counts from 0."""

    ids: list[int]
    labels: list[int]
    task: int


def encode_all(
    tokenizer: PreTrainedTokenizerBase, samples: Mapping[str, Sequence[Example]], settings: Settings
) -> tuple[dict[str, list[Encoded]], Counter[str]]:
    """Every example by task, and how many of each task were cut to `max_length`.

    Raises DataError listing every example that does not fit or has nothing to learn, and CheckpointError where the
    tokenizer cannot do what the examples need.
    """
    _check_template(tokenizer, samples.values())
    encoded: dict[str, list[Encoded]] = {}
    cut: Counter[str] = Counter()
    problems: list[str] = []
    for number, (task, examples) in enumerate(samples.items()):
        encoded[task] = []
        for example in examples:
            try:
                ids, labels = encode(tokenizer, example)
                cut[task] += len(ids) > settings.max_length and settings.truncate
                encoded[task].append(Encoded(*_fitted(ids, labels, settings), number))
            except ValueError as error:
                problems.append(f"{example.place}: {error}")
    if problems:
        more = [f"and {len(problems) - LISTED} more examples like these"] if len(problems) > LISTED else []
        raise DataError(problems[:LISTED] + more)
    return encoded, +cut


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], list[int]]:
    """Ids and labels of one example. Raises ValueError where the chat template does not take it."""
    ids, asked = _chat(tokenizer, example) if example.turns else _completed(tokenizer, example)
    asked[:1] = [False] * len(asked[:1])  # nothing precedes it to predict it from
    if not any(asked):
        raise ValueError("has no token to learn after tokenizing")
    return ids, [token if wanted else IGNORED for token, wanted in zip(ids, asked, strict=True)]


def _completed(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], list[bool]]:
    """Prompt and completion as one text, and the end of text after it.

    Asked for is all from where its tokens leave those of the prompt alone, which is what a model will be given.
    """
    ids = _ids(tokenizer(example.prompt + example.completion))
    alone = _ids(tokenizer(example.prompt)) if example.prompt else []
    end = tokenizer.eos_token_id
    if end is not None and ids[-1:] != [end]:
        ids.append(int(end))
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, alone, strict=False)))
    return ids, [False] * shared + [True] * (len(ids) - shared)


def _chat(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], list[bool]]:
    """The conversation in the model's chat template; asked for is what the assistant says, up to the end of its turn.

    Where the template marks the assistant's words, these; else what each of its turns adds to the text.
    """
    messages = [{"role": turn.role, "content": turn.content} for turn in example.turns]
    if _marks_words(tokenizer):
        found: Any = _templated(tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(found["input_ids"]), [bool(flag) for flag in found["assistant_masks"]]
    text = str(_templated(tokenizer, messages, tokenize=False))
    spans = list(_spans(tokenizer, messages, text))
    coded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    asked = [any(begin < stop and first < end for first, stop in spans) for begin, end in coded["offset_mapping"]]
    return _ids(coded), asked


def _spans(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], text: str) -> Iterator[tuple[int, int]]:
    """Where in `text`, the whole conversation, each of the assistant's turns begins and ends."""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = ""
        if number:
            before = str(_templated(tokenizer, messages[:number], tokenize=False, add_generation_prompt=True))
        turn = str(_templated(tokenizer, messages[: number + 1], tokenize=False))
        if not (text.startswith(turn) and turn.startswith(before)):
            raise ValueError(
                f"message {number + 1}: the model's chat template writes it otherwise where more follows. "
                "Split the conversation, so that each example ends with the answer that is learnt"
            )
        yield len(before), len(turn)


def _templated(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> Any:
    """What the model's chat template makes of the messages. Raises ValueError where it refuses them."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (TemplateError, TypeError, KeyError) as error:  # a template may fail as any program may
        raise ValueError(f"the model's chat template refuses it: {error}") from error


def _marks_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    return GENERATION.search(str(tokenizer.chat_template)) is not None


def _check_template(tokenizer: PreTrainedTokenizerBase, samples: Iterable[Sequence[Example]]) -> None:
    """Raise CheckpointError where there are conversations and the tokenizer cannot write them."""
    first = next((example for examples in samples for example in examples if example.turns), None)
    if first is None:
        return
    where = f"{tokenizer.name_or_path}: its tokenizer"
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"{where} has no chat template, which {first.place} needs for its 'messages'. Give 'prompt' and "
            "'completion' instead, or put the template of your chats into chat_template.jinja beside the tokenizer"
        )
    if not isinstance(tokenizer.chat_template, str):
        raise CheckpointError(f"{where} has several chat templates. Leave the one to train with in chat_template.jinja")
    if not tokenizer.is_fast:
        raise CheckpointError(f"{where} has no tokenizer.json, which says where in a text a token stands. Convert it")


def _ids(coded: Any) -> list[int]:
    return [int(token) for token in coded["input_ids"]]


def _fitted(ids: list[int], labels: list[int], settings: Settings) -> tuple[list[int], list[int]]:
    """At most `max_length` tokens, the last ones. Raises ValueError where that is not wanted, or not possible."""
    length, limit = len(ids), settings.max_length
    if length <= limit:
        return ids, labels
    if not settings.truncate:
        raise ValueError(f"has {length} tokens, more than --max-length {limit}. Raise it, or cut with --truncate")
    answer = length - _last_answer(labels)
    if answer >= limit:
        raise ValueError(f"its answer alone has {answer} tokens; --max-length {limit} leaves no prompt. Raise it")
    labels = [IGNORED, *labels[length - limit + 1 :]]  # what comes first has nothing before it to be predicted from
    return ids[length - limit :], labels


def _last_answer(labels: Sequence[int]) -> int:
    """Where the last run of labels begins."""
    place = max(number for number, label in enumerate(labels) if label != IGNORED)
    while place and labels[place - 1] != IGNORED:
        place -= 1
    return place


def padded(batch: Sequence[Encoded], padding: int) -> dict[str, list[list[int]]]:
    """`input_ids`, `attention_mask` and `labels`, each of one length, padded at the end; `task`, one each."""
    length = max(len(example.ids) for example in batch)
    rest = [length - len(example.ids) for example in batch]
    return {
        "input_ids": [example.ids + [padding] * more for example, more in zip(batch, rest, strict=True)],
        "attention_mask": [[1] * len(example.ids) + [0] * more for example, more in zip(batch, rest, strict=True)],
        "labels": [example.labels + [IGNORED] * more for example, more in zip(batch, rest, strict=True)],
        "task": [[example.task] for example in batch],
    }
