"""Which values of a graph are observed: names of attentions, layouts of their operands, and what smoothing reaches."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from reelforge.calibration.errors import CalibrationError
from reelforge.calibration.observe import ChannelLayout
from reelforge.calibration.rules import Fold, FoldKind, SmoothingGroup
from reelforge.calibration.scale_file import ScaleKind
from reelforge.export.observed import attention_nodes, observed_values, smoothed_attentions

WIDTH = 6
VALUE = helper.make_tensor_value_info


def block_graph(rank: int = 4) -> ir.Graph:
    """v is a layer; its output is mixed by the second of two attentions, rearranged, and read by proj and shared."""
    shape = [1, 3, None, 2] if rank == 4 else [1, None, WIDTH]
    heads = {} if rank == 4 else {"q_num_heads": 3, "kv_num_heads": 3}
    node = helper.make_node
    nodes = [
        node("Gemm", ["x", "b.v.weight"], ["v"], "b.v", transB=1),
        node("Reshape", ["v", "to_heads"], ["vs"], "b.Reshape"),
        node("Attention", ["q", "k", "vs"], ["first"], "b.Attention", **heads),
        node("Attention", ["first", "k", "vs"], ["mixed"], "b.Attention.2", **heads),
        node("Reshape", ["mixed", "to_rows"], ["rows"], "b.Reshape.2"),
        node("Gemm", ["rows", "b.proj.weight"], ["y"], "b.proj", transB=1),
        node("Gemm", ["rows", "b.shared.weight"], ["z"], "b.shared", transB=1),
        node("Relu", ["rows"], ["positive"], "b.Relu"),
        node("Gemm", ["positive", "b.late.weight"], ["w"], "b.late", transB=1),
    ]
    weights = [
        numpy_helper.from_array(np.ones((WIDTH, WIDTH), np.float32), f"b.{name}.weight")
        for name in ("v", "proj", "shared", "late")
    ]
    shapes = {"to_heads": [1, 3, -1, 2] if rank == 4 else [1, -1, WIDTH], "to_rows": [-1, WIDTH]}
    stored = [*weights, *(numpy_helper.from_array(np.array(size), name) for name, size in shapes.items())]
    inputs = [VALUE("x", 1, [None, WIDTH]), VALUE("q", 1, shape), VALUE("k", 1, shape)]
    outputs = [VALUE(name, 1, [None, WIDTH]) for name in ("y", "z", "w")]
    graph = helper.make_graph(
        nodes, "g", inputs, outputs, stored, value_info=[VALUE("vs", 1, shape), VALUE("first", 1, shape)]
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])).graph


def group(layer: str, kind: FoldKind = FoldKind.AFFINE, stage: str = "s") -> SmoothingGroup:
    return SmoothingGroup("s", (layer,), (Fold(kind, stage, "b.v"),))


def test_attentions_are_named_after_their_block() -> None:
    assert {name: node.name for name, node in attention_nodes(block_graph()).items()} == {
        "b.attention": "b.Attention",
        "b.attention.2": "b.Attention.2",
    }


@pytest.mark.parametrize("rank", [3, 4])
def test_layers_and_operands_in_execution_order(rank: int) -> None:
    layers = ["b.shared", "b.v", "b.proj"]
    found = observed_values(block_graph(rank), "s", layers, ["b.attention.2"], outputs=layers)  # of convolutions only
    layout = ChannelLayout.HEADS if rank == 4 else ChannelLayout.LAST
    assert [(item.value.name, item.tensor.kind, item.layers) for item in found] == [
        ("x", ScaleKind.ACTIVATION, ("b.v",)),
        ("k", ScaleKind.KEY, ("b.attention.2",)),
        ("vs", ScaleKind.VALUE, ("b.attention.2",)),
        ("first", ScaleKind.QUERY, ("b.attention.2",)),
        ("rows", ScaleKind.ACTIVATION, ("b.proj", "b.shared")),
    ]
    assert all(item.tensor.channels == WIDTH for item in found)
    kinds = {item.tensor.name: item.tensor.layout for item in found}
    assert kinds["s.b.attention.2.value"] is layout
    assert kinds["s.b.proj.activation"] is ChannelLayout.LAST


def test_a_convolution_has_its_channels_on_the_second_axis() -> None:
    weight = numpy_helper.from_array(np.ones((2, 5, 1, 1, 1), np.float32), "c.weight")
    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["padded"], "pad"),
        helper.make_node("Conv", ["padded", "c.weight"], ["y"], "c"),
    ]
    pads = numpy_helper.from_array(np.array([0, 0, 1, 1, 1, 0, 0, 1, 1, 1]), "pads")
    info = [VALUE("padded", 1, [1, 5, None, None, None])]
    graph = helper.make_graph(
        nodes, "g", [VALUE("x", 1, [1, 5, 2, 2, 2])], [VALUE("y", 1, [1, 2, 4, 4, 4])], [weight, pads], value_info=info
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]))
    (found,) = observed_values(model.graph, "vae_decoder", ["c"])
    assert (found.value.name, found.tensor.channels, found.tensor.layout) == ("padded", 5, ChannelLayout.SECOND)
    read, made = observed_values(model.graph, "vae_decoder", ["c"], outputs=["c"])
    assert (read.layers, read.outputs_of, made.layers, made.outputs_of) == (("c",), (), (), ("c",))
    assert (made.value.name, made.tensor.channels, made.tensor.name) == ("y", 2, "vae_decoder.c.output")
    assert made.tensor.layout is ChannelLayout.SECOND


def test_names_that_the_graph_lacks() -> None:
    with pytest.raises(CalibrationError, match="stage 's' has no layers that could be observed under 5") as caught:
        observed_values(block_graph(), "s", [f"b.{k}" for k in range(5)])
    assert "received: b.0, b.1, b.2, ..." in str(caught.value)
    assert "names such as b.v, b.proj, b.shared, ..." in str(caught.value)
    with pytest.raises(CalibrationError, match="has no attentions"):
        observed_values(block_graph(), "s", [], ["b.Attention"])


def test_smoothing_reaches_values_through_rearrangement_only() -> None:
    graph = block_graph()
    assert smoothed_attentions(graph, group("b.proj")) == {"b.attention.2"}
    assert smoothed_attentions(graph, group("b.late")) == set()  # behind an activation function
    assert smoothed_attentions(graph, group("b.v")) == set()  # reads no attention
    assert smoothed_attentions(graph, group("b.proj", FoldKind.MODULATION)) == set()
    assert smoothed_attentions(graph, group("b.proj", stage="other")) == set()
