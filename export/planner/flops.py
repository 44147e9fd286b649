"""Floating-point operations of a call, split by what computes them; a multiply-add counts as two.

A matrix product of ``rows`` rows is ``2 * rows * inputs * outputs``; a convolution is one with ``inputs * kernel`` per
output position; attention is two products, ``4 * head_dim`` per visible pair of query and key and head. Norms, softmax
and activations are not counted: they are bounded by memory (see ``roofline``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from reelforge.export.planner.layers import StageLayers, rows_of
from reelforge.export.planner.work import Attention, Call


@dataclass(frozen=True)
class Flops:
    """Operations by kind."""

    gemm: int = 0
    attention: int = 0
    convolution: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.gemm + self.attention + self.convolution

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.gemm + other.gemm, self.attention + other.attention, self.convolution + other.convolution)

    def __mul__(self, times: int) -> Flops:
        return Flops(self.gemm * times, self.attention * times, self.convolution * times)


def layer_flops(shape: tuple[int, ...], rows: int) -> int:
    """Return the operations of one product or convolution with a weight of ``shape``."""
    return 2 * rows * math.prod(shape)


def attention_flops(attention: Attention) -> int:
    """Return the operations of all attentions of one shape in a call."""
    return 4 * attention.count * attention.heads * attention.head_dim * attention.pairs


def call_flops(call: Call, layers: StageLayers) -> Flops:
    """Return the operations of one call."""
    gemm = convolution = 0
    for name, rows in rows_of(call, layers).items():
        layer = layers.layers[name]
        work = layer_flops(layer.shape, rows)
        if layer.convolution:
            convolution += work
        else:
            gemm += work
    return Flops(gemm, sum(attention_flops(attention) for attention in call.attentions), convolution)
