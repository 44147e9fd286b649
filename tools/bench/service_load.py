"""Many clients at once on a real service, beside one pipeline in a loop: a part of the service's benchmark.

The clients are on the same machine, in a process of their own: what they take, the service does not have, and it is
said how much that is. Machines change their pace within minutes, so that each turn of a service is between two turns of
the loop, and compared with these.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelforge.runtime import Pipeline, Request, VideoWriter
from reelforge.tools.bench import report
from reelforge.tools.bench.service_clients import Timings
from tests.tools.service.process import ServiceProcess

CLIENTS = 64
SIZES = ((64, 64, 9, 20), (96, 64, 9, 16), (64, 96, 17, 12), (128, 128, 9, 10))  # width, height, frames, steps
PROMPTS = ("a red circle moving right on a black background", "a blue square", "a green circle moving up")
GOAL = 0.97
OPTIONS: dict[str, tuple[str, ...]] = {"with previews": (), "--no-previews": ("--no-previews",)}


@dataclass(frozen=True)
class Cpu:
    """Seconds of the processor that a process has taken.

    Attributes:
        whole: All its threads, those that have ended too.
        first_thread: Of these its first, in which a service has its event loop.
    """

    whole: float
    first_thread: float

    @classmethod
    def of(cls, process: int) -> Cpu:
        """Return what a process has taken so far (proc(5); in ticks of mostly 10 ms)."""
        return cls(*(_cpu_s(Path(f"/proc/{process}/{name}")) for name in ("stat", f"task/{process}/stat")))

    def since(self, before: Cpu) -> Cpu:
        """Return what was taken after that."""
        return Cpu(self.whole - before.whole, self.first_thread - before.first_thread)


@dataclass(frozen=True)
class Loop:
    """One turn of one pipeline in a loop, in seconds."""

    seconds: float
    cpu_s: float


@dataclass(frozen=True)
class Turn:
    """One turn of a service: what its clients saw, and what it took."""

    told: Timings
    cpu: Cpu


def requests(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Return bodies of requests of mixed sizes, no two alike."""
    found = []
    for number in range(first, first + count):
        width, height, frames, steps = SIZES[number % len(SIZES)]
        prompt = PROMPTS[number % len(PROMPTS)]
        found.append({"prompt": prompt, "size": f"{width}x{height}", "frames": frames, "steps": steps, "seed": number})
    return found


def in_a_loop(pipeline: Pipeline, bodies: list[dict[str, Any]], folder: Path) -> Loop:
    """Make videos with one pipeline, one after the other, each written to an mp4 file."""
    started, cpu_s = time.monotonic(), time.process_time()
    rate = pipeline.spec.defaults.frames_per_second
    for number, body in enumerate(bodies):
        width, height = (int(side) for side in body["size"].split("x"))
        asked = Request(body["prompt"], height, width, body["frames"], body["steps"], body["seed"])
        with VideoWriter(folder / f"{number}.mp4", height, width, body["frames"], rate) as video:
            video.write(pipeline.generate(asked))
    return Loop(time.monotonic() - started, time.process_time() - cpu_s)


def drive(process: ServiceProcess, bodies: list[dict[str, Any]], count: int = CLIENTS) -> Turn:
    """Have many clients ask a service for videos."""
    assert process.process is not None
    path = process.data.with_suffix(".requests")
    path.write_text(json.dumps(bodies))
    command = [sys.executable, "-m", "reelforge.tools.bench.service_clients", process.url, str(path), str(count)]
    before = Cpu.of(process.process.pid)
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Turn(Timings(**json.loads(finished.stdout)), Cpu.of(process.process.pid).since(before))


def section(bundle: Path, work: Path, jobs: int, rounds: int) -> list[str]:
    """Measure, and return the section's lines."""
    bodies, first = requests(jobs), requests(len(SIZES), first=10_000)
    services = {}
    try:
        for name, options in OPTIONS.items():
            process = ServiceProcess(bundle, work / f"load-{name.strip('-').replace(' ', '-')}", threads=None)
            process.options = ("--queue-per-key", "256", *options)
            process.start()
            services[name] = process
            drive(process, first, 1)
        loops, turns = _measure(bundle, work / "loop", services, bodies, rounds)
        for process in services.values():
            process.terminate()
            process.wait()
    finally:
        for process in services.values():
            process.stop()
    return _lines(loops, turns, jobs)


def _measure(
    bundle: Path, folder: Path, services: dict[str, ServiceProcess], bodies: list[dict[str, Any]], rounds: int
) -> tuple[list[Loop], dict[str, list[Turn]]]:
    """Return the loop's turns, one more than all services' together, and these, in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    turns: dict[str, list[Turn]] = {name: [] for name in services}
    with Pipeline.open(bundle) as pipeline:
        in_a_loop(pipeline, requests(len(SIZES), first=10_000), folder)
        loops = [in_a_loop(pipeline, bodies, folder)]
        for _ in range(rounds):
            for name, process in services.items():
                turns[name].append(drive(process, bodies))
                loops.append(in_a_loop(pipeline, bodies, folder))
    return loops, turns


def _ratios(loops: Sequence[Loop], turns: dict[str, list[Turn]]) -> dict[str, list[float]]:
    """Return each turn's throughput beside the mean of the loops before and after it."""
    found: dict[str, list[float]] = {}
    for place, name in enumerate(turns):
        around = [loops[number : number + 2] for number in range(place, len(loops) - 1, len(turns))]
        pairs = zip(around, turns[name], strict=True)
        found[name] = [(one.seconds + other.seconds) / 2 / turn.told.seconds for (one, other), turn in pairs]
    return found


def _lines(loops: Sequence[Loop], turns: dict[str, list[Turn]], jobs: int) -> list[str]:
    ratios = _ratios(loops, turns)
    rows, lost = [], 0
    taken: list[tuple[str, ...]] = [("the loop", _per_video([loop.cpu_s for loop in loops], jobs), "", "", "")]
    for name, found in turns.items():
        accepted = sorted(1e3 * value for turn in found for value in turn.told.accepted)
        events = sorted(1e3 * value for turn in found for value in turn.told.first_event)
        lost += sum(jobs - turn.told.ends.count("completed") for turn in found)
        rows.append(
            (
                name,
                f"{statistics.median(accepted):.0f}",
                f"{_p95(accepted):.0f}",
                f"{statistics.median(events):.0f}",
                f"{_p95(events):.0f}",
                report.spread([jobs / turn.told.seconds for turn in found], 2),
                report.spread(ratios[name], 3),
            )
        )
        event_loop = [turn.cpu.first_thread for turn in found]
        others = [turn.cpu.whole - turn.cpu.first_thread for turn in found]
        clients = [turn.told.cpu_s for turn in found]
        everyone = [turn.cpu.whole + turn.told.cpu_s for turn in found]
        taken.append((name, *(_per_video(values, jobs) for values in (everyone, others, event_loop, clients))))
    best = {name: statistics.median(values) for name, values in ratios.items()}
    sizes = ", ".join(f"{width}x{height}x{frames} in {steps} steps" for width, height, frames, steps in SIZES)
    seconds = report.spread([loop.seconds for loop in loops])
    return [
        *report.prose(
            f"{CLIENTS} clients ask for {jobs} videos of the demonstration model in turn ({sizes}), each with a "
            "connection of its own and a stream of events open until its video is there. Service and model share the "
            f"machine's {os.cpu_count()} cores with the clients, which are one process that speaks HTTP over plain "
            "sockets. In the loop one pipeline makes the same videos and writes the same files, without previews: "
            f"{seconds} s. Loop and services take turns, and a turn's ratio is to the mean of the loops before and "
            "after it; the goal is judged by the median."
        ),
        "",
        *report.table(
            ("service", "ms to acceptance, p50", "p95", "ms to first event, p50", "p95", "videos/s", "beside the loop"),
            rows,
        ),
        "",
        *report.prose(
            "The processor's milliseconds per video, median of the turns. The event loop's thread reads and writes "
            "all connections; the others are the model's, and those that write videos and the database. Threads of "
            "ONNX Runtime that wait for each other spin, which counts as work here."
        ),
        "",
        *report.table(
            ("", "together", "service: model, videos, database", "service: event loop", "clients"),
            taken,
        ),
        "",
        *report.table(
            ("goal", "measured", ""),
            [
                *(
                    (f"at least {GOAL}x of a loop, {name}", f"{value:.3f}x", "met" if value >= GOAL else "**missed**")
                    for name, value in best.items()
                ),
                ("no accepted job is lost", f"{lost} lost", "met" if lost == 0 else "**missed**"),
            ],
        ),
    ]


def _per_video(seconds: Sequence[float], jobs: int) -> str:
    return f"{1e3 * statistics.median(seconds) / jobs:.1f}"


def _cpu_s(stat: Path) -> float:
    user, system = stat.read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _p95(ranked: list[float]) -> float:
    return ranked[max(-(-95 * len(ranked) // 100) - 1, 0)]
