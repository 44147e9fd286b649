"""Captured attentions as text: projections, norms per head, rotation, attention; and inputs for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

HEADS, CHANNELS, IMAGE, TEXT = 2, 64, 150, 40
WIDTH, HALF = HEADS * CHANNELS, CHANNELS // 2

Array = np.ndarray[Any, Any]

HEADER = f"""
<ir_version: 11, opset_import: ["": 23, "reelforge": 1]>
dit (float[B,N,{WIDTH}] image, float[B,L,{WIDTH}] text, float[N,{HALF}] rope_cos, float[N,{HALF}] rope_sin,
     float[{WIDTH},{WIDTH}] wq, float[{WIDTH},{WIDTH}] wk, float[{WIDTH},{WIDTH}] wv, float[{WIDTH}] bias,
     float[{CHANNELS}] q_norm, float[{CHANNELS}] k_norm, float[{CHANNELS}] q_norm2, float[{CHANNELS}] k_norm2,
     int64[B] lengths, int32[E] index, int32[{HEADS},Q] start, int32[B,K] counts)
=> (float[B,S,{HEADS},{CHANNELS}] out)
"""

TABLES = f"""
one = Constant <value = float {{1.0}}> ()
zero = Constant <value = float {{0.0}}> ()
by_head = Constant <value = int64[4] {{0, -1, {HEADS}, {CHANNELS}}}> ()
axis = Constant <value = int64[1] {{1}}> ()
length = Shape <start = 1, end = 2> (text)
half = Constant <value = int64[1] {{{HALF}}}> ()
tail_shape = Concat <axis = 0> (length, half)
ones = Expand (one, tail_shape)
zeros = Expand (zero, tail_shape)
joint_cos = Concat <axis = 0> (rope_cos, ones)
joint_sin = Concat <axis = 0> (rope_sin, zeros)
cos = Unsqueeze (joint_cos, axis)
sin = Unsqueeze (joint_sin, axis)
"""


def _projected(source: str, weight: str, result: str) -> str:
    return f"""
{result}_product = MatMul ({source}, {weight})
{result}_flat = Add ({result}_product, bias)
{result} = Reshape ({result}_flat, by_head)"""


def _normed(source: str, norm: str, result: str) -> str:
    return f"{result} = RMSNormalization <axis = -1, epsilon = 0.000001> ({source}, {norm})"


def _rotated(source: str, result: str) -> str:
    return f"""
{result}_a, {result}_b = Split <axis = 3, num_outputs = 2> ({source})
{result}_ac = Mul ({result}_a, cos)
{result}_bs = Mul ({result}_b, sin)
{result}_first = Sub ({result}_ac, {result}_bs)
{result}_bc = Mul ({result}_b, cos)
{result}_as = Mul ({result}_a, sin)
{result}_second = Add ({result}_bc, {result}_as)
{result}_turned = Concat <axis = -1> ({result}_first, {result}_second)
{result} = Transpose <perm = [0, 2, 1, 3]> ({result}_turned)"""


TWO_STREAMS = "\n".join(
    [
        _projected("image", "wq", "iq"),
        _projected("image", "wk", "ik"),
        _projected("image", "wv", "iv"),
        _projected("text", "wq", "tq"),
        _projected("text", "wk", "tk"),
        _projected("text", "wv", "tv"),
        _normed("iq", "q_norm", "iqn"),
        _normed("ik", "k_norm", "ikn"),
        _normed("tq", "q_norm2", "tqn"),
        _normed("tk", "k_norm2", "tkn"),
        "qn = Concat <axis = 1> (iqn, tqn)",
        "kn = Concat <axis = 1> (ikn, tkn)",
        "vj = Concat <axis = 1> (iv, tv)",
    ]
)
ONE_STREAM = "\n".join(
    [
        "joint = Concat <axis = 1> (image, text)",
        _projected("joint", "wq", "jq"),
        _projected("joint", "wk", "jk"),
        _projected("joint", "wv", "vj"),
        _normed("jq", "q_norm", "qn"),
        _normed("jk", "k_norm", "kn"),
    ]
)
ATTENTIONS = {
    "dense": "attended = Attention (q, k, v)",
    "lengths": "attended = reelforge.AttentionWithKeyLengths (q, k, v, lengths)",
    "sparse": "attended = reelforge.BlockSparseAttention <query_block = 128, key_block = 64> "
    "(q, k, v, index, start, counts)",
}


def attention_text(streams: str = TWO_STREAMS, attention: str = "dense") -> str:
    """Return a model as text."""
    values = "v = Transpose <perm = [0, 2, 1, 3]> (vj)"
    result = "out = Transpose <perm = [0, 2, 1, 3]> (attended)"
    parts = [TABLES, streams, _rotated("qn", "q"), _rotated("kn", "k"), values, ATTENTIONS[attention], result]
    return f"{HEADER} {{\n" + "\n".join(parts) + "\n}"


def attention_model(text: str) -> ir.Model:
    """Return the model, with types and ranks inferred, its attention called ``double.0.Attention``."""
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    model = ir.from_proto(proto)
    for number, node in enumerate(model.graph):
        node.name = f"double.0.{node.op_type}" if "Attention" in node.op_type else f"double.0.{node.op_type}.{number}"
    for value in [value for node in model.graph for value in node.outputs if "Attention" in node.op_type]:
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, HEADS, None, CHANNELS])
    return model


def attention_inputs(batch: int = 1, seed: int = 3) -> dict[str, Array]:
    """Return inputs for all forms; three of six key blocks are listed for the image's first query block."""
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return random.standard_normal(shape).astype(np.float32)

    angles = random.uniform(0, 6, (IMAGE, HALF))
    return {
        "image": normal(batch, IMAGE, WIDTH),
        "text": normal(batch, TEXT, WIDTH),
        "rope_cos": np.cos(angles).astype(np.float32),
        "rope_sin": np.sin(angles).astype(np.float32),
        **{name: normal(WIDTH, WIDTH) / np.float32(WIDTH**0.5) for name in ("wq", "wk", "wv")},
        "bias": normal(WIDTH),
        **{name: (1 + 0.2 * normal(CHANNELS)) for name in ("q_norm", "k_norm", "q_norm2", "k_norm2")},
        "lengths": np.array([IMAGE + TEXT - 17 * b for b in range(batch)], np.int64),
        "index": np.array([0, 2, 0, 1, 2], np.int32),
        "start": np.array([[0, 2, 5], [2, 5, 5]], np.int32),
        "counts": np.array([[64, 64, 62, 0]] * batch, np.int32),
    }


def needed(model: ir.Model, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return the arrays that are inputs of ``model``."""
    return {value.name: arrays[value.name] for value in model.graph.inputs if value.name is not None}
