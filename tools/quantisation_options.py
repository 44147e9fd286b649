"""Command-line options about quantisation that several commands share, and how their text becomes data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import Precision, parse_precisions

F = TypeVar("F", bound=Callable[..., Any])

METHODS = ("max", "percentile", "mse", "entropy")


def calibration_options(function: F) -> F:
    """Add the options that say how scales are found."""
    options = (
        click.option(
            "--calibration-prompts",
            "prompts",
            type=click.Path(path_type=Path),
            help="Text file, one prompt per line. The last quarter is held out for measuring. Built-in prompts by "
            "default.",
        ),
        click.option(
            "--method",
            type=click.Choice(METHODS),
            default="max",
            show_default=True,
            help="How the scale of an activation is chosen from what was observed.",
        ),
        click.option(
            "--percentile",
            default=99.99,
            show_default=True,
            type=click.FloatRange(0, 100, min_open=True),
            help="For --method percentile, in percent.",
        ),
        click.option(
            "--smoothing",
            type=click.FloatRange(0, 1),
            help="Move outliers of activations into the weights with this strength, e.g. 0.5. Off by default.",
        ),
        click.option("--calibration-seed", "seed", default=0, show_default=True, type=int, help="Of the noise."),
        click.option(
            "--calibration-steps",
            "steps",
            type=click.IntRange(1),
            help="Sampling steps while observing and measuring; the model's default by default.",
        ),
        click.option(
            "--calibration-shape",
            "shape",
            help="HEIGHTxWIDTHxFRAMES while observing and measuring; the model's default by default.",
        ),
        click.option(
            "--calibration-memory",
            "memory",
            default=8.0,
            show_default=True,
            type=click.FloatRange(0, min_open=True),
            help="GiB of fp32 weights that may be loaded at a time; larger stages are run in segments.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def parsed_precisions(text: str | None) -> dict[str, Precision]:
    """Return the precisions that ``--precision`` says, by stage; none if it is not given.

    Raises:
        RequestError: If it cannot be read.
    """
    return {} if text is None else parse_precisions(text)


def parse_kept(texts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Read ``--keep STAGE=PATTERN``, given any number of times.

    Raises:
        RequestError: If one has another form.
    """
    kept: dict[str, tuple[str, ...]] = {}
    for text in texts:
        stage, separator, pattern = (part.strip() for part in text.partition("="))
        if not (stage and separator and pattern):
            raise RequestError(
                f"--keep {text!r} cannot be read.",
                received=text,
                expected="STAGE=PATTERN",
                fix="write for example --keep dit=single.39.*",
            )
        kept[stage] = (*kept.get(stage, ()), pattern)
    return kept


def precision_of(word: str | None) -> Precision | None:
    """Return the precision that a choice of words means, or None for none."""
    return None if word is None else Precision(word)


def attention_of(word: str | None) -> Precision | None:
    """Return the arithmetic of attention; None for the high precision, which ``high`` says aloud."""
    return None if word == "high" else precision_of(word)
