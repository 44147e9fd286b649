"""Benchmark of the compiler at full width: ``python -m reelforge.tools.bench.export``.

Synthetic checkpoints of the 13-billion-parameter size are captured in both layouts; then a model of full width but one
block of each kind is executed and compared with PyTorch. Writes ``benchmarks/export.md``. Numbers of a busy machine are
worth little: run it on an idle one.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from reelforge.tools.bench import report
from reelforge.tools.bench.memory import Usage, run_sampled
from reelforge.tools.synthesize import Layout, synthesize

PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "transformers")
GOAL_SECONDS, GOAL_BYTES = 120, 2e9
_OPEN_GRAPH = """
import json, sys, time
import onnxruntime
options = onnxruntime.SessionOptions()
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
options.add_session_config_entry("session.disable_prepacking", "1")
started = time.monotonic()
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(json.dumps({"seconds": time.monotonic() - started, "inputs": len(session.get_inputs())}))
"""

_INTRODUCTION = """\
Synthetic HunyuanVideo checkpoints (13-billion-parameter transformer, 8-billion-parameter LLaMA, CLIP, real VAE; bf16,
sparse files, distinct content per tensor). `build-engine --precision fp16` runs in a process of its own; memory is
sampled every 20 ms, anonymous and file-backed apart. Every weight byte is read, hashed and scanned for NaN; what needs
another row or column order is written once, the rest is referenced in the checkpoint's files."""
_BLOCKS = """\
All stages at full width (3072, 24 heads of 128; LLaMA 4096; the real VAE) with one block of each kind and random bf16
weights, computed in fp32: largest absolute difference between ONNX Runtime and PyTorch at output scale 1-4"""


@dataclass(frozen=True)
class Built:
    """One measured build."""

    layout: Layout
    synthesis_seconds: float
    usage: Usage
    result: dict[str, Any]
    new_bytes: int  # of files that are not hard links to the checkpoint


def build(checkpoint: Path, bundle: Path, *options: str) -> Usage:
    """Run ``build-engine`` in a process of its own, sampled."""
    command = [sys.executable, "-m", "reelforge.tools.build_engine", str(checkpoint), "-o", str(bundle), "--json"]
    return run_sampled([*command, *options])


def measure_layout(work: Path, layout: Layout, repeats: int) -> list[Built]:
    """Build a full-size checkpoint of one layout ``repeats`` times; the last bundle stays."""
    checkpoint, bundle = work / layout.value, work / f"{layout.value}.bundle"
    started = time.monotonic()
    synthesize(checkpoint, "full", format=layout)
    seconds = time.monotonic() - started
    builds = []
    for _ in range(repeats):
        shutil.rmtree(bundle, ignore_errors=True)
        usage = build(checkpoint, bundle, "--precision", "fp16")
        own = [path.stat() for path in bundle.rglob("*") if path.is_file() and path.stat().st_nlink == 1]
        builds.append(Built(layout, seconds, usage, json.loads(usage.output), sum(stat.st_size for stat in own)))
    return builds


def open_graphs(bundle: Path) -> list[tuple[str, float, Usage]]:
    """Load each graph in ONNX Runtime without optimisation, in a process of its own: (stage, seconds, usage)."""
    rows = []
    for graph in sorted(bundle.glob("*.onnx")):
        usage = run_sampled([sys.executable, "-c", _OPEN_GRAPH, str(graph)])
        rows.append((graph.stem, float(json.loads(usage.output)["seconds"]), usage))
    return rows


def verify_blocks(work: Path) -> tuple[dict[str, Any], Usage]:
    """Build a model of full width with one block of each kind and compare every stage with PyTorch."""
    checkpoint = synthesize(work / "block", "block")
    usage = build(checkpoint, work / "block.bundle", "--precision", "fp32", "--verify")
    return json.loads(usage.output)["stages"], usage


def _summary(builds: list[list[Built]]) -> list[str]:
    rows = []
    for runs in builds:
        last = runs[-1]
        rows.append(
            (
                last.layout.value,
                f"{last.synthesis_seconds:.1f}",
                report.spread([run.usage.seconds for run in runs]),
                report.spread([run.usage.peak_anonymous_bytes / 1e9 for run in runs], 2),
                report.spread([run.usage.peak_file_bytes / 1e9 for run in runs], 2),
                f"{sum(stage['weights_bytes'] for stage in last.result['stages'].values()) / 1e9:.1f}",
                f"{last.new_bytes / 1e9:.2f}",
                last.result["content_digest"][:16],
            )
        )
    return report.table(
        (
            "layout",
            "synthesis s",
            "build s, median (min-max)",
            "peak anonymous GB",
            "peak file-backed GB",
            "weights GB",
            "written GB",
            "content digest",
        ),
        rows,
    )


def _goals(builds: list[list[Built]]) -> list[str]:
    seconds = max(run.usage.seconds for runs in builds for run in runs)
    memory = max(run.usage.peak_anonymous_bytes for runs in builds for run in runs)
    digests = {runs[-1].result["content_digest"] for runs in builds}
    return report.table(
        ("goal", "measured (worst run)", ""),
        [
            (f"all stages under {GOAL_SECONDS} s", f"{seconds:.1f} s", _met(seconds < GOAL_SECONDS)),
            ("peak anonymous memory under 2 GB", f"{memory / 1e9:.2f} GB", _met(memory < GOAL_BYTES)),
            ("both layouts give one content digest", f"{len(digests)} digest(s)", _met(len(digests) == 1)),
        ],
    )


def _met(met: bool) -> str:
    return "met" if met else "**missed**"


def _stages(run: Built) -> list[str]:
    return report.table(
        ("stage", "weights GB", "nodes", "Gemm", "Conv", "Attention", "graph finished after s"),
        [
            (
                name,
                f"{stage['weights_bytes'] / 1e9:.2f}",
                sum(stage["nodes"].values()),
                *(stage["nodes"].get(operator, 0) for operator in ("Gemm", "Conv", "Attention")),
                f"{stage['finished_s']:.1f}",
            )
            for name, stage in run.result["stages"].items()
        ],
    )


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Empty scratch folder, 20 GB free.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1))
@click.option("--output", default=Path("benchmarks/export.md"), show_default=True, type=click.Path(path_type=Path))
def main(work: Path, repeats: int, output: Path) -> None:
    """Measure capture and build at full size, and execute full-width blocks."""
    work.mkdir(parents=True, exist_ok=True)
    builds: list[list[Built]] = []
    graphs: list[tuple[str, float, Usage]] = []
    for layout in (Layout.DIFFUSERS, Layout.TENCENT):
        builds.append(measure_layout(work, layout, repeats))
        if layout is Layout.DIFFUSERS:
            graphs = open_graphs(work / f"{layout.value}.bundle")
        shutil.rmtree(work / f"{layout.value}.bundle")
        shutil.rmtree(work / layout.value)
    blocks, block_usage = verify_blocks(work)
    shutil.rmtree(work / "block.bundle")
    shutil.rmtree(work / "block")
    lines = [
        "# Export at full size",
        "",
        *report.environment(f"python -m reelforge.tools.bench.export --work DIR --repeats {repeats}", PACKAGES),
        "",
        _INTRODUCTION,
        "",
        *_summary(builds),
        "",
        *_goals(builds),
        "",
        "## Stages (diffusers layout, last run)",
        "",
        "Weights of later stages are placed while earlier ones are traced, so the last column is cumulative.",
        "",
        *_stages(builds[0][-1]),
        "",
        "## ONNX Runtime loads the structure",
        "",
        "Each graph opened with optimisation and prepacking off; weights stay mapped in the checkpoint's files.",
        "",
        *report.table(
            ("stage", "seconds", "peak anonymous GB", "peak file-backed GB"),
            [
                (stage, f"{s:.1f}", f"{u.peak_anonymous_bytes / 1e9:.2f}", f"{u.peak_file_bytes / 1e9:.2f}")
                for stage, s, u in graphs
            ],
        ),
        "",
        "## Full width, executed",
        "",
        f"{_BLOCKS} (`build-engine --verify`, {block_usage.seconds:.0f} s).",
        "",
        *report.table(
            ("stage", "largest difference", "tolerance", ""),
            [
                (name, f"{s['parity']:.1e}", f"{s['tolerance']:.0e}", _met(s["parity"] <= s["tolerance"]))
                for name, s in blocks.items()
            ],
        ),
    ]
    report.write(output, lines)
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
