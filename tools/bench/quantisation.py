"""Benchmark of quantisation: ``python -m reelforge.tools.bench.quantisation -o benchmarks/quantisation.md``.

Run it from the repository's root, on an idle machine. The file has four sections, each of which is also kept as a
fragment in the work folder: ``--only`` measures some of them again and takes the others from there, and every section
says at which commit it was measured. What a section measures is in a module of its own.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click

from reelforge.calibration.scale_methods import ScaleMethod
from reelforge.runtime.recipe import Precision
from reelforge.tools.bench import (
    calibration_data,
    dit_step_time,
    quantisation_against_peers,
    quantisation_methods,
    quantise_weights,
    report,
    sections,
)
from reelforge.tools.bench.quantisation_workbench import CHANGED_STAGES, Variant, Workbench
from reelforge.tools.synthesize import synthesize

PACKAGES = ("onnxruntime", "onnx-ir", "onnx", "torch", "diffusers", "numpy", "ml_dtypes", "scikit-image")
TITLES = {
    "methods": "INT8 and FP8 on the demonstration model",
    "peers": "Other quantisers on the same graph",
    "weights": "Quantising the weights of 13 billion parameters",
    "steps": "INT8 on this CPU",
}
GOAL_SPEED = 2.0
STEP_STAGES = ("refiner", *CHANGED_STAGES)
STEP_PROMPTS = 2
STEP_STEPS = 2  # sampling steps that the scales of timed bundles are calibrated on
TIMING_ROUNDS = 7


@dataclass(frozen=True)
class Settings:
    """What the command line says about how much is measured."""

    checkpoint: Path
    peers_python: str | None
    repeats: int
    calibration: int
    evaluation: int
    recipe_prompts: int
    large: str | None

    def describe(self) -> str:
        """Return the counts in words, for the fragment."""
        return f"{self.repeats} repeats, {self.calibration} calibration and {self.evaluation} evaluation prompts"


class Sections:
    """Measures sections; bundles that several of them need are built once.

    Args:
        settings: How much.
        folder: An empty folder for everything, with 20 GB free for the weights.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder

    @cached_property
    def demo(self) -> Workbench:
        """The demonstration checkpoint's bundles."""
        return Workbench.open(self.settings.checkpoint, self.folder / "demo")

    @cached_property
    def large_checkpoint(self) -> Path | None:
        """A larger synthetic checkpoint."""
        size = self.settings.large
        return None if size is None else synthesize(self.folder / "large-checkpoint", size)

    @cached_property
    def large(self) -> Workbench | None:
        """Its bundles."""
        return None if self.large_checkpoint is None else Workbench.open(self.large_checkpoint, self.folder / "large")

    def methods(self) -> list[str]:
        """Return the section on formats and scale methods."""
        settings = self.settings
        return quantisation_methods.section(
            self.demo, settings.repeats, settings.calibration, settings.evaluation, settings.recipe_prompts
        )

    def peers(self) -> list[str]:
        """Return the section on other quantisers."""
        settings = self.settings
        return quantisation_against_peers.section(
            self.demo, self.large, settings.peers_python, settings.repeats, settings.calibration, settings.evaluation
        )

    def weights(self) -> list[str]:
        """Return the section on streaming weights."""
        return quantise_weights.section(self.folder / "weights", self.settings.repeats)

    def steps(self) -> list[str]:
        """Return the section on the time of a step."""
        cases = {"Demonstration model": (self.settings.checkpoint, self.demo)}
        if self.large is not None and self.large_checkpoint is not None:
            cases["A larger, synthetic model"] = (self.large_checkpoint, self.large)
        lines = [
            f"One `dit` step, all on the same weights and shapes; median of {TIMING_ROUNDS} rounds (smallest-largest),",
            "in which the contenders take turns on all cores, warm. All linear layers of the blocks are INT8 in ours.",
            "Diffusers' step contains token refiner and modulation, which a bundle computes once for all steps.",
        ]
        goals = []
        for name, (checkpoint, bench) in cases.items():
            bundle = _int8_bundle(bench)
            timings = dit_step_time.measure(checkpoint, bench.reference.path, {"reelforge int8": bundle}, TIMING_ROUNDS)
            shutil.rmtree(bundle)
            lines += ["", f"### {name}", "", dit_step_time.describe(bench.reference.path), ""]
            lines += dit_step_time.timing_lines(timings)
            goals.append((name, _speed(timings)))
        rows = [
            (f"INT8 at least {GOAL_SPEED:g} times as fast as our fp32: {name}", f"{speed:.2f} times", _met(speed))
            for name, speed in goals
        ]
        return [*lines, "", *report.table(("goal", "measured", ""), rows)]


def _int8_bundle(bench: Workbench) -> Path:
    """Build a bundle for timing; its scales need not be good."""
    prompts = [request.prompt for request in calibration_data.calibration_requests(STEP_PROMPTS)]
    observed = bench.observe(prompts, calibration_data.CALIBRATION_SEED, None, STEP_STEPS)
    scales = bench.scales(observed, Precision.INT8, ScaleMethod.MAX)
    return bench.build(Variant(Precision.INT8, scales), bench.folder / "int8.bundle", STEP_STAGES).path


def _speed(timings: list[dit_step_time.Timing]) -> float:
    seconds = {timing.contender: timing.seconds for timing in timings}
    pairs = zip(seconds[dit_step_time.BASE], seconds["reelforge int8"], strict=True)
    return statistics.median(base / ours for base, ours in pairs)


def _met(speed: float) -> str:
    return "met" if speed >= GOAL_SPEED else "**missed**"


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Markdown file.")
@sections.options(
    TITLES,
    "build/bench/quantisation",
    "Folder for fragments of sections, and while running for bundles (20 GB free for the weights).",
)
@click.option("--peers-python", help="Interpreter with tools/bench/requirements-peers.txt; else without ModelOpt.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1))
@click.option("--calibration", default=calibration_data.CALIBRATION_PROMPTS, show_default=True, help="Prompts.")
@click.option("--evaluation", default=calibration_data.EVALUATION_PROMPTS, show_default=True, help="Other prompts.")
@click.option(
    "--recipe-prompts",
    default=quantisation_methods.RECIPE_PROMPTS,
    show_default=True,
    help="Prompts that mixed-precision recipes are chosen on, those of the calibration among them.",
)
@click.option("--large", default="mid", show_default=True, help="Size of the synthetic model, or none.")
def main(
    output: Path,
    work: Path,
    only: tuple[str, ...],
    checkpoint: Path,
    peers_python: str | None,
    repeats: int,
    calibration: int,
    evaluation: int,
    recipe_prompts: int,
    large: str,
) -> None:
    """Measure quantisation and write one Markdown file."""
    work.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        checkpoint, peers_python, repeats, calibration, evaluation, recipe_prompts, None if large == "none" else large
    )
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        contents = Sections(settings, Path(scratch))
        measures: dict[str, Callable[[], list[str]]] = {
            "methods": contents.methods,
            "peers": contents.peers,
            "weights": contents.weights,
            "steps": contents.steps,
        }
        sections.measure_all(only, TITLES, measures, settings.describe(), _head, work, output)


def _head() -> list[str]:
    return [
        "# Quantisation",
        "",
        *report.environment("python -m reelforge.tools.bench.quantisation -o benchmarks/quantisation.md", PACKAGES),
        "",
        "Numbers of *seconds* and *ms* are of an otherwise idle machine. A goal that is missed is marked as such.",
    ]


if __name__ == "__main__":
    main()
