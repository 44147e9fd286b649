"""Benchmark files in sections that can be measured apart: each is kept as a fragment and says when it was measured.

The module knows no benchmark.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from reelforge.tools.bench import report

Command = TypeVar("Command", bound=Callable[..., Any])

_STATES, _STEAL = 8, 7  # of "cpu" in /proc/stat: those behind are guests', which are contained in "user" and "nice"


@dataclass(frozen=True)
class Fragment:
    """One measured section.

    Attributes:
        lines: Markdown below the section's title.
        commit: At which it was measured.
        date: When.
        minutes: How long it took.
        settings: Counts and repeats, in words.
        stolen: Of the processors' time meanwhile, what a virtual machine's host gave to others; None where it is not
            known.
    """

    lines: list[str]
    commit: str
    date: str
    minutes: float
    settings: str
    stolen: float | None = None


def chosen(titles: Collection[str]) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    """Return the callback of an option that names sections, separated by commas."""

    def callback(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(","))
        unknown = [name for name in names if name not in titles]
        if unknown:
            raise click.BadParameter(f"no section is called {', '.join(unknown)}; there are {', '.join(titles)}")
        return names

    return callback


def options(titles: Collection[str], work: str, what: str) -> Callable[[Command], Command]:
    """Return a decorator that gives a command ``--work``, ``--only`` and ``--checkpoint``.

    Args:
        titles: The sections' names.
        work: The default folder.
        what: What the folder is for.
    """
    given = (
        click.option("--work", type=click.Path(path_type=Path), default=Path(work), show_default=True, help=what),
        click.option(
            "--only",
            default=",".join(titles),
            show_default=True,
            callback=chosen(titles),
            help="Sections to measure again.",
        ),
        click.option(
            "--checkpoint", default="demo/checkpoint", show_default=True, type=click.Path(path_type=Path, exists=True)
        ),
    )

    def decorate(command: Command) -> Command:
        for option in reversed(given):
            command = option(command)
        return command

    return decorate


def measure_all(
    only: Collection[str],
    titles: Mapping[str, str],
    measures: Mapping[str, Callable[[], list[str]]],
    settings: str,
    head: Callable[[], Sequence[str]],
    work: Path,
    output: Path,
) -> None:
    """Measure sections in the file's order, and write the file after each.

    Args:
        only: Names of those to measure; of others the fragments in ``work`` are used.
        titles: Name -> title, in order.
        measures: Name -> what measures it.
        settings: Counts and repeats, in words.
        head: Returns the lines above the sections.
        work: Folder of the fragments.
        output: The file.
    """
    for name in [name for name in titles if name in only]:
        fragment = measure(name, measures[name], settings, work)
        report.write(output, document(head(), titles, read(work, titles)))
        click.echo(f"{name}: {fragment.minutes:.1f} minutes; wrote {output}")


def measure(name: str, section: Callable[[], list[str]], settings: str, work: Path) -> Fragment:
    """Measure one section and keep its fragment in ``work``."""
    started, commit, before = time.monotonic(), report.commit(), processor_times()
    lines = section()
    minutes = (time.monotonic() - started) / 60
    stolen = stolen_share(before, processor_times())
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    fragment = Fragment(lines, commit, today, minutes, settings, stolen)
    (work / f"{name}.json").write_text(json.dumps(asdict(fragment), indent=1), encoding="utf-8")
    return fragment


def processor_times(stat: Path = Path("/proc/stat")) -> list[int] | None:
    """Return how long all processors were in each state, in ticks (proc(5)); None where it is not told."""
    try:
        return [int(number) for number in stat.read_text(encoding="utf-8").splitlines()[0].split()[1:]]
    except OSError:
        return None


def stolen_share(before: Sequence[int] | None, after: Sequence[int] | None) -> float | None:
    """Return what a virtual machine's host gave to others between two :func:`processor_times`, from 0 to 1."""
    if before is None or after is None:
        return None
    passed = [late - early for early, late in zip(before, after, strict=True)][:_STATES]
    return passed[_STEAL] / sum(passed) if sum(passed) > 0 else None


def read(folder: Path, titles: Collection[str]) -> dict[str, Fragment]:
    """Return the fragments that ``folder`` has of the sections ``titles``."""
    paths = {name: folder / f"{name}.json" for name in titles}
    return {
        name: Fragment(**json.loads(path.read_text(encoding="utf-8"))) for name, path in paths.items() if path.exists()
    }


def document(head: Sequence[str], titles: Mapping[str, str], fragments: Mapping[str, Fragment]) -> list[str]:
    """Return the whole file; a section that was never measured says so."""
    lines = list(head)
    for name, title in titles.items():
        lines += ["", f"## {title}", ""]
        if name not in fragments:
            lines.append(f"Not measured yet: `--only {name}`.")
            continue
        fragment = fragments[name]
        about = f"commit {fragment.commit}, {fragment.date}, {fragment.settings}, {fragment.minutes:.0f} minutes"
        if fragment.stolen is not None:
            about += f", {fragment.stolen * 100:.1f} % of the processors' time taken by the virtual machine's host"
        lines += [f"*Measured at {about}.*", "", *fragment.lines]
    return lines
