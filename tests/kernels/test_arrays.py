"""Kernels run where compiled code cannot be kept."""

from __future__ import annotations

import errno
import os
from typing import Any

import numpy as np
import pytest
from numba.core import caching

from cpimerge.kernels.arrays import compiled


def double(values: Any) -> Any:
    return values * 2


def test_without_a_place_to_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba finds none that it may write to: an installation of somebody else, and no home directory."""
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    assert compiled(double)(np.arange(3)).tolist() == [0, 2, 4]


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def full(*what: object) -> None:
        tried.append(what)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
    assert compiled(double)(np.arange(3)).tolist() == [0, 2, 4]
    assert len(tried) == 1
