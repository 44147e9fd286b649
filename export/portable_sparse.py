"""Portable operators of sparse attention: one over lists of key blocks, and one that makes its lists by itself.

While a graph is captured each becomes one node of domain ``reelforge`` (see ``export.portable``); in eager PyTorch the
same function computes the result with an S x S mask. A target's passes say how a backend gets it.

Shapes: ``B`` videos, ``h`` heads, ``S`` tokens (image slots and text), ``d`` head width, ``Q`` query blocks: S rounded
up to whole ones, ``K`` key blocks: as many as fill the query blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from reelforge.export.portable import DOMAIN

BLOCK_SPARSE_OP = "BlockSparseAttention"
TOP_K_OP = "TopKAttention"


@dataclass(frozen=True)
class Blocks:
    """How many tokens make a block: the attributes ``query_block`` and ``key_block`` of both operators.

    Attributes:
        query: A multiple of ``key``.
        key: At least one.
    """

    query: int
    key: int


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_index: Tensor,
    block_start: Tensor,
    block_keys: Tensor,
    blocks: Blocks,
) -> Tensor:
    """Softmax attention where a block of queries sees the key blocks of its own list, and what counts of each.

    Args:
        query: [B, h, S, d].
        key: [B, h, S, d].
        value: [B, h, S, d].
        block_index: int32 [entries], numbers of key blocks.
        block_start: int32 [h, Q + 1]: block q of head h has the entries from ``[h, q]`` up to ``[h, q + 1]``, at least
            one with a key that counts.
        block_keys: int32 [B, K]: the first so many keys of each block count.
        blocks: Their sizes.

    Returns:
        [B, h, S, d] in query's dtype.
    """
    if torch.onnx.is_in_onnx_export():
        return _node(BLOCK_SPARSE_OP, blocks, query, key, value, block_index, block_start, block_keys)
    listed = torch.zeros((*block_start.shape[:1], block_start.shape[1] - 1, block_keys.shape[1]), dtype=torch.bool)
    for head, row in enumerate(block_start.tolist()):
        for block, (first, end) in enumerate(pairwise(row)):
            listed[head, block, block_index[first:end].long()] = True
    return _attend(query, key, value, listed[None], block_keys, blocks)


def top_k_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    token_gather: Tensor,
    kept_blocks: Tensor,
    block_keys: Tensor,
    blocks: Blocks,
) -> Tensor:
    """Block-sparse attention over the key blocks whose mean key has the largest products with the mean query.

    Only blocks of nothing but image take part: such a query block sees ``kept_blocks`` of such key blocks, its own one
    included, and every block with text; a query block with text sees everything.

    Args:
        query: [1, h, S, d].
        key: [1, h, S, d].
        value: [1, h, S, d].
        token_gather: int64 [image slots], of which only the length is read.
        kept_blocks: int64 scalar, from ``blocks.query / blocks.key`` to the number of image key blocks.
        block_keys: int32 [1, K]: the first so many keys of each block count.
        blocks: Their sizes.

    Returns:
        [1, h, S, d] in query's dtype.
    """
    if torch.onnx.is_in_onnx_export():
        return _node(TOP_K_OP, blocks, query, key, value, token_gather, kept_blocks, block_keys)
    slots = token_gather.shape[0]
    queries, keys = slots // blocks.query, slots // blocks.key
    pooled = [
        x[0, :, : count * size].float().unflatten(1, (count, size)).mean(2)
        for x, count, size in ((query, queries, blocks.query), (key, keys, blocks.key))
    ]
    scores = pooled[0] @ pooled[1].transpose(1, 2)
    own = torch.arange(keys) // (blocks.query // blocks.key) == torch.arange(queries)[:, None]
    best = scores.masked_fill(own, torch.inf).topk(int(kept_blocks), dim=2).indices
    total = -(-query.shape[2] // blocks.query)
    listed = torch.ones((query.shape[1], total, block_keys.shape[1]), dtype=torch.bool)
    listed[:, :queries, :keys] = torch.zeros_like(scores, dtype=torch.bool).scatter(2, best, True)
    return _attend(query, key, value, listed[None], block_keys, blocks)


def _attend(query: Tensor, key: Tensor, value: Tensor, listed: Tensor, counts: Tensor, blocks: Blocks) -> Tensor:
    """Attend under the mask of listed blocks [1, h, Q, K] and counts [B, K]."""
    tokens = query.shape[2]
    by_token = listed.repeat_interleave(blocks.query, 2).repeat_interleave(blocks.key, 3)[:, :, :tokens, :tokens]
    counting = (torch.arange(blocks.key) < counts[:, :, None]).flatten(1)[:, None, None, :tokens]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=by_token & counting)


def _node(operator: str, blocks: Blocks, query: Tensor, *others: Tensor) -> Tensor:
    """One node whose output is like ``query``."""
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{operator}",
        (query, *others),
        {"query_block": blocks.query, "key_block": blocks.key},
        dtype=query.dtype,
        shape=query.shape,
        version=1,
    )
