"""The ``build-engine`` command: a checkpoint in, a sealed bundle out."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Console

from reelforge.runtime.codec import to_json
from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import Target, VideoShape
from reelforge.tools import console
from reelforge.tools.attention_options import sparse_attention_of, sparse_build_options
from reelforge.tools.build_report import node_table, quality_table, shown, whole_of
from reelforge.tools.quantisation_options import (
    attention_of,
    calibration_options,
    parse_kept,
    parsed_precisions,
    precision_of,
)
from reelforge.tools.recipe_file import ChosenRecipe, build_options
from reelforge.tools.recipe_option import recipe_option, settled, show_recipe

if TYPE_CHECKING:
    from reelforge.export.build_request import BuildRequest
    from reelforge.runtime.manifest import Manifest


@click.command(
    "build-engine",
    epilog=console.EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Bundle folder; must not exist.")
@click.option(
    "--target",
    default="cpu",
    show_default=True,
    help="What will execute the engines: cpu or cuda (ONNX Runtime), rtx:sm89+sm120 (TensorRT-RTX plans for these "
    "architectures) or trt:sm90 (TensorRT).",
)
@click.option(
    "--precision",
    help="fp32, bf16, fp16, int8 or fp8; or by stage, e.g. dit=fp8,llm=int8,vae_decoder=fp16. A lone int8 or fp8 means "
    "the layers of dit. Norms, softmax, latents and timesteps are always fp32. By default fp32 on the CPU, bf16 for "
    "plans (fp16 with sm75, and of vae_decoder).",
)
@click.option(
    "--high-precision",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    help="Of what is not in 8 bits in a stage that is. By default as a stage without 8-bit layers.",
)
@click.option(
    "--keep",
    multiple=True,
    metavar="STAGE=PATTERN",
    help="Layers of an 8-bit stage that stay in high precision, e.g. 'dit=single.39.*'. May be given several times.",
)
@recipe_option(build_options)
@click.option(
    "--attention",
    type=click.Choice(["fp8", "int8", "high"]),
    help="Quantise the queries, keys and values of dit's attention too: fp8 for GPUs, int8 for cpu. By default "
    "attention is in high precision; for trt it is in 8 bits either way, by default in plugins of reelforge's own.",
)
@sparse_build_options
@click.option(
    "--scales",
    type=click.Path(path_type=Path),
    help="Use this scale file (see `reelforge calibrate`) instead of calibrating.",
)
@calibration_options
@click.option(
    "--min-psnr",
    type=click.FloatRange(0),
    help="A quantised bundle whose videos are further from fp32 than this many dB (median) is refused. By default 30 "
    "for int8, 33 for fp8.",
)
@click.option(
    "--min-cosine",
    type=click.FloatRange(0, 1),
    default=0.0,
    help="Likewise for the cosine between the velocities of any step. By default nothing is asked for.",
)
@click.option("--no-gate", is_flag=True, help="Do not measure what quantisation costs; the manifest then says so.")
@click.option(
    "--shapes",
    default="",
    help="Videos to serve, HEIGHTxWIDTHxFRAMES separated by commas, e.g. 720x1280x129,544x960x129. Plans serve these "
    "and one frame of each size, by default the model's own; ONNX Runtime also serves what lies between the smallest "
    "and the largest, per dimension, and by default any size.",
)
@click.option(
    "--partition",
    type=click.Choice(["head,body,tail"]),
    help="Also cut dit after its first block and before its final layer, for `generate --step-cache fbcache:0.08` and "
    "reuse=tokens. The parts share its weights: nothing is stored twice.",
)
@click.option("--stages", default="", help="Build only these, separated by commas; such a bundle cannot generate.")
@click.option(
    "--batch", default=1, show_default=True, type=click.IntRange(1), help="Videos per call of the dit engine."
)
@click.option(
    "--step-cache",
    metavar="METHOD:THRESHOLD",
    help="What requests get that say nothing about it (see docs/step_cache.md), e.g. easycache:0.025. By default, and "
    "with off, every step is computed.",
)
@click.option(
    "--numerics",
    type=click.Choice(["tencent", "diffusers"]),
    default="tencent",
    show_default=True,
    help="Whose rounding of the guidance value and VAE tiles to follow.",
)
@click.option(
    "--prompt-template",
    type=click.Path(path_type=Path),
    help="File with the text around a prompt ({} marks its place). By default the checkpoint's own, or an installed "
    "diffusers' (its digest is checked).",
)
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Of compiled plans; $XDG_CACHE_HOME/reelforge.")
@click.option("--cache-size", default="50GB", show_default=True, help="What was not used for longest goes first.")
@click.option("--no-cache", is_flag=True, help="Compile every plan, and keep none for other builds.")
@click.option(
    "--builder-memory",
    type=click.FloatRange(0, min_open=True),
    help="GB that compiling a plan may take; a stage that needs more is cut into parts, which run one after the other. "
    "By default half of the machine's.",
)
@click.option("--plan", "only_plan", is_flag=True, help="Only predict what this build costs (see `reelforge plan`).")
@click.option(
    "--verify",
    is_flag=True,
    help="Run each stage against its PyTorch reference and store the difference; the gate measures what is in 8 bits.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout; no progress.")
@click.pass_context
def build_engine(
    context: click.Context,
    checkpoint: Path,
    output: Path,
    target: str,
    precision: str | None,
    high_precision: str | None,
    keep: tuple[str, ...],
    recipe: ChosenRecipe | None,
    attention: str | None,
    sparse_attention: str | None,
    attention_blocks: str | None,
    scales: Path | None,
    prompts: Path | None,
    method: str,
    percentile: float,
    smoothing: float | None,
    seed: int,
    steps: int | None,
    shape: str | None,
    memory: float,
    min_psnr: float | None,
    min_cosine: float,
    no_gate: bool,
    shapes: str,
    partition: str | None,
    stages: str,
    batch: int,
    step_cache: str | None,
    numerics: str,
    prompt_template: Path | None,
    cache_dir: Path | None,
    cache_size: str,
    no_cache: bool,
    builder_memory: float | None,
    only_plan: bool,
    verify: bool,
    as_json: bool,
) -> None:
    """Compile the HunyuanVideo CHECKPOINT to a bundle that runs without PyTorch.

    CHECKPOINT is a folder in diffusers' layout (model_index.json, transformer/, vae/, ...) or in Tencent's
    (hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt, ...). Weights that need no conversion are not
    copied: the bundle holds hard links to the checkpoint's files where both lie on one file system.

    The bundle appears under its name only when it is complete; a build that fails or is interrupted leaves nothing but
    the progress of a calibration (OUTPUT.calibration), from which the same command goes on.

    With int8 or fp8 the model is first built in fp32 and run over prompts and all steps to find scales; the finished
    bundle is measured against it on other prompts, and refused if its videos are too far off (exit code 6).

    Plans for rtx and trt are compiled in processes of their own, checked layer by layer against what was asked for,
    and kept in a cache for other builds. TensorRT-RTX needs no GPU for that; TensorRT compiles for the GPU at hand.

    \b
    Examples:
      build-engine models/HunyuanVideo -o hv.bundle
      build-engine ckpts -o hv-720p.bundle --precision fp16 --shapes 720x1280x129,544x960x129
      build-engine ckpts -o hv-int8.bundle --precision int8 --calibration-prompts prompts.txt
      build-engine demo/checkpoint -o sparse.bundle --sparse-attention lists --attention-blocks 4x4
      build-engine ckpts -o hv-rtx.bundle --target rtx:sm89+sm120 --precision fp8 --attention fp8
      build-engine ckpts -o hv-4090.bundle --recipe rtx-4090-720p --scales hv.scales
    """  # noqa: D301 - \b is click's mark for text that it does not wrap
    parsed_target = Target.parse(target)
    parsed_shapes = tuple(VideoShape.parse(text) for text in shapes.split(",") if text.strip())
    from reelforge.calibration.scale_methods import ScaleMethod
    from reelforge.export.build import build_bundle
    from reelforge.export.build_request import BuildRequest, CalibrationRequest, CompilationRequest
    from reelforge.export.cache import parse_size
    from reelforge.export.models.hunyuan_video.spec_from_checkpoint import Numerics
    from reelforge.runtime.cache_folder import default_folder

    if not checkpoint.is_dir():
        raise RequestError(
            f"the checkpoint '{checkpoint}' is not a folder.",
            expected="a folder in diffusers' or Tencent's layout",
            fix="download the model first; hub names are not resolved",
        )
    became = {} if recipe is None else settled(recipe, build_options, context)
    if recipe is not None and not as_json:
        show_recipe(recipe.name, became, Console(stderr=True))
    request = BuildRequest(
        checkpoint=checkpoint,
        output=output,
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
        verify=verify,
        calibration=CalibrationRequest(
            scales=scales,
            prompts=prompts,
            method=ScaleMethod(method),
            percentile=percentile,
            smoothing=smoothing,
            seed=seed,
            steps=steps,
            shape=None if shape is None else VideoShape.parse(shape),
            memory_bytes=int(memory * 2**30),
            min_psnr_db=min_psnr,
            min_cosine=min_cosine,
            gated=not no_gate,
        ),
        compilation=CompilationRequest(
            cache=None if no_cache else cache_dir or default_folder(os.environ, Path.home()),
            cache_bytes=parse_size(cache_size),
            memory_bytes=None if builder_memory is None else int(builder_memory * 1e9),
        ),
    )
    if only_plan:
        _show_plan(request, as_json)
        return
    started = time.monotonic()
    finished: dict[str, float] = {}
    with shown(as_json, lambda entry: finished.update({entry.name: time.monotonic() - started})) as events:
        manifest = build_bundle(request, events)
    if as_json:
        result = _as_json(manifest, output, time.monotonic() - started, finished)
        named = {} if recipe is None else {"from_recipe": {"name": recipe.name, "options": became}}
        click.echo(json.dumps({**result, **named}))
        return
    terminal = Console(stderr=True)
    terminal.print(node_table(manifest))
    if manifest.quality is not None:
        terminal.print(quality_table(manifest.quality))
    terminal.print(f"{output}: built in {time.monotonic() - started:.1f} s, content {manifest.content_digest[:16]}")


def _show_plan(request: BuildRequest, as_json: bool) -> None:
    from reelforge.export.planner.checkpoint import plan_checkpoint
    from reelforge.export.planner.plan import PlanOptions
    from reelforge.export.planner.refusals import require_fit
    from reelforge.tools import plan, plan_report

    planned = plan_checkpoint(request, PlanOptions(host_bytes=plan.host_memory()))
    if as_json:
        click.echo(json.dumps(plan_report.as_json(planned)))
    else:
        plan_report.show(planned, Console())
    require_fit(planned.refusals)


def _as_json(manifest: Manifest, output: Path, seconds: float, finished: dict[str, float]) -> dict[str, Any]:
    """What ``--json`` prints; ``finished_s`` counts from the command's start."""
    return {
        "bundle": str(output),
        "content_digest": manifest.content_digest,
        "seconds": round(seconds, 3),
        "target": str(manifest.target),
        "recipe": to_json(manifest.recipe),
        "step_cache": manifest.step_cache,
        "quality": to_json(manifest.quality),
        "stages": {
            entry.name: {
                "weights_bytes": sum(weight.length for weight in entry.weights),
                "weights_of": None if (whole := whole_of(entry, manifest.stages)) is None else whole.name,
                "nodes": entry.nodes,
                "parity": entry.parity,
                "tolerance": entry.tolerance,
                "finished_s": round(finished[entry.name], 3),
            }
            for entry in manifest.stages
        },
    }


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit (the entry point of the package)."""
    console.run(build_engine, arguments)


if __name__ == "__main__":
    main()
