"""A real service that is killed again and again while clients ask it for videos: a part of the service's benchmark."""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from reelforge.tools.bench import report
from tests.tools.service.process import ServiceProcess

KILLS = 20
_LONGEST_S = 6.0
_PATIENCE_S = 60.0
_BODIES = (
    {"prompt": "a red circle moving right", "size": "64x64", "frames": 9, "steps": 20, "seed": 1},
    {"prompt": "a blue square", "size": "96x64", "frames": 9, "steps": 16, "seed": 2},
    {"prompt": "a green circle", "size": "64x96", "frames": 17, "steps": 8, "seed": 3},
)


@dataclass
class Feeder:
    """A client that asks for one video after the other, whatever happens, and remembers what was promised.

    It repeats a request whose answer never came with the same Idempotency-Key, as clients should.
    """

    bodies: tuple[dict[str, Any], ...]
    pause_s: float
    url: str = ""
    promised: dict[str, int] = field(default_factory=dict)  # job -> which body
    asked: int = 0
    repeated: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)

    def work(self) -> None:
        """Ask until stopped."""
        while not self.stopped.wait(self.pause_s):
            body = self.asked % len(self.bodies)
            headers = {"Idempotency-Key": f"request-{self.asked}"}
            try:
                answer = httpx.post(f"{self.url}/v1/videos", json=self.bodies[body], headers=headers, timeout=10)
            except httpx.TransportError:
                self.repeated += 1
                continue
            if answer.status_code == 202:
                self.promised[answer.json()["id"]] = body
                self.asked += 1


def section(bundle: Path, work: Path) -> list[str]:
    """Kill, restart, wait for everything that was promised, and look at what is there."""
    random.seed(20)
    process = ServiceProcess(bundle, work / "kills", threads=None)
    process.options = ("--queue", "10000", "--queue-per-key", "10000")
    feeder = Feeder(_BODIES, 0.3)
    try:
        return _lines(process.data, feeder, *_drill(process, feeder))
    finally:
        feeder.stopped.set()
        process.stop()


def _drill(process: ServiceProcess, feeder: Feeder) -> tuple[list[Any], Counter[str], int]:
    """Return all jobs' rows, what the process was doing when it was killed, and its exit code in the end."""
    process.start()
    feeder.url = process.url
    thread = threading.Thread(target=feeder.work, daemon=True)
    thread.start()
    phases: Counter[str] = Counter()
    for _ in range(KILLS):
        time.sleep(random.uniform(0.0, _LONGEST_S))
        phases[_phase(process)] += 1
        process.kill()
        process.start(ready=False)
        feeder.url = process.url
    asked, end = feeder.asked, time.monotonic() + _PATIENCE_S
    while feeder.asked < asked + 2 and time.monotonic() < end:  # so that what got no answer was repeated
        time.sleep(0.1)
    feeder.stopped.set()
    thread.join()
    began = time.monotonic()
    with sqlite3.connect(process.data / "jobs.sqlite3") as database:
        while database.execute("SELECT count(*) FROM jobs WHERE status IN ('queued', 'running')").fetchone()[0]:
            assert time.monotonic() - began < 600, "the queue does not empty"
            time.sleep(0.2)
        rows = database.execute("SELECT id, status, attempts, crashes FROM jobs").fetchall()
    process.terminate()
    code = process.wait()
    return rows, phases, code


def _phase(process: ServiceProcess) -> str:
    """Return what the service is doing, as far as it says."""
    try:
        if httpx.get(f"{process.url}/readyz", timeout=2).status_code != 200:
            return "loading"
        jobs = httpx.get(f"{process.url}/v1/videos?limit=100", timeout=2).json()["data"]
    except httpx.TransportError:
        return "starting"
    running = [job["progress"]["phase"] for job in jobs if job["status"] == "running"]
    return running[-1] if running else "nothing to do"


def _lines(data: Path, feeder: Feeder, rows: list[Any], phases: Counter[str], code: int) -> list[str]:
    states = Counter(row[1] for row in rows)
    files = {path.stem: path.read_bytes() for path in (data / "videos").iterdir()}
    known = {row[0]: row[1] for row in rows}
    lost = [job for job in feeder.promised if known.get(job) != "completed" or job not in files]
    videos = {body: {files[job] for job, its in feeder.promised.items() if its == body} for body in range(len(_BODIES))}
    twice = len(rows) - len({row[0] for row in rows}) + len(files) - states["completed"]
    left = [path.name for path in (data / "work").rglob("*")]
    killed = ", ".join(f"{phase} {count}" for phase, count in phases.most_common())
    return [
        *report.prose(
            f"The process is killed {KILLS} times, 0 to {_LONGEST_S:g} s after it began to listen, while a client asks "
            "for videos, repeating requests that got no answer with their Idempotency-Key. What it was doing: "
            f"{killed}. {len(feeder.promised)} jobs were accepted, {feeder.repeated} requests repeated; "
            f"{sum(row[3] > 0 for row in rows)} jobs were killed while they ran, the most often "
            f"{max(row[3] for row in rows)} times. Then everything is waited for, and the process asked to end: "
            f"exit code {code}."
        ),
        "",
        *report.table(
            ("goal", "measured", ""),
            [
                _goal("no accepted job is lost", len(lost), "lost"),
                _goal("no job is there twice", twice + len(rows) - len(feeder.promised), "too many"),
                _goal("no half-written file is left", len(left), "left"),
                _goal(
                    "a job that was killed gives the same bytes",
                    sum(max(len(found) - 1, 0) for found in videos.values()),
                    f"videos differ from others of the same request, {len(videos)} requests",
                ),
            ],
        ),
    ]


def _goal(goal: str, wrong: int, what: str) -> tuple[str, str, str]:
    return goal, f"{wrong} {what}", "met" if wrong == 0 else "**missed**"
