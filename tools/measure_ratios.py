"""The ``reelforge measure-ratios`` command: a bundle to the file that MagCache needs.

Knows the options and the progress display; the work is in ``runtime.step_cache.measure``.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.errors import OutputError, RequestError
from reelforge.tools import console

DEFAULT_PROMPT = "A cat walks on the grass, realistic style."


@click.command("measure-ratios", epilog=console.EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="The JSON file; an existing one is replaced.",
)
@click.option(
    "-p",
    "--prompt",
    "prompts",
    multiple=True,
    help=f"A prompt to measure; may be given several times.  [default: {DEFAULT_PROMPT!r}]",
)
@click.option("--height", type=int, help="Pixels.  [default: the model's]")
@click.option("--width", type=int, help="Pixels.  [default: the model's]")
@click.option("--frames", type=int, help="Number of frames, 4k+1.  [default: the model's]")
@click.option("--steps", type=int, help="Sampling steps; other numbers are interpolated.  [default: the model's]")
@click.option("--shift", type=float, help="Shift of the noise schedule.  [default: the model's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first prompt's noise.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads per operator.  [default: one per core]")
@click.option("--device", type=click.IntRange(min=0), default=0, help="Number of the GPU.  [default: 0]")
@click.option("--json", "as_json", is_flag=True, help="Print the file's content on stdout too, and no bars.")
def measure_ratios(
    bundle: Path,
    output: Path,
    prompts: tuple[str, ...],
    height: int | None,
    width: int | None,
    frames: int | None,
    steps: int | None,
    shift: float | None,
    seed: int,
    threads: int | None,
    device: int,
    as_json: bool,
) -> None:
    """Measure how BUNDLE's velocities change from step to step, for `reelforge generate --step-cache magcache:...`.

    Every prompt's sampling loop is run whole, without decoding. One prompt is enough: the ratios hardly depend on it.

    \b
    Example:
      reelforge measure-ratios hv.bundle -o hv-ratios.json
      reelforge generate hv.bundle -p "a red ball" -o ball.mp4 --step-cache magcache:0.12,ratios=hv-ratios.json
    """  # noqa: D301 - \b is click's mark for text that it does not wrap
    from reelforge.runtime.bundle.open import Bundle
    from reelforge.runtime.pipeline import Pipeline
    from reelforge.runtime.request import Request
    from reelforge.runtime.step_cache.measure import measure_ratios as measure

    if not output.parent.is_dir():
        raise OutputError(f"the folder {str(output.parent)!r} does not exist.", fix="create it, or choose another path")
    if steps is not None and steps < 2:
        raise RequestError("a ratio is of two steps.", received=f"--steps {steps}", expected="--steps 2 or more")
    requests = [
        Request(prompt, height, width, frames, steps, seed + number, shift=shift)
        for number, prompt in enumerate(prompts or (DEFAULT_PROMPT,))
    ]
    started = time.monotonic()
    columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    terminal = Console(stderr=True)
    with Progress(*columns, console=terminal, disable=as_json or not terminal.is_terminal) as bars:
        task = bars.add_task("sampling", total=None)
        with Pipeline(Bundle.open(bundle), EngineOptions(threads=threads, device=device)) as pipeline:
            ratios = measure(pipeline, requests, lambda done, total: bars.update(task, completed=done, total=total))
    ratios.write(output)
    if as_json:
        click.echo(json.dumps(json.loads(output.read_text(encoding="utf-8"))))
    else:
        low, high = min(ratios.ratios[1:]), max(ratios.ratios[1:])
        seconds = time.monotonic() - started
        click.echo(
            f"{output}: ratios {low:.3f} to {high:.3f} of {len(ratios.ratios)} steps, from {ratios.generations} "
            f"generation{'s' if ratios.generations > 1 else ''} in {seconds:.1f} s",
            err=True,
        )
