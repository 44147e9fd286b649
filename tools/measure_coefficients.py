"""The ``reelforge measure-coefficients`` command: a bundle to the file that TeaCache needs.

Knows the command's words; the work is in ``runtime.step_cache.measure``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from reelforge.tools import console
from reelforge.tools.measurement import DEFAULT_PROMPTS, Options, measurement_options, run

if TYPE_CHECKING:
    from reelforge.runtime.step_cache.rescaling import Rescaling


@click.command(
    "measure-coefficients", epilog=console.EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]}
)
@measurement_options(
    prompts=f"{len(DEFAULT_PROMPTS)} of them", steps="the coefficients are for about as many, as a step's change is"
)
def measure_coefficients(
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
    """Measure how far BUNDLE's velocities move when what the first block is given moves, for TeaCache.

    Every prompt's sampling loop is run whole, without decoding; a polynomial is fitted to all their steps. The more
    prompts the better: TeaCache's authors took 70. For the released HunyuanVideo their coefficients are built in, and
    nothing needs to be measured.

    \b
    Example:
      reelforge measure-coefficients hv.bundle -o hv-teacache.json
      reelforge generate hv.bundle -p "a red ball" -o ball.mp4 --step-cache teacache:0.1,coefficients=hv-teacache.json
    """  # noqa: D301 - \b is click's mark for text that it does not wrap
    from reelforge.runtime.step_cache.measure import measure_rescaling

    def summary(found: Rescaling) -> str:
        return f"changes of {found.least:.3f} to {found.most:.3f}, {found.deviation:.3f} off the polynomial"

    options = Options(bundle, output, prompts, height, width, frames, steps, shift, seed, threads, device, as_json)
    run(options, DEFAULT_PROMPTS, measure_rescaling, summary)
