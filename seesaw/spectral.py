"""Data-free merges that work on the singular vectors of each matrix, for comparison with cpimerge's levelling.

They are slower by orders of magnitude than what works element by element: every matrix of every expert is decomposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from .merging import Parameters

REST = 0.4  # the factor of task arithmetic on what is not decomposed: vectors, and matrices of other sides
SMALLEST, LARGEST = 32, 10_000  # of a matrix's sides; vocabularies are larger


def spectral(method: str, base: Path, experts: Mapping[str, Path], parameters: Parameters) -> dict[str, torch.Tensor]:
    """The tensors that "tsv" or "iso" gives; `parameters["lambda"]` is the factor on what it makes of the updates."""
    held = [load_file(path / "model.safetensors") for path in (base, *experts.values())]
    result = {}
    for name, start in held[0].items():
        if start.is_floating_point():
            updates = torch.stack([tensors[name].float() - start.float() for tensors in held[1:]])
            result[name] = (start.float() + _merged(method, updates, parameters["lambda"])).to(start.dtype)
        else:
            result[name] = start
    return result


def _merged(method: str, updates: torch.Tensor, factor: float) -> torch.Tensor:
    if not updates.any():
        return updates[0]
    if updates.dim() != 3 or min(updates.shape[1:]) < SMALLEST or max(updates.shape[1:]) > LARGEST:
        return REST * updates.sum(0)
    return factor * (tsv(updates) if method == "tsv" else iso(updates))


def tsv(updates: torch.Tensor) -> torch.Tensor:
    """Task singular vectors, TSV-Merge (arXiv 2412.00081) of [tasks, rows, columns]: float32 [rows, columns].

    Of every task the largest 1/T of the singular values, with vectors made orthogonal to those of the others.
    """
    kept = min(updates.shape[1:]) // len(updates)
    left, values, right = torch.linalg.svd(updates, full_matrices=False)
    columns = torch.cat(list(left[:, :, :kept]), dim=1)
    rows = torch.cat(list(right[:, :kept]), dim=0)
    merged: torch.Tensor = (_orthogonal(columns) * values[:, :kept].flatten()) @ _orthogonal(rows)
    return merged


def iso(updates: torch.Tensor) -> torch.Tensor:
    """Isotropic merging, Iso-C (arXiv 2502.04959) of [tasks, rows, columns]: float32 [rows, columns].

    The sum of the updates, with the mean of its singular values in place of each.
    """
    left, values, right = torch.linalg.svd(updates.sum(0), full_matrices=False)
    merged: torch.Tensor = values.mean() * (left @ right)
    return merged


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with orthonormal rows or columns."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    nearest: torch.Tensor = left @ right
    return nearest
