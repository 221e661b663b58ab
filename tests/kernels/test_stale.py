"""Compiled kernels do not outlive what they were compiled from."""

from __future__ import annotations

import os
from pathlib import Path

from cpimerge.kernels import _forget_stale_kernels


def test_a_change_of_one_file_forgets_all_that_was_compiled_before(tmp_path: Path) -> None:
    for number, name in enumerate(["a.py", "__pycache__/a.b.nbi", "__pycache__/a.b.nbc", "__pycache__/a.pyc", "b.py"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (number, number))
    young = tmp_path / "__pycache__/b.b.nbi"
    young.touch()
    _forget_stale_kernels(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["a.py", "a.pyc", "b.b.nbi", "b.py"]
