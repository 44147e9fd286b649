"""Words of a compiler's log, from a real log shortened, and anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto as Kind

from reelforge.export.engines.builder import build_plan
from reelforge.export.engines.layer_information import PlanInformation, read_log, worth_keeping
from reelforge.export.engines.module import Message
from reelforge.export.engines.request import Profile
from reelforge.runtime.receipt import Receipt
from tests.export.engines.tiny_graphs import Graph, request_for, save_attention

US = "\x1f"


def tensor(name: str, kind: str) -> str:
    return (
        f"{{ Name: {name}, Dimensions: [-1,64], Strides: [64,1], StrideOrder: [1,0], Datatype: {kind}, "
        "Format: (Linear) Row major linear format }"
    )


def layer(
    name: str, kind: str, inputs: str, constants: str, outputs: str, nodes: tuple[str, ...] = (), tactic: str = "t"
) -> str:
    lists = (
        ", ".join(tensor(f"t{index}", word) for index, word in enumerate(words.split()))
        for words in (inputs, constants, outputs)
    )
    first, second, third = (f"[ {text}]" if text else "[]" for text in lists)
    metadata = US.join(f"[ONNX Layer: {node}]" for node in nodes)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: {first}, Constants: {second}, Outputs: {third}, "
        f"TacticName: {tactic}, StreamId: 0, Metadata: {metadata}"
    )


def log(*layers: str, extra: tuple[str, ...] = ()) -> list[Message]:
    texts = [*extra, "\n".join(["Layers:", *layers, "", "I/O Tensors:", " Name: x, IOMode: Input"])]
    return [Message("VERBOSE", text) for text in texts]


def only(text: str) -> Any:
    ((record,),) = read_log(log(text), {"a.node": "a", "b": "b"}).profiles
    return record


def test_a_product() -> None:
    record = only(
        layer("a.node_myl0_2", "gemm", "FP8", "FP8 Float Float", "BFloat16", ("a.node", "a.node.weight", "b"), "STUB")
    )
    assert (record.name, record.kind, record.kernel) == ("a.node_myl0_2", "gemm", "STUB")
    assert (record.inputs, record.constants, record.outputs) == (("FP8",), ("FP8", "Float", "Float"), ("BFloat16",))
    assert record.nodes == ("a", "b")


@pytest.mark.parametrize(
    ("name", "layer_type", "kind"),
    [
        ("__myl_FcAddMulTanh_myl0_1", "runtime_fusion", "gemm"),
        ("c_myl0_2", "correlation", "convolution"),
        ("_gemm_mha_v2_myl0_4", "kgen", "attention"),
        ("__myl_ReshMoveTran_myl0_3", "kgen", "reformat"),
        ("__myl_Cast_myl0_3", "kgen", "cast"),
        ("__myl_TranCast_myl12_30", "kgen", "cast"),
        ("__myl_MulCast_myl0_3", "kgen", "other"),
        ("Reformatting CopyNode for Input Tensor 0", "Reformat", "reformat"),
        ("__mye43_0_myl0_0", "shape_call", "other"),
        ("something new", "quantum", "other"),
    ],
)
def test_kinds(name: str, layer_type: str, kind: str) -> None:
    assert only(layer(name, layer_type, "Half", "", "Half")).kind == kind


def test_what_only_touches_a_layer_does_not_compute_it() -> None:
    # The bias's addition behind a product carries the product's name too.
    assert only(layer("__myl_MulAdd_myl0_3", "kgen", "Half", "", "Half", ("b",))).nodes == ()
    assert only(layer("__mye43_0_myl0_0", "shape_call", "", "", "", tactic="")).kernel == "shape_call"


def test_node_names_with_brackets() -> None:
    text = layer("g_myl0_1", "gemm", "Half", "Half", "Half", ("blocks[0]", "x][ONNX Layer: y"))
    names = {"blocks[0]": "first", "x][ONNX Layer: y": "second"}
    assert read_log(log(text), names).profiles[0][0].nodes == ("first", "second")


def test_profiles_and_sizes() -> None:
    lines = [
        layer("__myl_Cast_myl0_0", "kgen", "Half", "", "Half"),
        layer("a.node_myl0_1", "gemm", "Half", "Half", "Half", ("a.node",)),
        layer("b_myl1_0", "gemm", "Half", "Half", "Half", ("b",)),  # a second region of the first profile
        layer("__myl_Cast_myl2_0", "kgen", "Half", "", "Half"),
        layer("a.node [profile 1]_myl2_1", "gemm", "Half", "Half", "Half", ("a.node",)),
        layer("b [profile 1]_myl3_0", "gemm", "Half", "Half", "Half", ("b",)),
    ]
    sizes = (
        "Total Activation Memory: 100 bytes",
        "Total Activation Memory: 2000 bytes",
        "Total Weights Memory: 7 bytes",
    )
    information = read_log(log(*lines, extra=sizes), {"a.node": "a", "b": "b"})
    names = ["__myl_Cast_myl", "a.node_myl", "b_myl"]
    assert [[record.name.rstrip("0123456789_") for record in layers] for layers in information.profiles] == [names] * 2
    assert (information.weight_bytes, information.activation_bytes) == (7, (100, 2000))


@given(st.lists(st.text(max_size=80)))
def test_anything_else_is_passed_over(lines: list[str]) -> None:
    good = layer("a.node_myl0_1", "gemm", "Half", "Half", "Half", ("a.node",))
    noise = [line for line in lines if "Name:" not in line]
    information = read_log(log(*noise, good, *noise), {"a.node": "a"})
    assert [record.nodes for record in information.profiles[0]] == [("a",)]
    assert read_log([Message("INFO", line) for line in noise], {}) == PlanInformation((), None, ())


def test_what_is_kept_is_what_is_read() -> None:
    sizes = (
        "Total Activation Memory: 100 bytes",
        "Total Weights Memory: 7 bytes",
        "Total Host Persistent Memory: 9 bytes",
    )
    messages = log(layer("g_myl0_1", "gemm", "Half", "Half", "Half"), extra=sizes)
    assert read_log(messages, {}) == read_log(filter(worth_keeping, messages), {})
    assert sum(map(worth_keeping, messages)) == 3


def test_a_real_plan_of_two_profiles(float8_plan: tuple[Path, Receipt]) -> None:
    _, receipt = float8_plan
    assert [layer.nodes for layer in receipt.of_kind("gemm")] == [("blocks.0.fc",), ("blocks.1.fc",)]
    assert receipt.precisions("gemm") == {"FP8": 2}
    assert receipt.weight_bytes < receipt.plan_bytes
    assert set(receipt.activation_bytes) == {"small", "large"}
    assert 0 < receipt.activation_bytes["small"] < receipt.activation_bytes["large"]


def test_a_real_convolution(tmp_path: Path, rtx: Any) -> None:
    graph = Graph()
    weight = graph.store("c.weight", np.random.default_rng(0).standard_normal((32, 16, 3, 3, 3)) * 0.1, Kind.FLOAT16)
    graph.node("Conv", ["x", weight], "y", "c", pads=[1] * 6)
    shape = [1, 16, "t", "h", "w"]
    path = graph.save(tmp_path / "c.onnx", {"x": (Kind.FLOAT16, shape)}, {"y": (Kind.FLOAT16, [1, 32, *shape[2:]])})
    profile = Profile("default", dict.fromkeys("thw", (4, 8, 16)))
    built = build_plan(rtx, request_for(path, "rtx:sm86", profiles=(profile,), out=tmp_path))
    built.writer.discard()
    found = [record for record in built.information.profiles[0] if record.kind == "convolution"]
    assert [(record.nodes, record.inputs[0], record.constants[0]) for record in found] == [(("c",), "Half", "Half")]


def test_a_real_attention(tmp_path: Path, rtx: Any) -> None:
    built = build_plan(rtx, request_for(save_attention(tmp_path / "a.onnx"), "rtx:sm89", out=tmp_path))
    built.writer.discard()
    found = [record for record in built.information.profiles[0] if record.kind == "attention"]
    assert [(record.nodes, record.inputs) for record in found] == [(("double.0.attention",), ("BFloat16",) * 3)]


@pytest.mark.parametrize("kind", ["PluginV3", "Plugin_V3_ext"])
def test_a_plugin(kind: str) -> None:
    """As classic TensorRT documents its layers; no such log was seen."""
    names = {"double.0.attention.int8_fp8_attention": "double.0.attention"}
    full = layer("double.0.attention.int8_fp8_attention", kind, "Int8 Float", "", "BFloat16",
                 ("double.0.attention.int8_fp8_attention",))  # fmt: skip
    short = full.replace(", Constants: []", "").replace(", TacticName: t", "")
    unnamed = short.partition(", Metadata")[0]
    for text in (full, short, unnamed, unnamed.replace(", LayerType", " [profile 1], LayerType")):
        (record,) = read_log(log(text), names).profiles[0]
        assert (record.kind, record.nodes) == ("plugin", ("double.0.attention",))
        assert (record.inputs, record.outputs, record.constants) == (("Int8", "Float"), ("BFloat16",), ())
        assert record.kernel == ("t" if text == full else kind)
    (other,) = read_log(log(full.replace("int8_fp8_attention", "value_quantise")), names).profiles[0]
    assert (other.kind, other.nodes) == ("plugin", ())
