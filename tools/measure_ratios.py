"""The ``reelforge measure-ratios`` command: a bundle to the file that MagCache needs.

Knows the command's words; the work is in ``runtime.step_cache.measure``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from reelforge.runtime.errors import RequestError
from reelforge.tools import console
from reelforge.tools.measurement import DEFAULT_PROMPTS, Options, measurement_options, run

if TYPE_CHECKING:
    from reelforge.runtime.step_cache.ratios import MagnitudeRatios


@click.command("measure-ratios", epilog=console.EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@measurement_options(prompts=repr(DEFAULT_PROMPTS[0]), steps="other numbers are interpolated")
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
    from reelforge.runtime.step_cache.measure import measure_ratios as measure

    if steps is not None and steps < 2:
        raise RequestError("a ratio is of two steps.", received=f"--steps {steps}", expected="--steps 2 or more")

    def summary(found: MagnitudeRatios) -> str:
        ratios = found.ratios
        return f"ratios {min(ratios[1:]):.3f} to {max(ratios[1:]):.3f} of {len(ratios)} steps"

    options = Options(bundle, output, prompts, height, width, frames, steps, shift, seed, threads, device, as_json)
    run(options, DEFAULT_PROMPTS[:1], measure, summary)
