"""What kernels reach of a GPU's dense rate and bandwidth: stated constants, each with its source, none of them fitted.

Matrix products in 16 and 8 bits, convolutions and memory-bound work have one share each, measured on one GPU. Attention
has measured or published rates per kernel and GPU; another GPU gets the same fraction of its dense 16-bit rate as its
nearest relative there, and is marked as extrapolated. The module does not know which kernel a compiler will choose:
nobody has published how fast TensorRT-RTX's fused attention is, so it is taken to be as fast as FlashAttention-2 and,
in FP8, faster by the ratio of FlashAttention-3's two precisions.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from reelforge.export.planner.gpus import Gpu, find_gpu
from reelforge.plugins.attention_choice import ATTENTION_PLUGINS
from reelforge.runtime.architectures import ARCHITECTURES
from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import Backend, Precision, Target


@dataclass(frozen=True)
class Constant:
    """A number with its source."""

    value: float
    source: str


_H100 = "an H100 80GB HBM3 with PyTorch 2.11 (benchmarks/planner_h100.json)"
GEMM = Constant(0.78, f"mean of q, fc1 and fc2 of a 720p step in bf16, 0.73 to 0.81 of 989 TFLOP/s, on {_H100}")
GEMM_8_BIT = Constant(0.67, f"the same in FP8, 0.64 to 0.71 of 1979 TFLOP/s, on {_H100}")
CONVOLUTION = Constant(
    0.55, f"mean of four 3x3x3 convolutions in two layouts, fp16, 0.41 to 0.74 of the rate, on {_H100}"
)
BANDWIDTH = Constant(0.89, f"a copy of 4 GiB, 2.98 of 3.35 TB/s, on {_H100}")


def product_share(precision: Precision) -> Constant:
    """Return which share of the GPU's rate a matrix product reaches."""
    return GEMM_8_BIT if precision.quantised else GEMM


class AttentionKernel(enum.Enum):
    """An attention kernel whose speed somebody has published."""

    FLASH_2 = "FlashAttention-2"
    FLASH_3 = "FlashAttention-3"
    FLASH_3_FP8 = "FlashAttention-3 FP8"
    SAGE_1 = "SageAttention 1"
    SAGE_2 = "SageAttention 2"
    SAGE_2_PLUS = "SageAttention 2++"
    SAGE_3 = "SageAttention 3"
    CUDNN = "cuDNN 9.19"  # what PyTorch 2.11 runs on an H100
    PLUGIN = "our 8-bit plugin"
    FUSED = "fused, 16 bit"  # the compiler's own
    FUSED_FP8 = "fused, FP8"


_SAGE_PAPERS = "arXiv 2411.10958, 2505.11594, 2505.21136: head dim 128, 32K tokens, not causal"
# TFLOP/s (TOP/s) by GPU.
_MEASURED: dict[AttentionKernel, dict[str, float]] = {
    AttentionKernel.FLASH_2: {"H100 SXM": 339, "RTX 4090": 164, "RTX 5090": 214},
    AttentionKernel.FLASH_3: {"H100 SXM": 470},
    AttentionKernel.FLASH_3_FP8: {"H100 SXM": 892},
    AttentionKernel.SAGE_1: {"H100 SXM": 518, "RTX 4090": 322, "RTX 5090": 479},
    AttentionKernel.SAGE_2: {"H100 SXM": 882, "RTX 4090": 431, "RTX 5090": 554},
    AttentionKernel.SAGE_2_PLUS: {"RTX 4090": 493, "RTX 5090": 643},
    AttentionKernel.SAGE_3: {"RTX 5090": 1027},
    AttentionKernel.CUDNN: {"H100 SXM": 561},
    AttentionKernel.PLUGIN: {"H100 SXM": 760},
}
_OUR_MEASUREMENTS = "benchmarks/attention_h100.json: head dim 128, 119,056 tokens"
_OURS = (AttentionKernel.CUDNN, AttentionKernel.PLUGIN)
# The A100's part of FlashAttention-2's own figures; there is no A100 in the table above.
_FLASH_2_AMPERE = Constant(0.73, "arXiv 2307.08691: up to 73 % of the A100's dense rate")
_FAMILY = {
    "sm75": "sm80",
    "sm80": "sm80",
    "sm86": "sm80",
    "sm89": "sm89",
    "sm90": "sm90",
    "sm100": "sm90",
    "sm120": "sm120",
}
_FP8_RATIO = _MEASURED[AttentionKernel.FLASH_3_FP8]["H100 SXM"] / _MEASURED[AttentionKernel.FLASH_3]["H100 SXM"]
_FUSED_SOURCE = "assumed as fast as FlashAttention-2, for want of a published figure"


@dataclass(frozen=True)
class AttentionRate:
    """Operations per second of one kernel on one GPU, with what the number rests on."""

    kernel: AttentionKernel
    rate: float
    source: str
    extrapolated: bool


def attention_rate(kernel: AttentionKernel, gpu: Gpu) -> AttentionRate:
    """Return how fast a kernel is on a GPU.

    Raises:
        RequestError: Where neither a figure nor a measured relative of the GPU exists.
    """
    if kernel in (AttentionKernel.FUSED, AttentionKernel.FUSED_FP8):
        base = attention_rate(AttentionKernel.FLASH_2, gpu)
        if kernel is AttentionKernel.FUSED:
            return AttentionRate(kernel, base.rate, _FUSED_SOURCE, True)
        note = f"{_FUSED_SOURCE}; times {_FP8_RATIO:.1f}, FlashAttention-3's ratio of FP8 to fp16"
        return AttentionRate(kernel, base.rate * _FP8_RATIO, note, True)
    measured = _MEASURED[kernel]
    source = _OUR_MEASUREMENTS if kernel in _OURS else _SAGE_PAPERS
    if gpu.name in measured:
        return AttentionRate(kernel, measured[gpu.name] * 1e12, source, False)
    dense = gpu.rates["fp16"]
    family = _FAMILY[gpu.architecture]
    if kernel is AttentionKernel.FLASH_2 and family == "sm80":
        return AttentionRate(kernel, _FLASH_2_AMPERE.value * dense, _FLASH_2_AMPERE.source, gpu.architecture != "sm80")
    for name, rate in measured.items():
        relative = find_gpu(name)
        if _FAMILY[relative.architecture] == family:
            fraction = rate * 1e12 / relative.rates["fp16"]
            return AttentionRate(kernel, fraction * dense, f"{source}; scaled from the {name}", True)
    if kernel is AttentionKernel.PLUGIN:  # the same algorithm as SageAttention 2
        base, known = attention_rate(AttentionKernel.SAGE_2, gpu), find_gpu("H100 SXM")
        ratio = attention_rate(kernel, known).rate / attention_rate(AttentionKernel.SAGE_2, known).rate
        return AttentionRate(kernel, base.rate * ratio, f"{base.source}, times our plugin's ratio on an H100", True)
    raise RequestError(
        f"nobody has published how fast {kernel.value} is on the {gpu.name} or a GPU like it.",
        received=f"{kernel.value} on {gpu.architecture}",
        expected="a GPU like " + " or ".join(measured),
        fix="choose another --attention, or another --gpu",
    )


COMPILERS_KERNELS: Mapping[Precision, AttentionKernel] = {
    Precision.FP16: AttentionKernel.FUSED,
    Precision.BF16: AttentionKernel.FUSED,
    Precision.FP8: AttentionKernel.FUSED_FP8,
}
"""The kernel that a compiler's own attention is assumed to run in, by precision; attention in fp32 has none."""


def has_plugins(target: Target) -> bool:
    """Whether plugins compute the loop's attention for ``target`` where a recipe says nothing about it."""
    return target.backend is Backend.TRT and all(name in ATTENTION_PLUGINS for name in target.architectures)


def plugin_kernel(target: Target) -> AttentionKernel | None:
    """Return the kernel of the plugins that :func:`has_plugins` means; None where nothing is known of their speed.

    Those with 16-bit values (sm80, sm86) were never timed, and no relative of theirs in the tables is like them.
    """
    known = has_plugins(target) and all(ARCHITECTURES[name].fp8 for name in target.architectures)
    return AttentionKernel.PLUGIN if known else None
