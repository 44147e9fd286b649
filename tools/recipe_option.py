"""The ``--recipe`` option: a recipe's values become the defaults of a command's options, and the result is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from rich import box
from rich.console import Console
from rich.table import Table

from reelforge.tools.recipe_file import ChosenRecipe, RecipeFile, find_recipe

F = TypeVar("F", bound=Callable[..., Any])
OptionsOf = Callable[[RecipeFile], dict[str, Any]]


def recipe_option(options_of: OptionsOf) -> Callable[[F], F]:
    """Add ``--recipe``; the command gets a ``ChosenRecipe`` or None, and its other parameters as the recipe says.

    Args:
        options_of: Turns a recipe into values of the command's options.
    """

    def load(context: click.Context, _parameter: click.Parameter, value: str | None) -> ChosenRecipe | None:
        if value is None:
            return None
        recipe = find_recipe(value)
        context.default_map = {**(context.default_map or {}), **options_of(recipe.content)}
        return recipe

    return click.option(
        "--recipe",
        metavar="NAME|FILE",
        is_eager=True,  # before all options that it has defaults for
        callback=load,
        help="A recipe of `reelforge recipes`, or a file such as `reelforge sensitivity --recipe` writes. What it says "
        "is the default of the other options: those that are given win.",
    )


def settled(recipe: ChosenRecipe, options_of: OptionsOf, context: click.Context) -> dict[str, dict[str, Any]]:
    """Return what became of a recipe: by option its value, and what the recipe said where the command line won.

    Args:
        recipe: From the command line.
        options_of: As for :func:`recipe_option`.
        context: Of the command.
    """
    said = options_of(recipe.content)
    names = {parameter.name: _flag(parameter) for parameter in context.command.params if parameter.name}
    result: dict[str, dict[str, Any]] = {}
    for name, flag in names.items():
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if name in said:
            value = _plain(context.params[name])
            result[flag] = {"value": value, **({"instead_of": said[name]} if given else {})}
    return result


def show_recipe(name: str, result: Mapping[str, Mapping[str, Any]], terminal: Console) -> None:
    """Print what became of a recipe.

    Args:
        name: What the user called it.
        result: From :func:`settled`.
        terminal: Where to print.
    """
    table = Table(title=f"Recipe {name}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("option", "value", "from"):
        table.add_column(column, no_wrap=column == "option")
    for flag, one in result.items():
        origin = "recipe"
        if "instead_of" in one:
            origin = f"command line, instead of {_shown(one['instead_of'])}"
        table.add_row(flag, _shown(one["value"]), origin)
    terminal.print(table)


def _flag(parameter: click.Parameter) -> str:
    return next((text for text in parameter.opts if text.startswith("--")), parameter.opts[0])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
