"""LowerIntegerAttentionPass in ONNX Runtime, against the same codes in float64 and against exact attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import PostconditionError, PreconditionError

from reelforge.export.graph_file import check_graph, graph_bytes
from reelforge.export.lower import EightBit, lower
from reelforge.export.passes.lower_integer_attention import ROWS, LowerIntegerAttentionPass
from reelforge.export.passes.quantise_attention import AttentionScales
from reelforge.runtime.recipe import Backend, Precision, Target

HEADS, WIDTH = 2, 16
NAME = "b.attention"
BY_HEAD = [0, 2, 1, 3]
Arrays = dict[str, NDArray[np.float32]]


def attention_model(
    *, by_head: bool = False, mask: bool = False, batch: int = 1, dtype: int = TensorProto.FLOAT, **attributes: object
) -> ir.Model:
    """Attention over ``q``, ``k``, ``v``: [B, S, h, d] with transposes around it, or [B, h, S, d] without.

    Queries have a number of tokens of their own.
    """
    node = helper.make_node
    extra = ["mask"] if mask else []
    if by_head:
        shape: list[int | str] = [batch, HEADS, "tokens", WIDTH]
        queries: list[int | str] = [batch, HEADS, "queries", WIDTH]
        nodes = [node("Attention", ["q", "k", "v", *extra], ["y"], "b.Attention", **attributes)]
    else:
        shape, queries = [batch, "tokens", HEADS, WIDTH], [batch, "queries", HEADS, WIDTH]
        nodes = [
            *(node("Transpose", [name], [f"{name}t"], f"b.{name}t", perm=BY_HEAD) for name in "qkv"),
            node("Attention", ["qt", "kt", "vt", *extra], ["yt"], "b.Attention", **attributes),
            node("Transpose", ["yt"], ["y"], "b.yt", perm=BY_HEAD),
        ]
    info = helper.make_tensor_value_info
    tensors = [numpy_helper.from_array(np.zeros((1, 1), np.float32), "mask")] if mask else []
    graph = helper.make_graph(
        nodes,
        "attention",
        [info("q", dtype, queries), info("k", dtype, shape), info("v", dtype, shape)],
        [info("y", dtype, queries)],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def operands(tokens: int, spread: float = 1.0, batch: int = 1, queries: int | None = None) -> Arrays:
    """[B, S, h, d]; ``spread`` of the queries makes attention flat or sharp."""
    rng = np.random.default_rng(tokens)
    count = {"q": tokens if queries is None else queries, "k": tokens, "v": tokens}
    made = {name: rng.standard_normal((batch, count[name], HEADS, WIDTH)).astype(np.float32) for name in "qkv"}
    made["q"] *= np.float32(spread)
    return made


def scales_of(arrays: Arrays) -> AttentionScales:
    q, k, v = (float(np.abs(arrays[name]).max()) / 127 for name in "qkv")
    return AttentionScales(q, k, v, Precision.INT8)


def lowered(scales: AttentionScales, *, by_head: bool = False, batch: int = 1) -> ir.Model:
    model = attention_model(by_head=by_head, batch=batch)
    return lower(model, Target(Backend.CPU), EightBit(attentions={NAME: scales}))


def run(model: ir.Model, feed: Arrays, optimised: Path | None = None) -> NDArray[np.float64]:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = 1
    if optimised is not None:
        settings.optimized_model_filepath = str(optimised)
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, settings, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feed)[0], np.float64)


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def exact(arrays: Arrays) -> NDArray[np.float64]:
    q, k, v = (arrays[name].astype(np.float64) for name in "qkv")
    return np.einsum("bhst,bthd->bshd", softmax(np.einsum("bshd,bthd->bhst", q, k) * WIDTH**-0.5), v)


def through_codes(arrays: Arrays, scales: AttentionScales) -> NDArray[np.float64]:
    """What the graph is to compute, in float64 from the codes on."""
    codes = {}
    for name, scale in (("q", scales.query), ("k", scales.key), ("v", scales.value)):
        quotient = arrays[name] / np.float32(scale)
        codes[name] = np.clip(np.rint(quotient), -128, 127).astype(np.float64) * scale
    weights = softmax(np.einsum("bshd,bthd->bhst", codes["q"], codes["k"]) * WIDTH**-0.5)
    row_scale = weights.max(axis=-1, keepdims=True) / 255
    rounded = np.rint(weights / row_scale) * row_scale
    return np.einsum("bhst,bthd->bshd", rounded, codes["v"])


@pytest.mark.parametrize("tokens", [1, 2, 57, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS - 5])
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_computes_what_the_codes_say(tokens: int, spread: float) -> None:
    """Any number of blocks, the last one full or not.

    A probability on the edge between two codes may fall to either side, which is one code of one value: 1/255 of the
    row's largest probability times the largest value. Few do; on the average nothing is left but fp32's rounding.
    """
    arrays = operands(tokens, spread)
    check_codes(arrays, scales_of(arrays))


def check_codes(arrays: Arrays, scales: AttentionScales) -> None:
    received, expected = run(lowered(scales, batch=len(arrays["q"])), arrays), through_codes(arrays, scales)
    error = np.abs(received - expected)
    assert error.max() <= np.abs(arrays["v"]).max() * 2 / 255
    assert error.mean() <= 2e-5


@pytest.mark.parametrize(("queries", "tokens"), [(1, 300), (ROWS + 1, 1), (ROWS, 7)])
def test_other_numbers_of_queries_than_keys(queries: int, tokens: int) -> None:
    arrays = operands(tokens, queries=queries)
    check_codes(arrays, scales_of(arrays))


def test_videos_do_not_see_each_other() -> None:
    """Two per call, in several blocks: each as alone."""
    arrays = operands(ROWS + 3, batch=2)
    scales = scales_of(arrays)
    check_codes(arrays, scales)
    both = run(lowered(scales, batch=2), arrays)
    for index in range(2):
        alone = {name: array[index : index + 1] for name, array in arrays.items()}
        np.testing.assert_array_equal(both[index : index + 1], run(lowered(scales), alone))


def test_what_calibration_has_not_seen_saturates() -> None:
    """Codes end at -128 and 127: nothing wraps around, in the queries' offset codes either."""
    arrays = operands(ROWS + 9, spread=3.0)
    seen = scales_of(arrays)
    check_codes(arrays, AttentionScales(seen.query / 4, seen.key / 3, seen.value / 2, Precision.INT8))


def test_rows_of_zeros() -> None:
    """Nothing to choose by: every value counts the same; and values of zero are a result of zero."""
    arrays = operands(150)
    scales = scales_of(arrays)
    flat = {**arrays, "q": np.zeros_like(arrays["q"])}
    mean = through_codes(flat, scales)
    np.testing.assert_allclose(mean, np.broadcast_to(arrays["v"].mean(axis=1, keepdims=True), mean.shape), atol=0.01)
    np.testing.assert_allclose(run(lowered(scales), flat), mean, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(run(lowered(scales), {**arrays, "v": np.zeros_like(arrays["v"])}), 0)


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_is_near_exact_attention(spread: float) -> None:
    """Also where attention is flat: with one scale for all probabilities most of them would be zero there."""
    arrays = operands(2 * ROWS + 3, spread)
    received, expected = run(lowered(scales_of(arrays)), arrays), exact(arrays)
    error = np.linalg.norm(received - expected) / np.linalg.norm(expected)
    assert error <= 0.05
    assert np.sum(received * expected) / np.linalg.norm(received) / np.linalg.norm(expected) > 0.999


def test_heads_first_and_last_are_the_same() -> None:
    arrays = operands(70)
    scales = scales_of(arrays)
    by_head = {name: np.ascontiguousarray(array.transpose(BY_HEAD)) for name, array in arrays.items()}
    received = run(lowered(scales, by_head=True), by_head).transpose(BY_HEAD)
    np.testing.assert_array_equal(received, run(lowered(scales), arrays))


def test_permuted_keys_change_nothing() -> None:
    """The sums are of integers, and exact in any order; only the softmax's sum rounds."""
    arrays = operands(150)
    scales = scales_of(arrays)
    order = np.random.default_rng(0).permutation(150)
    permuted = {**arrays, "k": arrays["k"][:, order], "v": arrays["v"][:, order]}
    model = lowered(scales)
    np.testing.assert_allclose(run(model, permuted), run(model, arrays), rtol=0, atol=0.02)


def test_equal_values_come_out_as_they_are() -> None:
    """A mean of equal numbers, whatever the weights: but for the rounding of their codes, which is not made up for."""
    arrays = {**operands(140), "v": np.full((1, 140, HEADS, WIDTH), 0.5, np.float32)}
    received = run(lowered(scales_of(arrays)), arrays)
    np.testing.assert_allclose(received, 0.5, rtol=0.02)


def test_the_graph_is_valid_and_its_products_are_integer(tmp_path: Path) -> None:
    """As ONNX Runtime executes it: two integer products in the loop's body, and no attention in fp32."""
    arrays = operands(ROWS + 9)
    model = lowered(scales_of(arrays))
    check_graph(graph_bytes(model), "attention.onnx")
    run(model, arrays, tmp_path / "optimised.onnx")
    nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    (scan,) = [node for node in nodes if node.op_type == "Scan"]
    (body,) = [attribute.g for attribute in scan.attribute if attribute.name == "body"]
    inside = [node.op_type for node in body.node]
    assert inside.count("MatMulIntegerToFloat") == 2
    assert not {"Attention", "MatMul", "Gemm", "FusedMatMul", "DequantizeLinear"} & {
        *inside,
        *(node.op_type for node in nodes),
    }
    # Transposes move codes, not numbers: only the result is fp32.
    names = {node.op_type: node.input[0] for node in nodes if node.op_type == "QuantizeLinear"}
    assert set(names.values()) <= set("qkv")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mask": True}, "it has a mask"),
        ({"is_causal": 1}, "it is causal"),
        ({"softcap": 3.0}, "its logits are capped"),
        ({"dtype": TensorProto.FLOAT16}, "an operand is not fp32"),
    ],
)
def test_refuses_other_attention(options: dict[str, object], reason: str) -> None:
    model = attention_model(**options)  # type: ignore[arg-type]
    with pytest.raises(PreconditionError, match=rf"b\.attention cannot be computed in integers: {reason}"):
        LowerIntegerAttentionPass({NAME: AttentionScales(1, 1, 1, Precision.INT8)})(model)


def test_a_transpose_without_a_permutation_is_another_one() -> None:
    """It reverses all axes."""
    model = attention_model()
    turned = next(node for node in model.graph if node.name == "b.qt")
    turned.attributes.pop("perm")
    LowerIntegerAttentionPass({NAME: AttentionScales(1, 1, 1, Precision.INT8)})(model)
    read = {
        value.name for node in model.graph if node.op_type == "QuantizeLinear" for value in node.inputs[:1] if value
    }
    assert read == {"qt", "k", "v"}, "k and v are quantised before their transposes, q behind its own"


def test_attentions_that_are_not_there() -> None:
    with pytest.raises(PreconditionError, match=r"has no attentions b\.other"):
        LowerIntegerAttentionPass({"b.other": AttentionScales(1, 1, 1, Precision.INT8)})(attention_model())


def test_an_attention_that_is_left_is_noticed() -> None:
    with pytest.raises(PostconditionError, match="still computed in high precision"):
        LowerIntegerAttentionPass({NAME: AttentionScales(1, 1, 1, Precision.INT8)}).ensures(attention_model())


def test_scales_for_int8_are_not_taken_for_fp8() -> None:
    """Where nothing lowers them: a target without attention in integers would compute with wrong scales."""
    for target in ("cuda", "rtx:sm89", "trt:sm90"):
        eight_bit = EightBit(attentions={NAME: AttentionScales(0.1, 0.1, 0.1, Precision.INT8)})
        with pytest.raises(PreconditionError, match=r"scales of b\.attention are for other codes than FP8's"):
            lower(attention_model(), Target.parse(target), eight_bit)


def test_attention_in_fp8_stays_attention() -> None:
    model = attention_model()
    lower(model, Target(Backend.CPU), EightBit(attentions={NAME: AttentionScales(0.1, 0.1, 0.1)}))
    assert [node.op_type for node in model.graph].count("Attention") == 1
