"""What every test relies on: no network, few threads, and hypothesis without a stopwatch.

The environment is set when pytest loads this file, before a test module imports torch, numba or transformers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hub_server import Hub

# The Hub must not be asked for anything.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Test processes run side by side, so each computes with one thread unless a test asks for more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import hypothesis
import pytest

# No deadline: the first call of a kernel compiles it.
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,  # the same examples every time: a change passes or fails on its own merit
    print_blob=True,
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub on this machine instead of the real one, and an empty cache."""
    from hub_models import connected

    with connected(monkeypatch, tmp_path / "cache") as found:
        yield found


@pytest.fixture
def published(hub: Hub, tmp_path: Path) -> Path:
    """A recipe of models on that Hub."""
    from hub_models import publish

    return publish(hub, tmp_path)


@pytest.fixture
def from_directories(published: Path, tmp_path: Path) -> dict[str, bytes]:
    """What it gives where the models are directories."""
    from hub_models import merged_locally

    return merged_locally(tmp_path)
