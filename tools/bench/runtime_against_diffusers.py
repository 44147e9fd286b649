"""End-to-end generation beside diffusers' own pipeline: the same weights, prompts, steps and noise, on the same CPU.

Every contender is a process of its own; they take turns, and a disturbance of the machine meets all of them. Memory is
sampled over each process's whole life. The module knows no model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np

from reelforge.tools.bench import report
from reelforge.tools.bench.runtime_child import Answer, Job, Task
from reelforge.tools.bench.runtime_processes import Contender

GOAL_INT8 = 2.0
WARM_STEPS = 2
PAUSE_S = 0.5  # idle threads of the contender before have stopped spinning by then
FP32, INT8, EAGER = "reelforge fp32", "reelforge int8", "diffusers fp32"
INT8_DECODER = "reelforge int8, decoder too"
# Of one length in any tokenizer, be it of words or of letters.
PROMPTS = (
    "a red circle moving left on a black background",
    "a red square moving left on a white background",
    "a red circle moving down on a white background",
    "a red square moving down on a black background",
    "a red circle moving left on a white background",
)


@dataclass(frozen=True)
class Run:
    """One contender.

    Attributes:
        name: For the table.
        seconds: Of whole videos, one per round: from the prompt to 8-bit frames.
        steps: Seconds of a step, one per round, without the first step, which may contain loading.
        decoding: Seconds from the last step to the frames, one per round.
        first: Seconds of the video before the rounds, which compiles or loads.
        psnr_db: Of the last round's frames from those of ``EAGER``; infinity if equal.
        anonymous_bytes: Peak of anonymous memory.
        file_bytes: Peak of mapped files in memory.
    """

    name: str
    seconds: tuple[float, ...]
    steps: tuple[float, ...]
    decoding: tuple[float, ...]
    first: float
    psnr_db: float
    anonymous_bytes: int
    file_bytes: int


def jobs(checkpoint: Path, bundles: Mapping[str, Path], compiled: Sequence[str]) -> dict[str, Job]:
    """Return the contenders: our bundles, diffusers eager, and diffusers compiled in the types ``compiled``."""
    contenders = {name: Job("reelforge", str(bundle)) for name, bundle in bundles.items()}
    for name, dtype in {"fp32": "float32", "bf16": "bfloat16"}.items():
        contenders[f"diffusers {name}"] = Job("diffusers", str(checkpoint), dtype)
        if name in compiled:
            contenders[f"diffusers {name}, torch.compile"] = Job("diffusers", str(checkpoint), dtype, compiled=True)
    return contenders


def measure(contenders: Mapping[str, Job], tasks: Sequence[Task], folder: Path) -> list[Run]:
    """Let all contenders generate all videos in turns.

    Args:
        contenders: By name; ``EAGER`` among them.
        tasks: The first is not counted; then a round each. Their prompts must have one length, so that nothing is
            compiled again.
        folder: For frames and compiled code; it is reused by a later run.
    """
    if len({task.text_tokens for task in tasks}) != 1:
        raise AssertionError(f"prompts of different lengths: {[task.text_tokens for task in tasks]}")
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(folder.absolute() / "inductor")}
    names = list(contenders)
    answers: dict[str, list[Answer]] = {name: [] for name in names}
    frames = {name: folder / f"{index}.npy" for index, name in enumerate(names)}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(Contender(name, job, environment)) for name, job in contenders.items()}
        for turn, task in enumerate(tasks):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                time.sleep(PAUSE_S)
                # The first video only warms up. Compiled code is the same for any number of steps but one.
                asked = replace(task, output=str(frames[name])) if turn else replace(task, steps=WARM_STEPS)
                answers[name].append(processes[name].ask(asked))
                click.echo(f"{name}: {answers[name][-1].finished - answers[name][-1].began:.2f} s")
        traces = {name: process.trace for name, process in processes.items()}
    reference = np.load(frames[EAGER])
    runs = []
    for name in names:
        first, *counted = answers[name]
        pairs = [step_and_decoding(answer) for answer in counted]
        runs.append(
            Run(
                name,
                tuple(answer.finished - answer.began for answer in counted),
                tuple(step for step, _ in pairs),
                tuple(decoding for _, decoding in pairs),
                first.finished - first.began,
                psnr_db(np.load(frames[name]), reference),
                traces[name].peak_anonymous_bytes,
                traces[name].peak_file_bytes,
            )
        )
    return runs


def step_and_decoding(answer: Answer) -> tuple[float, float]:
    """Return the mean seconds of a step after the first, and those from the last step to the end."""
    steps = [mark.clock for mark in answer.marks if mark.phase == "sampling"]
    mean = (steps[-1] - steps[0]) / (len(steps) - 1) if len(steps) > 1 else float("nan")
    return mean, answer.finished - steps[-1]


def psnr_db(frames: np.ndarray, reference: np.ndarray) -> float:
    """Return the PSNR of 8-bit frames, infinity if they are equal."""
    error = float(np.mean((frames.astype(np.float64) - reference) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def case_lines(runs: Sequence[Run]) -> list[str]:
    """Return the table of one model and its goals; ratios are of times in the same round."""
    by_name = {run.name: run for run in runs}
    eager, best = by_name[EAGER], best_peer(runs)
    rows = [
        (
            run.name,
            report.spread(run.seconds, digits=2),
            report.spread(ratios(eager, run), digits=2),
            report.spread(ratios(best, run), digits=2),
            report.spread([seconds * 1e3 for seconds in run.steps], digits=1 if run.steps[0] < 1 else 0),
            report.spread(run.decoding, digits=2),
            f"{run.first:.1f}",
            "-" if run.name == EAGER else "equal" if run.psnr_db == float("inf") else f"{run.psnr_db:.1f}",
            f"{run.anonymous_bytes / 1e6:.0f}",
            f"{run.file_bytes / 1e6:.0f}",
        )
        for run in runs
    ]
    headings = (
        "",
        "s per video",
        f"times as fast as {EAGER}",
        f"as {best.name}",
        "ms per step",
        "s of decoding",
        f"s of the first, {WARM_STEPS} steps",
        "PSNR dB",
        "peak anonymous MB",
        "peak file-backed MB",
    )
    return [*report.table(headings, rows), "", *report.table(("goal", "measured", ""), goals(runs))]


def goals(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Return the goals as rows."""
    by_name = {run.name: run for run in runs}
    best = best_peer(runs)
    faster = statistics.median(ratios(by_name[EAGER], by_name[FP32]))
    rows = [("fp32 faster than eager fp32", f"{faster:.2f} times as fast", _met(faster > 1))]
    eight_bit = [name for name in (INT8, INT8_DECODER) if name in by_name]
    for name in eight_bit:
        times = statistics.median(ratios(best, by_name[name]))
        what = f"{name}: at least {GOAL_INT8:g} times as fast as the best of diffusers"
        rows.append((what, f"{times:.2f} times as fast as {best.name}", _met(times >= GOAL_INT8)))
    peers = [run for run in runs if run.name.startswith("diffusers")]
    smallest = min(peers, key=lambda run: run.anonymous_bytes)
    for name in (FP32, *eight_bit):
        ours = by_name[name]
        text = (
            f"{ours.anonymous_bytes / 1e6:.0f} MB, the smallest {smallest.anonymous_bytes / 1e6:.0f} ({smallest.name})"
        )
        rows.append((f"{name}: less peak memory than any", text, _met(ours.anonymous_bytes < smallest.anonymous_bytes)))
    return rows


def best_peer(runs: Sequence[Run]) -> Run:
    """Return the fastest of diffusers."""
    return min(
        (run for run in runs if run.name.startswith("diffusers")), key=lambda run: statistics.median(run.seconds)
    )


def ratios(theirs: Run, ours: Run) -> list[float]:
    """Return how many times as fast ``ours`` was, by round."""
    return [other / own for other, own in zip(theirs.seconds, ours.seconds, strict=True)]


def _met(met: bool) -> str:
    return "met" if met else "**missed**"
