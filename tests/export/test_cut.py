"""Cutting graphs: segments run one after the other give what the whole graph gives, bit for bit, wherever it is cut."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from reelforge.export.cut import Limits, Timeline, find_places, infer_types, loaded_bytes, segments, timeline

WIDTH = 4
LAYER = np.dtype(np.float16)


def model(layers: Sequence[tuple[int, int, bool]]) -> ir.Model:
    """Each layer adds two earlier values and multiplies by a stored weight, which may be the cast of another type.

    Args:
        layers: Distances back to the two values, and whether the weight is fp16 and cast.
    """
    nodes, weights, names = [], [], ["x"]
    random = np.random.default_rng(len(layers))
    for k, (one, other, cast) in enumerate(layers):
        weight = random.standard_normal((WIDTH, WIDTH)).astype(LAYER if cast else np.float32)
        weights.append(numpy_helper.from_array(weight, f"{k}.weight"))
        if cast:
            nodes.append(helper.make_node("Cast", [f"{k}.weight"], [f"{k}.cast"], f"{k}.Cast", to=TensorProto.FLOAT))
        first, second = (names[max(len(names) - back, 0)] for back in (one, other))
        nodes.append(helper.make_node("Add", [first, second], [f"{k}.sum"], f"{k}.Add"))
        operand = f"{k}.cast" if cast else f"{k}.weight"
        nodes.append(helper.make_node("MatMul", [f"{k}.sum", operand], [f"{k}.out"], f"{k}.MatMul"))
        names.append(f"{k}.out")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value("x", 1, ["n", WIDTH])], [value(names[-1], 1, ["n", WIDTH])], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return infer_types(ir.from_proto(proto))


def run(graph: ir.Graph, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    proto = ir.to_proto(ir.Model(graph, ir_version=9))
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def run_segments(line: Timeline, places: Sequence[int], x: np.ndarray) -> dict[str, np.ndarray]:
    values = {"x": x}
    for graph in segments(line, places):
        assert not [value for value in graph.inputs if value.name not in values]  # made by an earlier segment
        values.update(run(graph, {str(value.name): values[str(value.name)] for value in graph.inputs}))
    return values


LAYERS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9), st.booleans()), min_size=1, max_size=8)


@given(LAYERS, st.data())
@settings(deadline=None, max_examples=30)
def test_any_cut_gives_the_same_bits(layers: list[tuple[int, int, bool]], data: st.DataObject) -> None:
    whole = model(layers)
    values = ir.convenience.create_value_mapping(whole.graph)
    names = data.draw(st.sets(st.sampled_from([f"{k}.{kind}" for k in range(len(layers)) for kind in ("sum", "out")])))
    wanted = [*whole.graph.outputs, *(values[name] for name in sorted(names))]
    line = timeline(whole.graph, wanted)
    places = sorted(data.draw(st.sets(st.integers(1, len(line.nodes) - 1), max_size=6))) if len(line.nodes) > 1 else []
    x = np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32)
    cut, expected = run_segments(line, places, x), run_segments(line, [], x)
    for value in wanted:
        np.testing.assert_array_equal(cut[str(value.name)], expected[str(value.name)])


@given(LAYERS, st.integers(1, 600), st.integers(1, 3))
@settings(deadline=None, max_examples=50)
def test_segments_keep_to_the_limits(layers: list[tuple[int, int, bool]], weight_bytes: int, observed: int) -> None:
    whole = model(layers)
    line = timeline(whole.graph, whole.graph.outputs)
    values = ir.convenience.create_value_mapping(whole.graph)
    sums = [values[f"{k}.sum"] for k in range(len(layers)) if values[f"{k}.sum"] in line.made]
    line = timeline(whole.graph, [*whole.graph.outputs, *sums])
    limits = Limits(weight_bytes, 10 * observed, lambda value: 10 if value in sums else 0)
    places = find_places(line, limits)
    assert places == sorted(set(places))
    made = 0
    for graph in segments(line, places):
        names = {str(value.name) for value in graph.outputs}
        computing = [node for node in graph if node.op_type != "Cast"]
        made += len(computing)
        stored = sum(loaded_bytes(value) for value in graph.initializers.values())
        shown = 10 * len([name for name in names if name.endswith(".sum")])
        assert (stored <= weight_bytes and shown <= 10 * observed) or len(computing) == 1
    assert made == len(line.nodes)


def test_a_chain_is_cut_between_its_blocks() -> None:
    """Within a block two values cross (the sum and what is added to it), between blocks one."""
    whole = model([(1, 1, True), (1, 2, True)] * 4)
    line = timeline(whole.graph, whole.graph.outputs)
    weight = WIDTH * WIDTH * 4
    places = find_places(line, Limits(4 * weight, 1))
    assert [len(line.crossing(place)) for place in places] == [1] * len(places)
    assert len(places) >= 1


def test_a_cast_weight_is_repeated_where_it_is_used_and_never_crosses() -> None:
    whole = model([(1, 1, True), (1, 1, True), (1, 1, True)])
    line = timeline(whole.graph, whole.graph.outputs)
    assert [node.op_type for node in line.nodes] == ["Add", "MatMul"] * 3
    assert line.weight_bytes() == 3 * WIDTH * WIDTH * 4  # as fp32, although they are stored in fp16
    graphs = list(segments(line, [2, 4]))
    assert [sorted(graph.initializers) for graph in graphs] == [["0.weight"], ["1.weight"], ["2.weight"]]
    assert [[str(value.name) for value in graph.inputs] for graph in graphs] == [["x"], ["0.out"], ["1.out"]]


def test_what_leads_nowhere_is_left_out() -> None:
    whole = model([(1, 1, False), (2, 2, False)])  # the second layer reads x
    line = timeline(whole.graph, whole.graph.outputs)
    assert [node.name for node in line.nodes] == ["1.Add", "1.MatMul"]


def test_the_graph_stays_as_it_is() -> None:
    whole = model([(1, 2, True)] * 3)
    before = ir.to_proto(whole).SerializeToString(deterministic=True)
    graphs = list(segments(timeline(whole.graph, whole.graph.outputs), [2, 3]))
    assert ir.to_proto(whole).SerializeToString(deterministic=True) == before
    again = list(segments(timeline(whole.graph, whole.graph.outputs), [2, 3]))
    assert [ir.to_proto(g).SerializeToString(deterministic=True) for g in graphs] == [
        ir.to_proto(g).SerializeToString(deterministic=True) for g in again
    ]


def test_values_that_a_subgraph_reads_cross() -> None:
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Add", ["carried", "outer"], ["inner"]),
            helper.make_node("Mul", ["inner", "factor"], ["next"]),
            helper.make_node("Identity", ["going"], ["go_on"]),
        ],
        "body",
        [value("i", 7, []), value("going", 9, []), value("carried", 1, ["n"])],
        [value("go_on", 9, []), value("next", 1, ["n"])],
    )
    nodes = [
        helper.make_node("Neg", ["x"], ["outer"], "outer"),
        helper.make_node("Abs", ["x"], ["start"], "start"),
        helper.make_node("Loop", ["trips", "", "start"], ["y"], "loop", body=body),
    ]
    stored = [numpy_helper.from_array(np.array(3), "trips"), numpy_helper.from_array(np.float32([2.0]), "factor")]
    graph = helper.make_graph(nodes, "g", [value("x", 1, ["n"])], [value("y", 1, ["n"])], stored)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    whole = infer_types(ir.from_proto(proto))
    line = timeline(whole.graph, whole.graph.outputs)
    assert [str(v.name) for v in line.crossing(2)] == ["outer", "start"]
    x = np.float32([1.0, -2.0, 3.0])
    expected = run_segments(line, [], x)["y"]
    np.testing.assert_array_equal(run_segments(line, [1, 2], x)["y"], expected)
    last = list(segments(line, [2]))[-1]
    assert sorted(last.initializers) == ["factor", "trips"]


@pytest.mark.parametrize("weight_bytes", [1, 100, 10**9])
def test_a_random_number_is_not_a_stored_tensor(weight_bytes: int) -> None:
    """Computed once: a node without inputs that is no constant belongs to one place."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("RandomNormal", [], ["noise"], "noise", shape=[3]),
        helper.make_node("Add", ["x", "noise"], ["a"], "a"),
        helper.make_node("Add", ["a", "noise"], ["y"], "y"),
    ]
    graph = helper.make_graph(nodes, "g", [value("x", 1, [3])], [value("y", 1, [3])])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    line = timeline(ir.from_proto(proto).graph, ())
    assert line.nodes == ()
    whole = infer_types(ir.from_proto(proto))
    line = timeline(whole.graph, whole.graph.outputs)
    assert len(line.nodes) == 3
    assert find_places(line, Limits(weight_bytes, 1)) == []
