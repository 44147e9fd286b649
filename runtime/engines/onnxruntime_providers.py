"""ONNX Runtime's execution providers: the CPU, and three ways to an NVIDIA GPU.

ONNX Runtime goes on with the CPU when a GPU provider is missing or cannot be loaded, and only logs that; here it is an
error. Single nodes that a provider lacks still run on the CPU: that is how ONNX Runtime computes shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.errors import EngineError


@dataclass(frozen=True)
class Device:
    """Memory other than the host's, as ONNX Runtime names it.

    Attributes:
        kind: ``cuda``.
        index: Of the GPU.
    """

    kind: str
    index: int


@dataclass(frozen=True)
class Provider:
    """What a session computes with.

    Attributes:
        names: Of execution providers, in order of preference; the first must be there.
        settings: Of each of them.
        package: To install.
        device: Where it keeps tensors; None for the host's memory.
    """

    names: tuple[str, ...]
    settings: dict[str, str]
    package: str
    device: Device | None = None


CPU = Provider(("CPUExecutionProvider",), {}, "reelforge[cpu]")

_GPU = {
    "cuda": ("CUDAExecutionProvider",),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider"),
    "rtx": ("NvTensorRTRTXExecutionProvider", "CUDAExecutionProvider"),
}


def gpu_provider(options: EngineOptions) -> Provider:
    """Return the provider that the options name.

    Raises:
        EngineError: If there is none of that name.
    """
    name = options.provider or "cuda"
    if name not in _GPU:
        raise EngineError("the provider is not known.", received=name, expected=" or ".join(_GPU), fix="use cuda")
    settings = {"device_id": str(options.device)}
    return Provider(_GPU[name], settings, "reelforge[cuda]", Device("cuda", options.device))


def require_available(provider: Provider, runtime: Any) -> list[str | tuple[str, dict[str, str]]]:
    """Return the providers for a session, with their settings: those that this onnxruntime was built with.

    Raises:
        EngineError: If the first is not among them.
    """
    available = runtime.get_available_providers()
    if provider.names[0] not in available:
        raise EngineError(
            f"this onnxruntime has no {provider.names[0]}.",
            received=f"onnxruntime {runtime.__version__} with {', '.join(available)}",
            expected=provider.names[0],
            fix=f"pip uninstall onnxruntime, then pip install {provider.package}: the two packages exclude each other",
        )
    there = [name for name in provider.names if name in available]
    return [(name, dict(provider.settings)) if provider.settings else name for name in there]


def require_active(provider: Provider, session: Any) -> None:
    """Refuse a session that goes on without the provider it was asked for.

    Raises:
        EngineError: If the provider could not be initialised.
    """
    active = session.get_providers()
    if provider.names[0] not in active:
        raise EngineError(
            f"ONNX Runtime could not start {provider.names[0]}.",
            received=f"a session with {', '.join(active)}",
            expected=provider.names[0],
            fix="check with nvidia-smi that driver and GPU work, and that the provider's CUDA libraries are installed",
        )
