"""LowerIntegerConvolutionPass: integer convolutions against the same codes in float64, what is copied, what is left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import PostconditionError

from reelforge.calibration.number_formats import unsigned_codes
from reelforge.export.graph_file import check_graph, graph_bytes
from reelforge.export.lower import EightBit, lower, passes_for
from reelforge.export.passes.lower_integer_convolution import NARROW_CHANNELS, LowerIntegerConvolutionPass
from reelforge.export.passes.quantise_layers import IntegerInputs, QuantiseLayersPass
from reelforge.runtime.engines.onnxruntime_library import EXACT_PRODUCTS
from reelforge.runtime.recipe import Backend, Target
from tests.export.passes.layer_model import (
    dequantised_operands,
    layers_model,
    operators,
    quantised_layer,
    random_array,
    run,
)

SCALE = 0.03
CPU = Target(Backend.CPU)
WIDE = NARROW_CHANNELS + 4


def weight_of(out: int, channels: int, kernel: int = 3) -> NDArray[np.float32]:
    return random_array(0, out, channels, kernel, kernel, kernel) / np.float32(np.sqrt(channels * kernel**3))


def eight_bit(weight: NDArray[Any], limits: tuple[float, float] | None, name: str = "c") -> EightBit:
    return EightBit({name: replace(quantised_layer(weight, SCALE, "int8"), output_range=limits)})


def convolved(x: NDArray[np.float32], weight: NDArray[Any], bias: NDArray[np.float32] | None) -> NDArray[np.float64]:
    """The convolution of the dequantised codes in float64; x as the convolution reads it."""
    a, w = dequantised_operands(x, weight, SCALE, "int8")
    own = None if bias is None else torch.from_numpy(bias.astype(np.float64))
    y: NDArray[np.float64] = torch.nn.functional.conv3d(torch.from_numpy(a), torch.from_numpy(w), own).numpy()
    return y


def assert_codes_of(received: NDArray[np.float32], exact: NDArray[np.float64], limits: tuple[float, float]) -> None:
    """Within half a step of the output's codes, and a hundredth for fp32's rounding of the step and of the bias."""
    step, zero = unsigned_codes(*limits)
    clipped = np.clip(exact, -zero * step, (255 - zero) * step)
    assert np.abs(received - clipped).max() <= 0.51 * step
    codes = received.astype(np.float64) / step
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("channels", [5, 16, WIDE])
def test_computes_the_layer(channels: int, kernel: int, bias: bool) -> None:
    weight, own = weight_of(6, channels, kernel), random_array(1, 6) if bias else None
    model = ir.from_proto(layers_model({"c": (weight, own)}, (1, channels, "t", "h", "w")))
    limits = (-2.5, 3.0)
    lower(model, CPU, eight_bit(weight, limits))
    assert operators(model).count("QLinearConv") == 1
    assert "Conv" not in operators(model)
    check_graph(graph_bytes(model), "convolution.onnx")
    for size in ((3, 5, 4), (4, 3, 7)):
        x = random_array(3, 1, channels, *size)
        assert_codes_of(run(graph_bytes(model), x)["c.y"], convolved(x, weight, own), limits)


def test_values_beyond_the_range_are_cut_off() -> None:
    """As codes do; the range is of what was observed."""
    weight = weight_of(4, 8)
    limits = (-0.25, 0.5)
    model = lower(ir.from_proto(layers_model({"c": (weight, None)}, (1, 8, 4, 4, 4))), CPU, eight_bit(weight, limits))
    x = random_array(4, 1, 8, 4, 4, 4)
    exact = convolved(x, weight, None)
    assert exact.min() < limits[0]
    assert exact.max() > limits[1]
    assert_codes_of(run(graph_bytes(model), x)["c.y"], exact, limits)


def test_biases_are_exact_to_a_step_of_the_sums() -> None:
    """Of a layer whose weights are small beside its bias, too."""
    weight, bias = weight_of(3, 4) * np.float32(1e-4), np.array([0.5, -0.75, 0.0], np.float32)
    limits = (-1.0, 1.0)
    model = lower(ir.from_proto(layers_model({"c": (weight, bias)}, (1, 4, 3, 3, 3))), CPU, eight_bit(weight, limits))
    x = random_array(5, 1, 4, 3, 3, 3)
    assert_codes_of(run(graph_bytes(model), x)["c.y"], convolved(x, weight, bias), limits)


def upsampled_model(weight: NDArray[np.float32], also_used: bool = False) -> ir.Model:
    """What the decoder does before a convolution: frames, rows and columns twice, then padding by the edge."""
    channels = weight.shape[1]
    factors = numpy_helper.from_array(np.array([1, 1, 2, 2, 2], np.float32), "factors")
    pads = numpy_helper.from_array(np.array([0, 0, 1, 1, 1, 0, 0, 0, 1, 1]), "pads")
    nearest = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    nodes = [
        helper.make_node("Resize", ["x", "", "factors"], ["large"], "Resize", **nearest),
        helper.make_node("Pad", ["large", "pads"], ["padded"], "Pad", mode="edge"),
        helper.make_node("Conv", ["padded", "c.weight"], ["c.y"], "c"),
    ]
    outputs = [helper.make_tensor_value_info("c.y", TensorProto.FLOAT, [1, weight.shape[0], None, None, None])]
    if also_used:
        outputs.append(helper.make_tensor_value_info("large", TensorProto.FLOAT, [1, channels, None, None, None]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, "t", "h", "w"])
    tensors = [numpy_helper.from_array(weight, "c.weight"), factors, pads]
    graph = helper.make_graph(nodes, "upsampled", [x], outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def padded(x: NDArray[np.float32]) -> NDArray[np.float32]:
    large = x.repeat(2, axis=2).repeat(2, axis=3).repeat(2, axis=4)
    return np.pad(large, ((0, 0), (0, 0), (1, 0), (1, 1), (1, 1)), mode="edge")


@pytest.mark.parametrize("channels", [8, WIDE])
def test_what_only_copies_copies_codes(channels: int) -> None:
    """The picture is quantised when it is small; nothing of fp32 is upsampled or padded."""
    weight = weight_of(5, channels)
    limits = (-3.0, 3.0)
    model = lower(upsampled_model(weight), CPU, eight_bit(weight, limits))
    copying = [node for node in model.graph if node.op_type in ("Resize", "Pad", "Concat", "Reshape", "Unsqueeze")]
    videos = [node for node in copying if not all(value.is_initializer() for value in node.inputs if value is not None)]
    videos = [node for node in videos if node.outputs[0].dtype != ir.DataType.INT8]
    assert {node.op_type for node in videos} >= {"Resize", "Pad", "Concat", "Reshape"}
    assert {node.outputs[0].dtype for node in videos} == {ir.DataType.UINT8}
    x = random_array(6, 1, channels, 2, 3, 2)
    assert_codes_of(run(graph_bytes(model), x)["c.y"], convolved(padded(x), weight, None), limits)


def test_what_others_read_in_high_precision_stays_in_it() -> None:
    weight = weight_of(5, 8)
    model = lower(upsampled_model(weight, also_used=True), CPU, eight_bit(weight, (-3.0, 3.0)))
    x = random_array(7, 1, 8, 2, 3, 2)
    found = run(graph_bytes(model), x)
    np.testing.assert_array_equal(found["large"], x.repeat(2, axis=2).repeat(2, axis=3).repeat(2, axis=4))
    assert_codes_of(found["c.y"], convolved(padded(x), weight, None), (-3.0, 3.0))
    assert operators(model).count("Resize") == 1


def test_constants_are_computed_once(tmp_path: Path) -> None:
    """As ONNX Runtime executes it: nothing is done to weights or bias in a run."""
    weight, bias = weight_of(4, 6), random_array(1, 4)
    model = lower(
        ir.from_proto(layers_model({"c": (weight, bias)}, (1, 6, "t", "h", "w"))), CPU, eight_bit(weight, (-3.0, 3.0))
    )
    run(graph_bytes(model), random_array(8, 1, 6, 4, 4, 4), tmp_path / "optimised.onnx")
    found = operators(onnx.load(tmp_path / "optimised.onnx"))
    assert not {"Mul", "Div", "Round", "Clip", "Cast", "Reshape"} & set(found)
    assert found.count("Slice") == 3


def test_keeps_the_layer_s_name() -> None:
    """Profiles and receipts show layers by it."""
    weight = weight_of(4, 6)
    model = lower(
        ir.from_proto(layers_model({"c": (weight, None)}, (1, 6, 4, 4, 4))), CPU, eight_bit(weight, (-1.0, 1.0))
    )
    assert [node.name for node in model.graph if node.op_type == "QLinearConv"] == ["c"]


def test_is_exact_with_the_setting_for_processors_without_vnni(tmp_path: Path) -> None:
    """Which makes weights uint8, here as there, and refuses layers that share a constant.

    In an emulator of such a processor (``qemu-x86_64 -cpu Haswell``) results were off by 94 % without it, and are these
    with it.
    """
    weight, limits = weight_of(4, 6), (-200.0, 200.0)
    weights = {name: (np.abs(weight) + np.float32(index), None) for index, name in enumerate("cd")}
    codes = {name: eight_bit(own, limits, name).layers[name] for name, (own, _) in weights.items()}
    model = lower(ir.from_proto(layers_model(weights, (1, 6, "t", "h", "w"))), CPU, EightBit(codes))
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    for key, value in EXACT_PRODUCTS.items():
        settings.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(graph_bytes(model), settings, providers=["CPUExecutionProvider"])
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "optimised.onnx").graph.initializer}
    found = [node for node in onnx.load(tmp_path / "optimised.onnx").graph.node if node.op_type == "QLinearConv"]
    assert [stored[node.input[3]].data_type for node in found] == [TensorProto.UINT8] * 2
    x = np.full((1, 6, 4, 5, 5), 3.7, np.float32)  # the largest code everywhere: sums of pairs beyond 16 bits
    for y, (own, _) in zip(session.run(["c.y", "d.y"], {"x": x}), weights.values(), strict=True):
        assert_codes_of(y, convolved(x, own, None), limits)


@pytest.mark.parametrize("backend", [Backend.CUDA, Backend.RTX, Backend.TRT])
def test_is_for_the_cpu_alone(backend: Backend) -> None:
    steps = passes_for(Target(backend, ()), EightBit())
    assert not [step for step in steps if isinstance(step, LowerIntegerConvolutionPass)]


def refusal(
    weight: NDArray[Any],
    attributes: dict[str, object] | None = None,
    *,
    kind: str | None = "int8",
    inputs: IntegerInputs = IntegerInputs.UNSIGNED,
    known: bool = True,
) -> str:
    x = (1, weight.shape[1], *[6] * (weight.ndim - 2))
    model = ir.from_proto(layers_model({"c": (weight, None)}, x, attributes=attributes))
    if kind is not None:
        QuantiseLayersPass({"c": quantised_layer(weight, SCALE, kind)}, inputs)(model)
    before = operators(model)
    step = LowerIntegerConvolutionPass({"c": (-1.0, 1.0)} if known else {})
    step.call(model)
    assert operators(model) == before
    if known:
        with pytest.raises(PostconditionError, match="c is still a convolution of dequantised codes"):
            step.ensures(model)
    else:
        step.ensures(model)
    return step.refused["c"]


def test_leaves_alone_what_it_has_no_operator_for() -> None:
    weight = weight_of(4, 6)
    assert refusal(weight, kind=None) == "an operand is in high precision"
    assert refusal(weight, kind="fp8") == "the weight is not stored in int8"
    assert refusal(weight, inputs=IntegerInputs.SIGNED) == "the activation is not quantised to uint8"
    assert refusal(weight, known=False) == "the range of its output is not known"
    assert refusal(weight[..., 0]) == "it is no convolution of videos"
    for attributes in ({"pads": [0, 0, 1, 0, 0, 1]}, {"strides": [1, 2, 1]}, {"dilations": [1, 1, 2]}):
        assert refusal(weight, attributes) == "it pads, strides, dilates or has groups"
    assert refusal(weight, {"auto_pad": "SAME_UPPER"}) == "it pads by itself"
