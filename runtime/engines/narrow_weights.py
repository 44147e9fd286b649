"""Which stages leave their 16-bit weights in the mapped file on the CPU, where ONNX Runtime computes in float32.

A weight that is widened when the stage is loaded (a folded constant) is a copy in memory for as long as the stage is
there. One that is widened in the run is read from the page cache, and its copy is gone with the next layer. What runs
once per video is better off with that: of a model of 0.3 billion parameters in bf16, refiner and modulation hold 2 MB
instead of 540. In a loop's stage, widening would be repeated in each step. The module knows stages by their names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reelforge.runtime.manifest import StageEntry

SETTINGS = {"optimization.disable_specified_optimizers": "ConstantFolding"}
"""Of a session that widens in the run."""

_ONCE = ("llm", "clip", "refiner", "modulation")
_NARROW = {"F16", "BF16"}


def widens_in_the_run(entry: StageEntry) -> bool:
    """Whether a stage runs once per video and has 16-bit weights; none of 8 bits, whose graphs count on folding."""
    kinds = {weight.dtype for weight in entry.weights}
    return entry.name in _ONCE and bool(kinds & _NARROW) and kinds <= {"F32", *_NARROW}
