"""How a plan is shown: tables for people, one JSON object for machines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from reelforge.export.planner import kernels
from reelforge.export.planner.checkpoint import Planned
from reelforge.export.planner.gpus import Gpu
from reelforge.export.planner.kernels import attention_rate
from reelforge.export.planner.plan import Bucket, Plan, StageCost
from reelforge.export.planner.work import Phase
from reelforge.tools import console

_TERA = 1e12


def as_json(planned: Planned) -> dict[str, Any]:
    """Return everything that is predicted, as JSON types; sizes in bytes, times in seconds."""
    plan, gpu = planned.plan, planned.plan.options.gpu
    return {
        "target": str(plan.target),
        "precision": {stage: precision.value for stage, precision in plan.recipe.precision.items()},
        "fits": not planned.refusals,
        "refusals": [
            {"where": one.where, "received": one.received, "expected": one.expected, "fixes": list(one.fixes)}
            for one in planned.refusals
        ],
        "gpu": None
        if gpu is None
        else {
            "name": gpu.name,
            "architecture": gpu.architecture,
            "memory_bytes": gpu.memory_bytes,
            "bandwidth": gpu.bandwidth,
            "rates": dict(gpu.rates),
            "source": gpu.source,
        },
        "export_bytes": plan.export_bytes,
        "builder_bytes": plan.builder_bytes,
        "builder_seconds": round(plan.builder_seconds, 1),
        "bundle_bytes": plan.bundle_bytes,
        "stages": {
            build.stage: {
                "weight_bytes": build.weight_bytes,
                "plan_bytes": build.plan_bytes,
                "parts": build.parts,
                "builder_bytes": build.builder_bytes,
                "builder_seconds": round(build.builder_seconds, 1),
            }
            for build in plan.builds
        },
        "buckets": [_bucket_json(bucket) for bucket in plan.buckets],
        "assumptions": list(assumptions(plan)),
        "not_modelled": list(planned.limits),
    }


def _bucket_json(bucket: Bucket) -> dict[str, Any]:
    step = bucket.step
    return {
        "shape": str(bucket.shape),
        "image": bucket.shape.frames == 1,
        "steps": bucket.steps,
        "seconds_per_step": None if step is None else step.total,
        "seconds_per_video": bucket.seconds_per_video,
        "memory_bytes": {memory.phase.value: memory.total_bytes for memory in bucket.memory},
        "stages": {stage.stage: _stage_json(stage) for stage in bucket.stages},
    }


def _stage_json(stage: StageCost) -> dict[str, Any]:
    seconds = stage.seconds
    return {
        "phase": stage.phase.value,
        "calls": stage.calls,
        "flops": {
            "gemm": stage.flops.gemm,
            "attention": stage.flops.attention,
            "convolution": stage.flops.convolution,
        },
        "seconds": None
        if seconds is None
        else {
            "gemm": seconds.gemm,
            "attention": seconds.attention,
            "convolution": seconds.convolution,
            "memory": seconds.memory,
        },
        "activation_bytes": stage.activation_bytes,
        "io_bytes": stage.io_bytes,
    }


def assumptions(plan: Plan) -> Iterator[str]:
    """Yield what the times rest on, a sentence each."""
    gpu = plan.options.gpu
    if gpu is None:
        return
    yield f"{gpu.name}: {gpu.source}"
    for name, constant in (
        ("matrix products", kernels.GEMM),
        ("matrix products in 8 bits", kernels.GEMM_8_BIT),
        ("convolutions", kernels.CONVOLUTION),
        ("memory", kernels.BANDWIDTH),
    ):
        yield f"{name} at {constant.value:.0%} of the GPU's rate: {constant.source}"
    yield from _attention_assumptions(plan, gpu)


def _attention_assumptions(plan: Plan, gpu: Gpu) -> Iterator[str]:
    kernel = plan.attention_kernel
    if kernel is not None:
        rate = attention_rate(kernel, gpu)
        yield f"attention ({kernel.value}) at {rate.rate / _TERA:.0f} TFLOP/s: {rate.source}"


def show(planned: Planned, screen: Console) -> None:
    """Print a plan: what is built, what it takes on the GPU, what a video costs."""
    plan = planned.plan
    screen.print(_build_table(plan))
    screen.print(
        f"export {console.format_bytes(plan.export_bytes)}, builder {console.format_bytes(plan.builder_bytes)} "
        f"(anonymous memory, stages one by one), build about {_duration(plan.builder_seconds)}",
        highlight=False,
    )
    screen.print(_memory_table(plan))
    screen.print(_video_table(plan))
    for bucket in plan.buckets[:1]:
        screen.print(_stage_table(bucket))
    for sentence in assumptions(plan):
        screen.print(f"[dim]{sentence}[/dim]", highlight=False)
    for sentence in planned.limits:
        screen.print(f"not known: {sentence}", highlight=False, markup=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=True, justify="right" if index else "left")
    return table


def _build_table(plan: Plan) -> Table:
    table = _table(f"Build for {plan.target}", "stage", "precision", "weights", "plans", "parts", "builder", "time")
    for build in plan.builds:
        compiled = build.builder_bytes > 0
        table.add_row(
            build.stage,
            plan.recipe.precision[build.stage].value,
            console.format_bytes(build.weight_bytes),
            console.format_bytes(build.plan_bytes) if compiled else "",
            str(build.parts) if compiled else "",
            console.format_bytes(build.builder_bytes) if compiled else "",
            _duration(build.builder_seconds) if compiled else "",
        )
    table.add_section()
    table.add_row("all", "", "", console.format_bytes(plan.bundle_bytes), "", "", "")
    return table


def _memory_table(plan: Plan) -> Table:
    gpu = plan.options.gpu
    phases = [phase.value for phase in Phase]
    limit = "" if gpu is None else f" ({gpu.name}: {console.format_bytes(gpu.memory_bytes)})"
    table = _table(f"Memory while generating{limit}", "video", *phases, *(("fits",) if gpu else ()))
    for bucket in plan.buckets:
        sizes = {memory.phase.value: memory.total_bytes for memory in bucket.memory}
        row = [console.format_bytes(sizes[phase]) if phase in sizes else "" for phase in phases]
        if gpu is not None:
            row.append("yes" if max(sizes.values()) <= gpu.memory_bytes else "[red]no[/red]")
        table.add_row(str(bucket.shape), *row)
    return table


def _video_table(plan: Plan) -> Table:
    steps = plan.buckets[0].steps
    table = _table(
        f"One video, {steps} steps", "video", "loop PFLOP", "GEMM", "attention", "decode PFLOP", "s/step", "s/video"
    )
    for bucket in plan.buckets:
        loop = [stage.flops for stage in bucket.stages if stage.phase is Phase.LOOP]
        decode = [stage.flops for stage in bucket.stages if stage.phase is Phase.DECODE]
        total = sum(flops.total for flops in loop)
        step, video = bucket.step, bucket.seconds_per_video
        table.add_row(
            str(bucket.shape),
            f"{total / 1e15:.1f}",
            _share(sum(flops.gemm for flops in loop), total),
            _share(sum(flops.attention for flops in loop), total),
            f"{sum(flops.total for flops in decode) / 1e15:.2f}",
            "" if step is None else f"{step.total:.2f}",
            "" if video is None else f"{video:.0f}",
        )
    return table


def _stage_table(bucket: Bucket) -> Table:
    table = _table(
        f"Stages of {bucket.shape}", "stage", "calls", "GEMM TF", "attention", "conv TF", "activations", "seconds"
    )
    for stage in bucket.stages:
        flops = stage.flops
        table.add_row(
            stage.stage,
            str(stage.calls),
            *(f"{count / _TERA:,.1f}" for count in (flops.gemm, flops.attention, flops.convolution)),
            console.format_bytes(stage.activation_bytes),
            "" if stage.seconds is None else f"{stage.seconds.total:.2f}",
        )
    return table


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else ""


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
