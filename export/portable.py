"""Portable operators: attention forms that no standard ONNX operator of opset 23 states without an S x S mask.

While a graph is captured each becomes one node of domain ``reelforge``; the target's pass list chooses how to lower it.
In eager PyTorch the same function computes the result. Pass files say how a backend gets it; this module does not know.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DOMAIN = "reelforge"
KEY_LENGTHS_OP = "AttentionWithKeyLengths"
FRAME_CAUSAL_OP = "FrameCausalAttention"


def attention_with_key_lengths(query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor) -> Tensor:
    """Softmax attention where video ``b`` of the batch sees only its first ``key_lengths[b]`` keys.

    Args:
        query: [B, h, S, d].
        key: [B, h, S, d].
        value: [B, h, S, d].
        key_lengths: int64 [B], each at least 1.

    Returns:
        [B, h, S, d] in query's dtype.
    """
    if torch.onnx.is_in_onnx_export():
        return _node(KEY_LENGTHS_OP, query, key, value, key_lengths)
    visible = torch.arange(key.shape[2], device=key.device) < key_lengths[:, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None, None, :])


def frame_causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Single-head attention where frame ``f`` sees all positions of frames 0..f (specification 5.1).

    Computed frame by frame over the visible keys: equal to a masked softmax at half the work and without the mask.

    Args:
        query: [B, T, P, D], P positions a frame.
        key: [B, T, P, D].
        value: [B, T, P, D].

    Returns:
        [B, T, P, D].
    """
    if torch.onnx.is_in_onnx_export():
        return _node(FRAME_CAUSAL_OP, query, key, value)
    frames = [
        F.scaled_dot_product_attention(query[:, f], key[:, : f + 1].flatten(1, 2), value[:, : f + 1].flatten(1, 2))
        for f in range(query.shape[1])
    ]
    return torch.stack(frames, dim=1)


def _node(operator: str, query: Tensor, *others: Tensor) -> Tensor:
    """One node whose output is like ``query``."""
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{operator}", (query, *others), dtype=query.dtype, shape=query.shape, version=1
    )
