"""Our quantiser beside others: the same fp32 graph, calibration prompts and evaluation prompts, a process per run.

The others are ``quantisation_peers``; they are given recordings of what ``dit`` reads, made beforehand. Ours is
``our_quantiser``, which runs the whole pipeline itself. The module knows no details of any of them.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np

from reelforge.calibration.comparison import compare
from reelforge.calibration.reference_run import ReferenceRun, run_reference
from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.pipeline import Pipeline
from reelforge.tools.bench import calibration_data, quantised_quality, report
from reelforge.tools.bench.memory import Usage, run_sampled
from reelforge.tools.bench.our_quantiser import Job
from reelforge.tools.bench.quantisation_peers import LARGE_CALLS, PeerRun, peer_lines, record, run_peers
from reelforge.tools.bench.quantisation_workbench import Workbench
from reelforge.tools.bench.quantised_quality import Quality

PEERS = (
    "onnxruntime int8 MinMax",
    "onnxruntime int8 MinMax, inputs only",
    "onnxruntime int8 Entropy, inputs only",
    "onnxruntime int8 MinMax, inputs only, symmetric",
    "modelopt int8 max",
    "modelopt int8 entropy",
    "modelopt fp8 max",
    "modelopt fp8 entropy",
)
LARGE_PEERS = (
    "onnxruntime int8 MinMax, inputs only",
    "onnxruntime int8 Entropy, inputs only",
    "modelopt int8 max",
)
CHILD = "reelforge.tools.bench.our_quantiser_child"
LARGE_LIMIT_S = 300.0
_RESAMPLES = 4000


@dataclass(frozen=True)
class Ours:
    """One way to run our quantiser."""

    precision: str
    method: str
    smoothing: float | None = None

    @property
    def name(self) -> str:
        """As the table shows it."""
        smoothed = "" if self.smoothing is None else f", smoothing {self.smoothing:g}"
        return f"reelforge {self.precision} {self.method}{smoothed}"


OURS = (
    Ours("int8", "max"),
    Ours("int8", "mse"),
    Ours("int8", "max", 0.5),
    Ours("fp8", "max"),
    Ours("fp8", "mse"),
    Ours("fp8", "max", 0.5),
)
LARGE_OURS = (Ours("int8", "max"), Ours("int8", "entropy"))


def section(
    bench: Workbench, large: Workbench | None, peers_python: str | None, repeats: int, calibration: int, evaluation: int
) -> list[str]:
    """Run every quantiser and return the Markdown, without a title.

    Args:
        bench: Of the demonstration checkpoint.
        large: Of a larger one, for time and memory; None leaves it out.
        peers_python: The interpreter that has ModelOpt; None leaves ModelOpt out.
        repeats: Runs of each quantiser, on the smaller model.
        calibration: Prompts.
        evaluation: Other prompts.
    """
    bundle, work = bench.reference.path, bench.folder / "peers"
    recordings, usage = record(bundle, work / "recordings", "--count", str(calibration))
    requests = calibration_data.evaluation_requests(evaluation)
    references = quantised_quality.make_references(bundle, requests)
    theirs = run_peers(bundle, work / "theirs", recordings, references, peers_python, repeats, PEERS)
    reference = run_reference(
        Pipeline(bench.reference), [request.prompt for request in requests], calibration_data.EVALUATION_SEED
    )
    prompts = [request.prompt for request in calibration_data.calibration_requests(calibration)]
    ours = [_run_ours(bundle, one, prompts, None, work / "ours", repeats, reference) for one in OURS]
    lines = [
        "All linear layers of the blocks of `dit`, the same for all. Others quantise `dit.onnx` with its weights as",
        "fp32 inside, and are given recordings of its inputs over all prompts and steps; making these is not",
        "in their time. Ours runs the bundle's whole pipeline, text encoders included, and all of it is in its time.",
        "Each run is a process of its own: *seconds* of all of it, with imports (what each imported is in the last",
        f"column), and of the call alone; {repeats} runs, median (smallest-largest). *Seconds with recording* are",
        "those from the fp32 bundle to the quantised graph: a peer's and its recordings'. *By prompt* is the mean",
        "difference of PSNR from the best peer's, with the interval that 95% of resamples of the prompts give.",
        "",
        "Goals are judged by the peers' own seconds. What they would be with the recording is told beside them, since",
        "our seconds contain that work.",
        "",
        f"### Demonstration model, {calibration} calibration prompts, {evaluation} others",
        "",
        _recorded(usage),
        "",
        *peer_lines([*ours, *theirs], {run.peer: usage.seconds for run in theirs}),
        "",
        *_goals(ours, theirs, usage.seconds),
    ]
    if large is not None:
        lines += ["", *_large(large, peers_python)]
    return lines


def _large(bench: Workbench, peers_python: str | None) -> list[str]:
    bundle, work = bench.reference.path, bench.folder / "peers"
    recordings, usage = record(bundle, work / "few", "--count", "1", "--steps", str(LARGE_CALLS))
    theirs = run_peers(bundle, work / "theirs", recordings, (), peers_python, 1, LARGE_PEERS, LARGE_LIMIT_S)
    prompts = [request.prompt for request in calibration_data.calibration_requests(1)]
    ours = [_run_ours(bundle, one, prompts, LARGE_CALLS, work / "ours", 1, None) for one in LARGE_OURS]
    weights = sum(weight.length for weight in bench.reference.stage("dit").weights)
    return [
        f"### A larger, synthetic model, 1 prompt, {LARGE_CALLS} steps",
        "",
        f"`dit` has {weights / 1e6:.0f} MB of weights as stored. {_recorded(usage)} One run each, cut off after",
        f"{LARGE_LIMIT_S / 60:g} minutes. Random weights make no picture, so there is no PSNR.",
        "",
        *peer_lines([*ours, *theirs], {run.peer: usage.seconds for run in theirs}),
        "",
        *_goals(ours, theirs, usage.seconds),
    ]


def _run_ours(
    bundle: Path,
    one: Ours,
    prompts: Sequence[str],
    steps: int | None,
    output: Path,
    repeats: int,
    reference: ReferenceRun | None,
) -> PeerRun:
    """Quantise ``repeats`` times and compare the last result with ``reference``, if there is one."""
    job_file = output.with_suffix(".json")
    seed = calibration_data.CALIBRATION_SEED
    job = Job(str(bundle), prompts, seed, one.precision, one.method, one.smoothing, steps, str(output))
    job_file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    usages = []
    for _ in range(repeats):
        shutil.rmtree(output, ignore_errors=True)
        try:
            usages.append(run_sampled([sys.executable, "-m", CHILD, str(job_file)]))
        except subprocess.CalledProcessError as error:
            raise click.ClickException(f"{one.name} failed: {error.output}") from error
    said = [json.loads(usage.output.strip().splitlines()[-1]) for usage in usages]
    run = PeerRun(
        one.name,
        tuple(usage.seconds for usage in usages),
        tuple(answer["seconds"] for answer in said),
        tuple(usage.peak_anonymous_bytes for usage in usages),
        ", ".join(f"{name} {number}" for name, number in said[-1]["versions"].items()),
    )
    if reference is not None:
        result = compare(reference, Pipeline(Bundle.open(output, Check.SIZES)))
        cosines = tuple(loss.cosine for losses in result.velocity for loss in losses)
        run = replace(run, quality=Quality(tuple(result.psnr_db), tuple(result.ssim), cosines))
    shutil.rmtree(output)
    click.echo(f"{run.peer}: {[*run.seconds, *(run.quality.cells() if run.quality else ())]}")
    return run


def _goals(ours: Sequence[PeerRun], theirs: Sequence[PeerRun], recording_s: float) -> list[str]:
    """Return the goals: ours against each peer of its format, the best of them named.

    Args:
        ours: Our runs.
        theirs: The peers'.
        recording_s: What it took to make the peers' recordings; it gives a verdict of its own.
    """
    finished = [run for run in theirs if not run.failure]
    rows = []
    for run in ours:
        # "reelforge int8 max": the format is the second word of every name.
        rivals = [rival for rival in finished if rival.peer.split()[1] == run.peer.split()[1]]
        if not rivals:
            continue
        if run.quality is not None:
            best = max(rivals, key=_psnr)
            mean, low, high = _gain_db(run, best)
            text = (
                f"{_psnr(run):.2f} dB, the best peer {_psnr(best):.2f} dB ({best.peer}); by prompt {mean:+.2f} dB, 95% "
                f"{low:+.2f} to {high:+.2f}"
            )
            rows.append((f"{run.peer}: PSNR not below any peer's", text, _met(_psnr(run) >= _psnr(best))))
        best = min(rivals, key=_seconds)
        text = f"{_seconds(run):.1f} s, the fastest peer {_seconds(best):.1f} s ({best.peer})"
        rows.append((f"{run.peer}: faster than every peer", text, _met(_seconds(run) < _seconds(best))))
        whole = _seconds(best) + recording_s
        text = f"{_seconds(run):.1f} s, the fastest peer {_seconds(best):.1f} s + {recording_s:.1f} s = {whole:.1f} s"
        name = f"(beside it: {run.peer}: faster than every peer with its recording)"
        rows.append((name, text, _met(_seconds(run) < whole)))
        best = min(rivals, key=_megabytes)
        text = f"{_megabytes(run):.0f} MB, the smallest peer {_megabytes(best):.0f} MB ({best.peer})"
        rows.append((f"{run.peer}: less memory than every peer", text, _met(_megabytes(run) < _megabytes(best))))
    return report.table(("goal", "measured, medians", ""), rows)


def _psnr(run: PeerRun) -> float:
    return -float("inf") if run.quality is None else statistics.median(run.quality.psnr_db)


def _gain_db(ours: PeerRun, theirs: PeerRun) -> tuple[float, float, float]:
    """Return the mean difference of PSNR by prompt, and the interval that 95% of resamples of the prompts give."""
    if ours.quality is None or theirs.quality is None:
        return (float("nan"),) * 3
    differences = np.subtract(ours.quality.psnr_db, theirs.quality.psnr_db)
    chosen = np.random.default_rng(0).integers(len(differences), size=(_RESAMPLES, len(differences)))
    low, high = np.percentile(differences[chosen].mean(axis=1), (2.5, 97.5))
    return float(differences.mean()), float(low), float(high)


def _seconds(run: PeerRun) -> float:
    return statistics.median(run.seconds)


def _megabytes(run: PeerRun) -> float:
    return statistics.median(run.peak_anonymous_bytes) / 1e6


def _met(met: bool) -> str:
    return "met" if met else "**missed**"


def _recorded(usage: Usage) -> str:
    size_mb = usage.peak_anonymous_bytes / 1e6
    return f"Recording for the others took {usage.seconds:.1f} s and {size_mb:.0f} MB, which is not in their numbers."
