"""Command-line options about quantisation that several commands share, and how their text becomes data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from reelforge.runtime.codec import CodecError, from_json
from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import Precision, QuantisationRecipe, parse_precisions

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


def chosen_recipe(precision: str | None, keep: Iterable[str], recipe: Path | None) -> QuantisationRecipe:
    """Return the precisions and kept layers that ``--precision`` and ``--keep``, or ``--recipe``, say.

    Raises:
        RequestError: If both are given, or one cannot be read.
    """
    kept = tuple(keep)
    if recipe is None:
        return QuantisationRecipe({} if precision is None else parse_precisions(precision), parse_kept(kept))
    if kept or precision is not None:
        said = ([] if precision is None else [f"--precision {precision}"]) + [f"--keep {text}" for text in kept]
        raise RequestError(
            "a recipe file is given together with --precision or --keep.",
            received=" ".join([f"--recipe {recipe}", *said]),
            expected="one of them: the file says precisions and kept layers",
            fix="leave --precision and --keep out",
        )
    return read_recipe(recipe)


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


def read_recipe(path: Path) -> QuantisationRecipe:
    """Read a recipe file, as ``reelforge sensitivity --recipe`` writes it.

    Raises:
        RequestError: If it cannot be read or has other fields.
    """
    expected = '{"precision": {stage: precision}, "kept": {stage: [layers]}}'
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            content.pop("quality", None)
        return from_json(QuantisationRecipe, content)
    except OSError as error:
        raise RequestError(
            f"the recipe {str(path)!r} cannot be read: {error.strerror}.",
            expected="a file written by reelforge sensitivity",
            fix="check the path",
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError, CodecError) as error:
        raise RequestError(
            f"the recipe {str(path)!r} is not a recipe.",
            received=str(error),
            expected=expected,
            fix="write it with reelforge sensitivity --recipe",
        ) from error


def precision_of(word: str | None) -> Precision | None:
    """Return the precision that a choice of words means, or None for none."""
    return None if word is None else Precision(word)
