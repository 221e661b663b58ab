"""Buffers that a model computes and nobody trains: some versions of transformers saved them, others do not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from .checkpoint import Checkpoint, natural_key

__all__ = ["onto"]

# Rotary frequencies and positions, of which every model class makes its own when it is built; GPT-2's and GPT-J's
# constant for masked scores. Not their mask, `attn.bias`, as others have trained biases of that name.
COMPUTED = re.compile(r"(?:.*\.)?(?:rotary_(?:pos_)?emb\.inv_freq|position_ids|masked_bias)")


def onto(base: Checkpoint, other: Checkpoint) -> Checkpoint:
    """`other` with the buffers that the base has, and no more of them; its notes say so.

    The base's list of tensors is the authority, and where the model lacks a buffer, the base's is what it computes too.
    """
    missing = [name for name in base.tensors if name not in other.tensors and COMPUTED.fullmatch(name)]
    extra = [name for name in other.tensors if name not in base.tensors and COMPUTED.fullmatch(name)]
    if not missing and not extra:
        return other
    tensors = {name: tensor for name, tensor in other.tensors.items() if name not in extra}
    tensors |= {name: base.tensors[name] for name in missing}
    ordered = {name: tensors[name] for name in sorted(tensors, key=natural_key)}
    notes = [
        *_note(other, missing, "does not have them; the base's serve"),
        *_note(other, extra, "has them, unlike the base; they are left out"),
    ]
    return replace(other, tensors=ordered, notes=(*other.notes, *notes))


def _note(model: Checkpoint, names: Sequence[str], what: str) -> Iterator[str]:
    """A line on buffers that are in only one of the two."""
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{model.where}: {names[0]}{more}: buffers that are computed, not trained: {what}"
