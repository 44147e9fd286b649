"""``reelforge profile``: where a bundle's time goes, and what would make it faster.

Knows the options and the files; what is measured and how is in ``tools.profiling``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from reelforge.runtime.attention.table import chosen_table
from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.codec import to_json
from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.engines.narrow_weights import Widening
from reelforge.runtime.request import Request
from reelforge.runtime.step_cache.settings import StepCache
from reelforge.tools import console
from reelforge.tools.attention_options import attention_options

if TYPE_CHECKING:
    from reelforge.tools.profiling.schema import Profile

_PROMPT = "a red ball rolls to the left"


@click.command(epilog=console.EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder for the files.  [default: BUNDLE's name + .profile]"
)
@click.option("--compare", "other", type=click.Path(path_type=Path), help="Run this bundle alternately with BUNDLE.")
@click.option("--repeats", type=int, default=5, show_default=True, help="Warm runs that count.")
@click.option("--warmup", type=int, default=1, show_default=True, help="Warm runs before them that do not.")
@click.option("-p", "--prompt", default=_PROMPT, show_default=True, help="What to generate.")
@click.option("--height", type=int, help="Pixels.  [default: the model's]")
@click.option("--width", type=int, help="Pixels.  [default: the model's]")
@click.option("--frames", type=int, help="Number of frames, 4k+1.  [default: the model's]")
@click.option("--steps", type=int, help="Sampling steps.  [default: the model's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise.")
@click.option("--guidance", type=float, help="Embedded guidance scale.  [default: the model's]")
@click.option("--shift", type=float, help="Shift of the noise schedule.  [default: the model's]")
@click.option("--cfg-scale", type=float, help="Classifier-free guidance: two evaluations per step.  [default: 1, off]")
@click.option("--negative-prompt", help="What to keep away from, with --cfg-scale.  [default: '']")
@attention_options
@click.option(
    "--step-cache",
    metavar="METHOD:THRESHOLD",
    help="Skip steps that change little, as generate does: easycache:0.025.  [default: compute every step]",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads per operator.  [default: one per core]")
@click.option("--device", type=click.IntRange(min=0), default=0, help="Number of the GPU.  [default: 0]")
@click.option(
    "--provider",
    type=click.Choice(["cuda", "tensorrt", "rtx"]),
    help="What ONNX Runtime computes with, for bundles of --target cuda.  [default: cuda]",
)
@click.option(
    "--widening",
    type=click.Choice([widening.value for widening in Widening]),
    default=Widening.AUTO.value,
    show_default=True,
    help="When 16-bit weights of the transformer become float32 on the CPU, as generate has it.",
)
@click.option(
    "--check",
    type=click.Choice([check.value for check in Check]),
    default=Check.FULL.value,
    show_default=True,
    help="How the bundle is checked, here and in the cold run.",
)
@click.option("--cold/--no-cold", default=True, show_default=True, help="Begin with a run in a new process.")
@click.option("--layers/--no-layers", default=True, show_default=True, help="Time single layers, in runs of their own.")
@click.option("--peak/--no-peak", default=True, show_default=True, help="Measure what the processor reaches at best.")
@click.option(
    "--memory-budget",
    help="What engines that stay loaded between warm runs may take, e.g. 20GiB, or 'least': one stage at a time.  "
    "[default: half of the memory]",
)
@click.option("--nvtx", is_flag=True, help="Announce NVTX ranges for Nsight; needs reelforge[profile].")
@click.option("--json", "as_json", is_flag=True, help="Print profile.json on stdout instead of tables.")
def profile(
    bundle: Path,
    output: Path | None,
    other: Path | None,
    repeats: int,
    warmup: int,
    prompt: str,
    height: int | None,
    width: int | None,
    frames: int | None,
    steps: int | None,
    seed: int,
    guidance: float | None,
    shift: float | None,
    cfg_scale: float | None,
    negative_prompt: str | None,
    attention: str | None,
    attention_table: Path | None,
    dense_steps: int | None,
    step_cache: str | None,
    threads: int | None,
    device: int,
    provider: str | None,
    widening: str,
    check: str,
    cold: bool,
    layers: bool,
    peak: bool,
    memory_budget: str | None,
    nvtx: bool,
    as_json: bool,
) -> None:
    """Measure where the time of BUNDLE goes: a cold run, warm runs, every stage, step and layer, memory.

    Writes report.html (one file, works offline), profile.json (see docs/profiling.md) and trace.json (for
    ui.perfetto.dev) into a folder. Ctrl-C ends the measurement; what there is by then is written and marked as
    incomplete, also when an engine fails after the first run.

    \b
    Examples:
      reelforge profile my.bundle
      reelforge profile my.bundle -o before --height 544 --width 960 --frames 33 --steps 10
      reelforge profile fp32.bundle --compare int8.bundle --repeats 9
      reelforge profile my.bundle --step-cache easycache:0.025
      reelforge profile my.bundle --cfg-scale 6 --negative-prompt "blurred"
      nsys profile reelforge profile my.bundle --nvtx --no-cold --no-layers
    """  # noqa: D301 - \b is click's mark for text that it does not wrap
    from reelforge.tools.profiling.files import require_writable, write_files
    from reelforge.tools.profiling.session import ProfileRequest, UnfinishedProfileError, profile_bundle
    from reelforge.tools.profiling.terminal import show

    opened = Bundle.open(bundle, Check(check))
    asked = ProfileRequest(
        bundle=opened,
        request=Request(
            prompt,
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
        ),
        options=EngineOptions(threads=threads, device=device, provider=provider, widening=Widening(widening)),
        check=Check(check),
        warmup=warmup,
        repeats=repeats,
        cold=cold,
        layers=layers,
        peak=peak,
        nvtx=nvtx,
        memory_budget=memory_budget,
        other=None if other is None else Bundle.open(other, Check(check)),
    )
    asked.require_possible()
    folder = output if output is not None else Path(f"{opened.name.removesuffix('.bundle')}.profile")
    require_writable(folder)
    failure = None
    try:
        measured = profile_bundle(asked, lambda text: click.echo(text, err=True))
    except UnfinishedProfileError as unfinished:
        measured, failure = unfinished.profile, unfinished.error
    write_files(folder, _contents(measured))
    if as_json:
        click.echo(json.dumps(to_json(measured)))
    else:
        show(measured, Console())
    click.echo(f"{folder / 'report.html'}: open it in a browser", err=True)
    if failure is not None:
        click.echo("failed; the files hold what was measured until then, and say so.", err=True)
        raise failure
    if not measured.complete:
        click.echo("interrupted; the files hold what was measured until then, and say so.", err=True)
        sys.exit(console.INTERRUPTED)


def _contents(measured: Profile) -> dict[str, str]:
    from reelforge.tools.profiling.files import PROFILE, REPORT, TRACE
    from reelforge.tools.profiling.report_html import report
    from reelforge.tools.profiling.trace import trace_of

    return {
        PROFILE: json.dumps(to_json(measured), ensure_ascii=False) + "\n",
        TRACE: json.dumps(trace_of(measured)) + "\n",
        REPORT: report(measured),
    }
