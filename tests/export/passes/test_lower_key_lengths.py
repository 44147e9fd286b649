"""Attention over a prefix of the keys, in PyTorch and lowered, against a masked softmax in float64."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes import PostconditionError

from reelforge.export.passes.lower_key_lengths import LowerKeyLengthsPass
from reelforge.export.portable import KEY_LENGTHS_OP, attention_with_key_lengths
from tests.export.passes.portable_model import masked_softmax_attention, one_operator, run

HEADS, WIDTH = 2, 4
KIND = (ir.DataType.FLOAT, ("batch", HEADS, "tokens", WIDTH))


def model() -> ir.Model:
    lengths = (ir.DataType.INT64, ("batch",))
    return one_operator(KEY_LENGTHS_OP, {"q": KIND, "k": KIND, "v": KIND, "lengths": lengths})


@pytest.fixture(scope="module")
def lowered() -> ir.Model:
    result = model()
    assert LowerKeyLengthsPass()(result).modified
    return result


@settings(max_examples=40, deadline=None)
@given(data=st.data(), batch=st.integers(1, 4), tokens=st.integers(1, 24), seed=st.integers(0, 2**32 - 1))
def test_equals_the_masked_softmax(lowered: ir.Model, data: st.DataObject, batch: int, tokens: int, seed: int) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(1, tokens), min_size=batch, max_size=batch)), np.int64)
    q, k, v = np.random.default_rng(seed).standard_normal((3, batch, HEADS, tokens, WIDTH)).astype(np.float32)
    visible = (np.arange(tokens) < lengths[:, None])[:, None, None]
    wanted = masked_softmax_attention(q, k, v, visible)
    eager = attention_with_key_lengths(*(torch.from_numpy(operand) for operand in (q, k, v, lengths)))
    np.testing.assert_allclose(eager.numpy(), wanted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(run(lowered, q=q, k=k, v=v, lengths=lengths)[0], wanted, rtol=0, atol=1e-5)


def test_hidden_keys_may_hold_anything(lowered: ir.Model) -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, HEADS, 7, WIDTH)).astype(np.float32)
    lengths = np.array([3, 5])
    before = run(lowered, q=q, k=k, v=v, lengths=lengths)[0]
    for video, length in enumerate(lengths):
        k[video, :, length:], v[video, :, length:] = 1e30, -1e30
    np.testing.assert_array_equal(run(lowered, q=q, k=k, v=v, lengths=lengths)[0], before)


def test_only_graphs_with_it_become_opset_24(lowered: ir.Model) -> None:
    assert lowered.graph.opset_imports[""] == 24
    assert [node.op_type for node in lowered.graph] == ["Attention"]
    assert [value.name for value in lowered.graph.outputs] == ["out"]
    other = one_operator("SomethingElse", {"q": KIND})
    assert not LowerKeyLengthsPass()(other).modified
    assert other.graph.opset_imports[""] == 23


def test_the_postcondition() -> None:
    with pytest.raises(PostconditionError, match="AttentionWithKeyLengths is still in the graph"):
        LowerKeyLengthsPass().ensures(model())
