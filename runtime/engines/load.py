"""Which class loads a stage: the bundle's backend decides, and settings that mean nothing to it are refused.

Modules of a backend are imported when a bundle needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from reelforge.runtime.engines.engine import Engine, EngineOptions
from reelforge.runtime.recipe import Backend

if TYPE_CHECKING:
    from reelforge.runtime.bundle.open import Bundle
    from reelforge.runtime.engines.device_session import DeviceSession


def load_engine(bundle: Bundle, stage: str, options: EngineOptions, session: Callable[[], DeviceSession]) -> Engine:
    """Load a stage of a bundle.

    Args:
        bundle: Its manifest's target names the backend.
        stage: The stage's name.
        options: The user's decisions.
        session: Returns the GPU's session, which is opened when the first plan is loaded.

    Raises:
        BundleError: If the bundle lacks the stage, or a file is not what the manifest says.
        EngineError: If the backend is not installed, refuses the stage, or does not know a setting.
    """
    backend = bundle.manifest.target.backend
    if backend.has_plans:
        from reelforge.runtime.engines.tensorrt_engine import engine_from_plans
        from reelforge.runtime.engines.tensorrt_library import PRODUCTS

        settings = ("threads", "spinning", "graph_optimization", "provider", "arena", "widening")
        options.refuse(PRODUCTS[backend], *settings, *(() if backend is Backend.RTX else ("kernel_cache",)))
        return engine_from_plans(session(), bundle, stage, options)
    from reelforge.runtime.engines.onnxruntime_engine import engine_from_onnx
    from reelforge.runtime.engines.onnxruntime_providers import gpu_provider

    entry = bundle.stage(stage)
    if backend is Backend.CPU:
        options.refuse("ONNX Runtime on the CPU", "device", "cuda_graph", "provider", "kernel_cache")
        return engine_from_onnx(bundle.graph(stage), entry, options)
    options.refuse("ONNX Runtime on a GPU", "cuda_graph", "kernel_cache", "arena", "widening")
    return engine_from_onnx(bundle.graph(stage), entry, options, gpu_provider(options))
