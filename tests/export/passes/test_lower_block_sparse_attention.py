"""Attention over block lists, lowered to a mask, against a softmax in float64 over what the lists say."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes import PassResult, PostconditionError

from reelforge.export.passes.layers import attention_nodes
from reelforge.export.passes.lower_block_sparse_attention import LowerBlockSparseAttentionPass
from reelforge.export.portable_sparse import BLOCK_SPARSE_OP, Blocks, block_sparse_attention
from tests.export.passes.portable_model import masked_softmax_attention, run
from tests.export.passes.sparse_models import HEADS, WIDTH, sparse_model

SIZES = [(1, 1), (4, 2), (4, 4), (8, 2)]


def model(blocks: tuple[int, int], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    others = {
        "block_index": (ir.DataType.INT32, ("entries",)),
        "block_start": (ir.DataType.INT32, (HEADS, "starts")),
        "block_keys": (ir.DataType.INT32, ("batch", "key_blocks")),
    }
    return sparse_model(BLOCK_SPARSE_OP, blocks, others, dtype)


def lowered(blocks: tuple[int, int], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    result = model(blocks, dtype)
    assert LowerBlockSparseAttentionPass()(result).modified
    return result


LOWERED = {blocks: lowered(blocks) for blocks in SIZES}


def problem(blocks: tuple[int, int], tokens: int, videos: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return random inputs whose lists lie in any order between entries of others, and which key each query sees."""
    random = np.random.default_rng(seed)
    q, k, v = random.standard_normal((3, videos, HEADS, tokens, WIDTH)).astype(np.float32)
    query_blocks = -(-tokens // blocks[0])
    key_blocks = query_blocks * blocks[0] // blocks[1]
    filled = np.clip(tokens - np.arange(key_blocks) * blocks[1], 0, blocks[1])
    counts = np.minimum(random.integers(1, blocks[1] + 1, (videos, key_blocks)), filled)
    index: list[int] = list(random.integers(0, key_blocks, random.integers(0, 4)))
    starts = np.zeros((HEADS, query_blocks + 1), np.int32)
    visible = np.zeros((videos, HEADS, tokens, tokens), bool)
    for head in range(HEADS):
        starts[head, 0] = len(index)
        for block in range(query_blocks):
            chosen = random.permutation(key_blocks)[: random.integers(0, key_blocks + 1)]
            chosen = np.append(chosen[chosen != 0], 0)  # the first block always counts, so that no list is empty
            index += list(chosen)
            starts[head, block + 1] = len(index)
            rows = slice(block * blocks[0], (block + 1) * blocks[0])
            for number, video in np.ndindex(len(chosen), videos):
                first = chosen[number] * blocks[1]
                visible[video, head, rows, first : first + counts[video, chosen[number]]] = True
    index += list(random.integers(0, key_blocks, random.integers(0, 4)))
    lists = {"block_index": np.array(index, np.int32), "block_start": starts, "block_keys": counts.astype(np.int32)}
    return {"q": q, "k": k, "v": v, **lists}, visible


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SIZES), st.integers(1, 21), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_equals_the_softmax_over_what_is_listed(blocks: tuple[int, int], tokens: int, videos: int, seed: int) -> None:
    inputs, visible = problem(blocks, tokens, videos, seed)
    wanted = masked_softmax_attention(inputs["q"], inputs["k"], inputs["v"], visible)
    np.testing.assert_allclose(run(LOWERED[blocks], **inputs)[0], wanted, rtol=0, atol=1e-5)
    eager = block_sparse_attention(*(torch.from_numpy(array) for array in inputs.values()), Blocks(*blocks))
    np.testing.assert_allclose(eager.numpy(), wanted, rtol=0, atol=1e-5)


def test_types_and_names() -> None:
    half = lowered((4, 2), ir.DataType.FLOAT16)
    inputs, visible = problem((4, 2), 13, 1, 0)
    halves = {name: array.astype(np.float16) if name in "qkv" else array for name, array in inputs.items()}
    wanted = masked_softmax_attention(halves["q"], halves["k"], halves["v"], visible)
    np.testing.assert_allclose(run(half, **halves)[0], wanted, rtol=0, atol=5e-3)
    node = model((4, 2))
    node.graph[0].name = "double.3.BlockSparseAttention"
    LowerBlockSparseAttentionPass()(node)
    assert list(attention_nodes(node.graph)) == ["double.3.attention"]


def test_a_graph_without_the_operator_stays() -> None:
    other = lowered((1, 1))
    assert not LowerBlockSparseAttentionPass()(other).modified


class _Idle(LowerBlockSparseAttentionPass):
    def call(self, model: ir.Model) -> PassResult:
        return PassResult(model, modified=False)


def test_what_is_left_is_noticed() -> None:
    with pytest.raises(PostconditionError, match="BlockSparseAttention is still in the graph"):
        _Idle()(model((1, 1)))
