"""Training with frozen cores, stage by stage: the optional extra `cpimerge[train]`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import probe, sft
    from .callback import FrozenCoresCallback
    from .frozen import FrozenCores
    from .settings import Settings

__all__ = ["FrozenCores", "FrozenCoresCallback", "Settings", "probe", "sft"]

HOMES = {
    "FrozenCores": ".frozen",
    "FrozenCoresCallback": ".callback",
    "Settings": ".settings",
    "probe": ".api",
    "sft": ".api",
}
NEEDED = {"torch", "transformers", "accelerate"}


def __getattr__(name: str) -> Any:
    """On first use: PyTorch and transformers take seconds to import, and may be missing."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(HOMES[name], __name__), name)
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        raise ModuleNotFoundError(
            f"{name} needs {error.name}: pip install 'cpimerge[train]'", name=error.name
        ) from error
