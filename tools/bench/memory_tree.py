"""Runs a command and samples the memory of all its processes, each compiler of a plan apart.

A compiler is recognised by its command line, and what it compiles is read from its job. Anonymous and file-backed
memory are counted as the kernel does (see ``memory``). Reads ``/proc`` (Linux).
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reelforge.tools.bench.memory import Usage, status_fields

INTERVAL_S = 0.1
_COMPILER = "reelforge.export.engines.child"


@dataclass
class Peak:
    """The most that one process was seen to hold, and for how long it was seen."""

    anonymous_bytes: int = 0
    file_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class TreeUsage:
    """What a finished command used.

    Attributes:
        total: Of all processes together; its peaks are of single samples.
        build: Of the command's own process.
        compilers: What was compiled -> its compiler.
    """

    total: Usage
    build: Peak
    compilers: dict[str, Peak] = field(default_factory=dict)


def run_tree_sampled(command: Sequence[str]) -> TreeUsage:
    """Run ``command`` to its end, sampling its processes ten times a second.

    Raises:
        subprocess.CalledProcessError: If it fails; its stderr goes to ours.
    """
    started = time.monotonic()
    build, compilers = Peak(), dict[str, Peak]()
    names: dict[int, str] = {}
    anonymous = file_backed = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            sums = [0, 0]
            for pid in _tree(process.pid):
                fields = status_fields(Path(f"/proc/{pid}/status"))
                sizes = fields.get("RssAnon", 0), fields.get("RssFile", 0)
                sums = [total + size for total, size in zip(sums, sizes, strict=True)]
                if pid == process.pid:
                    peak = build
                elif name := names.get(pid) or _compiled(pid):
                    names[pid] = name
                    peak = compilers.setdefault(name, Peak())
                else:
                    continue
                peak.anonymous_bytes = max(peak.anonymous_bytes, sizes[0])
                peak.file_bytes = max(peak.file_bytes, sizes[1])
                peak.seconds += INTERVAL_S
            anonymous, file_backed = max(anonymous, sums[0]), max(file_backed, sums[1])
            time.sleep(INTERVAL_S)
        output = process.stdout.read() if process.stdout is not None else ""
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output)
    return TreeUsage(Usage(time.monotonic() - started, anonymous, file_backed, output), build, compilers)


def _tree(pid: int) -> Iterator[int]:
    """Yield a process and its descendants."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = children.read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in found:
            yield from _tree(int(child))


def _compiled(pid: int) -> str | None:
    """Return the stage or part that a compiler's process compiles, or None for another process."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if _COMPILER not in words:
            return None
        request = json.loads(Path(words[words.index(_COMPILER) + 1]).read_text(encoding="utf-8"))
    except (FileNotFoundError, ProcessLookupError, json.JSONDecodeError):
        return None
    return str(request["stage"])
