"""Roofline: seconds of a call as the sum over its kernels of the slower of arithmetic and memory traffic.

Matrix products and convolutions are taken one by one: operations over rate times efficiency, or weights, inputs and
outputs over bandwidth times efficiency. Attention goes by its kernel's published rate; where no fused kernel exists
(heads wider than 256) it is two products with the scores written and read in between. What lies between them moves its
bytes. Not modelled: launches, the host, loading of plans, clocks that drop under power limits, and overlap between
kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reelforge.export.planner import kernels
from reelforge.export.planner.flops import attention_flops, layer_flops
from reelforge.export.planner.gpus import Gpu
from reelforge.export.planner.kernels import AttentionKernel
from reelforge.export.planner.layers import BYTES, StageLayers, rows_of
from reelforge.export.planner.work import Attention, Call
from reelforge.runtime.recipe import Precision

_FUSED_HEAD_DIM = 256  # the widest head that a fused attention kernel takes
_SCORE_PASSES = 4  # scores written, read and written by softmax, read


@dataclass(frozen=True)
class Seconds:
    """Time by kind of kernel; ``memory`` is norms, activations, rotations and residual sums."""

    gemm: float = 0.0
    attention: float = 0.0
    convolution: float = 0.0
    memory: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.gemm + self.attention + self.convolution + self.memory

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.gemm + other.gemm,
            self.attention + other.attention,
            self.convolution + other.convolution,
            self.memory + other.memory,
        )

    def __mul__(self, times: float) -> Seconds:
        return Seconds(self.gemm * times, self.attention * times, self.convolution * times, self.memory * times)


def call_seconds(
    call: Call,
    layers: StageLayers,
    gpu: Gpu,
    attention_kernels: Mapping[Precision, AttentionKernel],
    plugin: AttentionKernel | None = None,
) -> Seconds:
    """Return the time of one call on a GPU.

    Args:
        call: What is computed.
        layers: Of the call's stage.
        gpu: Where.
        attention_kernels: By precision of the attention.
        plugin: Instead of these, for attentions that a recipe could quantise.

    Raises:
        RequestError: If the GPU does not compute in a precision that the stage has.
    """
    bandwidth = gpu.bandwidth * kernels.BANDWIDTH.value
    element = BYTES[layers.base]
    gemm = convolution = 0.0
    for name, rows in rows_of(call, layers).items():
        layer = layers.layers[name]
        share = kernels.CONVOLUTION if layer.convolution else kernels.product_share(layer.precision)
        compute = layer_flops(layer.shape, rows) / (gpu.rate(layer.precision) * share.value)
        moved = layer.bytes + rows * (layer.shape[1] * BYTES[layer.precision] + layer.shape[0] * element)
        seconds = max(compute, moved / bandwidth)
        if layer.convolution:
            convolution += seconds
        else:
            gemm += seconds
    attention = sum(
        _attention(
            one,
            layers,
            gpu,
            plugin if one.quantisable and plugin else attention_kernels.get(layers.attention_precision(one)),
        )
        for one in call.attentions
    )
    return Seconds(gemm, attention, convolution, call.passes * element / bandwidth)


def _attention(attention: Attention, layers: StageLayers, gpu: Gpu, kernel: AttentionKernel | None) -> float:
    precision = layers.attention_precision(attention)
    bandwidth = gpu.bandwidth * kernels.BANDWIDTH.value
    width = attention.count * attention.heads * attention.head_dim
    moved = 4 * width * attention.tokens * BYTES[precision]
    if kernel is not None and attention.head_dim <= _FUSED_HEAD_DIM:
        return max(attention_flops(attention) / kernels.attention_rate(kernel, gpu).rate, moved / bandwidth)
    moved += _SCORE_PASSES * attention.count * attention.heads * attention.pairs * BYTES[precision]
    return max(
        attention_flops(attention) / (gpu.rate(precision) * kernels.product_share(precision).value), moved / bandwidth
    )
