"""A stand-in for TensorRT-RTX's ``IRuntimeConfig`` and ``IRuntimeCache``, a part of ``fake_tensorrt``."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from typing import Any


class FakeConfig:
    def __init__(self, module: Any) -> None:
        self.module = module
        self.strategy: Any = None
        self.dynamic_shapes_kernel_specialization_strategy: Any = None
        self.kernels: Callable[[], FakeRuntimeCache | None] = lambda: None

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache(self.module)

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        self.kernels = weakref.ref(cache)
        return True

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class FakeRuntimeCache:
    """Kernels: names of plans with shapes. What it holds is bound to a driver, and it outlives its contexts."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.kernels: set[str] = set()
        self.contexts: list[weakref.ref[Any]] = []
        module.caches_alive += 1
        weakref.finalize(self, _gone, module, self.contexts).atexit = False

    def deserialize(self, blob: bytes) -> bool:
        stored = json.loads(blob)
        fits = stored["environment"] == self._environment()
        self.kernels |= set(stored["kernels"]) if fits else set()
        return fits

    def serialize(self) -> memoryview | None:
        content = {"environment": self._environment(), "kernels": sorted(self.kernels)}
        return None if self.module.no_kernels else memoryview(json.dumps(content).encode())

    def _environment(self) -> list[str]:
        return [self.module.__version__, self.module.driver]


def _gone(module: Any, contexts: list[weakref.ref[Any]]) -> None:
    module.caches_alive -= 1
    module.misuse += ["a cache of kernels went before its context" for context in contexts if context() is not None]
