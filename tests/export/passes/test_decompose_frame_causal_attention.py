"""Frame-causal attention as products around a masked softmax, against a masked softmax in float64."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes import PostconditionError

from reelforge.export.passes.decompose_frame_causal_attention import DecomposeFrameCausalAttentionPass
from reelforge.export.portable import FRAME_CAUSAL_OP
from tests.export.passes.portable_model import masked_softmax_attention, one_operator, run

WIDTH = 6
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def model(dtype: ir.DataType = FLOAT, width: int | str = WIDTH) -> ir.Model:
    kind = (dtype, ("batch", "frames", "positions", width))
    return one_operator(FRAME_CAUSAL_OP, {"q": kind, "k": kind, "v": kind})


def decomposed(dtype: ir.DataType = FLOAT, logits: ir.DataType | None = FLOAT, width: int = WIDTH) -> ir.Model:
    result = model(dtype, width)
    assert DecomposeFrameCausalAttentionPass(logits)(result).modified
    return result


@pytest.fixture(scope="module")
def lowered() -> ir.Model:
    return decomposed()


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
    received = run(lowered, q=q, k=k, v=v)[0]
    np.testing.assert_allclose(received, expected(q, k, v), rtol=0, atol=1e-5 * max(scale, 1) ** 2)


@pytest.mark.parametrize("logits", [FLOAT, None])
def test_half_precision(logits: ir.DataType | None) -> None:
    """512 channels as the VAE has them; with logits in fp16 their sums would not fit without the factor before."""
    q, k, v = np.random.default_rng(1).standard_normal((3, 1, 3, 4, 512)).astype(np.float16)
    q, k = q * np.float16(12), k * np.float16(12)
    assert np.abs(q[0, 0].astype(np.float64) @ q[0, 0].astype(np.float64).T).max() > np.finfo(np.float16).max
    wanted = expected(q, q, v)
    received = run(decomposed(HALF, logits, 512), q=q, k=q, v=v)[0]
    assert received.dtype == np.float16
    assert wanted.std() > 0.3
    np.testing.assert_allclose(received, wanted, rtol=0, atol=5e-3)
    tolerance = 5e-3 if logits == FLOAT else 0.1  # a logit of 300 has a step of 0.25 in fp16
    np.testing.assert_allclose(run(decomposed(HALF, logits, 512), q=q, k=k, v=v)[0], expected(q, k, v), rtol=0,
                               atol=tolerance)  # fmt: skip


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
    assert (kinds.count("MatMul"), kinds.count("Softmax"), kinds.count("Loop")) == (2, 1, 0)
    assert [value.name for value in lowered.graph.outputs] == ["out"]
    assert not DecomposeFrameCausalAttentionPass()(lowered).modified


def test_products_have_the_types_that_were_asked_for() -> None:
    for logits, wanted in ((FLOAT, [FLOAT, HALF]), (None, [HALF, HALF])):
        products = [node for node in decomposed(HALF, logits).graph if node.op_type == "MatMul"]
        assert [node.outputs[0].dtype for node in products] == wanted


def test_the_postcondition() -> None:
    with pytest.raises(PostconditionError, match="FrameCausalAttention is still in the graph"):
        DecomposeFrameCausalAttentionPass().ensures(model())


def test_an_unknown_width_is_a_bug_that_is_named() -> None:
    with pytest.raises(AssertionError, match="attend: type or channel count of the query is not fixed"):
        DecomposeFrameCausalAttentionPass()(model(width="width"))
