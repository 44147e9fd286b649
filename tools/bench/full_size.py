"""Benchmark of engine builds at full size: ``python -m reelforge.tools.bench.full_size``.

A synthetic HunyuanVideo checkpoint (13-billion-parameter transformer, 8-billion-parameter LLaMA, CLIP, real-width VAE)
becomes a bundle of FP8 plans for TensorRT-RTX, all stages, in one ``build-engine``. Writes ``benchmarks/full_size.md``
with seconds and memory per plan, sizes, and what the receipts say. Nothing is executed: there is no GPU.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click

from reelforge.export.build_request import BuildRequest
from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.codec import from_json
from reelforge.runtime.manifest import PlanEntry
from reelforge.runtime.receipt import Receipt
from reelforge.runtime.recipe import EVERY_STAGE, Precision, Target, VideoShape
from reelforge.tools.bench import report
from reelforge.tools.bench.invented_scales import write_invented_scales
from reelforge.tools.bench.memory_tree import Peak, TreeUsage, run_tree_sampled
from reelforge.tools.synthesize import synthesize

PACKAGES = ("tensorrt_rtx", "torch", "onnx", "onnx-ir")
GOAL_SECONDS, GOAL_BYTES = 30 * 60, 10e9
_INTRODUCTION = """\
Sparse bf16 checkpoint with distinct content per tensor; scales are invented, so the plans have the sizes, types and
kernels of a calibrated build and no meaning. One `build-engine` in a process of its own, compilers in child processes
one after the other; memory is sampled ten times a second, anonymous and file-backed apart. File-backed pages are the
mapped weights, which the kernel may drop. **Nothing was executed on a GPU.**"""


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Scratch folder, 60 GB free.")
@click.option("--size", default="full", show_default=True, help="Of the synthetic checkpoint.")
@click.option("--target", default="rtx:sm89+sm120", show_default=True)
@click.option("--shapes", default="720x1280x129", show_default=True)
@click.option("--builder-memory", default=8.0, show_default=True, help="GB that a compiler may take.")
@click.option("-o", "--output", default=Path("benchmarks/full_size.md"), type=click.Path(path_type=Path))
def main(work: Path, size: str, target: str, shapes: str, builder_memory: float, output: Path) -> None:
    """Compile a synthetic checkpoint to FP8 plans and write what it took."""
    checkpoint, bundle = work / f"{size}.checkpoint", work / f"{size}.bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    if not checkpoint.exists():
        synthesize(checkpoint, size)
    request = BuildRequest(
        checkpoint=checkpoint,
        output=bundle,
        target=Target.parse(target),
        precision={EVERY_STAGE: Precision.FP8},
        attention=Precision.FP8,
        shapes=tuple(VideoShape.parse(text) for text in shapes.split(",")),
    )
    started = time.monotonic()
    scales = write_invented_scales(request, work / f"{size}.safetensors")
    click.echo(f"scales in {time.monotonic() - started:.1f} s")
    command = [sys.executable, "-m", "reelforge.tools.build_engine", str(checkpoint), "-o", str(bundle), "--json"]
    command += ["--target", target, "--precision", "fp8", "--attention", "fp8", "--shapes", shapes, "--no-gate"]
    command += ["--scales", str(scales), "--no-cache", "--builder-memory", f"{builder_memory:g}"]
    usage = run_tree_sampled(command)
    lines = [
        "# Engines at full size",
        "",
        *report.environment(
            f"python -m reelforge.tools.bench.full_size --work DIR --builder-memory {builder_memory:g}", PACKAGES
        ),
        "",
        _INTRODUCTION,
        "",
        f"`build-engine --target {target} --precision fp8 --attention fp8 --shapes {shapes}`, one run.",
        "",
        *tables(Bundle.open(bundle, Check.SIZES), usage),
    ]
    report.write(output, lines)
    click.echo(f"wrote {output}")


def tables(bundle: Bundle, usage: TreeUsage) -> list[str]:
    """Return goals, a table of plans, and one of what their receipts count."""
    seconds = json.loads(usage.total.output)["seconds"]
    plans = list(_plans(bundle))
    return [
        *_goals(plans, usage, seconds),
        "",
        "## Plans",
        "",
        *report.table(
            ("plan", "weights GB", "plan GB", "compiler's call s", "peak anonymous GB", "peak file-backed GB"),
            [
                (
                    plan.path.removeprefix("plans/").removesuffix(".plan"),
                    _gigabytes(plan.weight_bytes),
                    _gigabytes(made.plan_bytes),
                    f"{made.build_seconds:.0f}",
                    *_peak(usage.compilers.get(made.stage)),
                )
                for plan, made in plans
            ],
        ),
        "",
        "The process that reads, quantises and writes weights and graphs: "
        f"{_gigabytes(usage.build.anonymous_bytes)} GB anonymous, {_gigabytes(usage.build.file_bytes)} GB file-backed. "
        f"The whole command: {seconds:.0f} s.",
        "",
        "## Receipts",
        "",
        *report.table(
            ("plan", "layers", "GEMMs", "attentions", "convolutions", "reformats and casts", "activations MB"),
            [
                (
                    plan.path.removeprefix("plans/").removesuffix(".plan"),
                    len(made.layers),
                    *(_counts(made, kind) for kind in ("gemm", "attention", "convolution")),
                    sum(1 for kind in ("reformat", "cast") for _ in made.of_kind(kind)),
                    ", ".join(f"{name} {size / 1e6:.0f}" for name, size in made.activation_bytes.items()),
                )
                for plan, made in plans
            ],
        ),
    ]


def _goals(plans: list[tuple[PlanEntry, Receipt]], usage: TreeUsage, seconds: float) -> list[str]:
    dit = [made for _, made in plans if made.stage.split(".")[0] == "dit"]
    gemms: Counter[str] = Counter()
    attentions: Counter[str] = Counter()
    for made in dit:
        attentions.update(made.precisions("attention"))
        for layer in made.of_kind("gemm"):
            block = any(node.startswith(("double.", "single.")) for node in layer.nodes)
            gemms[f"{layer.inputs[0]} {'in blocks' if block else 'elsewhere'}"] += 1
    total = sum(attentions.values())
    others = sum(count for name, count in gemms.items() if name.endswith("in blocks") and not name.startswith("FP8"))
    peak = usage.total.peak_anonymous_bytes
    return report.table(
        ("goal", "measured", ""),
        [
            (
                "all GEMMs of dit's blocks FP8",
                ", ".join(f"{count} {name}" for name, count in sorted(gemms.items())),
                _met(others == 0 and gemms["FP8 in blocks"] > 0),
            ),
            ("all attentions of dit fused in FP8", f"{attentions['FP8']} of {total}", _met(attentions["FP8"] == total)),
            ("peak anonymous memory under 10 GB", f"{_gigabytes(peak)} GB, all processes", _met(peak < GOAL_BYTES)),
            ("under 30 minutes in all", f"{seconds / 60:.1f} minutes", _met(seconds < GOAL_SECONDS)),
        ],
    )


def _plans(bundle: Bundle) -> Iterator[tuple[PlanEntry, Receipt]]:
    for stage in bundle.manifest.stages:
        for plan in stage.plans:
            text = (bundle.path / plan.receipt).read_text(encoding="utf-8")
            yield plan, from_json(Receipt, json.loads(text))


def _counts(made: Receipt, kind: str) -> str:
    return ", ".join(f"{count} {name}" for name, count in made.precisions(kind).items()) or "-"


def _peak(peak: Peak | None) -> tuple[str, str]:
    return ("-", "-") if peak is None else (_gigabytes(peak.anonymous_bytes), _gigabytes(peak.file_bytes))


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f}"


def _met(met: bool) -> str:
    return "met" if met else "**missed**"


if __name__ == "__main__":
    main()
