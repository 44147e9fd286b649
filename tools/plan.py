"""``reelforge plan``: what a build and its videos will cost, before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from reelforge.runtime.recipe import Target, VideoShape
from reelforge.tools import console
from reelforge.tools.attention_options import sparse_attention_of, sparse_build_options
from reelforge.tools.quantisation_options import attention_of, parse_kept, parsed_precisions, precision_of
from reelforge.tools.recipe_file import ChosenRecipe, plan_options
from reelforge.tools.recipe_option import recipe_option, settled, show_recipe

if TYPE_CHECKING:
    from reelforge.export.build_request import BuildRequest
    from reelforge.export.planner.plan import PlanOptions

_GB = 1e9


@click.command(epilog=console.EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True, help="cpu, cuda, rtx:sm89+sm120, trt:sm90, ...")
@click.option("--precision", help="As for build-engine, e.g. dit=fp8; the target's usual precision if left out.")
@click.option("--keep", multiple=True, metavar="STAGE=PATTERN", help="As for build-engine.")
@click.option("--high-precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="As for build-engine.")
@recipe_option(plan_options)
@click.option("--attention", type=click.Choice(["fp8", "int8", "high"]), help="As for build-engine.")
@sparse_build_options
@click.option("--shapes", default="", help="HEIGHTxWIDTHxFRAMES separated by commas; the model's default if left out.")
@click.option("--partition", type=click.Choice(["head,body,tail"]), help="As for build-engine.")
@click.option("--stages", default="", help="Only these, separated by commas.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1), help="Videos per call of dit.")
@click.option("--step-cache", metavar="METHOD:THRESHOLD", help="As for build-engine; the times leave it out.")
@click.option("--numerics", type=click.Choice(["tencent", "diffusers"]), default="tencent", show_default=True)
@click.option("--prompt-template", type=click.Path(path_type=Path), help="As for build-engine.")
@click.option("--scales", type=click.Path(path_type=Path), help="A scale file: nothing has to be calibrated.")
@click.option(
    "--calibration-memory",
    default=8.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="As for build-engine: GiB of fp32 weights that may be loaded at a time.",
)
@click.option("--gpu", help="Name of a GPU, e.g. 'RTX 4090' or h100: whether it fits, and how long it takes.")
@click.option("--steps", type=click.IntRange(1), help="Sampling steps; the model's default if left out.")
@click.option(
    "--memory",
    type=click.FloatRange(0, min_open=True),
    help="GB of memory of the machine that builds; this machine's by default.",
)
@click.option(
    "--builder-memory",
    type=click.FloatRange(0, min_open=True),
    help="As for build-engine: GB that compiling a plan may take. Half of the machine's by default.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.pass_context
def plan(
    context: click.Context,
    checkpoint: Path,
    target: str,
    precision: str | None,
    keep: tuple[str, ...],
    high_precision: str | None,
    recipe: ChosenRecipe | None,
    attention: str | None,
    sparse_attention: str | None,
    attention_blocks: str | None,
    shapes: str,
    partition: str | None,
    stages: str,
    batch: int,
    step_cache: str | None,
    numerics: str,
    prompt_template: Path | None,
    scales: Path | None,
    calibration_memory: float,
    gpu: str | None,
    steps: int | None,
    memory: float | None,
    builder_memory: float | None,
    as_json: bool,
) -> None:
    """Predict what building CHECKPOINT costs, and what a video made with it does.

    Only the headers of the checkpoint's files are read; no GPU is needed and nothing is written. Sizes come from the
    tensors' shapes and measured constants, times from a roofline with published kernel speeds: see docs/planner.md for
    what they leave out; what of this very build they say nothing about is printed under them. What cannot fit is
    refused with exit code 5, and the message says what would fit.

    \b
    Examples:
      reelforge plan ckpts --target rtx:sm89 --precision dit=fp8 --attention fp8 --gpu "RTX 4090"
      reelforge plan ckpts --recipe rtx-4060ti-16g-480p
      reelforge plan ckpts --target trt:sm90 --shapes 720x1280x129,544x960x129 --gpu h100
    """  # noqa: D301 - \b is click's mark for text that it does not wrap
    parsed_target = Target.parse(target)
    parsed_shapes = tuple(VideoShape.parse(text) for text in shapes.split(",") if text.strip())
    from reelforge.export.build_request import BuildRequest, CalibrationRequest, CompilationRequest
    from reelforge.export.models.hunyuan_video.spec_from_checkpoint import Numerics
    from reelforge.export.planner.gpus import find_gpu
    from reelforge.export.planner.plan import PlanOptions

    if recipe is not None and not as_json:
        show_recipe(recipe.name, settled(recipe, plan_options, context), Console(stderr=True))
    request = BuildRequest(
        checkpoint=checkpoint,
        output=Path(),
        target=parsed_target,
        precision=parsed_precisions(precision),
        high_precision=precision_of(high_precision),
        kept=parse_kept(keep),
        attention=attention_of(attention),
        sparse_attention=sparse_attention_of(sparse_attention, attention_blocks),
        shapes=parsed_shapes,
        stages=tuple(name.strip() for name in stages.split(",") if name.strip()),
        parted=partition is not None,
        batch=batch,
        step_cache=step_cache,
        numerics=Numerics(numerics),
        prompt_template=prompt_template,
        calibration=CalibrationRequest(scales=scales, memory_bytes=int(calibration_memory * 2**30)),
        compilation=CompilationRequest(memory_bytes=None if builder_memory is None else int(builder_memory * _GB)),
    )
    options = PlanOptions(
        gpu=None if gpu is None else find_gpu(gpu),
        steps=steps,
        host_bytes=host_memory() if memory is None else int(memory * _GB),
    )
    show_plan(request, options, as_json)


def show_plan(request: BuildRequest, options: PlanOptions, as_json: bool) -> None:
    """Plan a build and print it on stdout.

    Args:
        request: The build.
        options: GPU, steps, memory of the machine.
        as_json: Whether to print one JSON object instead of tables.

    Raises:
        BuildError: If the build or its videos do not fit; after printing.
        ReelforgeError: For what the build would refuse, too.
    """
    from reelforge.export.planner.checkpoint import plan_checkpoint
    from reelforge.export.planner.refusals import require_fit
    from reelforge.tools import plan_report

    planned = plan_checkpoint(request, options)
    if as_json:
        click.echo(json.dumps(plan_report.as_json(planned)))
    else:
        plan_report.show(planned, Console())
    require_fit(planned.refusals)


def host_memory() -> int | None:
    """Return the bytes of memory of this machine, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal")), None)
