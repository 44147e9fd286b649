"""Memory over time while videos of several lengths are generated and encoded: what grows with the length, and what not.

The module knows the phases of a generation; the picture is drawn by ``runtime_memory_chart``.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reelforge.tools.bench import report
from reelforge.tools.bench.runtime_bundles import task
from reelforge.tools.bench.runtime_child import Answer, Job
from reelforge.tools.bench.runtime_memory_chart import Curve, draw
from reelforge.tools.bench.runtime_processes import Contender, Sample, Trace

STEPS = 2
INTERVAL_S = 0.01
WINDOWED = 65
"""Frames of the shortest video that has more than one window."""
FLAT = 1.05
"""A longer video may take so many times its memory in the output path, in medians."""
PROMPT = "a red circle moving right on a black background"
SETTLE_S = 0.3  # samples before the request, which show what an open pipeline holds


@dataclass(frozen=True)
class Case:
    """What is measured of one model.

    Attributes:
        title: The model's.
        bundle: Of the target ``cpu``.
        size: Pixels of a side.
        lengths: Frames of each video; ``WINDOWED`` is one of them.
        rounds: How often each is made.
    """

    title: str
    bundle: Path
    size: int
    lengths: tuple[int, ...]
    rounds: int

    @property
    def name(self) -> str:
        """Model and size, for headings."""
        return f"{self.title}, {self.size}x{self.size}"


@dataclass(frozen=True)
class Length:
    """One video.

    Attributes:
        frames: Its length.
        size: Pixels of a side.
        idle_bytes: Anonymous memory of the process before the request.
        decoding_bytes: Peak of anonymous memory from the last step to the finished file.
        halves: Likewise, of the first and of the second half of that time.
        sampling_bytes: Peak of anonymous memory before that.
        decoding_s: How long it took.
        file_bytes: The mp4 file's size.
        curve: Over time, for the picture.
    """

    frames: int
    size: int
    idle_bytes: int
    decoding_bytes: int
    halves: tuple[int, int]
    sampling_bytes: int
    decoding_s: float
    file_bytes: int
    curve: Curve

    @property
    def raw_bytes(self) -> int:
        """What all frames take as fp32."""
        return self.frames * self.size**2 * 3 * 4


def measure(bundle: Path, size: int, frames: int) -> Length:
    """Generate one square video into an mp4 file, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "video.mp4"
        wanted = replace(task(bundle, PROMPT, STEPS, (size, size, frames)), output=str(output))
        with Contender(f"{frames} frames", Job("reelforge", str(bundle)), interval_s=INTERVAL_S) as process:
            answer = process.ask(wanted)
            trace = process.trace
        file_bytes = output.stat().st_size
    return length_of(frames, size, trace, answer, file_bytes)


def length_of(frames: int, size: int, trace: Trace, answer: Answer, file_bytes: int) -> Length:
    """Return the peaks of one video's phases."""
    steps = [mark.clock for mark in answer.marks if mark.phase == "sampling"]
    begin, end = steps[-1], answer.finished
    middle = (begin + end) / 2
    before = [sample for sample in trace.samples if sample.clock < answer.began]
    shown = [sample for sample in trace.samples if answer.began - SETTLE_S <= sample.clock <= end]
    points = tuple((sample.clock - answer.began, sample.anonymous_bytes) for sample in shown)
    return Length(
        frames,
        size,
        before[-1].anonymous_bytes if before else 0,
        _peak(trace.between(begin, end)),
        (_peak(trace.between(begin, middle)), _peak(trace.between(middle, end))),
        _peak(trace.between(answer.began, begin)),
        end - begin,
        file_bytes,
        Curve(f"{frames} frames", points, begin - answer.began, end - answer.began),
    )


def section(cases: Sequence[Case], picture: Path) -> list[str]:
    """Measure all lengths of all cases, draw them, and return the section.

    Args:
        cases: The models.
        picture: The SVG file, in the folder of the benchmark's file.
    """
    measured = [measure_case(case) for case in cases]
    # Of each length the first round: all of them would hide one another.
    draw(
        [(case.name, [runs[0].curve for runs in videos]) for case, videos in zip(cases, measured, strict=True)], picture
    )
    lines = [
        f"Videos of several lengths ({STEPS} steps) go to an mp4 file while they are decoded,",
        f"each in a process of its own, whose anonymous memory is read every {INTERVAL_S * 1e3:.0f} ms. Up to 61",
        "frames are one window of the decoder; longer videos have windows of 65 frames, of which 48 are new.",
        "Frames are written as soon as their window is blended. *Output path*: from the last step to the end.",
        "Lengths take turns, the whole row again in each round; numbers are medians (smallest-largest). The picture",
        "shows the first round.",
        "",
        f"![memory over time]({picture.name})",
    ]
    for case, videos in zip(cases, measured, strict=True):
        lines += ["", f"### {case.name}, {case.rounds} rounds", "", *_table(videos)]
    goals = [goal for case, videos in zip(cases, measured, strict=True) for goal in goals_of(case.title, videos)]
    return [*lines, "", *report.table(("goal", "measured", ""), goals)]


def measure_case(case: Case) -> list[list[Length]]:
    """Return the runs of each length, which take turns."""
    rounds = [[measure(case.bundle, case.size, frames) for frames in case.lengths] for _ in range(case.rounds)]
    return [list(runs) for runs in zip(*rounds, strict=True)]


def goals_of(title: str, videos: Sequence[Sequence[Length]]) -> list[tuple[str, str, str]]:
    """Return a row for each length above ``WINDOWED``: its median in the output path beside that one's."""
    peaks = {runs[0].frames: statistics.median(one.decoding_bytes for one in runs) for runs in videos}
    ratios = {frames: peak / peaks[WINDOWED] for frames, peak in peaks.items() if frames > WINDOWED}
    return [
        (
            f"{title}: flat in the output path ({frames} frames at most {FLAT:g} times {WINDOWED})",
            f"{ratio:.2f} times",
            "met" if ratio <= FLAT else "**missed**",
        )
        for frames, ratio in ratios.items()
    ]


def _table(videos: Sequence[Sequence[Length]]) -> list[str]:
    headings = (
        "frames",
        "all frames as fp32, MB",
        "idle MB",
        "peak before the output path, MB",
        "peak in the output path, MB",
        "first half",
        "second half",
        "s of the output path",
        "mp4 kB",
    )

    def megabytes(values: Sequence[int]) -> str:
        return report.spread([value / 1e6 for value in values], 0)

    rows = [
        (
            runs[0].frames,
            f"{runs[0].raw_bytes / 1e6:.1f}",
            megabytes([one.idle_bytes for one in runs]),
            megabytes([one.sampling_bytes for one in runs]),
            megabytes([one.decoding_bytes for one in runs]),
            megabytes([one.halves[0] for one in runs]),
            megabytes([one.halves[1] for one in runs]),
            report.spread([one.decoding_s for one in runs]),
            f"{runs[0].file_bytes / 1e3:.0f}",
        )
        for runs in videos
    ]
    return report.table(headings, rows)


def _peak(samples: Sequence[Sample]) -> int:
    return max((sample.anonymous_bytes for sample in samples), default=0)
