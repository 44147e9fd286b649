"""One contender of ``peers_cpu`` on OpenVINO, run as a file in its environment: ``python openvino_child.py JOB``.

That environment has numpy and OpenVINO and nothing of ours (``requirements-openvino.txt``); :func:`serve` is what all
contenders' processes share. ``JOB`` is JSON: a graph, its inputs as ``.npz``, the precision OpenVINO may compute in,
and where the result goes. After a line that says what was loaded, each line on stdin is a number of steps to time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Step = Callable[[], Any]


def serve(load: Callable[[], tuple[Step, dict[str, str]]], output: str) -> None:
    """Load a contender, keep the result of its first step, then time as many steps as each line of stdin says.

    Args:
        load: Returns a step, which returns an array, and notes for the table.
        output: ``.npy`` file for the array.
    """
    started = time.monotonic()
    step, notes = load()
    loaded = time.monotonic() - started
    np.save(output, np.asarray(step(), np.float32))
    _say({"loaded_s": loaded, "notes": notes})
    for line in sys.stdin:
        count = int(line)
        started = time.perf_counter()
        for _ in range(count):
            step()
        _say({"seconds": (time.perf_counter() - started) / count})


def openvino(job: dict[str, str]) -> tuple[Step, dict[str, str]]:
    """Compile a graph for the shapes of its inputs, on all cores."""
    import openvino as library  # type: ignore[import-not-found, unused-ignore]

    core = library.Core()
    model = core.read_model(job["graph"])
    names = {port.get_any_name() for port in model.inputs}
    with np.load(job["inputs"]) as found:
        arrays = {name: found[name] for name in found.files if name in names}
    model.reshape({name: list(array.shape) for name, array in arrays.items()})
    options = {
        "INFERENCE_PRECISION_HINT": job["precision"],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
    }
    compiled = core.compile_model(model, "CPU", options)
    notes = {
        "version": library.__version__.split("-")[0],
        "precision": str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string()),
        "threads": str(compiled.get_property("INFERENCE_NUM_THREADS")),
    }
    return lambda: compiled(arrays)["velocity"], notes


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    JOB = json.loads(sys.argv[1] if sys.argv[1].startswith("{") else Path(sys.argv[1]).read_text(encoding="utf-8"))
    serve(lambda: openvino(JOB), JOB["output"])
