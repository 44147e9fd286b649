"""Attention over a prefix of the keys, lowered to a mask, against a masked softmax in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import PassResult, PostconditionError

from reelforge.export.passes.layers import attention_nodes
from reelforge.export.passes.lower_key_lengths import LowerKeyLengthsPass
from reelforge.export.passes.mask_key_lengths import MASKED, MaskKeyLengthsPass
from reelforge.export.portable import KEY_LENGTHS_OP
from tests.export.passes.portable_model import masked_softmax_attention, one_operator

HEADS, WIDTH = 2, 4


def model(dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    kind = (dtype, ("batch", HEADS, "tokens", WIDTH))
    lengths = (ir.DataType.INT64, ("batch",))
    return one_operator(KEY_LENGTHS_OP, {"q": kind, "k": kind, "v": kind, "lengths": lengths})


def masked(dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    result = model(dtype)
    assert MaskKeyLengthsPass()(result).modified
    return result


@pytest.fixture(scope="module")
def lowered() -> ir.Model:
    return masked()


def run(lowered: ir.Model, **inputs: np.ndarray) -> np.ndarray:
    """Execute in ONNX's own evaluator: ONNX Runtime's CPU provider takes no mask of one row."""
    proto: Any = ir.to_proto(lowered)
    onnx.checker.check_model(proto, full_check=True)
    result: np.ndarray = ReferenceEvaluator(proto).run(None, inputs)[0]
    return result


@settings(max_examples=30, deadline=None)
@given(data=st.data(), batch=st.integers(1, 4), tokens=st.integers(1, 24), seed=st.integers(0, 2**32 - 1))
def test_equals_the_masked_softmax(lowered: ir.Model, data: st.DataObject, batch: int, tokens: int, seed: int) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(1, tokens), min_size=batch, max_size=batch)), np.int64)
    q, k, v = np.random.default_rng(seed).standard_normal((3, batch, HEADS, tokens, WIDTH)).astype(np.float32)
    visible = (np.arange(tokens) < lengths[:, None])[:, None, None]
    wanted = masked_softmax_attention(q, k, v, visible)
    np.testing.assert_allclose(run(lowered, q=q, k=k, v=v, lengths=lengths), wanted, rtol=0, atol=1e-5)


def test_hidden_keys_may_hold_anything_of_their_scale(lowered: ir.Model) -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, HEADS, 7, WIDTH)).astype(np.float32)
    lengths = np.array([3, 5])
    before = run(lowered, q=q, k=k, v=v, lengths=lengths)
    for video, length in enumerate(lengths):
        k[video, :, length:], v[video, :, length:] = 100, -100
    np.testing.assert_array_equal(run(lowered, q=q, k=k, v=v, lengths=lengths), before)


def test_the_mask_is_a_number_of_every_type() -> None:
    assert np.isfinite(np.float16(MASKED))
    for dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        node = next(node for node in masked(dtype).graph if node.op_type == "Where")
        assert node.outputs[0].dtype == dtype


@pytest.mark.parametrize("lowering", [MaskKeyLengthsPass, LowerKeyLengthsPass])
def test_the_attention_is_known_by_its_block(lowering: type[MaskKeyLengthsPass] | type[LowerKeyLengthsPass]) -> None:
    """Under the name that rules and scale files have for it, whether prompts are ragged or not."""
    ragged = model()
    next(iter(ragged.graph)).name = "double.3.AttentionWithKeyLengths"
    lowering()(ragged)
    assert list(attention_nodes(ragged.graph)) == ["double.3.attention"]


def test_what_it_leaves(lowered: ir.Model) -> None:
    assert lowered.graph.opset_imports[""] == 23
    assert [node.op_type for node in lowered.graph].count("Attention") == 1
    assert [value.name for value in lowered.graph.outputs] == ["out"]
    assert not MaskKeyLengthsPass()(lowered).modified


def test_the_postconditions() -> None:
    class DoesNothing(MaskKeyLengthsPass):
        def call(self, model: ir.Model) -> PassResult:
            return PassResult(model, modified=False)

    with pytest.raises(PostconditionError, match="AttentionWithKeyLengths is still in the graph"):
        DoesNothing()(model())
    with_lengths = model()
    LowerKeyLengthsPass()(with_lengths)
    with pytest.raises(PostconditionError, match=r"attend\.Attention has key lengths"):
        DoesNothing()(with_lengths)


def test_a_missing_type_is_a_bug_that_is_named() -> None:
    broken = model()
    broken.graph.inputs[0].type = None
    with pytest.raises(AssertionError, match="attend: an operand or its type is missing"):
        MaskKeyLengthsPass()(broken)
