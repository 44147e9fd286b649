"""What the commands share that measure a checkpoint for step caching: options, requests, the progress bar, the file.

The work is in ``runtime.step_cache.measure``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.errors import OutputError

if TYPE_CHECKING:
    from reelforge.runtime.pipeline import Pipeline
    from reelforge.runtime.request import Request

DEFAULT_PROMPTS = (
    "A cat walks on the grass, realistic style.",
    "A busy street at night, rain, neon signs, seen from a moving car.",
    "An old man with a white beard laughs and looks into the camera.",
    "Waves break on a rocky coast, seen from above.",
)
Command = TypeVar("Command", bound=Callable[..., Any])


class Measured(Protocol):
    """What was measured, which knows its file."""

    def write(self, path: Path) -> None:
        """Write the file."""
        ...


Result = TypeVar("Result", bound=Measured)
Measuring = Callable[["Pipeline", Sequence["Request"], Callable[[int, int], None]], Result]


@dataclass(frozen=True)
class Options:
    """The common options, as they were given."""

    bundle: Path
    output: Path
    prompts: tuple[str, ...]
    height: int | None
    width: int | None
    frames: int | None
    steps: int | None
    shift: float | None
    seed: int
    threads: int | None
    device: int
    as_json: bool

    def requests(self, default_prompts: Sequence[str]) -> list[Request]:
        """Return one request per prompt, each with noise of its own."""
        from reelforge.runtime.request import Request

        return [
            Request(prompt, self.height, self.width, self.frames, self.steps, self.seed + number, shift=self.shift)
            for number, prompt in enumerate(self.prompts or default_prompts)
        ]


def measurement_options(prompts: str, steps: str) -> Callable[[Command], Command]:
    """Return a decorator that gives a command the common options.

    Args:
        prompts: What is measured by default, as the help says it.
        steps: What the help says of ``--steps`` after a semicolon.
    """
    options = (
        click.argument("bundle", type=click.Path(path_type=Path)),
        click.option(
            "-o",
            "--output",
            required=True,
            type=click.Path(path_type=Path),
            help="The JSON file; an existing one is replaced.",
        ),
        click.option(
            "-p",
            "--prompt",
            "prompts",
            multiple=True,
            help=f"A prompt to measure; may be given several times.  [default: {prompts}]",
        ),
        click.option("--height", type=int, help="Pixels.  [default: the model's]"),
        click.option("--width", type=int, help="Pixels.  [default: the model's]"),
        click.option("--frames", type=int, help="Number of frames, 4k+1.  [default: the model's]"),
        click.option("--steps", type=int, help=f"Sampling steps; {steps}.  [default: the model's]"),
        click.option("--shift", type=float, help="Shift of the noise schedule.  [default: the model's]"),
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first prompt's noise."),
        click.option("--threads", type=click.IntRange(min=1), help="Threads per operator.  [default: one per core]"),
        click.option("--device", type=click.IntRange(min=0), default=0, help="Number of the GPU.  [default: 0]"),
        click.option("--json", "as_json", is_flag=True, help="Print the file's content on stdout too, and no bars."),
    )

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def run(
    options: Options,
    default_prompts: Sequence[str],
    measure: Measuring[Result],
    summary: Callable[[Result], str],
) -> None:
    """Measure, write the file, and say what became of it.

    Args:
        options: As they were given.
        default_prompts: What is measured if nothing else is asked for.
        measure: Does the work.
        summary: Says in a few words what was found.

    Raises:
        OutputError: If the file cannot be written, which is found out before anything is measured.
    """
    from reelforge.runtime.bundle.open import Bundle
    from reelforge.runtime.pipeline import Pipeline

    output = options.output
    _require_writable(output)
    started = time.monotonic()
    columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    terminal = Console(stderr=True)
    with Progress(*columns, console=terminal, disable=options.as_json or not terminal.is_terminal) as bars:
        task = bars.add_task("sampling", total=None)
        engine_options = EngineOptions(threads=options.threads, device=options.device)
        with Pipeline(Bundle.open(options.bundle), engine_options) as pipeline:
            requests = options.requests(default_prompts)
            found = measure(pipeline, requests, lambda done, total: bars.update(task, completed=done, total=total))
    found.write(output)
    if options.as_json:
        click.echo(json.dumps(json.loads(output.read_text(encoding="utf-8"))))
        return
    count = f"{len(requests)} generation{'s' if len(requests) > 1 else ''}"
    click.echo(f"{output}: {summary(found)}, from {count} in {time.monotonic() - started:.1f} s", err=True)


def _require_writable(output: Path) -> None:
    if not output.parent.is_dir():
        raise OutputError(f"the folder {str(output.parent)!r} does not exist.", fix="create it, or choose another path")
    place = output if output.exists() else output.parent
    if output.is_dir() or not os.access(place, os.W_OK):
        raise OutputError(
            f"the file {str(output)!r} cannot be written.",
            received="a folder" if output.is_dir() else "no permission",
            expected="a file that this user may write",
            fix="choose another path",
        )
