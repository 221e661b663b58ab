"""The order in which the kernels add up what is in the lanes of a register."""

from __future__ import annotations


def in_halves(lanes: list[float]) -> float:
    """Halves are added until one is left."""
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [a + b for a, b in zip(lanes[:half], lanes[half:], strict=True)]
    return lanes[0]
