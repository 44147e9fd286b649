"""The planner's figures of the recipes in the package: computed here, stored in their files, compared by a test.

``python -m reelforge.tools.recipe_figures`` prints what has moved and fails if something has; with ``--write``, from a
checkout, it stores the new figures. A recipe is planned for a model of the size that it names, without a checkpoint.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import click

from reelforge.export.family import FAMILIES
from reelforge.export.planner.gpus import find_gpu
from reelforge.export.planner.plan import Model, Plan, PlanOptions, make_plan
from reelforge.export.planner.refusals import Refusal, find_refusals
from reelforge.export.target_rules import default_base, stage_bases
from reelforge.runtime.codec import to_json
from reelforge.runtime.errors import BuildError, RequestError
from reelforge.runtime.recipe import Recipe, Target, VideoShape, resolve_precisions
from reelforge.tools import console
from reelforge.tools.recipe_file import Figures, RecipeFile, VideoFigures, find_recipe, recipe_names
from reelforge.tools.synthesize_layout import SIZES

_GB = 1_000_000_000
_CALIBRATION_GIB = 8.0  # what `build-engine --calibration-memory` takes by default
_OBSERVED_SHARE = 1.25  # as in export.planner.checkpoint


@dataclass(frozen=True)
class ModelSize:
    """A model that recipes are for: its name, numbers, and the template's tokens that are cropped."""

    name: str
    size: str
    template_tokens: int


MODELS: Mapping[str, ModelSize] = {
    "hunyuan-video": ModelSize("HunyuanVideo, 13 billion parameters", "full", 95),
    "demo": ModelSize("the demonstration checkpoint, 3 million parameters", "demo", 12),
}


def planned(recipe: RecipeFile) -> tuple[Plan, tuple[Refusal, ...]]:
    """Plan a recipe for its model and GPU.

    Raises:
        RequestError: If the recipe names no known model or GPU, or says what a build would refuse.
    """
    size = MODELS.get(recipe.model or "")
    if size is None or recipe.target is None:
        raise RequestError(
            "the recipe does not say what to plan.",
            received=f"model {recipe.model!r}, target {recipe.target!r}",
            expected=f"a target, and a model among {', '.join(MODELS)}",
            fix="name both in the file",
        )
    family, spec = FAMILIES["hunyuan_video"], SIZES[size.size]
    batch = recipe.batch or 1
    target = Target.parse(recipe.target)
    stages = family.stages(spec, batch, None, recipe.partition is not None)
    chosen = {**stage_bases(target, recipe.precision), **recipe.precision}
    data = Recipe(
        resolve_precisions(chosen, family.stage_names, family.quantised_by_default, default_base(target)),
        tuple(VideoShape.parse(shape) for shape in recipe.shapes),
        batch,
        recipe.high_precision or default_base(target, beside_8_bit=True),
        dict(recipe.kept),
        recipe.attention,
    )
    model = Model(family, spec, stages, size.template_tokens)
    compiler = None if recipe.builder_memory_gb is None else int(recipe.builder_memory_gb * _GB)
    options = PlanOptions(
        gpu=None if recipe.gpu is None else find_gpu(recipe.gpu),
        host_bytes=None if compiler is None else 2 * compiler,
        compiler_bytes=compiler,
        calibration_bytes=_calibration_bytes(recipe) if data.calibrated else 0,
    )
    plan = make_plan(model, target, data, options)
    return plan, find_refusals(model, plan)


def figures(plan: Plan) -> Figures:
    """Return what a recipe's file keeps of a plan; seconds are rounded to what a prediction can mean."""
    videos = []
    for bucket in plan.buckets:
        step, video = bucket.step, bucket.seconds_per_video
        videos.append(
            VideoFigures(
                str(bucket.shape),
                bucket.peak.total_bytes,
                bucket.peak.phase.value,
                None if step is None else round(step.total, 2),
                None if video is None else round(video, 1),
            )
        )
    return Figures(
        plan.buckets[0].steps,
        plan.bundle_bytes,
        plan.export_bytes,
        plan.builder_bytes,
        round(plan.builder_seconds),
        {build.stage: build.parts for build in plan.builds if build.parts > 1},
        tuple(videos),
    )


def _calibration_bytes(recipe: RecipeFile) -> int:
    gib = recipe.calibration.memory_gib or _CALIBRATION_GIB
    return int(int(gib * 2**30) * _OBSERVED_SHARE)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--write", is_flag=True, help="Store what the planner says now, instead of failing.")
def command(write: bool) -> None:
    """Compare the figures in the package's recipes with what the planner says."""
    folder = Path(str(importlib.resources.files("reelforge.export") / "recipes"))
    moved = []
    for name in recipe_names():
        recipe = find_recipe(name).content
        plan, refusals = planned(recipe)
        if refusals:
            raise refusals[0].error()
        now = figures(plan)
        if now != recipe.figures:
            moved.append(name)
            if write:
                path = folder / f"{name}.json"
                content = json.loads(path.read_text(encoding="utf-8"))
                content["figures"] = to_json(now)
                path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if moved and not write:
        raise BuildError(
            "the planner's figures have moved.",
            received=", ".join(moved),
            expected="the figures in their files",
            fix="look at them with reelforge recipes NAME, then run this with --write",
        )
    click.echo(f"{len(moved)} of {len(recipe_names())} written" if moved else "nothing has moved")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    console.run(command, arguments)


if __name__ == "__main__":
    main()
