"""Runs a command and samples its memory: anonymous and file-backed apart, as the kernel counts them.

Anonymous memory is what a process really needs; file-backed pages are the mapped checkpoint and can be dropped at any
time. Reads ``/proc/<pid>/status`` (Linux); it does not know what the command does.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL_S = 0.02


@dataclass(frozen=True)
class Usage:
    """What a finished command used; peaks are of single samples."""

    seconds: float
    peak_anonymous_bytes: int
    peak_file_bytes: int
    output: str


def run_sampled(command: Sequence[str], limit_s: float | None = None) -> Usage:
    """Run ``command`` to its end, sampling every 20 ms.

    Args:
        command: The program and its arguments.
        limit_s: After so many seconds it is killed; None waits for ever.

    Raises:
        subprocess.CalledProcessError: If it fails; its stderr goes to ours.
        subprocess.TimeoutExpired: If it was killed.
    """
    started = time.monotonic()
    anonymous = file_backed = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            fields = status_fields(status)
            anonymous = max(anonymous, fields.get("RssAnon", 0))
            file_backed = max(file_backed, fields.get("RssFile", 0))
            if limit_s is not None and time.monotonic() - started > limit_s:
                process.kill()
                raise subprocess.TimeoutExpired(command, limit_s)
            time.sleep(INTERVAL_S)
        output = process.stdout.read() if process.stdout is not None else ""
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output)
    return Usage(time.monotonic() - started, anonymous, file_backed, output)


def status_fields(status: Path) -> dict[str, int]:
    """Return the sizes in a status file, in bytes; empty once the process is gone."""
    try:
        lines = status.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    sizes = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(kilobytes) * 1024 for name, kilobytes, _ in sizes}
