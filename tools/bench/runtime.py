"""Benchmark of the runtime: ``python -m reelforge.tools.bench.runtime -o benchmarks/runtime.md``.

Run it from the repository's root, on an idle machine. Each section is also kept as a fragment in the work folder:
``--only`` measures some of them again and takes the others from there, and every section says at which commit it was
measured. What a section measures is in a module of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from reelforge.tools.bench import (
    report,
    runtime_against_diffusers,
    runtime_decoder,
    runtime_memory,
    runtime_overhead,
    runtime_start,
    sections,
)
from reelforge.tools.bench.runtime_against_diffusers import EAGER, FP32, INT8, INT8_DECODER, PROMPTS
from reelforge.tools.bench.runtime_bundles import EIGHT_BIT, Models, task
from reelforge.tools.bench.runtime_child import Task
from reelforge.tools.bench.runtime_soak import BLOCKS

PACKAGES = ("onnxruntime", "numpy", "av", "tokenizers", "torch", "diffusers", "transformers")
TITLES = {
    "overhead": "The loop beside its engine",
    "import": "Import",
    "start": "Cold start",
    "demo": "Beside diffusers: the demonstration model",
    "mid": "Beside diffusers: 0.3 billion parameters",
    "decoder": "Decoding in 8 bits",
    "memory": "Memory over time",
    "soak": "200 requests of mixed sizes",
}
DEMO_STEPS, MID_STEPS = 20, 5
START_RUNS, MID_START_RUNS = 3, 2
SOAK_REQUESTS = 200
OURS = {FP32: "fp32", INT8: "int8", INT8_DECODER: EIGHT_BIT}
MEMORY_SIZES = {"demo": 128, "wide-vae": 64}
PICTURE = "runtime_memory.svg"


@dataclass(frozen=True)
class Sections:
    """Measures sections.

    Attributes:
        models: Checkpoints and bundles.
        work: A folder for frames and compiled code.
        output: The benchmark's file, beside which pictures go.
        rounds: Of turns between contenders.
    """

    models: Models
    work: Path
    output: Path
    rounds: int

    def overhead(self) -> list[str]:
        """Return the section on the loop's overhead."""
        return runtime_overhead.section(self.models.demo("fp32"), self.models.demo("int8"))

    def imports(self) -> list[str]:
        """Return the section on imports."""
        return runtime_start.import_section()

    def start(self) -> list[str]:
        """Return the section on cold starts."""
        demo = runtime_against_diffusers.jobs(
            self.models.checkpoint, {FP32: self.models.demo("fp32"), INT8: self.models.demo("int8")}, ()
        )
        mid = runtime_against_diffusers.jobs(
            self.models.mid_checkpoint(), {FP32: self.models.mid("fp32"), INT8: self.models.mid("int8")}, ()
        )
        cases = [
            ("Demonstration model", demo, self._two(self.models.demo("fp32"), DEMO_STEPS), START_RUNS),
            ("0.3 billion parameters", mid, self._two(self.models.mid("fp32"), MID_STEPS), MID_START_RUNS),
        ]
        return runtime_start.start_section(
            [
                (title, [(name, jobs[name]) for name in (FP32, INT8, EAGER)], tasks, runs)
                for title, jobs, tasks, runs in cases
            ]
        )

    def demo(self) -> list[str]:
        """Return the comparison on the demonstration model."""
        bundles = {name: self.models.demo(precision) for name, precision in OURS.items()}
        jobs = runtime_against_diffusers.jobs(self.models.checkpoint, bundles, ("bf16",))
        tasks = self._tasks(self.models.demo("fp32"), DEMO_STEPS)
        runs = runtime_against_diffusers.measure(jobs, tasks, self.work / "demo")
        return [*self._explain(tasks[0]), *runtime_against_diffusers.case_lines(runs)]

    def mid(self) -> list[str]:
        """Return the comparison on the larger, synthetic model."""
        bundles = {name: self.models.mid(precision) for name, precision in OURS.items()}
        jobs = runtime_against_diffusers.jobs(self.models.mid_checkpoint(), bundles, ("bf16",))
        tasks = self._tasks(self.models.mid("fp32"), MID_STEPS)
        runs = runtime_against_diffusers.measure(jobs, tasks, self.work / "mid")
        return [
            *self._explain(tasks[0])[:-1],
            f"Random weights. Only {MID_STEPS} steps, so that the benchmark ends: with more, decoding weighs less.",
            "",
            *runtime_against_diffusers.case_lines(runs),
        ]

    def decoder(self) -> list[str]:
        """Return the section on the decoder in 8 bits."""
        models = self.models
        return runtime_decoder.section(
            [
                runtime_decoder.Case("Demonstration model", models.demo("fp32"), models.demo(EIGHT_BIT), (3, 8, 8)),
                runtime_decoder.Case("the same", models.demo("fp32"), models.demo(EIGHT_BIT), (16, 16, 16)),
                runtime_decoder.Case("0.3 billion parameters", models.mid("fp32"), models.mid(EIGHT_BIT), (5, 32, 32)),
                runtime_decoder.Case(
                    "The published VAE's widths", models.wide_vae(), models.wide_vae(EIGHT_BIT), (5, 8, 8)
                ),
            ]
        )

    def memory(self) -> list[str]:
        """Return the section on memory over time."""
        cases = [
            runtime_memory.Case(
                "Demonstration model",
                self.models.demo("fp32", numerics="tencent"),
                MEMORY_SIZES["demo"],
                lengths=(9, 65, 129, 257),
                rounds=3,
            ),
            # Two minutes a round.
            runtime_memory.Case(
                "The published VAE's widths",
                self.models.wide_vae(),
                MEMORY_SIZES["wide-vae"],
                lengths=(9, 65, 129),
                rounds=2,
            ),
        ]
        return runtime_memory.section(cases, self.output.parent / PICTURE)

    def soak(self) -> list[str]:
        """Return the section on growth."""
        command = [sys.executable, "-m", "reelforge.tools.bench.runtime_soak", str(self.models.demo("fp32"))]
        command += ["--requests", str(SOAK_REQUESTS), "--json"]
        # Its status is 1 if something grows, which is a result and not a failure.
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if not finished.stdout.startswith("{"):
            raise click.ClickException(f"{' '.join(command)} failed with status {finished.returncode}")
        return soak_lines(json.loads(finished.stdout))

    def _tasks(self, bundle: Path, steps: int) -> list[Task]:
        prompts = [PROMPTS[index % len(PROMPTS)] for index in range(self.rounds + 1)]
        return [task(bundle, prompt, steps, seed=seed) for seed, prompt in enumerate(prompts)]

    def _two(self, bundle: Path, steps: int) -> tuple[Task, Task]:
        first, second = (task(bundle, prompt, steps, seed=seed) for seed, prompt in enumerate(PROMPTS[:2]))
        return replace(first, only_first_step=True), replace(second, only_first_step=True)

    def _explain(self, one: Task) -> list[str]:
        return [
            f"A whole video, from the prompt to 8-bit frames: {one.width}x{one.height}, {one.frames} frames,",
            f"{one.steps} steps; median of {self.rounds} rounds (smallest-largest), another prompt in each.",
            "Contenders take turns, each in a process of its own that has generated before. Ratios are of times in",
            "the same round. Text is not padded, which spares diffusers more than us; our bundles have its VAE tiles",
            "and guidance value. `torch.compile` is of the transformer, its compiled code cached. PSNR is from",
            "diffusers fp32. Peaks of memory are over the process's life, with loading and compiling. There is no bf16",
            "of ours: ONNX Runtime has no such kernels for CPUs.",
            "",
        ]


def soak_lines(result: dict[str, Any]) -> list[str]:
    """Return the section on growth, from what ``runtime_soak --json`` prints."""
    ends = ", ".join(f"{count} {what}" for what, count in sorted(result["outcomes"].items()))
    rows = []
    for name, trend in result["trends"].items():
        in_bytes = name.endswith("_bytes")
        scale, digits = (1e3, 1) if in_bytes else (1.0, 4)
        rows.append(
            (
                name.removesuffix("_bytes").replace("_", " ") + (", kB" if in_bytes else ""),
                f"{trend['mean'] / scale:.{0 if in_bytes else 1}f}",
                f"{trend['low'] / scale:+.{digits}f} to {trend['high'] / scale:+.{digits}f}",
                "**grows**" if trend["grows"] else "does not grow",
            )
        )
    return [
        f"One process, one pipeline, {SOAK_REQUESTS} requests whose sizes, lengths, steps and prompts are drawn anew:",
        f"{ends}; {result['samples'][-1]['seconds']:.0f} s, stages were loaded {result['loads']} times. After each the",
        f"process is looked at. Before them came a warm-up of {result['warm_up']} requests, which are not counted:",
        "each size once, each prompt with each number of steps, each way to end. Slopes are those of straight lines",
        f"through the medians of {BLOCKS} blocks, as 99% intervals. Growth is what lies above zero.",
        "",
        *report.table(("", "mean", "slope per request", ""), rows),
        "",
        *report.table(
            ("goal", "measured", ""),
            [("no growth in memory or handles", "see above", "met" if result["passed"] else "**missed**")],
        ),
    ]


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Markdown file.")
@sections.options(
    TITLES,
    "build/bench/runtime",
    "Folder for fragments of sections, bundles, and compiled code. Remove its models after changing the compiler.",
)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Beside diffusers.")
@click.option("--prepare", is_flag=True, help="Only build the bundles, and measure nothing.")
def main(output: Path, work: Path, only: tuple[str, ...], checkpoint: Path, rounds: int, prepare: bool) -> None:
    """Measure the runtime and write one Markdown file."""
    work.mkdir(parents=True, exist_ok=True)
    models = Models(checkpoint, work / "models")
    if prepare:
        models.build_all()
        return
    contents = Sections(models, work, output, rounds)
    measures: dict[str, Callable[[], list[str]]] = {
        "overhead": contents.overhead,
        "import": contents.imports,
        "start": contents.start,
        "demo": contents.demo,
        "mid": contents.mid,
        "decoder": contents.decoder,
        "memory": contents.memory,
        "soak": contents.soak,
    }
    sections.measure_all(only, TITLES, measures, f"{rounds} rounds", _head, work, output)


def _head() -> list[str]:
    return [
        "# The runtime",
        "",
        *report.environment("python -m reelforge.tools.bench.runtime -o benchmarks/runtime.md", PACKAGES),
        "",
        "A goal that is missed is marked as such. Run on an idle machine; each section says if it was not.",
        "How to read the goals, what was left out and what was tried: [notes](../docs/runtime_benchmark.md).",
    ]


if __name__ == "__main__":
    main()
