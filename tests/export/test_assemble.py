"""Stages put together from traces: weights by reference, repeats stamped out, boundaries as declared, valid ONNX."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from reelforge.export.assemble import assemble_stage
from reelforge.export.capture import Trace
from reelforge.export.graph_file import check_graph, count_nodes, graph_bytes, graph_digest
from reelforge.export.lower import lower
from reelforge.export.models.hunyuan_video.stages import hunyuan_video_stages
from reelforge.export.reference import run_stage
from reelforge.export.stage import COMPUTE, Stage, Value
from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.errors import BuildError
from reelforge.runtime.manifest import WeightEntry
from reelforge.runtime.recipe import Precision
from tests.bundles import CPU, STAGES, TraceMemory
from tests.export.toy_stage import REPEATS, WIDTH, toy_stage

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@pytest.fixture
def stage() -> Stage:
    return toy_stage()


@pytest.fixture
def traces(stage: Stage, trace_memory: TraceMemory) -> tuple[Trace, ...]:
    return tuple(trace_memory(part, stage.values, Precision.FP32) for part in stage.parts)


def write_weights(folder: Path, stage: Stage, dtype: str = "F32") -> dict[str, WeightEntry]:
    """Write random weights into one file, each after a gap, and return where they are."""
    random = np.random.default_rng(3)
    entries, blob = {}, b"a head of 19 bytes "
    for name, shape in stage.parameter_shapes().items():
        data = (random.standard_normal(shape) * 0.7).astype(DTYPES[dtype]).tobytes()
        blob += bytes(-len(blob) % 64)
        digest = hashlib.sha256(data).hexdigest()
        entries[name] = WeightEntry(name, dtype, shape, "weights.bin", len(blob), len(data), digest)
        blob += data
    (folder / "weights.bin").write_bytes(blob)
    return entries


def execute(folder: Path, model: ir.Model, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    (folder / "toy.onnx").write_bytes(graph_bytes(model))
    session = onnxruntime.InferenceSession(str(folder / "toy.onnx"), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(inputs)), strict=True))


def toy_inputs() -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    return {
        "x": random.standard_normal((2, 3, WIDTH)).astype(np.float32),
        "rows": random.standard_normal((1, REPEATS, WIDTH)).astype(np.float32),
    }


def plain_result(
    folder: Path, entries: Mapping[str, WeightEntry], inputs: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """The toy in a few lines of NumPy, float64."""

    def weight(name: str) -> np.ndarray:
        entry = entries[name]
        raw = (folder / entry.file).read_bytes()[entry.offset : entry.offset + entry.length]
        return np.frombuffer(raw, DTYPES[entry.dtype]).reshape(entry.shape).astype(np.float64)

    x = inputs["x"] @ weight("fc.weight").T + weight("fc.bias")
    sums = []
    for i in range(REPEATS):
        up = np.tanh(x @ weight(f"blocks.{i}.inner.up.weight").T + weight(f"blocks.{i}.inner.up.bias"))
        down = up @ weight(f"blocks.{i}.inner.down.weight").T
        x = x + down * weight(f"blocks.{i}.scale") * inputs["rows"][:, i] * 0.5
        sums.append(x.sum(axis=1))
    return [x, np.stack(sums, axis=1)]


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("lowered", [False, True])
def test_the_graph_computes_the_stage(
    tmp_path: Path, stage: Stage, traces: tuple[Trace, ...], dtype: str, lowered: bool
) -> None:
    """Whatever type the weights are stored in; the reference in PyTorch agrees as well."""
    entries, inputs = write_weights(tmp_path, stage, dtype), toy_inputs()
    model = assemble_stage(stage, traces, Precision.FP32, entries)
    if lowered:
        lower(model, CPU)
    check_graph(graph_bytes(model), "toy.onnx")
    wanted = plain_result(tmp_path, entries, inputs)
    received = execute(tmp_path, model, inputs)
    reference = run_stage(stage, tmp_path, entries, inputs)
    assert list(received) == list(reference) == ["y", "sums"]
    for name, value in zip(("y", "sums"), wanted, strict=True):
        np.testing.assert_allclose(received[name], value, rtol=0, atol=1e-5)
        np.testing.assert_allclose(reference[name], value, rtol=0, atol=1e-5)
    casts = count_nodes(model).get("Cast", 0)
    assert casts == (0 if dtype == "F32" else len(entries))


def test_half_precision_computes_in_half_precision(tmp_path: Path, stage: Stage, trace_memory: TraceMemory) -> None:
    traces = tuple(trace_memory(part, stage.values, Precision.FP16) for part in stage.parts)
    entries, inputs = write_weights(tmp_path, stage), toy_inputs()
    model = assemble_stage(stage, traces, Precision.FP16, entries)
    assert {value.dtype for value in model.graph.outputs} == {ir.DataType.FLOAT}
    for node in model.graph:
        if node.op_type == "MatMul":
            assert node.outputs[0].dtype == ir.DataType.FLOAT16
    wanted = plain_result(tmp_path, entries, inputs)
    for value, name in zip(wanted, ("y", "sums"), strict=True):
        np.testing.assert_allclose(execute(tmp_path, model, inputs)[name], value, rtol=0, atol=2e-2)


def test_bfloat16_computes_in_bfloat16(tmp_path: Path, stage: Stage, trace_memory: TraceMemory) -> None:
    """ONNX Runtime's CPU provider has no bfloat16 products; ONNX's own evaluator has."""
    traces = tuple(trace_memory(part, stage.values, Precision.BF16) for part in stage.parts)
    entries, inputs = write_weights(tmp_path, stage, "BF16"), toy_inputs()
    model = assemble_stage(stage, traces, Precision.BF16, entries)
    lower(model, CPU)
    check_graph(graph_bytes(model), "toy.onnx")
    assert {value.dtype for value in model.graph.outputs} == {ir.DataType.FLOAT}
    products = [node for node in model.graph if node.op_type in ("MatMul", "Gemm")]
    assert products
    assert {node.outputs[0].dtype for node in products} == {ir.DataType.BFLOAT16}
    (tmp_path / "toy.onnx").write_bytes(graph_bytes(model))
    evaluator = ReferenceEvaluator(onnx.load(tmp_path / "toy.onnx"))
    for value, received in zip(plain_result(tmp_path, entries, inputs), evaluator.run(None, inputs), strict=True):
        assert received.dtype == np.float32
        np.testing.assert_allclose(received, value, rtol=0, atol=0.2)  # 8 bits through three products and a sum


def test_weights_are_references(tmp_path: Path, stage: Stage, traces: tuple[Trace, ...]) -> None:
    entries = write_weights(tmp_path, stage)
    proto = onnx.ModelProto.FromString(graph_bytes(assemble_stage(stage, traces, Precision.FP32, entries)))
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    assert set(entries) <= set(stored)
    for name, entry in entries.items():
        place = {item.key: item.value for item in stored[name].external_data}
        assert place["location"] == entry.file
        assert (int(place["offset"]), int(place["length"])) == (entry.offset, entry.length)
        assert tuple(stored[name].dims) == entry.shape
        assert not stored[name].raw_data
    constants = [tensor for name, tensor in stored.items() if name not in entries]
    assert len({tensor.name for tensor in constants}) == len(constants)
    assert all(tensor.ByteSize() < 200 for tensor in constants)


def test_equal_constants_of_all_repeats_are_one(tmp_path: Path, stage: Stage, traces: tuple[Trace, ...]) -> None:
    model = assemble_stage(stage, traces, Precision.FP32, write_weights(tmp_path, stage))
    contents = [
        (value.const_value.dtype, tuple(value.const_value.shape), value.const_value.tobytes())
        for name, value in model.graph.initializers.items()
        if name.startswith("constant.") and value.const_value is not None
    ]
    assert len(contents) == len(set(contents))
    halves = [content for content in contents if content[2] == np.float32(0.5).tobytes()]
    assert len(halves) == 1


def test_names(tmp_path: Path, stage: Stage, traces: tuple[Trace, ...]) -> None:
    model = assemble_stage(stage, traces, Precision.FP32, write_weights(tmp_path, stage))
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    assert {"Enter.fc.MatMul", "fc.MatMul"} & set(names)
    assert {f"blocks.{i}.inner.up.MatMul" for i in range(REPEATS)} <= set(names)
    lower(model, CPU)
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    assert {f"blocks.{i}.inner.down" for i in range(REPEATS)} <= set(names)


def test_equal_inputs_give_equal_bytes(tmp_path: Path, stage: Stage, traces: tuple[Trace, ...]) -> None:
    entries = write_weights(tmp_path, stage)
    one, other = (graph_bytes(assemble_stage(stage, traces, Precision.FP32, entries)) for _ in range(2))
    assert one == other


def test_the_digest_is_of_what_is_computed(tmp_path: Path, stage: Stage, traces: tuple[Trace, ...]) -> None:
    """Not of where weights lie; another weight or another graph is another digest."""
    entries = write_weights(tmp_path, stage)

    def digest(weights: dict[str, WeightEntry]) -> str:
        return graph_digest(graph_bytes(assemble_stage(stage, traces, Precision.FP32, weights)), weights)

    moved = {name: replace(entry, file="other.bin", offset=entry.offset + 64) for name, entry in entries.items()}
    assert digest(moved) == digest(entries)
    changed = {**entries, "fc.bias": replace(entries["fc.bias"], sha256="0" * 64)}
    assert digest(changed) != digest(entries)
    stored = {**entries, "fc.bias": replace(entries["fc.bias"], dtype="BF16", length=2 * WIDTH)}
    assert digest(stored) != digest(entries)


def test_a_precision_dependent_value_cannot_cross_the_boundary(
    tmp_path: Path, stage: Stage, traces: tuple[Trace, ...]
) -> None:
    values = {**stage.values, "x": Value(COMPUTE, stage.values["x"].shape)}
    with pytest.raises(AssertionError, match=r"toy\.x crosses a boundary"):
        assemble_stage(replace(stage, values=values), traces, Precision.FP32, write_weights(tmp_path, stage))


def test_an_invalid_graph_is_refused() -> None:
    node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"])
    info = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    proto = onnx.helper.make_model(onnx.helper.make_graph([node], "bad", info[:1], info[1:]))
    with pytest.raises(BuildError, match=r"the graph bad\.onnx is not valid ONNX") as caught:
        check_graph(proto.SerializeToString(), "bad.onnx")
    for part in ("received:", "NoSuchOperator", "expected: a graph that onnx.checker accepts", "fix: report this"):
        assert part in str(caught.value)


# The real stages, as they lie in the shared bundle.


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, Check.SIZES)


@pytest.mark.parametrize("name", STAGES)
def test_graphs_of_the_bundle(bundle: Bundle, name: str) -> None:
    entry = bundle.stage(name)
    data = bundle.graph(name).read_bytes()
    check_graph(data, name)
    model = ir.from_proto(onnx.ModelProto.FromString(data))
    assert model.opset_imports == {"": 23}
    assert all(node.domain == "" for node in model.graph.all_nodes())
    assert count_nodes(model) == entry.nodes
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.all_nodes())
    # The names of dynamic dimensions are the stage's own: a trace's symbols (s77) mean nothing outside of it.
    declared = {size for info in (*entry.inputs, *entry.outputs) for size in info.shape if isinstance(size, str)}
    found = {
        str(size)
        for value in (*model.graph.inputs, *model.graph.outputs, *(v for n in model.graph for v in n.outputs))
        for size in (value.shape or ())
        if isinstance(size, ir.SymbolicDim) and size.value is not None
    }
    assert found <= declared
    boundary = [(info.name, info.shape) for info in (*entry.inputs, *entry.outputs)]
    assert boundary == [
        (value.name, tuple(size if isinstance(size, int) else size.value for size in value.shape or ()))
        for value in (*model.graph.inputs, *model.graph.outputs)
    ]
    names = [node.name for node in model.graph.all_nodes()]
    assert len(set(names)) == len(names)
    used = {value.name for node in model.graph.all_nodes() for value in node.inputs if value is not None}
    assert set(model.graph.initializers) <= used


@pytest.mark.parametrize("name", STAGES)
def test_no_stored_weight_is_transposed(bundle: Bundle, name: str) -> None:
    """Linear layers are ``Gemm`` over the weight where it lies, one per layer, with the layer in its name."""
    model = ir.load(bundle.graph(name))
    matrices = {weight.name for weight in bundle.stage(name).weights if len(weight.shape) == 2}
    gemms: Counter[str] = Counter()
    for node in model.graph:
        if node.op_type == "Transpose":
            assert node.inputs[0] is not None
            assert not node.inputs[0].is_initializer()
        if node.op_type == "Gemm":
            weight = node.inputs[1]
            assert weight is not None
            assert str(weight.name).removesuffix(".weight") in str(node.name)
            assert node.attributes["transB"].as_int() == 1
            gemms[str(weight.name)] += 1
    assert "MatMul" not in bundle.stage(name).nodes
    assert set(gemms) == {weight for weight in matrices if "embed" not in weight or "patch" in weight}
    assert set(gemms.values()) <= {1}


def test_one_attention_per_block(bundle: Bundle) -> None:
    spec = bundle.manifest.spec
    counts = {stage.name: stage.nodes.get("Attention", 0) for stage in bundle.manifest.stages}
    assert counts == {
        "llm": spec.llm.used_layers,
        "clip": spec.clip.layers,
        "refiner": spec.dit.refiner_blocks,
        "modulation": 0,
        "dit": spec.dit.double_blocks + spec.dit.single_blocks,
        "guidance": 0,
        "step_change": 0,
        "step_reuse": 0,
        "input_change": 0,
        "vae_decoder": 1,  # in a loop over frames
    }
    for stage in bundle.manifest.stages:
        assert not {"Softmax", "Where", "ScatterElements", "ScatterND", "IsNaN"} & set(stage.nodes)


def test_several_videos_need_opset_24(bundle: Bundle, trace_memory: TraceMemory) -> None:
    stage = hunyuan_video_stages(bundle.manifest.spec, batch=3)[4]
    entries = {weight.name: weight for weight in bundle.stage("dit").weights}
    traces = [trace_memory(part, stage.values, Precision.FP32) for part in stage.parts]
    model = lower(assemble_stage(stage, traces, Precision.FP32, entries), CPU)
    check_graph(graph_bytes(model), "dit.onnx")
    assert model.opset_imports == {"": 24}
    assert count_nodes(model)["Attention"] == bundle.stage("dit").nodes["Attention"]
    assert [value.name for value in model.graph.inputs][-1] == "text_lengths"
