"""Recipes of builds: files of settings for ``build-engine`` and ``reelforge plan``, some in the package by name.

A recipe is nothing but values for options: what it says is the default of the option of the same meaning, so that the
command line wins option by option, and an option that a recipe does not mention keeps its usual default. The module
knows the fields of the files; it does not know what they do to a build, nor how the planner's figures come about
(``tools.recipe_figures``).
"""

from __future__ import annotations

import difflib
import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from reelforge.runtime.codec import CodecError, from_json, to_json
from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import Precision

_SUFFIX = ".json"


@dataclass(frozen=True)
class RecipeCalibration:
    """How scales are found and a quantised build is judged: the ``--calibration-...`` options and ``--method``."""

    method: str | None = None
    percentile: float | None = None
    smoothing: float | None = None
    steps: int | None = None
    shape: str | None = None
    memory_gib: float | None = None


@dataclass(frozen=True)
class VideoFigures:
    """What the planner says about videos of one shape, without step caching.

    Attributes:
        shape: HEIGHTxWIDTHxFRAMES.
        peak_bytes: GPU memory in the phase that needs most; on a CPU without the interpreter and its libraries.
        peak_phase: That phase.
        seconds_per_step: None where the planner knows no rates.
        seconds_per_video: Likewise.
    """

    shape: str
    peak_bytes: int
    peak_phase: str
    seconds_per_step: float | None
    seconds_per_video: float | None


@dataclass(frozen=True)
class Figures:
    """What the planner says about a recipe: predictions, none of them measured with this recipe.

    Attributes:
        steps: Sampling steps of the videos.
        bundle_bytes: Plans, or weights where nothing is compiled.
        export_bytes: Peak anonymous memory of export and calibration.
        builder_bytes: That of the compiler; 0 where nothing is compiled.
        builder_seconds: Of all stages, on two cores.
        parts: Stages that are compiled in several parts.
        videos: By shape, in the recipe's order, then one frame of each size.
    """

    steps: int
    bundle_bytes: int
    export_bytes: int
    builder_bytes: int
    builder_seconds: float
    parts: dict[str, int]
    videos: tuple[VideoFigures, ...]


@dataclass(frozen=True)
class RecipeFile:
    """The content of a recipe; whatever is None or empty is left to the command's own default.

    Attributes:
        precision: By stage, and for the model under ``"*"``; must be there, and may be empty.
        kept: Layers that stay in high precision, by stage.
        high_precision: Of what is not in 8 bits in a stage that is.
        attention: Arithmetic of ``dit``'s attention.
        target: Backend and architectures.
        shapes: Videos to serve, HEIGHTxWIDTHxFRAMES.
        partition: ``head,body,tail``, for step caches that look into ``dit``.
        batch: Videos per call of ``dit``.
        numerics: Whose rounding and tiles to follow.
        builder_memory_gb: What a compiler may take, which decides into how many parts a stage is cut.
        step_cache: The bundle's default.
        calibration: For quantised builds.
        description: A sentence for people.
        model: Which model the figures are of (a key of ``tools.recipe_figures.MODELS``).
        gpu: Which GPU, by the planner's name.
        remarks: What a person should know, a sentence each.
        figures: The planner's.
    """

    precision: dict[str, Precision]
    kept: dict[str, tuple[str, ...]] = field(default_factory=dict)
    high_precision: Precision | None = None
    attention: Precision | None = None
    target: str | None = None
    shapes: tuple[str, ...] = ()
    partition: str | None = None
    batch: int | None = None
    numerics: str | None = None
    builder_memory_gb: float | None = None
    step_cache: str | None = None
    calibration: RecipeCalibration = RecipeCalibration()
    description: str = ""
    model: str | None = None
    gpu: str | None = None
    remarks: tuple[str, ...] = ()
    figures: Figures | None = None


@dataclass(frozen=True)
class ChosenRecipe:
    """A recipe and what the user called it."""

    name: str
    content: RecipeFile


def recipe_names() -> tuple[str, ...]:
    """Return the names of the recipes in the package, in order."""
    return tuple(sorted(entry.name.removesuffix(_SUFFIX) for entry in _folder().iterdir() if _is_recipe(entry)))


def find_recipe(text: str) -> ChosenRecipe:
    """Return the recipe of the package that has this name, else that of the file.

    Raises:
        RequestError: If there is neither, or the file is no recipe.
    """
    names = recipe_names()
    if text in names:
        return ChosenRecipe(text, _parsed((_folder() / f"{text}{_SUFFIX}").read_text(encoding="utf-8"), text))
    try:
        content = Path(text).read_text(encoding="utf-8")
    except OSError as error:
        near = difflib.get_close_matches(text, names, 1)
        raise RequestError(
            f"the recipe {text!r} cannot be read: {error.strerror}.",
            received=text,
            expected=f"a file, or one of {', '.join(names)}",
            fix=f"use {near[0]}, or check the path" if near else "check the path, or see reelforge recipes",
        ) from error
    except UnicodeDecodeError as error:
        raise _no_recipe(text, str(error)) from error
    return ChosenRecipe(text, _parsed(content, text))


def build_options(recipe: RecipeFile) -> dict[str, Any]:
    """Return what a recipe says, as values of ``build-engine``'s options by their parameters' names."""
    calibration = recipe.calibration
    return _said(
        {
            **_shared(recipe),
            "method": calibration.method,
            "percentile": calibration.percentile,
            "smoothing": calibration.smoothing,
            "steps": calibration.steps,
            "shape": calibration.shape,
            "memory": calibration.memory_gib,
        }
    )


def plan_options(recipe: RecipeFile) -> dict[str, Any]:
    """Return what a recipe says, as values of ``plan``'s options, whose ``steps`` and ``memory`` mean other things."""
    return _said({**_shared(recipe), "gpu": recipe.gpu, "calibration_memory": recipe.calibration.memory_gib})


def _shared(recipe: RecipeFile) -> dict[str, Any]:
    words = {stage: precision.value for stage, precision in recipe.precision.items()}
    texts = [word if stage == "*" else f"{stage}={word}" for stage, word in words.items()]
    return {
        "target": recipe.target,
        "precision": ",".join(texts),
        "high_precision": None if recipe.high_precision is None else recipe.high_precision.value,
        "keep": [f"{stage}={pattern}" for stage, patterns in recipe.kept.items() for pattern in patterns],
        "attention": None if recipe.attention is None else recipe.attention.value,
        "shapes": ",".join(recipe.shapes),
        "partition": recipe.partition,
        "batch": recipe.batch,
        "numerics": recipe.numerics,
        "builder_memory": recipe.builder_memory_gb,
        "step_cache": recipe.step_cache,
    }


def _said(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value not in (None, "", [])}


def _folder() -> Traversable:
    return importlib.resources.files("reelforge.export") / "recipes"


def _is_recipe(entry: Traversable) -> bool:
    return entry.name.endswith(_SUFFIX)


def _parsed(text: str, name: str) -> RecipeFile:
    try:
        content = json.loads(text)
        if isinstance(content, dict) and "precision" in content:
            # What `reelforge sensitivity` measured is for the reader; a build measures again.
            content.pop("quality", None)
            content = _completed(content)
        return from_json(RecipeFile, content)
    except (json.JSONDecodeError, CodecError) as error:
        raise _no_recipe(name, str(error)) from error


def _completed(content: dict[str, Any]) -> dict[str, Any]:
    """Add the fields that a file may leave out; the codec asks for all of them."""
    defaults = to_json(RecipeFile({}))
    calibration = content.get("calibration", {})
    if isinstance(calibration, dict):
        calibration = {**defaults["calibration"], **calibration}
    return {**defaults, **content, "calibration": calibration}


def _no_recipe(name: str, received: str) -> RequestError:
    return RequestError(
        f"the recipe {name!r} is not a recipe.",
        received=received,
        expected='{"precision": {stage: precision}}, and other settings of a build beside it (see docs/recipes.md)',
        fix="write it with reelforge sensitivity --recipe, or begin with one that reelforge recipes NAME --json prints",
    )
