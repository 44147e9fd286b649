"""Attention that chooses its key blocks: the graph's choice against NumPy's, and the attention over it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes import PassResult, PostconditionError

from reelforge.export.passes.decompose_top_k_attention import DecomposeTopKAttentionPass
from reelforge.export.passes.lower_block_sparse_attention import LowerBlockSparseAttentionPass
from reelforge.export.portable_sparse import BLOCK_SPARSE_OP, TOP_K_OP, Blocks, top_k_attention
from reelforge.runtime.attention.patterns import Layout, block_lists, top_k
from tests.export.passes.portable_model import masked_softmax_attention, run
from tests.export.passes.sparse_models import HEADS, WIDTH, sparse_model

SIZES = [(1, 1), (4, 2), (4, 4), (8, 2)]


def model(blocks: tuple[int, int]) -> ir.Model:
    others = {
        "token_gather": (ir.DataType.INT64, ("slots",)),
        "kept_blocks": (ir.DataType.INT64, ()),
        "block_keys": (ir.DataType.INT32, (1, "key_blocks")),
    }
    return sparse_model(TOP_K_OP, blocks, others, videos=1)


def decomposed(blocks: tuple[int, int]) -> ir.Model:
    result = model(blocks)
    assert DecomposeTopKAttentionPass()(result).modified
    return result


def with_lists(blocks: tuple[int, int]) -> ir.Model:
    """Return the decomposed graph whose outputs are the lists too."""
    result = decomposed(blocks)
    node = next(node for node in result.graph if node.op_type == BLOCK_SPARSE_OP)
    for value, shape in zip(node.inputs[3:5], (["entries"], [HEADS, "starts"]), strict=True):
        assert value is not None
        value.shape = ir.Shape(shape)
        result.graph.outputs.append(value)
    LowerBlockSparseAttentionPass()(result)
    return result


LOWERED = {blocks: with_lists(blocks) for blocks in SIZES}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SIZES), st.integers(0, 30), st.integers(1, 9), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_the_choice_is_that_of_the_pattern(
    blocks: tuple[int, int], image: int, text: int, share: float, seed: int
) -> None:
    layout = Layout(max(image, blocks[0]), text, blocks[1], blocks[0])
    q, k, v = np.random.default_rng(seed).standard_normal((3, 1, HEADS, layout.tokens, WIDTH)).astype(np.float32)
    mask = top_k(layout, q[0].transpose(1, 0, 2), k[0].transpose(1, 0, 2), share)
    inputs = {
        "q": q,
        "k": k,
        "v": v,
        "token_gather": np.arange(layout.image_tokens),
        "kept_blocks": np.array(layout.kept_blocks(share)),
        "block_keys": layout.key_counts(),
    }
    out, index, start = run(LOWERED[blocks], **inputs)
    # The same lists, whatever the order within one.
    wanted = block_lists(mask)
    assert start.shape == wanted.block_start.shape
    for head, block in np.ndindex(HEADS, layout.query_blocks):
        found = index[start[head, block] : start[head, block + 1]]
        expected = wanted.block_index[wanted.block_start[head, block] : wanted.block_start[head, block + 1]]
        np.testing.assert_array_equal(np.sort(found), expected)
    visible = mask.repeat(blocks[0], 1).repeat(blocks[1], 2)[None, :, : layout.tokens, : layout.tokens]
    attended = masked_softmax_attention(q, k, v, visible)
    np.testing.assert_allclose(out, attended, rtol=0, atol=1e-5)
    eager = top_k_attention(*(torch.from_numpy(array) for array in inputs.values()), Blocks(*blocks))
    np.testing.assert_allclose(eager.numpy(), attended, rtol=0, atol=1e-5)


def test_the_name_stays_that_of_the_block() -> None:
    node = model((4, 2))
    node.graph[0].name = "single.7.TopKAttention"
    DecomposeTopKAttentionPass()(node)
    (sparse,) = (one for one in node.graph if one.op_type == BLOCK_SPARSE_OP)
    assert sparse.name == "single.7.BlockSparseAttention"
    assert {name: one.as_int() for name, one in sparse.attributes.items()} == {"query_block": 4, "key_block": 2}


def test_a_graph_without_the_operator_stays() -> None:
    assert not DecomposeTopKAttentionPass()(decomposed((1, 1))).modified


class _Idle(DecomposeTopKAttentionPass):
    def call(self, model: ir.Model) -> PassResult:
        return PassResult(model, modified=False)


def test_what_is_left_is_noticed() -> None:
    with pytest.raises(PostconditionError, match="TopKAttention is still in the graph"):
        _Idle()(model((1, 1)))
