"""Layers of a real bundle under ONNX Runtime's profiler: nodes find their layers, operations are the planner's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.engines.narrow_weights import SETTINGS
from reelforge.runtime.engines.onnxruntime_library import EXACT_PRODUCTS
from reelforge.runtime.request import Request
from reelforge.tools.profiling import layers_onnxruntime
from reelforge.tools.profiling.instrument import ProfilingPipeline
from reelforge.tools.profiling.layer_names import LayerNames, kind_of
from reelforge.tools.profiling.layers import StageLayers
from reelforge.tools.profiling.layers_onnxruntime import calls_of, profile_stage
from reelforge.tools.profiling.layers_tensorrt import joined
from reelforge.tools.profiling.model_words import block_of, words_for
from reelforge.tools.profiling.planned_work import planned_flops, planned_stages, planner_missing
from reelforge.tools.profiling.recorder import Recorder

OPTIONS = EngineOptions(threads=1, spinning=False)
REQUEST = Request("a ball", height=32, width=48, frames=5, steps=2)

Stages = Mapping[str, StageLayers]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, Check.SIZES)


@pytest.fixture(scope="module")
def stages(bundle: Bundle) -> Stages:
    with ProfilingPipeline(bundle, OPTIONS, Recorder()) as pipeline:
        pipeline.keep_inputs = True
        pipeline.generate(REQUEST)
        return {
            stage: profile_stage(bundle, stage, inputs, OPTIONS, repeats=2) for stage, inputs in pipeline.kept.items()
        }


def test_every_product_and_convolution_is_a_layer_with_weights(bundle: Bundle, stages: Stages) -> None:
    assert set(stages) == {"llm", "clip", "refiner", "modulation", "dit", "vae_decoder"}
    for name, stage in stages.items():
        weights = {weight.name.removesuffix(".weight") for weight in bundle.stage(name).weights}
        computing = [layer for layer in stage.layers if layer.kind in ("gemm", "convolution") and layer.flops]
        assert computing, name
        # The decoder's middle attention is spelt out on the CPU: its products are no layer's.
        assert {layer.name for layer in computing} <= weights | {"decoder.mid_block.gemm"}, name


def test_every_matrix_of_the_transformer_is_found(bundle: Bundle, stages: Stages) -> None:
    matrices = {w.name.removesuffix(".weight") for w in bundle.stage("dit").weights if len(w.shape) == 2}
    assert matrices == {layer.name for layer in stages["dit"].layers} & matrices
    attentions = [layer for layer in stages["dit"].layers if layer.name.endswith(".attention")]
    spec = bundle.manifest.spec.dit
    assert len(attentions) == spec.double_blocks + spec.single_blocks
    assert all(layer.flops > 0 for layer in attentions)


def test_hardly_anything_is_placed_by_position_alone(stages: Stages) -> None:
    for name, stage in stages.items():
        assert stage.unnamed_ms < 0.15 * stage.call_ms, name


def test_operations_are_those_that_the_planner_counts(bundle: Bundle, stages: Stages) -> None:
    planned = planned_flops(bundle, REQUEST)
    dit = {layer.name: layer.flops for layer in stages["dit"].layers}
    products = {name: count for name, count in planned["dit"].items() if dit.get(name)}
    assert any(".text." in name for name in products)  # as long as the prompt is, not as long as it may be
    assert any(".image." in name for name in products)
    assert {name: dit[name] for name in products} == products
    llm = {layer.name: layer.flops for layer in stages["llm"].layers if layer.name in planned["llm"] and layer.flops}
    assert llm
    assert {name: planned["llm"][name] for name in llm} == llm
    decoder = {layer.name: layer.flops for layer in stages["vae_decoder"].layers if layer.kind == "convolution"}
    assert decoder
    for name, count in decoder.items():
        # Channels may be padded to the width of a vector, and padding in time adds rows: never fewer than planned.
        assert count == pytest.approx(planned["vae_decoder"][name], rel=0.7), name


def test_whole_stages_are_the_sums_of_their_layers(bundle: Bundle, stages: Stages) -> None:
    works = {work.stage: work for work in planned_stages(bundle, REQUEST)}
    assert set(works) == set(stages)
    for name in ("llm", "refiner", "modulation", "dit"):
        flops = sum(layer.flops for layer in stages[name].layers)
        # Causal attention is counted in full by the profiler, and not by the planner.
        assert works[name].flops == pytest.approx(flops, rel=0.1), name
        assert works[name].bytes > 0
        assert works[name].precision == "fp32"
    assert planned_stages(bundle, replace(REQUEST, cfg_scale=4.0)) == ()


WITHOUT_PLANNER = """
import sys
from pathlib import Path
sys.modules.update(dict.fromkeys(("ml_dtypes", "torch", "onnx")))
from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.request import Request
from reelforge.tools.profiling.planned_work import planned_flops, planned_stages, planner_missing
bundle = Bundle.open(Path(sys.argv[1]), Check.SIZES)
print(planned_stages(bundle, Request("a")), planned_flops(bundle, Request("a")), planner_missing())
"""


def test_where_only_the_runtime_is_installed_nothing_is_counted_and_that_is_said(tiny_bundle: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_PLANNER, str(tiny_bundle)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert result.stdout.startswith("() {} The planner, which counts operations, is not installed: ")
    assert "pip install reelforge[export]" in result.stdout
    assert planner_missing() == ""


def test_layers_are_profiled_as_engines_run(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, bool, bool]] = []

    class Settings(onnxruntime.SessionOptions):
        """Remembers what is added: asking for an entry that is not there is an error."""

        def add_session_config_entry(self, name: str, value: str) -> None:
            self.names = [*getattr(self, "names", ()), name]
            super().add_session_config_entry(name, value)

    class Library:
        SessionOptions = Settings

        def InferenceSession(self, graph: str, settings: Settings, providers: list[str]) -> object:
            names = set(settings.names)
            asked.append((settings.enable_cpu_mem_arena, set(SETTINGS) <= names, set(EXACT_PRODUCTS) <= names))
            raise RuntimeError("seen enough")

    monkeypatch.setattr(layers_onnxruntime, "import_onnxruntime", Library)
    monkeypatch.setattr(layers_onnxruntime, "product_settings", lambda: EXACT_PRODUCTS)
    for stage in ("dit", "vae_decoder", "llm"):
        monkeypatch.setattr(layers_onnxruntime, "widens_in_the_run", lambda entry, _widening: entry.name == "llm")
        with pytest.raises(RuntimeError, match="seen enough"):
            profile_stage(bundle, stage, {}, OPTIONS, repeats=1)
    assert asked == [(True, False, True), (True, False, True), (False, True, True)]


def test_bytes_are_at_least_the_weights(bundle: Bundle, stages: Stages) -> None:
    sizes = {w.name.removesuffix(".weight"): 4 * int(np.prod(w.shape)) for w in bundle.stage("dit").weights}
    for layer in stages["dit"].layers:
        if layer.kind == "gemm" and layer.name in sizes:
            assert layer.bytes >= sizes[layer.name]


@pytest.mark.parametrize(
    ("node", "operator", "layer"),
    [
        ("double.0.image.fc1", "Gemm", "double.0.image.fc1"),
        ("double.0.image.fc1.Add.3", "Add", "double.0.image.fc1"),
        ("double.0.image.fc1.QuantizeLinear", "QuantizeLinear", "double.0.image.fc1"),
        ("double.0.Gather.2/GatherSliceToSplitFusion", "Split", "double.0.layout"),
        ("double.0.Add.4_q", "QuantizeLinear", "double.0.quantise"),
        ("double.0.Mul.4", "Mul", "double.0.elementwise"),
        ("double.0.Attention", "Attention", "double.0.attention"),
        ("PatchEmbedding.Shape.3", "Shape", "PatchEmbedding.layout"),
        ("Unet.double.0.image.fc1.Mul/QuickGeluFusion/", "QuickGelu", "double.0.image.fc1"),
    ],
)
def test_names_of_nodes(node: str, operator: str, layer: str) -> None:
    names = LayerNames(["double.0.image.fc1.weight", "double.0.image.fc1.weight.scale", "double.0.image.fc1.bias"])
    place = names.place(node, kind_of(operator))
    assert (place.layer, place.certain) == (layer, True)


def test_nameless_nodes_go_with_the_one_before() -> None:
    names = LayerNames(["final.proj.weight"])
    assert not names.place("Squeeze", "layout").certain
    names.place("final.proj", "gemm")
    place = names.place("Squeeze_token_14", "layout")
    assert (place.layer, place.certain) == ("graph.layout", False)
    names.place("double.3.Mul", "elementwise")
    place = names.place("Squeeze_token_15", "layout")
    assert (place.layer, place.certain) == ("double.3.layout", False)


@pytest.mark.parametrize(
    ("name", "words", "block"),
    [
        ("double.17.image.fc1", "double block 17, image MLP up-projection", "double.17"),
        ("double.3.text.q_norm", "double block 3, text query norm", "double.3"),
        ("double.3.attention", "double block 3, attention", "double.3"),
        ("single.39.proj_mlp", "single block 39, MLP down-projection", "single.39"),
        ("layers.7.self_attn.q_proj", "text layer 7, query projection", "layers.7"),
        ("layers.7.mlp.gate_proj", "text layer 7, MLP gate projection", "layers.7"),
        ("encoder.layers.0.mlp.fc1", "CLIP layer 0, MLP up-projection", "encoder.layers.0"),
        ("decoder.up_blocks.2.resnets.1.conv2.conv", "decoder level 2, residual block 1, convolution 2",
         "decoder.up_blocks.2"),
        ("decoder.up_blocks.2.upsamplers.0.conv.conv", "decoder level 2, upsampling, convolution",
         "decoder.up_blocks.2"),
        ("decoder.mid_block.attentions.0.to_out.0", "decoder middle, attention output projection", "decoder.mid_block"),
        ("decoder.conv_in.conv", "decoder's first convolution", ""),
        ("double.0.image.q+k+v", "double block 0, image query projection, key projection and value projection",
         "double.0"),
        ("PatchEmbedding.layout", "PatchEmbedding, reordering and casts", ""),
        ("something.else", "something.else", ""),
    ],
)  # fmt: skip
def test_layers_in_words(name: str, words: str, block: str) -> None:
    assert words_for(name) == words
    assert block_of(name) == block


def test_several_layers_in_one_kernel() -> None:
    assert joined(["double.0.image.q", "double.0.image.k", "double.0.image.v"]) == "double.0.image.q+k+v"
    assert joined(["a.q"]) == "a.q"
    assert joined(["a.q", "b.q"]) == "a.q+b.q"
    assert joined([]) == ""


def node_event(name: str, at: int, operator: str = "Add", **arguments: object) -> dict[str, object]:
    return {
        "cat": "Node",
        "name": f"{name}_kernel_time",
        "ts": at,
        "dur": 2,
        "args": {"op_name": operator, **arguments},
    }


def test_nodes_belong_to_the_call_during_which_they_ran() -> None:
    events = [
        {"cat": "Session", "name": "model_run", "ts": start, "dur": 100, "args": {}} for start in (1000, 2000)
    ] + [
        node_event("a", 1010),
        node_event("b", 2020),
        node_event("loop", 2030, "Loop"),  # its body's nodes are reported besides
        node_event("body", 2031),
        node_event("between", 1500),
    ]
    calls = calls_of(events)
    assert [[node.name for node in call] for call in calls] == [["a"], ["b", "body"]]


@pytest.mark.parametrize(
    ("operator", "inputs", "output", "flops"),
    [
        ("Gemm", [[5, 7], [7, 3]], [5, 3], 2 * 5 * 7 * 3),
        ("Gemm", [[7, 5], [7, 3]], [5, 3], 2 * 5 * 7 * 3),  # transposed
        ("MatMul", [[2, 5, 7], [7, 3]], [2, 5, 3], 2 * 2 * 5 * 7 * 3),
        ("QGemm", [[5, 7], [], [], [7, 3]], [5, 3], 2 * 5 * 7 * 3),
        ("Conv", [[1, 4, 9, 9, 9], [6, 4, 3, 3, 3]], [1, 6, 7, 7, 7], 2 * 6 * 343 * 4 * 27),
        ("Attention", [[1, 2, 5, 8], [1, 2, 11, 8], [1, 2, 11, 8]], [1, 2, 5, 8], 2 * 2 * (2 * 5 * 11 * 8)),
        ("Mul", [[5, 5], [5, 5]], [5, 5], 0),
    ],
)
def test_operations_from_shapes(operator: str, inputs: list[list[int]], output: list[int], flops: int) -> None:
    event = node_event(
        "n", 1, operator, input_type_shape=[{"float": shape} for shape in inputs],
        output_type_shape=[{"float": output}], activation_size="10", parameter_size="20", output_size="30",
    )  # fmt: skip
    run = {"cat": "Session", "name": "model_run", "ts": 0, "dur": 100, "args": {}}
    ((node,),) = calls_of([run, event])
    assert (node.flops, node.bytes, node.ms) == (flops, 60, 0.002)


def test_a_packed_weight_is_counted() -> None:
    event = node_event(
        "n", 1, "Gemm", input_type_shape=[{"float": [48, 128]}, {"float": [512]}],
        output_type_shape=[{"float": [48, 512]}], activation_size="24576", parameter_size="2048", output_size="98304",
    )  # fmt: skip
    run = {"cat": "Session", "name": "model_run", "ts": 0, "dur": 100, "args": {}}
    ((node,),) = calls_of([run, event])
    assert node.flops == 2 * 48 * 128 * 512
    assert node.bytes == 24576 + 2048 + 98304 + 4 * 128 * 512
