"""What ``make bench-check`` measures: ratios on the demonstration model, each against something in the same minutes.

Bundles are built anew, so that a slower graph is noticed too. The module knows no baseline.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import click

from reelforge.runtime.errors import BuildError

Samples = tuple[float, ...]
"""One ratio per round."""

STEP_ROUNDS, VIDEOS, VIDEO_STEPS, CAST_ROUNDS, IMPORT_ROUNDS = 9, 7, 20, 3, 7
CALIBRATION_PROMPTS, CALIBRATION_STEPS = 2, 4
OUR_IMPORT = "from reelforge.runtime import Pipeline, Request"
PEER_IMPORT = "import numpy, onnxruntime"


@dataclass
class Workbench:
    """Models of the measurements, built below an empty folder when they are first needed."""

    checkpoint: Path
    folder: Path
    built: list[str] = field(default_factory=list)

    @cached_property
    def fp32(self) -> Path:
        """The demonstration model's bundle in fp32."""
        return self._build("fp32")

    @cached_property
    def int8(self) -> Path:
        """Likewise in int8, calibrated on little: codes do not change the time."""
        prompts = self.checkpoint.parent / "calibration_prompts.txt"
        some = self.folder / "prompts.txt"
        some.write_text("\n".join(prompts.read_text(encoding="utf-8").splitlines()[:CALIBRATION_PROMPTS]) + "\n")
        options = ["--calibration-prompts", str(some), "--calibration-steps", str(CALIBRATION_STEPS), "--no-gate"]
        return self._build("int8", *options)

    @cached_property
    def block(self) -> Path:
        """A checkpoint of the published width with one block of each kind and random weights."""
        from reelforge.tools.synthesize import synthesize

        return synthesize(self.folder / "block", "block")

    def _build(self, precision: str, *options: str) -> Path:
        bundle = self.folder / f"{precision}.bundle"
        command = [sys.executable, "-m", "reelforge.tools.build_engine", str(self.checkpoint), "-o", str(bundle)]
        command += ["--precision", precision, "--json", *options]
        result = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if result.returncode:
            raise BuildError(
                f"the {precision} bundle of {self.checkpoint} could not be built for the measurements.",
                received=f"exit code {result.returncode} of build-engine",
                expected=result.stderr.strip().splitlines()[-1] if result.stderr.strip() else "exit code 0",
                fix=" ".join(command),
            )
        click.echo(f"built {precision}", err=True)
        return bundle


Measure = Callable[[Workbench], dict[str, Samples]]


@dataclass(frozen=True)
class Group:
    """Ratios that are measured together.

    Attributes:
        tolerances: By the ratio's name, for entries that are stored for the first time; the stored ones follow from
            the spread of several runs (``check --runs``).
        measure: Returns the samples of each.
        name: For the command line.
    """

    tolerances: dict[str, float]
    measure: Measure
    name: str = ""


INT8_STEP = "int8 step / fp32 step"
EAGER_STEP = "fp32 step / diffusers eager fp32 step"
LOOP = "loop besides the engine / fp32 engine"
QUANTISE = "quantising weights to int8 / plain cast"
IMPORT = "import of the runtime / of numpy and onnxruntime"


def steps(bench: Workbench) -> dict[str, Samples]:
    """Time a step of ours in fp32 and int8 and of diffusers' transformer, in turns."""
    import os

    import torch

    from reelforge.runtime.bundle.open import Bundle, Check
    from reelforge.tools.bench.dit_step_time import bundle_step, diffusers_step, random_inputs, take_turns

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with ExitStack() as stack:
        base = Bundle.open(bench.fp32, Check.SIZES)
        inputs = random_inputs(base)
        contenders = {
            "reelforge fp32": bundle_step(base, inputs, stack),
            "int8": bundle_step(Bundle.open(bench.int8, Check.SIZES), inputs, stack),
            "eager": diffusers_step(bench.checkpoint, inputs, torch.float32),
        }
        fp32, int8, eager = (timing.seconds for timing in take_turns(contenders, STEP_ROUNDS))
    return {INT8_STEP: _ratios(int8, fp32), EAGER_STEP: _ratios(fp32, eager)}


def loop(bench: Workbench) -> dict[str, Samples]:
    """Sample videos; per video, a step's time outside of ONNX Runtime's session over that inside."""
    from reelforge.tools.bench.runtime_overhead import FIRST_STEPS, measure

    run = measure(bench.fp32, "fp32", "real", None, VIDEO_STEPS, VIDEOS)
    count = VIDEO_STEPS - FIRST_STEPS
    starts = range(0, len(run.outside), count)
    medians = [[statistics.median(part[i : i + count]) for i in starts] for part in (run.outside, run.inside)]
    return {LOOP: _ratios(*medians)}


def quantise(bench: Workbench) -> dict[str, Samples]:
    """Quantise a checkpoint's weights, and cast them without scales, in processes in turn."""
    from reelforge.tools.bench.quantise_weights import run_pass

    rounds = [
        [run_pass([bench.block], bench.folder / "weights", "int8", plain).seconds for plain in (False, True)]
        for _ in range(CAST_ROUNDS)
    ]
    return {QUANTISE: _ratios(*zip(*rounds, strict=True))}


def imports(_bench: Workbench) -> dict[str, Samples]:
    """Import the runtime, and what it cannot do without, in fresh processes in turn."""
    from reelforge.tools.bench.runtime_start import measure_import

    rounds = [
        [measure_import("", statement, 1).seconds[0] for statement in (OUR_IMPORT, PEER_IMPORT)]
        for _ in range(IMPORT_ROUNDS)
    ]
    return {IMPORT: _ratios(*zip(*rounds, strict=True))}


def _ratios(ours: Samples | list[float], theirs: Samples | list[float]) -> Samples:
    return tuple(a / b for a, b in zip(ours, theirs, strict=True))


GROUPS: tuple[Group, ...] = (
    Group({INT8_STEP: 0.25, EAGER_STEP: 0.25}, steps, "steps"),
    Group({LOOP: 0.5}, loop, "loop"),
    Group({QUANTISE: 0.3}, quantise, "weights"),
    Group({IMPORT: 0.3}, imports, "import"),
)
