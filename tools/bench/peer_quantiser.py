"""Runs one other quantiser on one graph: a child process of ``quantisation_peers``, in whichever environment has it.

``python peer_quantiser.py JOB.json`` imports nothing of reelforge, so that the environment need not have it. The job
says: ``peer`` (a key of ``PEERS``), ``graph`` (fp32 ONNX), ``layers`` (names of the nodes to quantise), ``recordings``
(``.npz`` files, see ``calibration_data``) and ``output``. The last line of its output is JSON: ``seconds`` of the
quantiser's own call without imports, and ``versions``.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import quantization as ort

# Gemm's result goes to a norm, a rotation or a residual, so a quantised output is error without a kernel that gains.
INPUTS_ONLY = {"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]}
SYMMETRIC = {"ActivationSymmetric": True, "WeightSymmetric": True}


@dataclass(frozen=True)
class Job:
    """What one child process is to do."""

    peer: str
    graph: str
    layers: Sequence[str]
    recordings: Sequence[str]
    output: str


class Recordings(ort.CalibrationDataReader):  # type: ignore[misc]
    """Hands out the recorded calls one by one, a file in memory at a time."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        with np.load(paths[0]) as file:
            self.steps = len(file[file.files[0]])
        self.calls: Iterator[dict[str, Any]] = self._all()

    def __len__(self) -> int:
        """Return the number of calls; every file has as many as the first."""
        return self.steps * len(self.paths)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Hand out only the calls in ``[start_index, end_index)``, from the next one on."""
        self.calls = itertools.islice(self._all(), start_index, end_index)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next call's inputs, or None after the last."""
        return next(self.calls, None)

    def get_first(self) -> dict[str, Any]:
        """Return the first call's inputs (ModelOpt asks for them to learn shapes)."""
        return next(self._all())

    def rewind(self) -> None:
        """Begin again."""
        self.calls = self._all()

    def _all(self) -> Iterator[dict[str, Any]]:
        for path in self.paths:
            with np.load(path) as file:
                inputs = {name: file[name] for name in file.files}
            for step in range(len(next(iter(inputs.values())))):
                yield {name: rows[step, ...] for name, rows in inputs.items()}


def onnxruntime_peer(method: str, options: dict[str, Any]) -> Callable[[Job], None]:
    """Return a job that runs ``quantize_static``: Q/DQ, int8 weights per output channel.

    Activations are uint8, which its documentation recommends for CPUs with VNNI, or int8 if they shall be symmetric.
    """

    def run(job: Job) -> None:
        recordings = Recordings(job.recordings)
        # Its histograms take only calls of one shape at a time: prompts differ in length, the steps of one do not.
        stride = {"CalibStridedMinMax": recordings.steps}
        ort.quantize_static(
            job.graph,
            job.output,
            recordings,
            quant_format=ort.QuantFormat.QDQ,
            op_types_to_quantize=["Gemm", "MatMul"],
            per_channel=True,
            nodes_to_quantize=list(job.layers),
            calibrate_method=getattr(ort.CalibrationMethod, method),
            activation_type=ort.QuantType.QInt8 if "ActivationSymmetric" in options else ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            extra_options={**options, **stride},
        )

    return run


def modelopt_peer(mode: str, method: str) -> Callable[[Job], None]:
    """Return a job that runs ModelOpt's ONNX quantiser on the CPU provider; what is not quantised stays fp32."""

    def run(job: Job) -> None:
        importlib.import_module("modelopt.onnx.quantization").quantize(
            job.graph,
            quantize_mode=mode,
            calibration_data_reader=Recordings(job.recordings),
            calibration_method=method,
            calibration_eps=["cpu"],
            op_types_to_quantize=["Gemm", "MatMul"],
            nodes_to_quantize=list(job.layers),
            high_precision_dtype="fp32",
            output_path=job.output,
            log_level="WARNING",
        )

    return run


PEERS: dict[str, Callable[[Job], None]] = {
    "onnxruntime int8 MinMax": onnxruntime_peer("MinMax", {}),
    "onnxruntime int8 Entropy": onnxruntime_peer("Entropy", {}),
    "onnxruntime int8 Percentile": onnxruntime_peer("Percentile", {}),
    "onnxruntime int8 MinMax, inputs only": onnxruntime_peer("MinMax", INPUTS_ONLY),
    "onnxruntime int8 Entropy, inputs only": onnxruntime_peer("Entropy", INPUTS_ONLY),
    "onnxruntime int8 MinMax, inputs only, symmetric": onnxruntime_peer("MinMax", {**INPUTS_ONLY, **SYMMETRIC}),
    "modelopt int8 max": modelopt_peer("int8", "max"),
    "modelopt int8 entropy": modelopt_peer("int8", "entropy"),
    "modelopt fp8 max": modelopt_peer("fp8", "max"),
    "modelopt fp8 entropy": modelopt_peer("fp8", "entropy"),
}


def main(path: str) -> None:
    """Run the job in the file ``path``."""
    sys.stderr = sys.stdout  # the parent shows the error's last line
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    if job.peer.startswith("modelopt"):
        importlib.import_module("modelopt.onnx.quantization")
    started = time.monotonic()
    PEERS[job.peer](job)
    seconds = time.monotonic() - started
    print(json.dumps({"seconds": seconds, "versions": _versions(job.peer.split()[0])}))


def _versions(peer: str) -> dict[str, str]:
    names = {"onnxruntime": ("onnxruntime", "onnx"), "modelopt": ("nvidia-modelopt", "onnxruntime-gpu", "onnx")}
    return {name: version(name) for name in names[peer]}


if __name__ == "__main__":
    main(sys.argv[1])
