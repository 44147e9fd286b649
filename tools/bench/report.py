"""What every file under ``benchmarks/`` has in common: where it was measured, with what, and how tables look.

The module knows no benchmark.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import textwrap
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path


def environment(command: str, packages: Sequence[str]) -> list[str]:
    """Return the lines that say what made the file: command, machine, versions, commit and date."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")
    )
    memory_gb = int(fields["MemTotal"].split()[0]) * 1024 / 1e9
    return [
        f"Made by `{command}`.",
        "",
        f"- machine: {machine()}, {memory_gb:.0f} GB memory, {_gpu()}",
        f"- versions: {versions(packages)}",
        f"- commit {commit()}, {datetime.datetime.now(datetime.UTC).date().isoformat()}",
    ]


def machine() -> str:
    """Return the processor and the number of cores."""
    return f"{_processor()}, {_cores()} cores"


def versions(packages: Sequence[str]) -> str:
    """Return the versions of Python and of installed packages."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def prose(text: str) -> list[str]:
    """Return the lines of a paragraph."""
    return textwrap.wrap(text, 119, break_long_words=False, break_on_hyphens=False)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return the median with the smallest and the largest value, or the value alone if there is one."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def commit() -> str:
    """Return the checked out commit, marked if files differ from it; those under benchmarks/ are results."""
    name = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks")
    return f"{name}-dirty" if name and changed else name or "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def write(path: Path, lines: Sequence[str]) -> None:
    """Write a benchmark's file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _gpu(driver: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Return whether there is an NVIDIA GPU that could have taken part; none of these benchmarks uses one."""
    return "a GPU that took no part" if driver.exists() else "no GPU"


def _processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":", 1)[1].strip() if names else platform.machine()


def _cores() -> int:
    return len([line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("processor")])
