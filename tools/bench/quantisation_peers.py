"""Other quantisers on our fp32 graph: ``python -m reelforge.tools.bench.quantisation_peers --bundle DIR -o FILE``.

ONNX Runtime's ``quantize_static`` and NVIDIA ModelOpt quantise the linear layers of the blocks of one bundle's ``dit``,
each in a process of its own and on the same recordings; then the bundle's videos of prompts that none of them saw are
compared. ModelOpt's dependencies contradict ours, so it runs in an environment of its own
(``tools/bench/requirements-peers.txt``), whose interpreter ``--peers-python`` names. Development only; the module knows
nothing of our own quantiser.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np
import onnx_ir as ir

from reelforge.runtime.bundle.open import Bundle
from reelforge.tools.bench import calibration_data, peer_quantiser, quantised_quality, report
from reelforge.tools.bench.memory import Usage, run_sampled
from reelforge.tools.bench.quantised_quality import Quality, Reference

PACKAGES = ("onnxruntime", "onnx-ir", "scikit-image")
CHILD = Path(peer_quantiser.__file__)
LARGE_CALLS = 2  # sampling steps of one prompt that are recorded of a large model
QUANTISED_PARTS = ("double", "single")  # patch embedding and final projection stay as they are, as in our bundles


@dataclass(frozen=True)
class PeerRun:
    """What one quantiser did.

    Attributes:
        peer: A key of ``peer_quantiser.PEERS``.
        seconds: Of the whole process, one per run.
        call_seconds: Of the quantiser's own call, without start and imports, one per run.
        peak_anonymous_bytes: One per run.
        versions: Of the packages that did it.
        quality: None if it failed, or was not measured.
        failure: The error's last line, or empty.
    """

    peer: str
    seconds: tuple[float, ...] = ()
    call_seconds: tuple[float, ...] = ()
    peak_anonymous_bytes: tuple[int, ...] = ()
    versions: str = ""
    quality: Quality | None = None
    failure: str = ""


def write_plain_graph(bundle: Path, folder: Path) -> list[str]:
    """Write the bundle's ``dit.onnx`` into ``folder`` as quantisers expect it, and return the layers to quantise.

    Expected are float32 weights inside the file. Ours are bf16 in the checkpoint's own files with a Cast behind, and
    none of the quantisers takes a Cast's result for a weight. This preparation is not counted as their time.
    """
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        # onnx-ir refuses to read data through hard links, which is what a bundle's weights may be.
        copy = Path(shutil.copytree(bundle, Path(name) / "copy"))
        model = ir.load(copy / Bundle.open(bundle).stage("dit").graph)
        graph = model.graph
        for node in list(graph):
            weight = node.inputs[0].const_value if node.op_type == "Cast" and node.inputs[0] is not None else None
            if weight is None or node.inputs[0] not in graph.initializers.values():
                continue
            (cast,) = node.outputs
            tensor = ir.tensor(weight.numpy().astype(np.float32), name=f"{cast.name}.fp32")
            plain = ir.Value(name=tensor.name, shape=cast.shape, type=cast.type, const_value=tensor)
            cast.replace_all_uses_with(plain)
            graph.remove(node, safe=True)
            graph.register_initializer(plain)
        for key, value in list(graph.initializers.items()):
            if not value.uses():
                del graph.initializers[key]
            elif isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = ir.Tensor(value.const_value.numpy().copy(), name=key)
        ir.save(model, folder / quantised_quality.GRAPH)
    gemms = [node.name or "" for node in graph if node.op_type in ("Gemm", "MatMul")]
    return [name for name in gemms if name.split(".")[0] in QUANTISED_PARTS]


def run_peer(
    peer: str,
    python: str,
    graph: Path,
    layers: Sequence[str],
    recordings: Sequence[Path],
    output: Path,
    repeats: int,
    limit_s: float | None = None,
) -> PeerRun:
    """Quantise ``repeats`` times with one peer; the result of the last run is ``output/dit.onnx``.

    Args:
        peer: A key of ``peer_quantiser.PEERS``.
        python: The interpreter of the environment that has it.
        graph: From :func:`write_plain_graph`.
        layers: Likewise.
        recordings: The calibration data.
        output: A folder, which must not exist.
        repeats: How often.
        limit_s: After so many seconds a run is killed, which counts as a failure; None waits for ever.
    """
    output.mkdir(parents=True)
    job_file = output.parent / f"{output.name}.json"
    job = peer_quantiser.Job(
        peer, str(graph), list(layers), [str(path) for path in recordings], str(output / quantised_quality.GRAPH)
    )
    job_file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    try:
        usages = [run_sampled([python, str(CHILD), str(job_file)], limit_s) for _ in range(repeats)]
    except subprocess.TimeoutExpired:
        return PeerRun(peer, failure=f"cut off after {limit_s:g} s")
    except subprocess.CalledProcessError as error:
        lines = str(error.output).strip().splitlines()
        return PeerRun(peer, failure=lines[-1] if lines else f"exit status {error.returncode}")
    said = [json.loads(usage.output.strip().splitlines()[-1]) for usage in usages]
    return PeerRun(
        peer,
        tuple(usage.seconds for usage in usages),
        tuple(one["seconds"] for one in said),
        tuple(usage.peak_anonymous_bytes for usage in usages),
        ", ".join(f"{name} {number}" for name, number in said[-1]["versions"].items()),
    )


def run_peers(
    bundle: Path,
    work: Path,
    recordings: Sequence[Path],
    references: Sequence[Reference],
    peers_python: str | None,
    repeats: int,
    peers: Sequence[str] = tuple(peer_quantiser.PEERS),
    limit_s: float | None = None,
) -> list[PeerRun]:
    """Quantise the bundle's ``dit`` with every peer and measure the pictures.

    Args:
        bundle: The fp32 bundle.
        work: A folder for the graphs; it is filled with a few copies of the model.
        recordings: Files from ``calibration_data``.
        references: From ``quantised_quality.make_references``; without any, only time and memory are measured.
        peers_python: The interpreter that has ModelOpt; without it, ModelOpt is left out.
        repeats: Runs of each quantiser.
        peers: Keys of ``peer_quantiser.PEERS``.
        limit_s: For each run; see :func:`run_peer`.
    """
    layers = write_plain_graph(bundle, work / "plain")
    runs = []
    for number, peer in enumerate(peers):
        python = peers_python if peer.startswith("modelopt") else sys.executable
        if python is None:
            continue
        folder = work / str(number)
        graph = work / "plain" / quantised_quality.GRAPH
        run = run_peer(peer, python, graph, layers, recordings, folder, repeats, limit_s)
        if references and not run.failure:
            # See measure_quality; int8 runs with the kernels that a user gets.
            optimization = "basic" if "fp8" in peer else "all"
            run = replace(run, quality=quantised_quality.measure_quality(bundle, folder, references, optimization))
        shutil.rmtree(folder)
        click.echo(f"{peer}: {run.failure or [*run.seconds, *(run.quality.cells() if run.quality else ())]}")
        runs.append(run)
    return runs


def peer_lines(runs: Sequence[PeerRun], recording_s: Mapping[str, float] | None = None) -> list[str]:
    """Return the Markdown table of the runs, and below it the errors of those that failed.

    Args:
        runs: In the order of the rows.
        recording_s: What it took to make a peer's recordings, by peer; those that are not in it need none. Without it,
            the column of seconds with them is left out.
    """
    pictures = quantised_quality.HEADINGS if any(run.quality for run in runs) else ()
    whole = () if recording_s is None else ("seconds with recording",)
    headings = ("peer", *pictures, "seconds", "of these in its call", *whole, "peak anonymous MB", "with")
    rows = [
        (
            run.peer,
            *(run.quality.cells() if run.quality else ()),
            report.spread(run.seconds),
            report.spread(run.call_seconds),
            *(
                ()
                if recording_s is None
                else [report.spread([seconds + recording_s.get(run.peer, 0.0) for seconds in run.seconds])]
            ),
            report.spread([size / 1e6 for size in run.peak_anonymous_bytes], digits=0),
            run.versions,
        )
        for run in runs
        if not run.failure
    ]
    failures = [f"- {run.peer} failed: `{run.failure}`" for run in runs if run.failure]
    return [*report.table(headings, rows), *(["", *failures] if failures else [])]


def record(bundle: Path, folder: Path, *options: str) -> tuple[list[Path], Usage]:
    """Record calibration data in a process of its own."""
    recorder = [sys.executable, "-m", "reelforge.tools.bench.calibration_data", str(bundle)]
    usage = run_sampled([*recorder, "--output", str(folder), *options])
    return sorted(folder.glob("*.npz")), usage


@click.command()
@click.option("--bundle", required=True, type=click.Path(path_type=Path, exists=True), help="fp32 bundle of the demo.")
@click.option("--large", type=click.Path(path_type=Path, exists=True), help="A large fp32 bundle: time and memory.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Markdown file.")
@click.option("--peers-python", help="Interpreter with tools/bench/requirements-peers.txt; else without ModelOpt.")
@click.option("--repeats", default=3, show_default=True, help="Runs of each quantiser.")
@click.option("--calibration", default=calibration_data.CALIBRATION_PROMPTS, show_default=True, help="Prompts.")
@click.option("--evaluation", default=calibration_data.EVALUATION_PROMPTS, show_default=True, help="Other prompts.")
def main(
    bundle: Path,
    large: Path | None,
    output: Path,
    peers_python: str | None,
    repeats: int,
    calibration: int,
    evaluation: int,
) -> None:
    """Quantise the fp32 bundle's dit with other quantisers and compare the videos with fp32."""
    lines = [
        "# Other quantisers on our fp32 graph",
        "",
        *report.environment("python -m reelforge.tools.bench.quantisation_peers", PACKAGES),
        "",
        f"Linear layers of all blocks. Seconds and memory: {repeats} runs, median (smallest-largest).",
    ]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        recordings, usage = record(bundle, work / "recordings", "--count", str(calibration))
        references = quantised_quality.make_references(bundle, calibration_data.evaluation_requests(evaluation))
        runs = run_peers(bundle, work / "demo", recordings, references, peers_python, repeats)
        lines += [
            "",
            f"{calibration} calibration prompts and {evaluation} others, all steps, against the fp32 bundle on",
            f"the same noise. {_recorded(usage)}",
            "",
            *peer_lines(runs),
        ]
        if large is not None:
            recordings, usage = record(large, work / "few", "--count", "1", "--steps", str(LARGE_CALLS))
            runs = run_peers(large, work / "large", recordings, (), peers_python, repeats)
            lines += ["", "## A larger model", "", _recorded(usage), "", *peer_lines(runs)]
    report.write(output, lines)
    click.echo(f"wrote {output}")


def _recorded(usage: Usage) -> str:
    size_mb = usage.peak_anonymous_bytes / 1e6
    return f"Running the bundle to record the data is not in their time: {usage.seconds:.1f} s, {size_mb:.0f} MB."


if __name__ == "__main__":
    main()
