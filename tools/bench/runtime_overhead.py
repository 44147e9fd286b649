"""What a step costs besides its engine: the loop, the checks of its arrays, the binding, the check of its numbers.

A whole pipeline samples, and the consumer of its events takes the time of each step. From that the time that ONNX
Runtime's session spent is taken away; or there is no such time, because engine or session do nothing. The module knows
the ONNX Runtime engine's session, no model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.engines.engine import Array, Engine
from reelforge.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from reelforge.runtime.events import Progress
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.request import Request
from reelforge.tools.bench import report

GOAL_US = 100.0
SILENT_STEPS, REAL_STEPS, REAL_VIDEOS, LARGE_STEPS = 2000, 20, 15, 100
LARGE = (720, 1280, 129)
FIRST_STEPS = 2  # the loop has two buffers; what does nothing must have filled them with numbers once
PROMPT = "a red circle moving right on a black background"
SILENT_ENGINE, SILENT_SESSION = "an engine that does nothing", "a session that does nothing"


class SilentEngine:
    """An engine that computes nothing, after it wrote zeros into each of the loop's buffers."""

    def __init__(self, engine: Engine) -> None:
        self.name, self.inputs, self.outputs = engine.name, engine.inputs, engine.outputs
        self._calls = 0

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None] | None = None) -> dict[str, Array]:  # noqa: ARG002
        """Do nothing."""
        targets = {name: array for name, array in (outputs or {}).items() if array is not None}
        if self._calls < FIRST_STEPS:
            self._calls += 1
            for array in targets.values():
                array.fill(0)
        return targets

    def close(self) -> None:
        """Nothing to give back."""


class WatchedSession:
    """ONNX Runtime's session with a clock around its work.

    Args:
        session: The session.
        works: Whether it still does its work after the first calls.
    """

    def __init__(self, session: Any, works: bool) -> None:
        self._session = session
        self._works = works
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, *arguments: Any) -> None:
        """Run, and take the time."""
        started = time.perf_counter()
        if self._works or len(self.seconds) < FIRST_STEPS:
            self._session.run_with_iobinding(*arguments)
        self.seconds.append(time.perf_counter() - started)


class WatchedPipeline(Pipeline):
    """A pipeline whose ``dit`` is watched, or does nothing."""

    dit = "real"
    watched: WatchedSession | None = None

    @contextmanager
    def engine(self, stage: str) -> Iterator[Engine]:
        """Lend a stage's engine; ``dit`` as ``self.dit`` says."""
        with super().engine(stage) as engine:
            if stage != "dit":
                yield engine
            elif self.dit == SILENT_ENGINE:
                yield SilentEngine(engine)
            else:
                assert isinstance(engine, OnnxRuntimeEngine)
                session = engine._session
                engine._session = self.watched = WatchedSession(session, works=self.dit == "real")
                try:
                    yield engine
                finally:
                    engine._session = session


@dataclass(frozen=True)
class Overhead:
    """Seconds of steps besides the session's, and the session's."""

    what: str
    shape: str
    outside: tuple[float, ...]
    inside: tuple[float, ...]


def measure(bundle: Path, what: str, dit: str, size: tuple[int, int, int] | None, steps: int, videos: int) -> Overhead:
    """Sample videos and return what each step but the first ones took outside of the session.

    Args:
        bundle: To run.
        what: For the table.
        dit: ``"real"``, ``SILENT_ENGINE`` or ``SILENT_SESSION``.
        size: Height, width and frames; None means the model's own.
        steps: Of each video.
        videos: How many.
    """
    outside: list[float] = []
    inside: list[float] = []
    with WatchedPipeline(Bundle.open(bundle, Check.SIZES)) as pipeline:
        pipeline.dit = dit
        for seed in range(videos):
            height, width, frames = size or (None, None, None)
            request = Request(PROMPT, height, width, frames, steps=steps, seed=seed)
            taken = step_seconds(lambda request=request: pipeline.stream(request))  # type: ignore[misc]
            engine = pipeline.watched.seconds if pipeline.watched is not None else [0.0] * len(taken)
            engine = engine[: len(taken)]  # behind the last step the loop's memory is given back
            # The first step's time contains loading the engine.
            outside += [all_s - engine_s for all_s, engine_s in zip(taken, engine, strict=True)][FIRST_STEPS:]
            inside += engine[FIRST_STEPS:]
        shape = pipeline.resolve(request).shape
    return Overhead(what, f"{shape.height}x{shape.width}x{shape.frames}", tuple(outside), tuple(inside))


def step_seconds(stream: Callable[[], Iterator[object]]) -> list[float]:
    """Return how long each sampling step kept the consumer of a stream waiting; the stream is left after the last."""
    events = stream()
    taken = []
    while True:
        started = time.perf_counter()
        event = next(events)
        seconds = time.perf_counter() - started
        if isinstance(event, Progress) and event.phase == "sampling":
            taken.append(seconds)
            if event.step == event.total:
                close = getattr(events, "close", None)
                if close is not None:
                    close()
                return taken


def section(fp32: Path, int8: Path) -> list[str]:
    """Return the section on the loop's overhead.

    Args:
        fp32: The demonstration model's bundle.
        int8: Likewise, quantised.
    """
    rows = [
        measure(fp32, SILENT_ENGINE, SILENT_ENGINE, None, SILENT_STEPS, 1),
        measure(fp32, SILENT_SESSION, SILENT_SESSION, None, SILENT_STEPS, 1),
        measure(fp32, "the fp32 engine", "real", None, REAL_STEPS, REAL_VIDEOS),
        measure(int8, "the int8 engine", "real", None, REAL_STEPS, REAL_VIDEOS),
        measure(fp32, SILENT_ENGINE, SILENT_ENGINE, LARGE, LARGE_STEPS, 1),
    ]
    worst = max(np.median(row.outside) for row in rows[2:4]) * 1e6
    return [
        "Between two events of `Pipeline.stream` one step is done. Its time without that inside ONNX Runtime's",
        "session is the loop's: choosing what the step reads (all is bound before the first), looking whether all",
        "latents are finite, the event itself. *An engine that does nothing* leaves only the loop; *a session that",
        "does nothing* adds our engine class around it. The first two steps of a video are left out: they contain",
        "loading.",
        "",
        *report.table(
            ("with", "video", "steps", "us outside of the session, p50", "p95", "ms inside, p50"), map(_row, rows)
        ),
        "",
        "The last row is the published model's size, where the latents are 30 MB: looking at them is nearly all of it,",
        "and a step there takes seconds.",
        "",
        *report.table(
            ("goal", "measured", ""),
            [
                (
                    f"less than {GOAL_US:.0f} us per step outside of the engine (p50, real engines)",
                    f"{worst:.0f} us",
                    "met" if worst < GOAL_US else "**missed**",
                )
            ],
        ),
    ]


def _row(row: Overhead) -> Sequence[object]:
    p50, p95 = np.percentile(row.outside, (50, 95)) * 1e6
    inside = f"{np.median(row.inside) * 1e3:.2f}" if any(row.inside) else "-"
    return row.what, row.shape, len(row.outside), f"{p50:.0f}", f"{p95:.0f}", inside
