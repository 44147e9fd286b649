"""What a quantised ``dit.onnx`` does to the picture: the fp32 bundle's videos against those with the graph replaced.

Noise, text and conditioning are the reference's, so whatever differs is the graph's doing. The module does not know
who quantised the graph, nor how.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reelforge.calibration.quality import cosine, psnr, ssim
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.events import FloatArray
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.request import Request
from reelforge.tools.bench.calibration_data import Recording, RecordingPipeline, record

GRAPH = "dit.onnx"


@dataclass(frozen=True)
class Reference:
    """One video of the fp32 bundle: how it was sampled, and its frames ``[T, H, W, 3]`` in [0, 1]."""

    recording: Recording
    frames: FloatArray


@dataclass(frozen=True)
class Quality:
    """One value per prompt; of ``cosine`` one per prompt and step, between velocities on the reference's trajectory."""

    psnr_db: tuple[float, ...]
    ssim: tuple[float, ...]
    cosine: tuple[float, ...]

    def cells(self) -> tuple[str, ...]:
        """Return table cells under ``HEADINGS``."""
        return (
            f"{statistics.median(self.psnr_db):.2f}",
            f"{min(self.psnr_db):.2f}",
            f"{statistics.median(self.ssim):.4f}",
            f"{statistics.median(self.cosine):.5f}",
            f"{min(self.cosine):.5f}",
        )


HEADINGS = ("PSNR dB, median", "worst", "SSIM, median", "velocity cosine, median", "worst step")


def make_references(bundle: Path, requests: Sequence[Request]) -> list[Reference]:
    """Generate ``requests`` on the fp32 bundle."""
    pipeline = RecordingPipeline(Bundle.open(bundle))
    recordings = [record(pipeline, request) for request in requests]
    return [Reference(one, np.concatenate(list(pipeline.decode(one.latents)))) for one in recordings]


def measure_quality(
    bundle: Path, quantised: Path, references: Sequence[Reference], graph_optimization: str = "all"
) -> Quality:
    """Compare the bundle with ``quantised`` in place of its ``dit`` with the references.

    Args:
        bundle: The fp32 bundle, which is not altered.
        quantised: A folder with ``dit.onnx`` and whatever data files it refers to.
        references: From :func:`make_references` with the same bundle.
        graph_optimization: ONNX Runtime's. Float8 needs ``"basic"``: from ``"extended"`` on it makes an int8 kernel of
            any Gemm between Q/DQ, and then refuses the graph.
    """
    with replaced(bundle, quantised, graph_optimization) as pipeline:
        pairs = [(_video(pipeline, reference), reference.frames) for reference in references]
        cosines = tuple(value for reference in references for value in _cosines(pipeline, reference.recording))
    return Quality(tuple(psnr(*pair) for pair in pairs), tuple(ssim(*pair) for pair in pairs), cosines)


@contextmanager
def replaced(bundle: Path, quantised: Path, graph_optimization: str = "all") -> Iterator[Pipeline]:
    """Open a temporary copy of ``bundle`` whose ``dit`` is the one in the folder ``quantised``.

    The manifest stays the fp32 bundle's: it describes the same tensors, and digests are not checked.
    """
    original = Bundle.open(bundle)
    # Hard links need one file system, so the copy lies beside the quantised graph.
    with tempfile.TemporaryDirectory(dir=quantised.parent) as name:
        folder = Path(name) / "quantised.bundle"
        shutil.copytree(bundle, folder, copy_function=_link_or_copy)
        shutil.copytree(quantised, folder, copy_function=_link_or_copy, dirs_exist_ok=True)
        options = EngineOptions(graph_optimization=graph_optimization)
        yield Pipeline(Bundle(folder, original.manifest), options)


def _video(pipeline: Pipeline, reference: Reference) -> FloatArray:
    resolved = pipeline.resolve(reference.recording.request)
    return np.concatenate(list(pipeline.decode(pipeline.sample(resolved, reference.recording.conditions))))


def _cosines(pipeline: Pipeline, recording: Recording) -> list[float]:
    with pipeline.engine("dit") as dit:
        calls = [
            {name: rows[step, ...] for name, rows in recording.inputs.items()}
            for step in range(len(recording.velocities))
        ]
        received = [dit.run(call, {"velocity": None})["velocity"] for call in calls]
    return [cosine(*pair) for pair in zip(received, recording.velocities, strict=True)]


def _link_or_copy(source: str, target: str) -> str:
    Path(target).unlink(missing_ok=True)  # writing into it would alter the file that it is a link of
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
    return target
