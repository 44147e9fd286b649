"""Frame-causal attention, in PyTorch and lowered, against a masked softmax in float64."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes import PostconditionError

from reelforge.export.passes.lower_frame_causal_attention import LowerFrameCausalAttentionPass
from reelforge.export.portable import FRAME_CAUSAL_OP, frame_causal_attention
from tests.export.passes.portable_model import masked_softmax_attention, one_operator, run

WIDTH = 6
SHAPE = ("batch", "frames", "positions", WIDTH)
KIND = (ir.DataType.FLOAT, SHAPE)


def model() -> ir.Model:
    return one_operator(FRAME_CAUSAL_OP, {"q": KIND, "k": KIND, "v": KIND})


@pytest.fixture(scope="module")
def lowered() -> ir.Model:
    result = model()
    assert LowerFrameCausalAttentionPass()(result).modified
    return result


def expected(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    batch, frames, positions, width = q.shape
    frame = np.arange(frames * positions) // positions
    flat = (operand.reshape(batch, frames * positions, width) for operand in (q, k, v))
    return masked_softmax_attention(*flat, frame[:, None] >= frame[None]).reshape(q.shape)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2), frames=st.integers(1, 7), positions=st.integers(1, 9), seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
)  # fmt: skip
def test_equals_the_masked_softmax(
    lowered: ir.Model, batch: int, frames: int, positions: int, seed: int, scale: float
) -> None:
    draw = np.random.default_rng(seed).standard_normal((3, batch, frames, positions, WIDTH)) * scale
    q, k, v = draw.astype(np.float32)
    wanted = expected(q, k, v)
    tolerance = 1e-5 * max(scale, 1) ** 2
    eager = frame_causal_attention(*(torch.from_numpy(operand) for operand in (q, k, v)))
    np.testing.assert_allclose(eager.numpy(), wanted, rtol=0, atol=tolerance)
    np.testing.assert_allclose(run(lowered, q=q, k=k, v=v)[0], wanted, rtol=0, atol=tolerance)


def test_a_later_frame_changes_no_earlier_one(lowered: ir.Model) -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 5, 4, WIDTH)).astype(np.float32)
    before = run(lowered, q=q, k=k, v=v)[0]
    k[:, 3:], v[:, 3:] = 100, -100
    after = run(lowered, q=q, k=k, v=v)[0]
    np.testing.assert_array_equal(after[:, :3], before[:, :3])
    assert not np.allclose(after[:, 3:], before[:, 3:])


def test_what_it_leaves(lowered: ir.Model) -> None:
    kinds = [node.op_type for node in lowered.graph.all_nodes()]
    assert FRAME_CAUSAL_OP not in kinds
    assert kinds.count("Loop") == 1
    assert kinds.count("Attention") == 1
    assert [value.name for value in lowered.graph.outputs] == ["out"]
    assert not LowerFrameCausalAttentionPass()(lowered).modified


def test_the_postcondition() -> None:
    with pytest.raises(PostconditionError, match="FrameCausalAttention is still in the graph"):
        LowerFrameCausalAttentionPass().ensures(model())

    class DoesNothing(LowerFrameCausalAttentionPass):
        def call(self, model: ir.Model) -> ir.passes.PassResult:
            return ir.passes.PassResult(model, modified=False)

    with pytest.raises(PostconditionError):
        DoesNothing()(model())


def test_an_unknown_width_is_a_bug_that_is_named() -> None:
    unknown = (ir.DataType.FLOAT, ("batch", "frames", "positions", "width"))
    broken = one_operator(FRAME_CAUSAL_OP, {"q": unknown, "k": unknown, "v": unknown})
    with pytest.raises(AssertionError, match="attend: the channel count of the query is not fixed"):
        LowerFrameCausalAttentionPass()(broken)
