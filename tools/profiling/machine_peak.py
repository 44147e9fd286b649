"""What this processor reaches at best, measured in two seconds; and the machine in words.

Arithmetic is measured with the library that runs the bundle: ONNX Runtime multiplies a square matrix with a constant
one, in fp32 and in 8 bits, on as many threads. Bandwidth is that of copying arrays that no cache holds, counted as read
and written. The module knows no bundle; a GPU's peak is measured in ``gpu_peak``.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from reelforge.runtime.engines.onnxruntime_library import import_onnxruntime
from reelforge.tools.profiling.probe_graph import FLOAT, INT8, INT32, UINT8, Chain, graph_of
from reelforge.tools.profiling.schema import Peak
from reelforge.tools.profiling.schema_work import Machine

_SIZE = 1024
_PROBE_S = 0.3
_COPY_BYTES = 1 << 26
_PACKAGES = ("reelforge", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-python")


def measure_peak(threads: int, before: Peak | None = None) -> Peak:
    """Measure arithmetic and bandwidth on ``threads`` threads.

    Args:
        threads: How many.
        before: An earlier measurement; the better of both counts, number by number.

    Raises:
        ImportError: If onnxruntime is not installed; whoever has timed an engine has it.
    """
    seconds = {
        "fp32": best_seconds(_product("MatMul", FLOAT, FLOAT, FLOAT, threads)),
        "int8": best_seconds(_product("MatMulInteger", UINT8, INT8, INT32, threads)),
    }
    operations = 2 * _SIZE**3
    return Peak(
        name=processor(),
        flops={
            precision: max(operations / best, before.flops[precision] if before else 0.0)
            for precision, best in seconds.items()
        },
        bandwidth=max(_bandwidth(threads), before.bandwidth if before else 0.0),
        measured=True,
        source=f"the fastest of several products of {_SIZE}x{_SIZE} matrices and of copies of "
        f"{_COPY_BYTES >> 20} MiB per thread, {threads} threads",
    )


def describe_machine(gpu: str | None = None) -> Machine:
    """Return this machine in words."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(processor(), cores, _memory_bytes(), f"{platform.system()} {platform.machine()}", gpu, versions)


def processor(path: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name, or its architecture where the system does not say."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def best_seconds(work: Callable[[], object]) -> float:
    """Return the fastest of as many calls as fit into ``_PROBE_S``, after one that does not count."""
    work()
    best, end = float("inf"), time.perf_counter() + _PROBE_S
    while time.perf_counter() < end or best == float("inf"):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def _bandwidth(threads: int) -> float:
    sources = [np.ones(_COPY_BYTES, np.uint8) for _ in range(threads)]
    targets = [np.zeros(_COPY_BYTES, np.uint8) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:  # numpy lets the other threads run while it copies
        best = best_seconds(lambda: list(pool.map(np.copyto, targets, sources)))
    return 2 * threads * _COPY_BYTES / best


def _product(operator: str, left: int, right: int, result: int, threads: int) -> Callable[[], object]:
    """Return a product of a matrix with a constant one, in ONNX Runtime."""
    runtime: Any = import_onnxruntime()
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 4
    dtype = {FLOAT: np.float32, UINT8: np.uint8, INT8: np.int8}
    constant = np.ones((_SIZE, _SIZE), dtype[right])
    chain = Chain(operator, (_SIZE, _SIZE), (left, right), result)
    session = runtime.InferenceSession(
        graph_of(chain, constant.tobytes()), settings, providers=["CPUExecutionProvider"]
    )
    inputs = {"a": np.ones((_SIZE, _SIZE), dtype[left])}
    return lambda: session.run(None, inputs)
