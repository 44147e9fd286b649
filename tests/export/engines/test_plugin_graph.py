"""Plugins in a graph, from the pass that makes them to what is expected of a plan; TensorRT itself is a stub."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from reelforge.export.engines import builder, plugin_graph
from reelforge.export.engines.builder import build_plan
from reelforge.export.engines.expected import expected_of
from reelforge.export.engines.graph_names import check_expected, read_graph_names
from reelforge.export.engines.plugin_graph import parser_graph, registered, with_kernels
from reelforge.export.engines.request import Expected, PlanRequest, Profile
from reelforge.export.lower import PluginAttentions, lower
from reelforge.export.quantisation import StagePlan
from reelforge.plugins.schema import PLUGINS
from reelforge.runtime.errors import BuildError
from reelforge.runtime.recipe import Backend, Target
from tests.export.passes.attention_models import attention_model, attention_text

NAME, PLUGIN = "double.0.attention", "int8_fp8_attention"
CHAIN = ("int8_fp8_attention", "key_statistics", "rotary_qk_norm_quantise", "value_quantise", "value_statistics")
SM90 = Target.parse("trt:sm90")


@pytest.fixture
def model() -> ir.Model:
    return lower(attention_model(attention_text()), SM90, None, PluginAttentions((NAME,)))


@pytest.fixture
def graph(model: ir.Model, tmp_path: Path) -> Path:
    path = tmp_path / "dit.onnx"
    ir.save(parser_graph(model), path)
    return path


class FakePlugins(ModuleType):
    """Stands for ``tensorrt.plugin``."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[tuple[Any, ...]]]:
    """A module called ``tensorrt`` with ``tensorrt.plugin``, and the calls that register plugins."""
    module, calls = ModuleType("tensorrt"), []  # type: ignore[var-annotated]
    module.__version__ = "11.4.0"  # type: ignore[attr-defined]
    module.__path__ = []
    interface = FakePlugins("tensorrt.plugin")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", interface)

    def register(tensorrt: Any, trtp: Any, architecture: int, folder: Path, names: Any) -> None:
        assert folder.is_dir()
        calls.append((tensorrt, trtp, architecture, tuple(names), folder))

    monkeypatch.setattr(plugin_graph, "register_plugins", register)
    return module, calls


def test_names_of_a_graph_with_plugins(graph: Path, model: ir.Model) -> None:
    names = read_graph_names(graph, Backend.TRT)
    assert names.plugins == {NAME: f"{NAME}.{PLUGIN}"}
    assert names.by_node()[f"{NAME}.{PLUGIN}"] == NAME
    assert names.plugin_types == CHAIN
    assert names.attentions == {}
    expected = expected_of(model, StagePlan())
    assert expected == Expected(plugins={NAME: PLUGIN})
    check_expected(names, expected)
    with pytest.raises(BuildError, match="1 plugins that the recipe speaks of are not in the graph"):
        check_expected(names, Expected(plugins={"single.0.attention": PLUGIN}))


def test_the_parser_gets_no_functions(model: ir.Model, tmp_path: Path) -> None:
    assert len(model.functions) == len(CHAIN)
    path = tmp_path / "dit.onnx"
    ir.save(model, path)
    with pytest.raises(BuildError, match="has functions") as caught:
        read_graph_names(path, Backend.TRT)
    assert "parser_graph" in str(caught.value)
    with pytest.raises(BuildError, match="5 nodes that need a plugin, and 'rtx' has none"):
        read_graph_names(path, Backend.RTX)
    ir.save(parser_graph(model), path)
    proto = onnx.load(path)
    assert not proto.functions
    assert {node.op_type for node in proto.graph.node if node.domain} == set(CHAIN)
    read_graph_names(path, Backend.TRT)


def test_kernels_are_part_of_a_plans_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert with_kernels("0", ()) == "0"
    first = with_kernels("0", CHAIN)
    assert first == with_kernels("0", CHAIN) != with_kernels("1", CHAIN)
    monkeypatch.setattr(plugin_graph, "toolchain_digest", lambda: "other kernels")
    assert with_kernels("0", CHAIN) != first


def test_plugins_are_registered_before_the_graph_is_parsed(
    graph: Path, fake: tuple[Any, list[tuple[Any, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, calls = fake
    request = PlanRequest("dit", str(graph), (), (), SM90, (Profile("default", {}),), Expected(plugins={NAME: PLUGIN}),
                          "p", "r", str(graph.parent))  # fmt: skip
    seen = []

    def compile_(module: Any, request: Any, names: Any, *_: Any) -> str:
        seen.append((names.plugin_types, len(calls), calls[0][4].is_dir()))
        return "plan"

    monkeypatch.setattr(builder, "_compile", compile_)
    assert build_plan(module, request) == "plan"  # type: ignore[comparison-overlap]
    assert seen == [(CHAIN, 1, True)]
    tensorrt, trtp, architecture, names, folder = calls[0]
    assert (tensorrt, trtp.__name__, architecture, names) == (module, "tensorrt.plugin", 90, CHAIN)
    assert not folder.exists()  # compiled kernels are in the plan by then


def test_nothing_is_registered_without_plugins(fake: tuple[Any, list[tuple[Any, ...]]]) -> None:
    module, calls = fake
    with registered(module, SM90, ()):
        pass
    with registered(module, Target.parse("rtx:sm89+sm120"), CHAIN):
        pass
    assert calls == []


def test_a_library_without_plugins(fake: tuple[Any, list[tuple[Any, ...]]], monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = fake
    monkeypatch.delitem(sys.modules, "tensorrt.plugin")
    with pytest.raises(BuildError, match="takes no plugins from Python") as caught, registered(module, SM90, CHAIN):
        pass
    assert "tensorrt 11.4.0: No module named 'tensorrt.plugin'" in str(caught.value)
    assert "fix: upgrade it, or use --attention fp8" in str(caught.value)


def test_every_plugin_of_the_chain_is_known() -> None:
    assert set(CHAIN) <= set(PLUGINS)
