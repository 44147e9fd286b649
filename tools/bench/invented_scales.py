"""A scale file for a checkpoint with invented weights: every scale is the same number.

What is compiled from it has the sizes, types and kernels of a calibrated build, and no meaning. Calibrating a model of
13 billion parameters in fp32 is a matter of days on a small machine; measuring how it is compiled needs no picture.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from reelforge.calibration.scale_file import RANGES, Provenance, format_text, write_scale_file
from reelforge.export.build_request import BuildRequest
from reelforge.export.build_source import open_source
from reelforge.export.calibration_plan import format_names
from reelforge.export.quantisation import attention_formats, quantised_formats, required_scales

SCALE = 0.05


def write_invented_scales(request: BuildRequest, path: Path, scale: float = SCALE) -> Path:
    """Write the scales that ``request`` needs.

    Args:
        request: The build that will use them; no weight is read but for its first bytes.
        path: The file.
        scale: Of every activation and attention input; ranges span 128 steps of it on both sides.
    """
    source = open_source(request)
    recipe = source.recipe()
    rules = source.family.quantisation(source.spec)
    stages = {stage.name: stage for stage in source.stages}
    formats = quantised_formats(recipe, rules, stages)
    attentions = attention_formats(recipe, rules)
    tensors = {
        name: np.array([-128 * scale, 127 * scale] if name.endswith(RANGES) else scale, np.float32)
        for name in required_scales(formats, attentions, stages)
    }
    provenance = Provenance(
        checkpoint=source.fingerprint(),
        prompts_sha256="0" * 64,
        seed=0,
        method="invented",
        format=format_text(format_names(formats, attentions)),
        versions={},
    )
    write_scale_file(path, provenance, tensors)
    return path
