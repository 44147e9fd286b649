"""The ``reelforge cache`` command: what the cache of compiled plans holds, and making room in it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from reelforge.tools import console
from reelforge.tools.inspect_receipts import slim_table

if TYPE_CHECKING:
    from reelforge.export.cache_store import CachedEntry

_UNITS = ((86400, "days"), (3600, "hours"), (60, "minutes"))


@click.command("cache", epilog=console.EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--cache-dir", type=click.Path(path_type=Path), help="By default $XDG_CACHE_HOME/reelforge.")
@click.option("--trim", metavar="SIZE", help="Remove what was not used for longest until so much is left, e.g. 20GB.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def cache(cache_dir: Path | None, trim: str | None, as_json: bool) -> None:
    """Show the cache of compiled plans, or make room in it.

    Bundles keep their plans whatever is removed here. Builds that run meanwhile are not disturbed.

    \b
    Examples:
      reelforge cache
      reelforge cache --trim 20GB
      reelforge cache --trim 0
    """  # noqa: D301 - \b is click's mark for text that it does not wrap
    from reelforge.export.cache import PlanCache, parse_size
    from reelforge.runtime.cache_folder import default_folder

    limit = None if trim is None else parse_size(trim)
    folder = default_folder(os.environ, Path.home()) if cache_dir is None else cache_dir
    plans = PlanCache(folder)
    trimmed = limit is None or plans.trim(limit)
    entries = plans.entries()
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "entries": [_as_json(entry) for entry in entries]}))
    else:
        _print(folder, entries)
    if not trimmed:
        console.print_notice("plans that a build is taking right now were not removed.")


def _as_json(entry: CachedEntry) -> dict[str, Any]:
    return {"key": entry.key, "bytes": entry.bytes, "last_used_s": entry.last_used_ns / 1e9, "content": entry.content}


def _print(folder: Path, entries: list[CachedEntry]) -> None:
    total = console.format_bytes(sum(entry.bytes for entry in entries))
    count = f"{len(entries)} plan{'' if len(entries) == 1 else 's'}"
    screen = Console(highlight=False)
    screen.print(f"{folder}: {count}, {total}" if entries else f"{folder}: no plans", soft_wrap=True)
    if not entries:
        return
    table = slim_table("")
    for heading in ("stage", "for", "compiler", "size", "last used", "key"):
        table.add_column(heading, justify="right" if heading == "size" else "left", no_wrap=heading != "for")
    now = time.time()
    for entry in entries:
        stage, architectures, backend = _about(entry.content)
        age = _ago(now - entry.last_used_ns / 1e9) if entry.last_used_ns else "unknown"
        table.add_row(stage, architectures, backend, console.format_bytes(entry.bytes), age, entry.key[:12])
    screen.print(table)


def _about(content: Any) -> tuple[str, str, str]:
    """Return what a person knows a plan by; an entry of another version or a damaged one may not say it."""
    try:
        request = content["request"]
        return str(request["stage"]), "+".join(request["target"]["architectures"]), str(content["backend"])
    except (KeyError, TypeError):
        return "unknown", "", ""


def _ago(seconds: float) -> str:
    for length, unit in _UNITS:
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"
