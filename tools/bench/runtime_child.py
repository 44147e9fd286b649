"""A system that generates videos, in a process of its own: ``python -m reelforge.tools.bench.runtime_child JOB``.

``JOB`` is a :class:`Job` as JSON; each line on stdin is a :class:`Task`, and each line on stdout an answer. The first
answer says when imports and opening were done. Times are of the clock that all processes share (``time.monotonic``).
Only what the job's system needs is imported: a bundle runs without PyTorch, and the answers say so.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reelforge.runtime.events import Pixels, to_uint8
from reelforge.runtime.noise import gaussian_noise

FORBIDDEN = ("torch", "onnx", "transformers", "diffusers")


@dataclass(frozen=True)
class Job:
    """What a process runs.

    Attributes:
        system: ``"reelforge"`` or ``"diffusers"``.
        path: A bundle, or a checkpoint in diffusers' layout.
        dtype: Of diffusers: ``"float32"`` or ``"bfloat16"``.
        compiled: Whether diffusers' transformer goes through ``torch.compile``.
    """

    system: str
    path: str
    dtype: str = "float32"
    compiled: bool = False


@dataclass(frozen=True)
class Task:
    """One video.

    Attributes:
        prompt: Its text.
        text_tokens: How many tokens it has without the template: diffusers is spared the padding.
        height: Pixels.
        width: Pixels.
        frames: Frames.
        steps: Sampling steps.
        guidance: Embedded guidance scale.
        seed: Of the noise, which both systems get from ``runtime.noise``.
        output: ``.mp4``: encoded while frames come, which the time contains; ``.npy``: written afterwards; or nothing.
        only_first_step: Stop when the first step is done.
    """

    prompt: str
    text_tokens: int
    height: int
    width: int
    frames: int
    steps: int
    guidance: float
    seed: int = 0
    output: str = ""
    only_first_step: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened: a unit of a phase was finished, or ``frames`` came out."""

    phase: str
    unit: int
    clock: float


@dataclass(frozen=True)
class Answer:
    """When a task began and was done, what happened between, and which of ``FORBIDDEN`` were loaded afterwards."""

    began: float
    marks: list[Mark]
    finished: float
    forbidden: list[str]


@dataclass(frozen=True)
class Opened:
    """The first answer: when things were done."""

    imported: float
    opened: float


MarkDown = Callable[[str, int], None]
Generate = Callable[[Task, MarkDown], Pixels | None]


class _EnoughError(Exception):
    """The first step is done."""


def reelforge(job: Job, imported: Callable[[], None]) -> Generate:
    """Open a bundle."""
    from reelforge.runtime import Frames, Pipeline, Progress, Request, VideoWriter

    imported()
    pipeline = Pipeline.open(job.path)

    def generate(task: Task, mark: MarkDown) -> Pixels | None:
        request = Request(
            prompt=task.prompt,
            height=task.height,
            width=task.width,
            frames=task.frames,
            steps=task.steps,
            seed=task.seed,
            guidance=task.guidance,
        )
        batches = []
        with ExitStack() as stack:
            video = None
            if task.output.endswith(".mp4"):
                rate = pipeline.spec.defaults.frames_per_second
                video = stack.enter_context(VideoWriter(task.output, task.height, task.width, task.frames, rate))
            for event in pipeline.stream(request):
                if isinstance(event, Progress):
                    mark(event.phase, event.step)
                elif isinstance(event, Frames):
                    mark("frames", event.start)
                    if video is None:
                        batches.append(event.pixels)
                    else:
                        video.write(event.pixels)
        return np.concatenate(batches) if batches else None

    return generate


def diffusers(job: Job, imported: Callable[[], None]) -> Generate:
    """Load a checkpoint into diffusers' own pipeline, on all cores."""
    import torch
    from diffusers import HunyuanVideoPipeline
    from diffusers.utils import logging

    imported()
    logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    pipeline = HunyuanVideoPipeline.from_pretrained(job.path, torch_dtype=getattr(torch, job.dtype))
    pipeline.set_progress_bar_config(disable=True)
    template = json.loads((Path(job.path) / "prompt_template.json").read_text(encoding="utf-8"))
    channels = pipeline.transformer.config.in_channels
    if job.compiled:
        pipeline.transformer.compile()

    def generate(task: Task, mark: MarkDown) -> Pixels | None:
        def stepped(_pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            mark("sampling", step + 1)
            return tensors

        shape = (1, channels, (task.frames - 1) // 4 + 1, task.height // 8, task.width // 8)
        video = pipeline(
            prompt=task.prompt,
            prompt_template=template,
            max_sequence_length=task.text_tokens,
            height=task.height,
            width=task.width,
            num_frames=task.frames,
            num_inference_steps=task.steps,
            guidance_scale=task.guidance,
            latents=torch.from_numpy(gaussian_noise(shape, task.seed)),
            callback_on_step_end=stepped,
            output_type="np",
        ).frames[0]
        return to_uint8(np.asarray(video, np.float32))

    return generate


SYSTEMS = {"reelforge": reelforge, "diffusers": diffusers}


def run_task(generate: Generate, task: Task) -> Answer:
    """Generate one video and say when what happened."""
    marks: list[Mark] = []

    def mark(phase: str, unit: int) -> None:
        marks.append(Mark(phase, unit, time.monotonic()))
        if task.only_first_step and phase == "sampling":
            raise _EnoughError

    began = time.monotonic()
    pixels = None
    with suppress(_EnoughError):
        pixels = generate(task, mark)
    finished = time.monotonic()
    if pixels is not None and task.output.endswith(".npy"):
        np.save(task.output, pixels)
    return Answer(began, marks, finished, loaded(FORBIDDEN))


def main() -> None:
    """Open the job's system, then do tasks until stdin ends."""
    job = Job(**json.loads(sys.argv[1]))
    imported: list[float] = []
    generate = SYSTEMS[job.system](job, lambda: imported.append(time.monotonic()))
    _say(Opened(imported[0], time.monotonic()))
    for line in sys.stdin:
        _say(run_task(generate, Task(**json.loads(line))))


def loaded(names: tuple[str, ...]) -> list[str]:
    """Return those of ``names`` that are imported."""
    return [name for name in names if name in sys.modules]


def _say(answer: Opened | Answer) -> None:
    sys.stdout.write(json.dumps(asdict(answer)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
