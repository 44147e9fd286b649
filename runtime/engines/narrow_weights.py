"""Which stages leave their 16-bit weights in the mapped file on the CPU, where ONNX Runtime computes in float32.

A weight that is widened when the stage is loaded (a folded constant) is a copy in memory for as long as the stage is
there. One that is widened in the run is read from the page cache, and its copy is gone with the next layer. What runs
once per video is better off with that: of a model of 0.3 billion parameters in bf16, refiner and modulation hold 2 MB
instead of 540.

In the loop's stages widening is repeated in each step. That is work per weight, where computing is work per weight and
token: what it costs does not grow with the video, and what it saves grows with the model. Large stages therefore widen
in the run, too: of 9.1 billion parameters, as many as the published ``dit`` has, the copy takes 36 GB, and the file 18.
Small ones, whose copies are no burden, do not, nor does the decoder, whose convolutions ONNX Runtime lays out anew if
they are constants. The module knows stages by their names.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reelforge.runtime.manifest import StageEntry

SETTINGS = {"optimization.disable_specified_optimizers": "ConstantFolding"}
"""Of a session that widens in the run."""

LARGE_BYTES = 256 << 20
"""Widened weights of a stage of the loop from which on they stay in the file."""

_ONCE = ("llm", "clip", "refiner", "modulation")
_LOOP = ("dit", "dit_head", "dit_body", "dit_tail")
_NARROW = {"F16", "BF16"}
_WIDE_BYTES = 4


class Widening(StrEnum):
    """When 16-bit weights of the loop's stages become float32; those of stages that run once always do in the run."""

    AUTO = "auto"
    """In the run if they would take more than :data:`LARGE_BYTES`."""
    LOAD = "load"
    """Once: most memory, no work in a step."""
    RUN = "run"
    """In each step: least memory."""


def runs_once(entry: StageEntry) -> bool:
    """Whether a video needs one run of the stage."""
    return entry.name in _ONCE


def widens_in_the_run(entry: StageEntry, widening: Widening = Widening.AUTO) -> bool:
    """Whether a stage leaves 16-bit weights in the file; none with weights of 8 bits, whose graphs count on folding.

    Args:
        entry: The stage.
        widening: What was asked for.
    """
    kinds = {weight.dtype for weight in entry.weights}
    if not kinds & _NARROW or not kinds <= {"F32", *_NARROW}:
        return False
    if entry.name not in _LOOP or widening == Widening.LOAD:
        return runs_once(entry)
    return widening == Widening.RUN or _copied_bytes(entry) > LARGE_BYTES


def _copied_bytes(entry: StageEntry) -> int:
    return sum(math.prod(weight.shape) * _WIDE_BYTES for weight in entry.weights if weight.dtype in _NARROW)
