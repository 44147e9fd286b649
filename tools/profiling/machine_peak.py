"""What this processor reaches at best, measured in two seconds; and the machine in words.

Arithmetic is measured with the library that runs the bundle: ONNX Runtime multiplies a square matrix with a constant
one, in fp32 and in 8 bits, on as many threads. The small graphs for it are written here byte by byte, since the runtime
has no onnx. Bandwidth is that of copying arrays that no cache holds, counted as read and written. The module knows no
bundle.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from reelforge.runtime.engines.onnxruntime_library import import_onnxruntime
from reelforge.tools.profiling.schema import Peak
from reelforge.tools.profiling.schema_work import Machine

_SIZE = 1024
_PROBE_S = 0.3
_COPY_BYTES = 1 << 26
_PACKAGES = ("reelforge", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-python")
_FLOAT, _UINT8, _INT8, _INT32 = 1, 2, 3, 6  # of onnx.TensorProto.DataType


def measure_peak(threads: int, before: Peak | None = None) -> Peak:
    """Measure arithmetic and bandwidth on ``threads`` threads.

    Args:
        threads: How many.
        before: An earlier measurement; the better of both counts, number by number.

    Raises:
        ImportError: If onnxruntime is not installed; whoever has timed an engine has it.
    """
    seconds = {
        "fp32": _best_seconds(_product("MatMul", _FLOAT, _FLOAT, _FLOAT, threads)),
        "int8": _best_seconds(_product("MatMulInteger", _UINT8, _INT8, _INT32, threads)),
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


def _best_seconds(work: Callable[[], object]) -> float:
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
        best = _best_seconds(lambda: list(pool.map(np.copyto, targets, sources)))
    return 2 * threads * _COPY_BYTES / best


def _product(operator: str, left: int, right: int, result: int, threads: int) -> Callable[[], object]:
    """Return a product of a matrix with a constant one, in ONNX Runtime."""
    runtime: Any = import_onnxruntime()
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 4
    dtype = {_FLOAT: np.float32, _UINT8: np.uint8, _INT8: np.int8}
    constant = np.ones((_SIZE, _SIZE), dtype[right])
    graph = product_graph(operator, left, right, result, constant.tobytes())
    session = runtime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    inputs = {"a": np.ones((_SIZE, _SIZE), dtype[left])}
    return lambda: session.run(None, inputs)


def product_graph(operator: str, left: int, right: int, result: int, constant: bytes) -> bytes:
    """Return an ONNX model of one product ``c = operator(a, b)`` of square matrices, with ``b`` as a constant.

    Field numbers are those of ``onnx.proto``.
    """
    node = _text(1, "a") + _text(1, "b") + _text(2, "c") + _text(3, "product") + _text(4, operator)
    dims = b"".join(_number(1, _SIZE) for _ in range(2))
    initializer = dims + _number(2, right) + _text(8, "b") + _field(9, constant)
    graph = b"".join(
        (
            _field(1, node),
            _text(2, "probe"),
            _field(5, initializer),
            _field(11, _value("a", left)),
            _field(12, _value("c", result)),
        )
    )
    opset = _text(1, "") + _number(2, 17)
    return _number(1, 8) + _field(7, graph) + _field(8, opset)


def _value(name: str, element: int) -> bytes:
    shape = b"".join(_field(1, _number(1, _SIZE)) for _ in range(2))
    tensor = _number(1, element) + _field(2, shape)
    return _text(1, name) + _field(2, _field(1, tensor))


def _text(number: int, text: str) -> bytes:
    return _field(number, text.encode())


def _field(number: int, content: bytes) -> bytes:
    return bytes(_varint([number << 3 | 2, len(content)])) + content


def _number(number: int, value: int) -> bytes:
    return bytes(_varint([number << 3, value]))


def _varint(values: Sequence[int]) -> Iterator[int]:
    for value in values:
        while value > 127:
            yield value & 127 | 128
            value >>= 7
        yield value
