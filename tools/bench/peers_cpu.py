"""Peers on the CPU: ``python -m reelforge.tools.bench.peers_cpu``, from a checkout. Writes ``benchmarks/peers_cpu.md``.

One denoising step beside diffusers, OpenVINO on our graphs, and ONNX Runtime on an export of diffusers' module; and the
export itself at growing depth. Each section is kept as a fragment in the work folder: ``--only`` measures some of them
again and takes the others from there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from reelforge.runtime.errors import EngineError
from reelforge.tools import console
from reelforge.tools.bench import openvino_child, peers_export, report, sections
from reelforge.tools.bench.peers_processes import Contender, Result, take_turns
from reelforge.tools.bench.runtime_bundles import Models

PACKAGES = ("onnxruntime", "torch", "diffusers", "onnx", "onnxscript", "numpy")
TITLES = {
    "demo": "A step of the demonstration model",
    "mid-graphs": "A step of a model of 0.3 billion parameters: engines for graphs",
    "mid-torch": "A step of a model of 0.3 billion parameters: PyTorch",
    "ours": "Compiling the transformer at its published size",
    "export": "Exporting diffusers' transformer at growing depth",
}
SETTINGS = "{rounds} rounds; exports: 1 run"
BASE = "reelforge fp32"
CHILD = "reelforge.tools.bench.peers_child"
LIMIT_S = 540.0
EXPORT_LIMIT_S = 240.0
GRAPHS = ("reelforge", "OpenVINO", "ONNX Runtime")
TORCH = ("reelforge", "diffusers")
"""Beginnings of contenders' names: of a larger model not all fit into memory at once."""


@dataclass(frozen=True)
class Case:
    """One model: its checkpoint and bundles, and a folder for what contenders read and write."""

    checkpoint: Path
    fp32: Path
    int8: Path
    folder: Path


def contenders(case: Case, openvino_python: str | None) -> list[Contender]:
    """Return what is compared; without an interpreter for OpenVINO, it is left out."""
    ours = str(case.folder / "ours.npz")
    theirs = {"inputs": str(case.folder / "theirs.npz"), "checkpoint": str(case.checkpoint)}
    python = (sys.executable, "-m", CHILD)
    found = [
        Contender(BASE, python, {"system": "reelforge", "bundle": str(case.fp32), "inputs": ours}),
        Contender("reelforge int8", python, {"system": "reelforge", "bundle": str(case.int8), "inputs": ours}),
    ]
    if openvino_python:
        run = (openvino_python, str(openvino_child.__file__))
        for name, bundle, precision in (
            ("OpenVINO on our fp32 graph, f32", case.fp32, "f32"),
            ("OpenVINO on our fp32 graph, bf16", case.fp32, "bf16"),
            ("OpenVINO on our int8 graph, f32", case.int8, "f32"),
        ):
            job = {"graph": str(bundle / "dit.onnx"), "inputs": ours, "precision": precision}
            found.append(Contender(name, run, job))
    graph = str(case.folder / "export" / "graph.onnx")
    found += [
        Contender("ONNX Runtime on torch.onnx.export", python, {"system": "onnxruntime", "graph": graph, **theirs}),
        Contender("diffusers fp32", python, {"system": "diffusers", **theirs}),
        Contender("diffusers bf16", python, {"system": "diffusers", "dtype": "bfloat16", **theirs}),
        Contender("diffusers fp32, compiled", python, {"system": "diffusers", "compiled": "yes", **theirs}),
    ]
    outputs = (str(case.folder / f"velocity{index}.npy") for index in range(len(found)))
    return [Contender(one.name, one.command, {**one.job, "output": next(outputs)}) for one in found]


def write_inputs(case: Case) -> str:
    """Write the same inputs as either side takes them; return the model's size in words."""
    from reelforge.runtime.bundle.open import Bundle, Check
    from reelforge.tools.bench.dit_step_time import describe, dit_inputs, random_inputs

    bundle = Bundle.open(case.fp32, Check.SIZES)
    inputs = random_inputs(bundle)
    np.savez(case.folder / "ours.npz", allow_pickle=False, **dit_inputs(bundle, inputs))
    np.savez(
        case.folder / "theirs.npz",
        latents=inputs.latents,
        states=inputs.states,
        pooled=inputs.pooled,
        guidance=np.float32(inputs.guidance),
    )
    return describe(case.fp32)


def export_diffusers(case: Case) -> str:
    """Export diffusers' module for ONNX Runtime in a process of its own; return in words what that took."""
    graph = case.folder / "export" / "graph.onnx"
    graph.parent.mkdir(exist_ok=True)
    job = {"system": "export", "checkpoint": str(case.checkpoint), "inputs": str(case.folder / "theirs.npz")}
    command = [sys.executable, "-m", CHILD, json.dumps({**job, "graph": str(graph)})]
    try:
        result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=EXPORT_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"`torch.onnx.export(dynamo=True)` of diffusers' module did not end within {EXPORT_LIMIT_S:.0f} s."
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["nothing"])[-1]
        return f"`torch.onnx.export(dynamo=True)` of diffusers' module failed: `{last}`."
    return export_words(json.loads(result.stdout.strip().splitlines()[-1]))


def export_words(said: dict[str, Any]) -> str:
    """Return what an export took and what ONNX Runtime thought of it."""
    words = f"`torch.onnx.export(dynamo=True)` of diffusers' module took {said['seconds']:.0f} s."
    if not said["refused"]:
        return f"{words} ONNX Runtime loads the graph as it is."
    words += f" **As exported, ONNX Runtime refuses the graph:** `{said['refused']}`."
    if said["refused_again"]:
        return f"{words} Neither does it take it otherwise: `{said['refused_again']}`."
    return (
        f"{words} What is timed is that graph with {said['replaced']} boolean `Where(mask, false, x)` written by us as "
        "`And(Not(mask), x)`."
    )


def step_section(
    case: Case, rounds: int, openvino_python: str | None, names: tuple[str, ...] = (*GRAPHS, *TORCH)
) -> list[str]:
    """Return the section on one model.

    Args:
        case: The model.
        rounds: Rounds.
        openvino_python: Interpreter for OpenVINO, or None.
        names: Beginnings of the names of those that take turns; they are all loaded at once.
    """
    case.folder.mkdir(parents=True, exist_ok=True)
    size = write_inputs(case)
    chosen = [one for one in contenders(case, openvino_python) if one.name.startswith(names)]
    exports = any(one.job.get("system") == "onnxruntime" for one in chosen)
    exported = [export_diffusers(case), ""] if exports else []
    results = take_turns(chosen, rounds, LIMIT_S)
    return [
        size,
        "",
        *report.prose(
            f"Median of {rounds} rounds (smallest-largest), in which the contenders take turns on all cores, "
            "warm, each in a "
            "process of its own; ratios are of the same round. *Difference* and *cosine* compare a "
            "contender's velocity with "
            f"that of {BASE} on the same inputs. Memory is the peak of the process's whole life, loading "
            "included. A step of "
            "diffusers, and of its export, contains token refiner and modulation, which a bundle computes "
            "once for all steps; "
            "its text is not padded."
        ),
        "",
        *exported,
        *table(results),
        *notes(results),
    ]


def table(results: Sequence[Result]) -> list[str]:
    """Return the table of one model's step.

    Raises:
        EngineError: If what all others are compared with did not run.
    """
    base = next(one for one in results if one.name == BASE)
    if base.failure:
        raise EngineError(f"{BASE} does not run, and everything is compared with it.", received=base.failure)
    rows = []
    for one in results:
        if one.failure:
            rows.append((one.name, f"does not run: {one.failure}", *["-"] * 6))
            continue
        ratios = [ours / theirs for ours, theirs in zip(base.seconds, one.seconds, strict=True)]
        rows.append(
            (
                one.name,
                report.spread([value * 1e3 for value in one.seconds]),
                report.spread(ratios, 2),
                f"{np.abs(one.velocity - base.velocity).max():.1e}",
                f"{cosine(one.velocity, base.velocity):.6f}",
                f"{one.loaded_s:.1f}",
                f"{one.peak_anonymous_bytes / 1e9:.2f}",
                f"{one.peak_file_bytes / 1e9:.2f}",
            )
        )
    headings = ("contender", "ms per step", f"times as fast as {BASE}", "largest difference", "cosine", "s to load")
    return report.table((*headings, "peak anonymous GB", "peak file-backed GB"), rows)


def cosine(a: Any, b: Any) -> float:
    """Return the cosine of two arrays."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def notes(results: Sequence[Result]) -> list[str]:
    """Return what contenders say of themselves."""
    said = [f"{one.name}: {one.notes}" for one in results if one.notes]
    return ["", f"What OpenVINO reports: {'; '.join(said)}."] if said else []


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-o", "--output", default=Path("benchmarks/peers_cpu.md"), type=click.Path(path_type=Path))
@sections.options(
    TITLES,
    "build/bench/peers_cpu",
    "Folder for models and fragments of sections, 60 GB free.",
)
@click.option("--models", type=click.Path(path_type=Path), help="Folder with the models that `runtime` built.")
@click.option(
    "--openvino-python", help="Interpreter with tools/bench/requirements-openvino.txt; else without OpenVINO."
)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
def main(
    output: Path,
    work: Path,
    only: tuple[str, ...],
    checkpoint: Path,
    models: Path | None,
    openvino_python: str | None,
    rounds: int,
) -> None:
    """Measure peers on the CPU and write one Markdown file."""
    work.mkdir(parents=True, exist_ok=True)
    built = Models(checkpoint, models or work / "models")

    def demo() -> list[str]:
        case = Case(checkpoint, built.demo("fp32"), built.demo("int8"), work / "demo")
        return step_section(case, rounds, openvino_python)

    def mid(names: tuple[str, ...]) -> list[str]:
        case = Case(built.mid_checkpoint(), built.mid("fp32"), built.mid("int8"), work / "mid")
        return step_section(case, rounds, openvino_python, names)

    measures = {
        "demo": demo,
        "mid-graphs": lambda: mid(GRAPHS),
        "mid-torch": lambda: mid(TORCH),
        "ours": lambda: peers_export.our_section(work),
        "export": lambda: peers_export.section(work),
    }
    settings = SETTINGS.format(rounds=rounds)
    sections.measure_all(only, TITLES, measures, settings, _head, work, output)


def _head() -> list[str]:
    return [
        "# Peers on the CPU",
        "",
        *report.environment("python -m reelforge.tools.bench.peers_cpu", PACKAGES),
        "",
        *report.prose(
            "Inputs of steps are random numbers, not those that int8 scales were calibrated on: what int8 costs in "
            "videos is in [quantisation.md](quantisation.md). Whole videos beside diffusers are measured by `runtime`."
        ),
    ]


if __name__ == "__main__":
    console.run(main)
