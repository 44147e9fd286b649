"""Building blocks shared by the HunyuanVideo modules: modulation, rotary embedding, attention, small MLPs.

Written so that a trace is short: no masks, no data-dependent Python, static head counts. Shapes use ``B`` batch,
``S`` tokens, ``h`` heads, ``d`` head width, ``D`` width. The module knows nothing of checkpoints or precisions: norms
and rotations are computed in fp32, products in whatever dtype the parameters have.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelforge.export.portable import attention_with_key_lengths


class Mlp(nn.Module):
    """``fc2(SiLU(fc1(x)))``: the embedders of timestep, guidance and pooled text (specification 3.2)."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_width] to [..., width], both in the parameters' dtype."""
        return self.fc2(F.silu(self.fc1(x)))


class HeadNorm(nn.Module):
    """RMS norm over each head's channels with a learned weight, in fp32 (specification 3.1, QK norm)."""

    def __init__(self, head_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, S, h, d]; the result is fp32."""
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Return ``LayerNorm(x) * (1 + scale) + shift`` in x's dtype, computed in fp32 (specification 3.5).

    ``x`` is [B, S, D]; ``shift`` and ``scale`` are fp32 [B, 1, D].
    """
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (normed * (1.0 + scale) + shift).to(x.dtype)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """Return ``x * gate`` for x [B, S, D] and an fp32 gate [B, 1, D], in x's dtype."""
    return x * gate.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding in half-split layout.

    Channel ``i`` pairs with channel ``i + d/2``; q and k rows are permuted to this layout when weights are placed, so
    that logits equal those of the interleaved layout of specification 3.4. ``x`` is fp32 [B, S, h, d], ``cos`` and
    ``sin`` are fp32 [S, d/2].
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None = None) -> Tensor:
    """Softmax attention over [B, S, h, d] tensors; returns [B, S, h * d].

    With ``key_lengths`` (int64 [B]) keys from that position on are not visible.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if key_lengths is None:
        out = F.scaled_dot_product_attention(query, key, value)
    else:
        out = attention_with_key_lengths(query, key, value, key_lengths)
    return out.transpose(1, 2).flatten(2)
