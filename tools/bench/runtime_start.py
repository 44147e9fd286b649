"""What it takes until something happens: importing the runtime, and from a process's start to its first finished step.

Every sample is a fresh process. The module knows what is imported, and nothing of bundles but their files.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reelforge.tools.bench import report
from reelforge.tools.bench.runtime_child import FORBIDDEN, Job, Task
from reelforge.tools.bench.runtime_processes import Contender

IMPORT_GOAL_MS = 150.0
IMPORT_RUNS = 15
IMPORTS = {
    "nothing": "pass",
    "(`import numpy`)": "import numpy",
    "`import reelforge.runtime`": "import reelforge.runtime",
    "`from reelforge.runtime import Pipeline, Request`": "from reelforge.runtime import Pipeline, Request",
    "and what a first request loads": "from reelforge.runtime import Pipeline, Request; import onnxruntime, tokenizers",
    "(`from diffusers import HunyuanVideoPipeline`)": "from diffusers import HunyuanVideoPipeline",
}
PACKAGE, NAMES = "`import reelforge.runtime`", "`from reelforge.runtime import Pipeline, Request`"
_PEER_RUNS = 3  # each takes seconds
_FORBIDDEN_NAMES = ", ".join(f"`{name}`" for name in FORBIDDEN)

_CHILD = """
import json, sys, time
started = time.perf_counter()
exec(sys.argv[1])
seconds = time.perf_counter() - started
print(json.dumps([seconds, [name for name in sys.argv[2:] if name in sys.modules], len(sys.modules)]))
"""


@dataclass(frozen=True)
class Import:
    """One statement in fresh processes: seconds, which of ``FORBIDDEN`` it loaded, and how many modules there were."""

    what: str
    seconds: tuple[float, ...]
    forbidden: tuple[str, ...]
    modules: int


@dataclass(frozen=True)
class Start:
    """Seconds of one system, a value per process.

    Attributes:
        name: The system.
        imported: From the process's start until its modules were imported.
        opened: Until it could take requests.
        first_step: Until the first request's first step was done.
        second_request: From a second request, with another prompt, to its first step.
        forbidden: What of ``FORBIDDEN`` was loaded after both.
    """

    name: str
    imported: tuple[float, ...]
    opened: tuple[float, ...]
    first_step: tuple[float, ...]
    second_request: tuple[float, ...]
    forbidden: tuple[str, ...]


def measure_import(what: str, statement: str, runs: int) -> Import:
    """Time a statement in ``runs`` fresh processes, after one that is not counted."""
    answers = []
    for _ in range(runs + 1):
        command = [sys.executable, "-c", _CHILD, statement, *FORBIDDEN]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        answers.append(json.loads(output.strip().splitlines()[-1]))
    counted = answers[1:]
    return Import(what, tuple(answer[0] for answer in counted), tuple(counted[0][1]), counted[0][2])


def measure_start(name: str, job: Job, tasks: tuple[Task, Task], runs: int) -> Start:
    """Start a system ``runs`` times, its files out of the page cache, and ask for two videos' first steps."""
    columns: list[tuple[float, ...]] = []
    forbidden: list[str] = []
    for _ in range(runs):
        forget(Path(job.path))
        with Contender(name, job) as contender:
            first, second = (contender.ask(replace(task, only_first_step=True)) for task in tasks)
            moments = (contender.opened.imported, contender.opened.opened, first.finished)
            columns.append((*(moment - contender.started for moment in moments), second.finished - second.began))
            forbidden = second.forbidden
    imported, opened, first_step, second_request = zip(*columns, strict=True)
    return Start(name, imported, opened, first_step, second_request, tuple(forbidden))


def forget(folder: Path) -> None:
    """Ask the kernel to drop the files below ``folder`` from the page cache, so that they are read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def import_section() -> list[str]:
    """Return the section on imports."""
    imports = {
        what: measure_import(what, statement, IMPORT_RUNS if "diffusers" not in statement else _PEER_RUNS)
        for what, statement in IMPORTS.items()
    }
    package, names = (statistics.median(imports[what].seconds) * 1e3 for what in (PACKAGE, NAMES))
    ours = [entry for entry in imports.values() if "diffusers" not in entry.what]
    loaded = sorted({name for entry in ours for name in entry.forbidden})
    return [
        f"The statement's own time in {IMPORT_RUNS} fresh processes ({_PEER_RUNS} for diffusers), files in the page",
        "cache: median (smallest-largest). The package loads its names when they are first used, so the first row with",
        "it is nearly nothing; the row after it is what a program pays. Of " + _FORBIDDEN_NAMES + " the",
        "column says which are in `sys.modules` afterwards; after a whole video it is said in the next section.",
        "",
        *report.table(
            ("statement", "ms", "loaded of these", "modules"),
            [
                (
                    entry.what,
                    report.spread([value * 1e3 for value in entry.seconds]),
                    ", ".join(entry.forbidden) or "none",
                    entry.modules,
                )
                for entry in imports.values()
            ],
        ),
        "",
        *report.table(
            ("goal", "measured", ""),
            [
                (f"{PACKAGE} under {IMPORT_GOAL_MS:.0f} ms", f"{package:.0f} ms", _met(package < IMPORT_GOAL_MS)),
                (f"(beside it: with numpy, {NAMES})", f"{names:.0f} ms", _met(names < IMPORT_GOAL_MS)),
                ("torch is not loaded", ", ".join(loaded) or "none of them", _met(not loaded)),
            ],
        ),
    ]


def start_section(cases: Sequence[tuple[str, Sequence[tuple[str, Job]], tuple[Task, Task], int]]) -> list[str]:
    """Return the section on cold starts.

    Args:
        cases: Title of a model, its systems by name, two videos with different prompts, and how many processes each.
    """
    lines = [
        "From the start of a process to its first finished step, with everything between: interpreter, imports,",
        "opening with all digests checked, text encoders, conditioning, loading `dit`. The model's files are not in",
        "the page cache, the libraries' are. The second request is to the same process, with another prompt of",
        "the same length; its time is from the request to its first step.",
    ]
    starts = []
    for title, systems, tasks, runs in cases:
        measured = [measure_start(name, job, tasks, runs) for name, job in systems]
        starts += [one for one, (_, job) in zip(measured, systems, strict=True) if job.system == "reelforge"]
        rows = [
            (one.name, *map(_seconds, (one.imported, one.opened, one.first_step, one.second_request)))
            for one in measured
        ]
        headings = ("", "s to imported", "s to opened", "s to the first step", "s of the second request's")
        lines += ["", f"### {title}, {runs} processes each", "", *report.table(headings, rows)]
    loaded = sorted({name for one in starts for name in one.forbidden})
    said = ", ".join(loaded) or "none"
    return [*lines, "", f"Of {_FORBIDDEN_NAMES}, our processes had loaded {said} when all of it was done."]


def _seconds(values: Sequence[float]) -> str:
    return report.spread(values, digits=2)


def _met(met: bool) -> str:
    return "met" if met else "**missed**"
