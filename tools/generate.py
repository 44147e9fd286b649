"""``reelforge generate``: a prompt and a bundle to a video file.

Knows the options and the progress display; the work is in ``runtime``.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from reelforge.runtime.attention.table import chosen_table
from reelforge.runtime.budget import LEAST, parse_budget
from reelforge.runtime.bundle.check import Check
from reelforge.runtime.control import Stop
from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.engines.narrow_weights import Widening
from reelforge.runtime.errors import CancelledError, RequestError
from reelforge.runtime.latents_file import read_latents
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.request import Request
from reelforge.runtime.resume import step_of
from reelforge.runtime.step_cache.settings import StepCache
from reelforge.runtime.video import VideoWriter
from reelforge.tools import console
from reelforge.tools.attention_options import attention_options
from reelforge.tools.interruption import Unfinished, finishing_the_step
from reelforge.tools.video_events import open_bundle, progress_bars, write_video


@click.command(epilog=console.EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", help="What to show. It may be empty ('').")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="Read the prompt from this UTF-8 text file.")
@click.option(
    "-o",
    "--output",
    required=True,
    help="Where the video goes: out.mp4, out.webm, out.gif, out.png (one frame), or frames/%04d.png. An existing file "
    "is replaced when the new one is complete.",
)
@click.option("--height", type=int, help="Pixels.  [default: the model's]")
@click.option("--width", type=int, help="Pixels.  [default: the model's]")
@click.option("--frames", type=int, help="Number of frames, 4k+1; 1 makes a picture.  [default: the model's]")
@click.option("--steps", type=int, help="Sampling steps.  [default: the model's]")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the noise; the same seed, the same video."
)
@click.option("--guidance", type=float, help="Embedded guidance scale.  [default: the model's]")
@click.option(
    "--cfg-scale",
    type=float,
    help="Classifier-free guidance, for models that are not guidance-distilled: two evaluations per step.  "
    "[default: 1, off]",
)
@click.option("--negative-prompt", help="What to keep away from, with --cfg-scale.  [default: '']")
@click.option("--shift", type=float, help="Shift of the noise schedule.  [default: the model's]")
@attention_options
@click.option(
    "--step-cache",
    metavar="METHOD:THRESHOLD",
    help="Skip steps that change little: easycache:0.1, magcache:0.12,ratios=FILE, teacache:0.1[,coefficients=FILE] or "
    "fbcache:0.08 with a bundle built with --partition (see docs/step_cache.md; also reuse=, warmup=, max-skips=), or "
    "off.  [default: the bundle's, which mostly computes every step]",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads per operator.  [default: one per core]")
@click.option("--device", type=click.IntRange(min=0), default=0, help="Number of the GPU.  [default: 0]")
@click.option(
    "--provider",
    type=click.Choice(["cuda", "tensorrt", "rtx"]),
    help="What ONNX Runtime computes with, for bundles of --target cuda.  [default: cuda]",
)
@click.option(
    "--memory-budget",
    metavar="SIZE",
    help="What loaded stages may take where they compute, such as 20GiB or 8GB; a video for which it does not suffice "
    "is refused at once.  [default: least, one stage at a time]",
)
@click.option(
    "--widening",
    type=click.Choice([widening.value for widening in Widening]),
    default=Widening.AUTO.value,
    show_default=True,
    help="When 16-bit weights of the transformer become float32 on the CPU: when it is loaded (most memory) or in each "
    "run, which leaves them in the mapped file; auto does that where float32 would take more than 256 MiB.",
)
@click.option(
    "--save-latents",
    type=click.Path(path_type=Path),
    help="Also write the final latents to this .npy file, before decoding starts. If a step fails, or at Ctrl-C, what "
    "the steps before made is kept beside it, as FILE.step-N.npy.",
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="FILE.step-N.npy",
    help="Go on with what a run with --save-latents kept; all other options as they were. Final latents are for "
    "`reelforge decode`.",
)
@click.option(
    "--check",
    type=click.Choice([check.value for check in Check]),
    default=Check.FULL.value,
    show_default=True,
    help="How the bundle is checked first: every digest, or only presence and sizes (instant for large bundles).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object about the result on stdout, and no bars.")
def generate(
    bundle: Path,
    prompt: str | None,
    prompt_file: Path | None,
    output: str,
    height: int | None,
    width: int | None,
    frames: int | None,
    steps: int | None,
    seed: int,
    guidance: float | None,
    cfg_scale: float | None,
    negative_prompt: str | None,
    shift: float | None,
    attention: str | None,
    attention_table: Path | None,
    dense_steps: int | None,
    step_cache: str | None,
    threads: int | None,
    device: int,
    provider: str | None,
    memory_budget: str | None,
    widening: str,
    save_latents: Path | None,
    resume: Path | None,
    check: str,
    as_json: bool,
) -> None:
    """Generate a video from a prompt with BUNDLE, a folder made by `build-engine`.

    The request, the bundle and the output path are checked before sampling starts, and the video appears under its name
    only when it is complete. Prompts that are longer than the model reads are cut, with a notice.

    \b
    Examples:
      reelforge generate my.bundle -p "a cat on a beach, sunset" -o cat.mp4
      reelforge generate my.bundle --prompt-file prompt.txt -o cat.webm --steps 30 --seed 7
      reelforge generate my.bundle -p "a red ball" --frames 1 -o ball.png
      reelforge generate my.bundle -p "a red ball" -o frames/%04d.png --json
      reelforge generate my.bundle -p "a red ball" -o ball.mp4 --step-cache easycache:0.025
      reelforge generate my.bundle -p "a red ball" -o ball.mp4 --save-latents ball.npy --resume ball.step-7.npy
      reelforge generate sparse.bundle -p "a red ball" -o ball.mp4 --attention radial --dense-steps 5
    """  # noqa: D301 - \b is click's mark for text that it does not wrap
    request = Request(
        _prompt(prompt, prompt_file),
        height,
        width,
        frames,
        steps,
        seed,
        guidance,
        shift,
        chosen_table(attention, attention_table, dense_steps),
        cfg_scale=cfg_scale,
        negative_prompt=negative_prompt,
        step_cache=None if step_cache is None else StepCache.parse(step_cache),
    )
    started = time.monotonic()
    with progress_bars(hidden=as_json) as bars:
        options = EngineOptions(threads=threads, device=device, provider=provider, widening=Widening(widening))
        parse_budget(memory_budget)  # what it does not understand is said before the bundle is read
        first_step, latents = (0, None) if resume is None else (step_of(resume), read_latents(resume))
        pipeline = Pipeline(open_bundle(bundle, Check(check), bars), options, memory_budget or LEAST)
        resolved = pipeline.resolve(request)
        shape = resolved.shape
        rate = pipeline.spec.defaults.frames_per_second
        stop = Stop()
        events = pipeline.stream(request, latents, save_latents, stop, first_step=first_step)
        with pipeline, VideoWriter(output, shape.height, shape.width, shape.frames, rate) as video:
            if save_latents is None:
                told = write_video(events, bars, video)
            else:
                unfinished = Unfinished(save_latents)
                try:
                    with finishing_the_step(stop):
                        told = write_video(unfinished.watch(events), bars, video)
                except (CancelledError, KeyboardInterrupt) as error:
                    step_was_finished = isinstance(error, CancelledError)
                    raise console.InterruptedRunError(unfinished.advice(bundle, output, step_was_finished)) from None
    seconds = time.monotonic() - started
    if first_step and resolved.step_cache is not None:
        told.notices.append("step caching began anew at the step: the video is not quite that of one run.")
    for notice in told.notices:
        console.print_notice(notice)
    if as_json:
        result = {
            "output": output,
            "prompt": resolved.prompt,
            "height": shape.height,
            "width": shape.width,
            "frames": shape.frames,
            "frames_per_second": rate,
            "steps": resolved.steps,
            "skipped_steps": told.skipped,
            "seed": resolved.seed,
            "guidance": resolved.guidance,
            "cfg_scale": resolved.cfg_scale,
            "negative_prompt": resolved.negative_prompt,
            "shift": resolved.shift,
            "attention": resolved.attention.pattern.value,
            "first_step": first_step,
            "latents": None if save_latents is None else str(save_latents),
            "seconds": round(seconds, 3),
            "notices": told.notices,
            "bundle": pipeline.bundle.manifest.content_digest,
        }
        click.echo(json.dumps(result))
    else:
        count = f"{shape.frames} frame{'s' if shape.frames > 1 else ''}"
        skipped = f", {told.skipped} of {resolved.steps} steps skipped" if resolved.step_cache is not None else ""
        click.echo(f"{output}: {count} of {shape.width}x{shape.height} in {seconds:.1f} s{skipped}", err=True)


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise RequestError(
            "the prompt is given twice." if prompt is not None else "there is no prompt.",
            expected="one of -p TEXT and --prompt-file FILE",
            fix="add -p 'what to show'" if prompt is None else "leave one of them out",
        )
    if prompt_file is None:
        assert prompt is not None
        return prompt
    try:
        return prompt_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"the prompt file {str(prompt_file)!r} is not UTF-8 at byte {error.start}.",
            received=f"byte 0x{error.object[error.start]:02x}",
            expected="UTF-8 text",
            fix="save the file as UTF-8",
        ) from error
    except OSError as error:
        raise RequestError(
            f"the prompt file {str(prompt_file)!r} cannot be read: {error.strerror or error}.",
            expected="a readable UTF-8 text file",
        ) from error
