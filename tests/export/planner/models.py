"""Models of invented sizes to plan for; no checkpoint is written."""

from __future__ import annotations

from functools import cache

from reelforge.export.family import FAMILIES
from reelforge.export.planner.plan import Model
from reelforge.runtime.recipe import Precision, Recipe, VideoShape
from reelforge.tools.synthesize_layout import SIZES

FAMILY = FAMILIES["hunyuan_video"]
TEMPLATE_TOKENS = 95
HD = VideoShape(720, 1280, 129)
MIDDLE = VideoShape(544, 960, 129)
SMALL = VideoShape(480, 832, 81)


@cache
def model(size: str = "full", batch: int = 1) -> Model:
    spec = SIZES[size]
    return Model(FAMILY, spec, FAMILY.stages(spec, batch), TEMPLATE_TOKENS)


def recipe(*shapes: VideoShape, attention: Precision | None = None, **stages: Precision) -> Recipe:
    """Return a recipe in fp16 except for the stages that are named."""
    precision = {**dict.fromkeys(FAMILY.stage_names, Precision.FP16), **stages}
    return Recipe(precision, shapes, high_precision=Precision.FP16, attention=attention)
