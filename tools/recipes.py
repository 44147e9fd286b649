"""``reelforge recipes``: the builds in the package by name, what they say, and what the planner says about them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from reelforge.runtime.codec import to_json
from reelforge.tools import console
from reelforge.tools.recipe_file import ChosenRecipe, VideoFigures, build_options, find_recipe, recipe_names

_PREDICTED = "Figures are the planner's predictions (docs/planner.md), without step caching; none was measured."


@click.command(epilog=console.EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout; that of a NAME is its file.")
def recipes(name: str | None, as_json: bool) -> None:
    """List the recipes that `build-engine --recipe` takes by name, or show NAME in detail.

    A recipe is a set of values for `build-engine`'s options, chosen for one GPU and size. NAME may be a file, too.

    \b
    Examples:
      reelforge recipes
      reelforge recipes rtx-4090-720p
      reelforge recipes rtx-4090-720p --json > mine.json
      build-engine ckpts -o hv.bundle --recipe mine.json
    """  # noqa: D301 - \b is click's mark for text that it does not wrap
    if name is None:
        every = [find_recipe(each) for each in recipe_names()]
        if as_json:
            click.echo(json.dumps({one.name: _file(one) for one in every}))
        else:
            _show_all(every, Console())
        return
    recipe = find_recipe(name)
    if as_json:
        click.echo(json.dumps(_file(recipe), indent=1))
    else:
        _show(recipe, Console())


def _file(recipe: ChosenRecipe) -> dict[str, Any]:
    """Return the recipe's content as a file would say it: without the settings that it leaves out."""
    content = to_json(recipe.content)
    content["calibration"] = _said(content["calibration"])
    return {"precision": content["precision"], **_said(content)}


def _said(content: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if value not in (None, "", [], {})}


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index == 0)
    return table


def _show_all(every: list[ChosenRecipe], screen: Console) -> None:
    table = _table("recipe", "target", "precision", "largest video", "memory", "one video", "bundle", "step cache")
    for recipe in every:
        content = recipe.content
        largest = _largest(recipe)
        table.add_row(
            recipe.name,
            content.target or "",
            build_options(content).get("precision", "target's default")
            + (f", attention {content.attention.value}" if content.attention else ""),
            largest.shape if largest else "",
            console.format_bytes(largest.peak_bytes) if largest else "",
            _seconds(largest.seconds_per_video) if largest else "",
            console.format_bytes(content.figures.bundle_bytes) if content.figures else "",
            content.step_cache or "",
        )
    screen.print(table)
    screen.print(_PREDICTED, highlight=False)


def _largest(recipe: ChosenRecipe) -> VideoFigures | None:
    figures = recipe.content.figures
    return None if figures is None or not figures.videos else figures.videos[0]


def _show(recipe: ChosenRecipe, screen: Console) -> None:
    content = recipe.content
    screen.print(f"[bold]{recipe.name}[/bold]: {content.description or 'no description'}", highlight=False)
    options = _table("option of build-engine", "value")
    for name, value in _options(recipe):
        options.add_row(name, value)
    screen.print(options)
    figures = content.figures
    if figures is not None:
        videos = _table("video", "memory at its peak", "in phase", "s/step", f"one video, {figures.steps} steps")
        for video in figures.videos:
            step = "" if video.seconds_per_step is None else f"{video.seconds_per_step:.2f}"
            videos.add_row(
                video.shape,
                console.format_bytes(video.peak_bytes),
                video.peak_phase,
                step,
                _seconds(video.seconds_per_video),
            )
        screen.print(videos)
        parts = ", ".join(f"{stage} in {count}" for stage, count in figures.parts.items())
        screen.print(
            f"bundle {console.format_bytes(figures.bundle_bytes)}; build: export "
            f"{console.format_bytes(figures.export_bytes)}, compiler {console.format_bytes(figures.builder_bytes)}, "
            f"about {_seconds(figures.builder_seconds)} of compilation; parts: {parts or 'every stage whole'}",
            highlight=False,
        )
        screen.print(_PREDICTED, highlight=False)
    for remark in content.remarks:
        screen.print(f"- {remark}", highlight=False)


_FLAGS = {
    "builder_memory": "--builder-memory",
    "high_precision": "--high-precision",
    "step_cache": "--step-cache",
    "steps": "--calibration-steps",
    "shape": "--calibration-shape",
    "memory": "--calibration-memory",
}


def _options(recipe: ChosenRecipe) -> Iterator[tuple[str, str]]:
    for name, value in build_options(recipe.content).items():
        shown = " ".join(value) if isinstance(value, list) else str(value)
        yield _FLAGS.get(name, f"--{name}"), shown


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
