"""``reelforge bench``: the list of benchmarks, and running one of them as its own module.

Knows the registry; it imports nothing that measures. Benchmarks run from a checkout: they compare with the shipped
checkpoint and write below ``benchmarks/``.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console

from reelforge.runtime.errors import RequestError
from reelforge.tools import console
from reelforge.tools.bench.registry import BENCHMARKS, PACKAGE, Benchmark, find
from reelforge.tools.inspect_receipts import slim_table

FOLDER = "benchmarks"


@click.command("bench", epilog=console.EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", required=False)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.option("--list", "listing", is_flag=True, help="List all benchmarks; so does no NAME.")
@click.option("--show", is_flag=True, help="Print the command of NAME instead of running it.")
@click.option("--json", "as_json", is_flag=True, help="Print the list as one JSON object.")
def bench(name: str | None, options: tuple[str, ...], listing: bool, show: bool, as_json: bool) -> None:
    """Run one of the project's benchmarks, from a checkout, or list them.

    What follows `--` is passed on: `reelforge bench NAME -- --help` shows what a benchmark takes. Its exit code is
    this command's.

    \b
    Examples:
      reelforge bench --list
      reelforge bench parity
      reelforge bench quantisation -- --only methods --repeats 1
    """  # noqa: D301 - \b is click's mark for text that it does not wrap
    if listing or name is None:
        if options or name is not None or show:
            raise click.UsageError("--list takes no NAME and no --show; without it, NAME is needed")
        click.echo(json.dumps({"benchmarks": [asdict(one) for one in BENCHMARKS]})) if as_json else _print_list()
        return
    if as_json:
        raise click.UsageError("--json is for the list")
    command = command_of(named(name), options)
    if show:
        click.echo(" ".join(["python", *command[1:]]))
        return
    if not options or options[0] not in ("-h", "--help"):
        check(named(name), Path.cwd())
    click.echo(" ".join(["python", *command[1:]]), err=True)
    result = subprocess.run(command, check=False)
    if result.returncode:
        raise click.exceptions.Exit(result.returncode)


def named(name: str) -> Benchmark:
    """Return a benchmark.

    Raises:
        RequestError: If there is none of that name.
    """
    benchmark = find(name)
    if benchmark is None:
        names = [one.name for one in BENCHMARKS]
        close = difflib.get_close_matches(name.replace("_", "-"), names, n=1)
        raise RequestError(
            f"no benchmark is called {name!r}.",
            received=name,
            expected=f"one of {', '.join(names)}",
            fix=f"reelforge bench {close[0]}" if close else "see `reelforge bench --list`",
        )
    return benchmark


def command_of(benchmark: Benchmark, options: Sequence[str]) -> list[str]:
    """Return the command that runs a benchmark; of options given twice the later one, the user's, counts."""
    return [sys.executable, "-m", f"{PACKAGE}.{benchmark.module}", *benchmark.options, *options]


def check(benchmark: Benchmark, folder: Path) -> None:
    """Refuse to start what cannot end well.

    Args:
        benchmark: To run.
        folder: Where it would run.

    Raises:
        RequestError: If ``folder`` is no checkout's root, or a package is missing.
    """
    if not (folder / FOLDER).is_dir() or not (folder / "pyproject.toml").is_file():
        raise RequestError(
            f"benchmark {benchmark.name!r} cannot run here.",
            received=str(folder),
            expected=f"the root of a checkout of reelforge, with the folder {FOLDER}/",
            fix="git clone the project, `make env`, and run this from the checkout's root",
        )
    missing = [name for name in benchmark.imports if importlib.util.find_spec(name) is None]
    if missing:
        raise RequestError(
            f"benchmark {benchmark.name!r} needs packages that are not installed.",
            received=f"without {', '.join(missing)}",
            expected=f"an environment with {', '.join(benchmark.imports)}",
            fix="`make env` and .venv/bin/reelforge, or pip install -e '.[dev]' -c constraints.txt",
        )


def _print_list() -> None:
    table = slim_table("")
    for heading in ("name", "shows", "makes", "takes", "needs"):
        table.add_column(heading, no_wrap=heading in ("name", "takes"), overflow="fold")
    for one in BENCHMARKS:
        table.add_row(one.name, one.shows, f"{FOLDER}/{one.output}" if one.output else "-", one.takes, one.needs)
    Console(highlight=False).print(table)
