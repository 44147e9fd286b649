"""Many clients at once on a real service, beside one pipeline in a loop: a part of the service's benchmark.

The clients are in this process, on the same machine: what they take, the service does not have.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from reelforge.runtime import Pipeline, Request, VideoWriter
from reelforge.tools.bench import report
from tests.tools.service.process import ServiceProcess

CLIENTS = 64
SIZES = ((64, 64, 9, 20), (96, 64, 9, 16), (64, 96, 17, 12), (128, 128, 9, 10))  # width, height, frames, steps
PROMPTS = ("a red circle moving right on a black background", "a blue square", "a green circle moving up")
GOAL = 0.97


@dataclass
class Timings:
    """What the clients saw, in seconds."""

    accepted: list[float] = field(default_factory=list)
    first_event: list[float] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    refused: int = 0
    seconds: float = 0.0


def requests(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Return bodies of requests of mixed sizes, no two alike."""
    found = []
    for number in range(first, first + count):
        width, height, frames, steps = SIZES[number % len(SIZES)]
        prompt = PROMPTS[number % len(PROMPTS)]
        found.append({"prompt": prompt, "size": f"{width}x{height}", "frames": frames, "steps": steps, "seed": number})
    return found


def in_a_loop(pipeline: Pipeline, bodies: list[dict[str, Any]], folder: Path) -> float:
    """Return how long one pipeline takes, one video after the other, each written to an mp4 file."""
    started = time.monotonic()
    rate = pipeline.spec.defaults.frames_per_second
    for number, body in enumerate(bodies):
        width, height = (int(side) for side in body["size"].split("x"))
        asked = Request(body["prompt"], height, width, body["frames"], body["steps"], body["seed"])
        with VideoWriter(folder / f"{number}.mp4", height, width, body["frames"], rate) as video:
            video.write(pipeline.generate(asked))
    return time.monotonic() - started


async def clients(url: str, bodies: list[dict[str, Any]], count: int = CLIENTS) -> Timings:
    """Send requests from many clients at once; each sends its next one when its last video is there."""
    told = Timings()
    todo = iter(bodies)
    limits = httpx.Limits(max_connections=None)

    async def one(client: httpx.AsyncClient) -> None:
        for body in todo:
            await _follow(client, body, told)

    async with httpx.AsyncClient(base_url=url, timeout=600.0, limits=limits) as client:
        started = time.monotonic()
        await asyncio.gather(*(one(client) for _ in range(count)))
        told.seconds = time.monotonic() - started
    return told


async def _follow(client: httpx.AsyncClient, body: dict[str, Any], told: Timings) -> None:
    began = time.monotonic()
    while (answer := await client.post("/v1/videos", json=body)).status_code == 429:
        told.refused += 1
        await asyncio.sleep(float(answer.headers["retry-after"]))
        began = time.monotonic()
    answer.raise_for_status()
    told.accepted.append(time.monotonic() - began)
    job_id = answer.json()["id"]
    told.jobs.append(job_id)
    first, last = None, ""
    async with client.stream("GET", f"/v1/videos/{job_id}/events") as events:
        async for line in events.aiter_lines():
            if line.startswith("event: "):
                first = time.monotonic() if first is None else first
                last = line.removeprefix("event: ")
    told.first_event.append((first or time.monotonic()) - began)
    told.ends.append(last)


def section(bundle: Path, work: Path, jobs: int, rounds: int) -> list[str]:
    """Measure, and return the section's lines."""
    bodies = requests(jobs)
    loops: list[float] = []
    services: dict[str, list[Timings]] = {"with previews": [], "--no-previews": []}
    folder = work / "loop"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(rounds):
        with Pipeline.open(bundle) as pipeline:
            in_a_loop(pipeline, bodies[: len(SIZES)], folder)
            loops.append(in_a_loop(pipeline, bodies, folder))
        for name, found in services.items():
            process = ServiceProcess(bundle, work / f"load-{number}-{name.strip('-')}", threads=None)
            process.options = ("--queue-per-key", "256", *([name] if name.startswith("--") else []))
            process.start()
            asyncio.run(clients(process.url, requests(len(SIZES), first=10_000), count=1))
            found.append(asyncio.run(clients(process.url, bodies)))
            process.terminate()
            process.wait()
    return _lines(loops, services, jobs)


def _lines(loops: list[float], services: dict[str, list[Timings]], jobs: int) -> list[str]:
    rows, ratios, lost = [], {}, 0
    for name, found in services.items():
        accepted = sorted(1e3 * value for told in found for value in told.accepted)
        events = sorted(1e3 * value for told in found for value in told.first_event)
        ratios[name] = [loop / told.seconds for loop, told in zip(loops, found, strict=True)]
        lost += sum(jobs - told.ends.count("completed") for told in found)
        rows.append(
            (
                name,
                f"{statistics.median(accepted):.0f}",
                f"{_p95(accepted):.0f}",
                f"{statistics.median(events):.0f}",
                f"{_p95(events):.0f}",
                report.spread([jobs / told.seconds for told in found], 2),
                report.spread(ratios[name], 3),
            )
        )
    best = {name: statistics.median(values) for name, values in ratios.items()}
    sizes = ", ".join(f"{width}x{height}x{frames} in {steps} steps" for width, height, frames, steps in SIZES)
    return [
        *report.prose(
            f"{CLIENTS} clients ask for {jobs} videos of the demonstration model in turn ({sizes}), each with a stream "
            "of events open until its video is there. Clients, service and model share the machine's two cores. In the "
            f"loop one pipeline makes the same videos and writes the same files, {report.spread(loops)} s. Ratios are "
            "of times in the same round."
        ),
        "",
        *report.table(
            ("service", "ms to acceptance, p50", "p95", "ms to first event, p50", "p95", "videos/s", "beside the loop"),
            rows,
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


def _p95(ranked: list[float]) -> float:
    return ranked[max(-(-95 * len(ranked) // 100) - 1, 0)]
