"""A chunk of several checkpoints, stored and as float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cpimerge.kernels.arrays import TILE
from cpimerge.kernels.floats import KINDS

TORCH = {0: torch.bfloat16, 1: torch.float16, 2: torch.float32}
NAMES = {kind: name for name, kind in KINDS.items()}
# Elements of a chunk and of a row: around tiles and words of 64 elements, in whole rows.
SHAPES = [
    *((n, n) for n in (1, 63, 64, 65, 2049, TILE - 1, TILE, TILE + 1, 2 * TILE + 904)),
    *((n, 1) for n in (1, 65, TILE + 1)),
    *((n, 3) for n in (63, TILE // 3 * 3, TILE // 3 * 3 + 3)),
    *((n, 64) for n in (64, TILE, TILE + 64, 2 * TILE + 64)),
    *((n, 1000) for n in (1000, 2000 + TILE // 1000 * 1000)),
]


@dataclass(frozen=True)
class Stored:
    """`raw` uint8 [C, ≥ 4n] as the kernels take it, and what it says: `values` float32 [C, n]."""

    raw: np.ndarray
    kinds: np.ndarray
    values: np.ndarray


def store(values: np.ndarray, kind: int) -> bytes:
    """float32 as torch stores it in another dtype."""
    return torch.from_numpy(values).to(TORCH[kind]).view(torch.uint8).numpy().tobytes()


def stored(values: np.ndarray, kinds: Sequence[int]) -> Stored:
    """`values` float32 [C, n], rounded to each checkpoint's kind; unused bytes of the buffer hold rubbish."""
    count, n = values.shape
    raw = np.random.default_rng(7).integers(0, 256, (count, 4 * n + 24), np.uint8)
    rounded = np.empty_like(values)
    for c, kind in enumerate(kinds):
        data = store(values[c], kind)
        raw[c, : len(data)] = np.frombuffer(data, np.uint8)
        rounded[c] = torch.from_numpy(values[c]).to(TORCH[kind]).float().numpy()
    return Stored(raw, np.array(kinds, np.int64), rounded)


def near_the_base(rng: np.random.Generator, checkpoints: int, n: int) -> np.ndarray:
    """A base of many scales, some of it 0; the others differ here and there, in multiples of a step: ties abound."""
    base = rng.normal(size=n) * 2.0 ** rng.integers(-20, 2, n) * (rng.random(n) < 0.95)
    steps = rng.integers(-6, 7, (checkpoints - 1, n)) * (rng.random((checkpoints - 1, n)) < 0.7)
    scale = rng.choice([2.0**-16, 2.0**-6], n)
    return np.vstack([base, base + steps * scale]).astype(np.float32)
