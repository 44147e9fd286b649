"""This process' memory, as the operating system counts it (Linux; elsewhere it is not known).

The module knows nothing of engines.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path


def available_bytes() -> int | None:
    """Return what programs can still allocate without swapping: the machine's, or less where a cgroup limits it."""
    machine = _field(Path("/proc/meminfo"), "MemAvailable")
    group = _cgroup_left()
    known = [value for value in (machine, group) if value is not None]
    return min(known) if known else None


def anonymous_bytes() -> int | None:
    """Return this process' anonymous memory: what it holds besides mapped files, which can be dropped at any time."""
    return _field(Path("/proc/self/status"), "RssAnon")


def return_freed() -> None:
    """Give freed memory back to the system: glibc keeps small blocks between those in use for later."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Return glibc's function; other C libraries have none, and keep less."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def _field(path: Path, name: str) -> int | None:
    try:
        text = path.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return None


def _cgroup_left() -> int | None:
    """Return what the control group of a container leaves, without the file pages that it can drop."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        pages = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(int(limit) - used + int(pages.get("inactive_file", 0)), 0)
