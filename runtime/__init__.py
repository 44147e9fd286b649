"""Sampling runtime: bundles, engines, pipeline, video files. numpy only; no torch, no onnx.

``from reelforge.runtime import Pipeline, Request`` is the public surface. The names are loaded when they are first used
(PEP 562), so that importing the package costs nothing and a tool that only reads manifests needs no engine. The package
knows nothing of checkpoints or of how a bundle was compiled.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reelforge.runtime.bundle.check import Check
    from reelforge.runtime.bundle.open import Bundle
    from reelforge.runtime.control import Stop
    from reelforge.runtime.errors import ReelforgeError
    from reelforge.runtime.events import Frames, Notice, Progress
    from reelforge.runtime.pipeline import Pipeline
    from reelforge.runtime.request import Request
    from reelforge.runtime.scheduling.limits import QueueFullError, QueueLimits
    from reelforge.runtime.scheduling.pool import PipelinePool
    from reelforge.runtime.video import VideoWriter

_HOMES = {
    "Bundle": "reelforge.runtime.bundle.open",
    "Check": "reelforge.runtime.bundle.check",
    "Frames": "reelforge.runtime.events",
    "Notice": "reelforge.runtime.events",
    "Pipeline": "reelforge.runtime.pipeline",
    "PipelinePool": "reelforge.runtime.scheduling.pool",
    "Progress": "reelforge.runtime.events",
    "QueueFullError": "reelforge.runtime.scheduling.limits",
    "QueueLimits": "reelforge.runtime.scheduling.limits",
    "ReelforgeError": "reelforge.runtime.errors",
    "Request": "reelforge.runtime.request",
    "Stop": "reelforge.runtime.control",
    "VideoWriter": "reelforge.runtime.video",
}

__all__ = [
    "Bundle",
    "Check",
    "Frames",
    "Notice",
    "Pipeline",
    "PipelinePool",
    "Progress",
    "QueueFullError",
    "QueueLimits",
    "ReelforgeError",
    "Request",
    "Stop",
    "VideoWriter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
