"""What a GPU reaches at best, measured with the library that runs the bundle; and the GPU's name and memory.

ONNX Runtime's provider multiplies matrices that lie in the GPU's memory, several in a row, in each precision that it
has a kernel for; the processor never takes over. Bandwidth is that of negating an array that no cache holds, counted as
read and written. Matrices are random: a GPU clocks higher on equal numbers than it does on weights. Providers and their
memory are ``runtime``'s affair. The measurement has not been executed on a GPU: tests run it on the CPU's provider and
on a stand-in for a GPU's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from reelforge.runtime.cuda.driver import Cuda, open_cuda
from reelforge.runtime.engines.engine import Array, EngineOptions
from reelforge.runtime.engines.onnxruntime_library import import_onnxruntime
from reelforge.runtime.engines.onnxruntime_providers import Provider, require_active, require_available
from reelforge.runtime.errors import EngineError
from reelforge.tools.profiling.machine_peak import best_seconds
from reelforge.tools.profiling.probe_graph import BFLOAT16, FLOAT, FLOAT16, INT8, INT32, Chain, graph_of
from reelforge.tools.profiling.schema import Peak

_SIZE, _IN_A_ROW = 8192, 8
_ELEMENTS = 1 << 27  # 512 MiB in fp32
_BLOCK = (1 << 20) - 3  # random numbers are repeated after so many, which is no multiple of a row
_PRODUCTS: dict[str, tuple[int | None, int]] = {
    # precision: what fp32 inputs are cast to, and the type of the result
    "fp32": (None, FLOAT),
    "fp16": (FLOAT16, FLOAT16),
    "bf16": (BFLOAT16, BFLOAT16),
}


def open_gpu(options: EngineOptions) -> tuple[Cuda | None, str]:
    """Return the GPU that engines compute on, or None and a sentence that says why it cannot be asked anything."""
    try:
        return open_cuda(options.device), ""
    except EngineError as error:
        return None, f"The GPU could not be asked for its name and memory: {error.where} (pip install cuda-python)"


def measure_gpu_peak(provider: Provider, name: str) -> Peak:
    """Measure arithmetic and bandwidth of what a provider computes with.

    Args:
        provider: It computes; without a device of its own, in the host's memory.
        name: Of the processor.

    Raises:
        EngineError: If the provider is not there, or has a kernel for nothing that is tried.
    """
    size, chains = (_SIZE, _SIZE), {}
    for precision, (cast, result) in _PRODUCTS.items():
        chains[precision] = Chain("MatMul", size, (FLOAT, FLOAT), result, _IN_A_ROW, cast)
    chains["int8"] = Chain("MatMulInteger", size, (INT8, INT8), INT32)
    flops = {}
    for precision, chain in chains.items():
        seconds = _seconds(provider, chain)
        if seconds is not None:
            flops[precision] = 2 * _SIZE**3 * chain.count / seconds
    if not flops:
        raise EngineError(
            f"the peak of {name} cannot be measured.",
            received=f"{provider.names[0]} without a kernel for products in {', '.join(chains)}",
            expected="a product of matrices in some precision",
        )
    negations = Chain("Neg", (_ELEMENTS,), (FLOAT,), FLOAT, _IN_A_ROW)
    seconds = _seconds(provider, negations)
    bandwidth = 0.0 if seconds is None else 2 * 4 * _ELEMENTS * _IN_A_ROW / seconds
    return Peak(
        name=name,
        flops=flops,
        bandwidth=bandwidth,
        measured=True,
        source=f"the fastest of several products of {_SIZE}x{_SIZE} matrices, {_IN_A_ROW} in a row (1 in int8), and of "
        f"{_IN_A_ROW} negations of {4 * _ELEMENTS >> 20} MiB, by {provider.names[0]} with its default for fp32, which "
        "may be TF32; a precision that is absent has no kernel there, or no memory",
    )


def _seconds(provider: Provider, chain: Chain) -> float | None:
    """Return how long a chain takes at best; None if the provider has no kernel for it, or no memory."""
    runtime: Any = import_onnxruntime()
    settings = runtime.SessionOptions()
    settings.log_severity_level = 4
    settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if provider.device is not None:
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    # There is no common base of what onnxruntime raises besides these.
    state = runtime.capi.onnxruntime_pybind11_state
    refusals = (state.NotImplemented, state.Fail, state.InvalidGraph, state.RuntimeException, RuntimeError, MemoryError)
    providers = require_available(provider, runtime)
    try:
        session = runtime.InferenceSession(graph_of(chain), settings, providers=providers)
        require_active(provider, session)
        return best_seconds(_bound(runtime, session, provider, chain))
    except refusals:
        return None


def _bound(runtime: Any, session: Any, provider: Provider, chain: Chain) -> Callable[[], object]:
    """Return a call of a session on arrays that lie where it computes."""
    binding = session.io_binding()
    device = () if provider.device is None else (provider.device.kind, provider.device.index)
    scale = 1 / chain.shape[-1] ** 0.5  # so that a row of products neither grows nor vanishes
    for name, element in zip(("a", "b"), chain.inputs, strict=False):
        array = _random(chain.shape, element, 1.0 if name == "a" else scale)
        binding.bind_ortvalue_input(name, runtime.OrtValue.ortvalue_from_numpy(array, *device))
    binding.bind_output("c", *(device or ("cpu",)))
    return lambda: session.run_with_iobinding(binding)


def _random(shape: tuple[int, ...], element: int, scale: float) -> Array:
    generator = np.random.default_rng(0)
    if element == INT8:
        return np.resize(generator.integers(-128, 128, _BLOCK, np.int8), shape)
    return np.resize(generator.standard_normal(_BLOCK, np.float32) * np.float32(scale), shape)
