"""What is read off a graph before a compiler sees it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import helper

from reelforge.export.engines.graph_names import check_expected, read_graph_names
from reelforge.export.engines.request import Expected
from reelforge.runtime.errors import BuildError
from reelforge.runtime.recipe import Backend, Precision
from tests.export.engines.tiny_graphs import expect_attention, expect_linears, save_attention, save_linears


@pytest.mark.parametrize("precision", [None, Precision.FP8, Precision.INT8])
def test_layers_by_name(tmp_path: Path, precision: Precision | None) -> None:
    names = read_graph_names(save_linears(tmp_path / "g.onnx", precision), Backend.RTX)
    assert names.layers == {"blocks.0.fc": "blocks.0.fc", "blocks.1.fc": "blocks.1.fc"}
    assert names.attentions == {}
    assert names.stored_bytes == sum(
        len(tensor.raw_data) for tensor in onnx.load(tmp_path / "g.onnx").graph.initializer
    )
    check_expected(names, expect_linears(Precision.FP8))


def test_attentions_by_name(tmp_path: Path) -> None:
    names = read_graph_names(save_attention(tmp_path / "g.onnx"), Backend.RTX)
    assert names.attentions == {"double.0.attention": "double.0.Attention"}
    assert names.by_node() == {"double.0.Attention": "double.0.attention"}
    check_expected(names, expect_attention(Precision.BF16))
    check_expected(names, Expected(decomposed=("double.0.attention",)))


def test_what_is_not_in_the_graph(tmp_path: Path) -> None:
    names = read_graph_names(save_linears(tmp_path / "g.onnx"), Backend.RTX)
    with pytest.raises(BuildError, match="6 layers that the recipe speaks of") as caught:
        check_expected(names, expect_linears(Precision.FP8, blocks=8))
    assert "blocks.2.fc, blocks.3.fc, blocks.4.fc, blocks.5.fc, blocks.6.fc, ..." in str(caught.value)
    with pytest.raises(BuildError, match=r"1 attentions .*\n.*received: double.0.attention   .*example none"):
        check_expected(names, expect_attention(Precision.FP8))
    with pytest.raises(BuildError, match="1 attentions"):
        check_expected(names, Expected(decomposed=("double.0.attention",)))


@pytest.mark.parametrize("domain", ["reelforge", "com.microsoft", "trt.plugins"])
def test_a_plugin_is_refused_before_the_parser_aborts(tmp_path: Path, domain: str) -> None:
    graph = save_linears(tmp_path / "g.onnx", domain=domain)
    with pytest.raises(BuildError, match=r"g\.onnx has 1 nodes that need a plugin") as caught:
        read_graph_names(graph, Backend.RTX)
    assert f"{domain}::Special (blocks.special)" in str(caught.value)
    assert "fix: use a target trt" in str(caught.value)


def test_domains_that_a_parser_knows(tmp_path: Path) -> None:
    read_graph_names(save_linears(tmp_path / "own.onnx", domain="trt"), Backend.RTX)
    read_graph_names(save_linears(tmp_path / "plugin.onnx", domain="reelforge"), Backend.TRT)


def test_a_plugin_inside_a_loop(tmp_path: Path) -> None:
    def body() -> onnx.GraphProto:
        node = helper.make_node("Special", ["x"], ["inner"], name="deep", domain="reelforge")
        return helper.make_graph([node], "body", [], [helper.make_tensor_value_info("inner", 1, [1])])

    node = helper.make_node("If", ["c"], ["y"], name="if", then_branch=body(), else_branch=body())
    infos = [helper.make_tensor_value_info("x", 1, [1]), helper.make_tensor_value_info("c", 9, [1])]
    graph = helper.make_graph([node], "g", infos, [helper.make_tensor_value_info("y", 1, [1])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), tmp_path / "g.onnx")
    with pytest.raises(BuildError, match="has 2 nodes that need a plugin"):
        read_graph_names(tmp_path / "g.onnx", Backend.RTX)


def test_functions_are_refused(tmp_path: Path) -> None:
    path = save_linears(tmp_path / "g.onnx")
    model = onnx.load(path)
    body = [helper.make_node("Relu", ["a"], ["b"])]
    model.functions.append(
        helper.make_function("reelforge", "Block", ["a"], ["b"], body, [helper.make_opsetid("", 23)])
    )
    onnx.save(model, path)
    with pytest.raises(BuildError, match="has functions") as caught:
        read_graph_names(path, Backend.RTX)
    assert "InlinePass" in str(caught.value)


def test_no_graph(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"this is no protobuf")
    with pytest.raises(BuildError, match="cannot be read as an ONNX graph"):
        read_graph_names(tmp_path / "g.onnx", Backend.RTX)
    with pytest.raises(BuildError, match="cannot be read as an ONNX graph"):
        read_graph_names(tmp_path / "absent.onnx", Backend.RTX)
