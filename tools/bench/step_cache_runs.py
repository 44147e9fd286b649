"""Generations of the demonstration checkpoint with and without step caching, and what became of them.

The module knows the pipeline and the checker of the demo's world; it writes no report.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reelforge.runtime.events import Frames, Progress
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.request import Request
from reelforge.runtime.step_cache.settings import StepCache
from reelforge.tools.bench.demo_model import Case, judge

Video = NDArray[np.float32]


@dataclass(frozen=True)
class Setting:
    """One way to sample: a number of steps, all computed, or fewer of them by a step cache.

    Attributes:
        series: What it is a point of, for tables and lines.
        label: Its own name in the series: a threshold, or a number of steps.
        steps: Of the schedule.
        cache: As the command line writes it; empty computes every step.
    """

    series: str
    label: str
    steps: int
    cache: str = ""


@dataclass(frozen=True)
class Clip:
    """One generation.

    Attributes:
        video: float32 ``[frames, height, width, 3]`` in [0, 1].
        evaluations: Of the model.
        loop_s: From the end of the first step to that of the last.
        cpu_s: Of this process in that time; of one thread it hardly depends on what else the machine does.
    """

    video: Video
    evaluations: int
    loop_s: float
    cpu_s: float


@dataclass(frozen=True)
class Point:
    """What a setting came to over all cases.

    Attributes:
        setting: Which one.
        evaluations: Of the model, of each case.
        errors: Mean squared error of each video against that of the full run with the same noise.
        accuracy: Share of videos that show what the prompt says, in all four respects.
        loop_s: Of each case and repeat.
        cpu_s: Likewise.
    """

    setting: Setting
    evaluations: tuple[int, ...]
    errors: tuple[float, ...]
    accuracy: float
    loop_s: tuple[float, ...]
    cpu_s: tuple[float, ...]

    @property
    def mean_evaluations(self) -> float:
        """Mean over the cases."""
        return float(np.mean(self.evaluations))

    @property
    def psnr_db(self) -> float:
        """Of all videos together; infinite where all are equal to the full run's."""
        return psnr(float(np.mean(self.errors)))

    @property
    def lowest_db(self) -> float:
        """Of the worst video."""
        return psnr(max(self.errors))


def psnr(error: float) -> float:
    """Return the peak signal-to-noise ratio in dB of a mean squared error at a peak of 1."""
    return math.inf if error == 0 else -10 * math.log10(error)


def generate(pipeline: Pipeline, case: Case, seed: int, setting: Setting) -> Clip:
    """Generate one video."""
    cache = StepCache.parse(setting.cache) if setting.cache else None
    request = Request(case.prompt, steps=setting.steps, seed=seed, step_cache=cache)
    batches, ends, skipped = [], [], 0
    cpu_ends = []
    for event in pipeline.stream(request):
        if isinstance(event, Frames):
            batches.append(event.values)
        elif isinstance(event, Progress) and event.phase == "sampling":
            ends.append(time.perf_counter())
            cpu_ends.append(time.process_time())
            skipped = event.skipped
    return Clip(np.concatenate(batches), setting.steps - skipped, ends[-1] - ends[0], cpu_ends[-1] - cpu_ends[0])


def measure(
    pipeline: Pipeline,
    cases: Sequence[Case],
    settings: Sequence[Setting],
    full: Setting,
    repeats: int,
    tell: Callable[[str], None],
) -> list[Point]:
    """Generate every case with every setting.

    Args:
        pipeline: Of the demonstration checkpoint.
        cases: What to generate; the number of a case is its seed.
        settings: What to compare with ``full``, which is the first point returned.
        full: The whole run.
        repeats: How often each generation is made; videos are equal, times are not.
        tell: Told one line per setting.
    """
    references = [generate(pipeline, case, seed, full).video for seed, case in enumerate(cases)]
    points = []
    for setting in (full, *settings):
        videos, evaluations = [], []
        times: list[float] = []
        cpu_times: list[float] = []
        for seed, case in enumerate(cases):
            clips = [generate(pipeline, case, seed, setting) for _ in range(repeats)]
            if any(not np.array_equal(clip.video, clips[0].video) for clip in clips):
                raise AssertionError("the same request gave two videos")
            videos.append(clips[0].video)
            evaluations.append(clips[0].evaluations)
            times += [clip.loop_s for clip in clips]
            cpu_times += [clip.cpu_s for clip in clips]
        errors = tuple(
            float(np.mean((one.astype(np.float64) - other) ** 2)) for one, other in zip(videos, references, strict=True)
        )
        accuracy = judge([video.transpose(0, 3, 1, 2) for video in videos], cases)["together"]
        points.append(Point(setting, tuple(evaluations), errors, accuracy, tuple(times), tuple(cpu_times)))
        tell(
            f"{setting.series} {setting.label}: {points[-1].mean_evaluations:.1f} evaluations, "
            f"{points[-1].psnr_db:.1f} dB, lowest {points[-1].lowest_db:.1f} dB, {accuracy:.3f} right"
        )
    return points


def line(points: Sequence[Point], value: Callable[[Point], float], evaluations: float) -> float:
    """Return a series' value at a number of evaluations, interpolated between its points.

    Args:
        points: Of one series.
        value: Which value.
        evaluations: Inside of the range that the points span.
    """
    ordered = sorted(points, key=lambda point: point.mean_evaluations)
    places = [point.mean_evaluations for point in ordered]
    return float(np.interp(evaluations, places, [value(point) for point in ordered]))


def settings_of(steps: int, ratios: Path, coefficients: Path) -> list[Setting]:
    """Return what is compared: fewer steps, and each method over its thresholds.

    Args:
        steps: Of the full run.
        ratios: What MagCache knows.
        coefficients: What TeaCache knows.
    """
    fewer = sorted({max(round(steps * share), 1) for share in np.linspace(0.25, 0.95, 15)})
    made = [Setting("fewer steps", str(number), number) for number in fewer]
    long = f"max-skips={steps}"
    methods = (
        ("EasyCache", "easycache", (0.025, 0.05, 0.08, 0.12, 0.2, 0.3), "", f",reuse=residual,{long}"),
        ("MagCache", "magcache", (0.03, 0.06, 0.12, 0.24), f",ratios={ratios}", ",reuse=residual"),
        ("TeaCache", "teacache", (0.05, 0.08, 0.1, 0.15), f",coefficients={coefficients}", f",reuse=tokens,{long}"),
        ("First-block cache", "fbcache", (0.03, 0.06, 0.1, 0.15, 0.25), "", f",reuse=tokens,{long}"),
    )
    for series, word, thresholds, measured, published in methods:
        for suffix, settings in (("", ""), (" as published", published)):
            for threshold in thresholds:
                text = f"{word}:{threshold}{measured}{settings}"
                made.append(Setting(f"{series}{suffix}", f"{threshold:g}", steps, text))
    return made
