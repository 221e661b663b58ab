"""mergekit 0.1.5 itself as an oracle: the same checkpoints, its own code, its own result.

What must be known of it:
- Its model card asks the Hub about relative paths with less than two slashes, local ones too. With the
  network off a merge then fails after its weights are written. So no card is written here.
- `dtype` is what it computes in, `out_dtype` what it writes; the conversion between them is one rounding.
- It plans decoder models only (of the encoders, BertModel stops in its planning).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def load(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in `directory`, by name."""
    files = sorted(directory.glob("*.safetensors"))
    assert files, f"no safetensors file in {directory}"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def merge(config: dict[str, Any], out: Path) -> dict[str, torch.Tensor]:
    """Run mergekit on `config` (what its YAML would hold), write the model to `out` and return its tensors.

    Checkpoints are given by absolute paths. The Hub is off (conftest.py). Raises what mergekit raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its warnings are its own affair, and none of the tests'
        # Imported here: it takes seconds, which only the tests that need it should pay.
        from mergekit.config import MergeConfiguration
        from mergekit.io.tasks import LoaderCache
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        # It keeps opened checkpoints by path for the life of the process.
        LoaderCache().loaders.clear()
        options = MergeOptions(device="cpu", write_model_card=False, copy_tokenizer=False, quiet=True)
        run_merge(MergeConfiguration.model_validate(config), str(out), options)
    return load(out)
