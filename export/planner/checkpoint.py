"""plan_checkpoint: what a build request will cost, from the checkpoint's headers alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from reelforge.export.build_request import BuildRequest
from reelforge.export.build_source import BuildSource, open_source
from reelforge.export.checkpoint.open import open_checkpoint
from reelforge.export.default_step_cache import default_step_cache, require_coefficients
from reelforge.export.models.hunyuan_video.spec_from_checkpoint import Numerics
from reelforge.export.planner.limits import limits
from reelforge.export.planner.plan import Model, Plan, PlanOptions, make_plan
from reelforge.export.planner.refusals import Refusal, check_gpu, find_refusals
from reelforge.export.stage import Stage
from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import Recipe
from reelforge.runtime.spec import VaeTiling

_OBSERVED_SHARE = 1.25  # calibration keeps observed values of up to a quarter of the weights' size beside them


@dataclass(frozen=True)
class Planned:
    """A plan, what of it does not fit, and what of the build it says nothing about."""

    plan: Plan
    refusals: tuple[Refusal, ...]
    limits: tuple[str, ...]


def plan_checkpoint(request: BuildRequest, options: PlanOptions) -> Planned:
    """Predict a build and its videos; no weight is read, and nothing is written.

    Args:
        request: The build; its ``output`` is not looked at.
        options: GPU, steps, partition, memory of the machine.

    Raises:
        RequestError: For what the build would refuse, too, and a GPU that the target does not serve.
        CheckpointError: If the checkpoint is incomplete, damaged, or of another family.
    """
    if options.gpu is not None:
        check_gpu(request.target, options.gpu)
    step_cache = default_step_cache(request)
    source = open_source(request)
    require_coefficients(step_cache, source.spec)
    recipe = source.recipe()
    model = Model(
        source.family,
        source.spec,
        _planned_stages(source),
        source.template.crop_start,
        _other_tilings(source),
    )
    plan = make_plan(model, request.target, recipe, _completed(options, request, recipe))
    return Planned(plan, find_refusals(model, plan), tuple(limits(request, recipe)))


def _planned_stages(source: BuildSource) -> tuple[Stage, ...]:
    """Return the stages to build, with dense attention, which is what the family's work is counted for.

    Raises:
        RequestError: If all of them are views of others, which are planned with these only.
    """
    request = source.request
    names = [stage.name for stage in source.chosen_stages()]
    dense = source.family.stages(source.spec, request.batch, None, request.parted)
    stages = tuple(stage for stage in dense if stage.name in names)
    if all(stage.weights_of for stage in stages):
        whole = sorted({stage.weights_of for stage in stages})
        raise RequestError(
            "the stages to plan have no weights of their own.",
            received=f"--stages {','.join(names)}",
            expected=f"{' and '.join(whole)} among them, of which they are views",
            fix=f"use --stages {','.join([*whole, *names])}",
        )
    return stages


def _completed(options: PlanOptions, request: BuildRequest, recipe: Recipe) -> PlanOptions:
    """Add what the request says about memory."""
    calibrates = recipe.calibrated and request.calibration.scales is None
    calibration = int(request.calibration.memory_bytes * _OBSERVED_SHARE) if calibrates else 0
    return replace(options, compiler_bytes=request.compilation.memory_bytes, calibration_bytes=calibration)


def _other_tilings(source: BuildSource) -> dict[str, VaeTiling]:
    checkpoint = open_checkpoint(source.request.checkpoint)
    others = [numerics for numerics in Numerics if numerics is not source.request.numerics]
    return {f"--numerics {one.value}": source.family.spec(checkpoint, one).tiling for one in others}
