"""GPU architectures: what each computes in, and which backends compile for it.

Names are CUDA's compute capabilities (``sm89`` is 8.9). The facts are of TensorRT-RTX 1.7 and TensorRT 10/11, read off
the compilers themselves where they run without a GPU; TensorRT-RTX offers no data-centre Hopper or Blackwell. The
module does not know particular graphics cards, their memory or their speed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """One compute capability.

    Attributes:
        capability: Major and minor number.
        backends: Values of ``runtime.recipe.Backend`` that compile for it.
        bf16: Whether its tensor cores take bfloat16.
        fp8: Whether they take E4M3.
        int8: Whether a compiler uses its int8 tensor cores (TensorRT-RTX computes int8 layers in fp16 on 7.5).
    """

    capability: tuple[int, int]
    backends: tuple[str, ...]
    bf16: bool
    fp8: bool
    int8: bool


ARCHITECTURES: dict[str, Architecture] = {
    "sm75": Architecture((7, 5), ("rtx", "trt"), bf16=False, fp8=False, int8=False),
    "sm80": Architecture((8, 0), ("rtx", "trt"), bf16=True, fp8=False, int8=True),
    "sm86": Architecture((8, 6), ("rtx", "trt"), bf16=True, fp8=False, int8=True),
    "sm89": Architecture((8, 9), ("rtx", "trt"), bf16=True, fp8=True, int8=True),
    "sm90": Architecture((9, 0), ("trt",), bf16=True, fp8=True, int8=True),
    "sm100": Architecture((10, 0), ("trt",), bf16=True, fp8=True, int8=True),
    "sm120": Architecture((12, 0), ("rtx", "trt"), bf16=True, fp8=True, int8=True),
    "sm121": Architecture((12, 1), ("rtx", "trt"), bf16=True, fp8=True, int8=True),
}
"""In ascending order."""
