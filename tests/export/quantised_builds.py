"""What tests of quantised builds share: a request that is quick, refusals, a checkpoint with one weight changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from reelforge.runtime.errors import ReelforgeError
from reelforge.runtime.recipe import VideoShape

SHAPE = VideoShape(32, 48, 5)
STEPS = 2


def refused(error: type[ReelforgeError], parts: list[str], output: Path, run: Callable[[], object]) -> ReelforgeError:
    """``run`` fails with all ``parts`` in its message, and nothing is left."""
    with pytest.raises(error) as caught:
        run()
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert list(output.parent.iterdir()) == []
    return caught.value


def altered(checkpoint: Path, copy: Path, change: Callable[[np.ndarray], object]) -> Path:
    """Return a copy of the checkpoint with the output projection of its first single block changed."""
    shutil.copytree(checkpoint, copy)
    for path in sorted((copy / "transformer").glob("*.safetensors")):
        tensors = load_file(path)
        name = "single_transformer_blocks.0.proj_out.weight"
        if name in tensors:
            tensors[name] = tensors[name].copy()
            change(tensors[name])
            save_file(tensors, path, metadata={"format": "pt"})
            return copy
    raise AssertionError("the checkpoint has no single block")
