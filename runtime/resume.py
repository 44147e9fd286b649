"""A sampling loop that failed or was stopped, and how it goes on: what the steps before made is kept, and begun from.

The module knows neither engines nor why a step failed.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from reelforge.runtime.control import Stop
from reelforge.runtime.errors import OutputError, RequestError
from reelforge.runtime.events import FloatArray
from reelforge.runtime.latents_file import write_latents
from reelforge.runtime.sampling import SamplingError

_STEP = re.compile(r"\.step-(\d+)$")


def check_first_step(first_step: int, steps: int, latents: FloatArray | None) -> None:
    """Check where a loop is to begin.

    Raises:
        RequestError: If there is no such step, or nothing to begin it with.
    """
    if type(first_step) is not int or not 0 <= first_step < steps:
        raise RequestError(
            "there is no such step to begin with.",
            received=f"first_step={first_step!r}",
            expected=f"a whole number in 0..{steps - 1}, since the request has {steps} steps",
            fix="use the same number of steps as the run that failed, and its error.step",
        )
    if first_step and latents is None:
        raise RequestError(
            f"step {first_step + 1} cannot begin without the latents of the step before.",
            received=f"first_step={first_step} and no latents",
            expected="latents, as error.latents of the run that failed or the file that it wrote",
            fix="pass latents=, or leave first_step out",
        )


def keep_stopped(stop: Stop, save_latents: Path, step: int, latents: FloatArray) -> None:
    """Write the latents of a loop that was stopped, if whoever stopped it wants that and any step was done.

    If they cannot be written, they are not there: the caller hears that the loop was stopped in any case.
    """
    if stop.keeps and step > 0:
        with suppress(OutputError):
            write_latents(step_file(save_latents, step), latents)


def kept(error: SamplingError, save_latents: Path) -> SamplingError:
    """Write the latents of a failed loop beside where the final ones would have been, and return an error that says so.

    The file of ``x.npy`` is ``x.step-7.npy`` if ``first_step=7`` goes on with it. If it cannot be written, the error is
    the one that was there: it carries the latents, too.
    """
    path = step_file(save_latents, error.step)
    try:
        write_latents(path, error.latents)
    except OutputError:
        return error
    how = f"--resume, or latents= of it and first_step={error.step}"
    go_on = f"the steps before are kept in {str(path)!r}: go on with {how}"
    return type(error)(
        error.where,
        error.step,
        error.latents,
        received=error.received,
        expected=error.expected,
        fix=f"{error.fix}; {go_on}" if error.fix else go_on,
    )


def step_file(save_latents: Path, step: int) -> Path:
    """Return where the latents before ``step`` are kept: ``x.step-7.npy`` for ``x.npy`` and 7."""
    return save_latents.with_name(f"{save_latents.stem}.step-{step}{save_latents.suffix}")


def step_of(path: Path) -> int:
    """Return the step that goes on with the latents of a file, from its name.

    Raises:
        RequestError: If the name does not say it.
    """
    found = _STEP.search(path.stem)
    if found is None:
        raise RequestError(
            f"the name of {str(path)!r} does not say which step goes on with it.",
            received=path.name,
            expected="the name that a run gave it which failed or was interrupted, such as x.step-7.npy",
            fix="give it its name again; final latents, without a step, are for reelforge decode",
        )
    return int(found[1])
