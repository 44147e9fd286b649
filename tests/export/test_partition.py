"""A stage in parts: nothing lost, nothing twice, and the parts one after the other compute what the stage computes."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelforge.export.assemble import assemble_stage
from reelforge.export.graph_file import check_graph, graph_bytes
from reelforge.export.lower import lower
from reelforge.export.models.hunyuan_video.stages import hunyuan_video_stages
from reelforge.export.partition import partition
from reelforge.export.reference import run_stage
from reelforge.export.stage import Stage
from reelforge.runtime.manifest import WeightEntry
from reelforge.runtime.recipe import Precision
from reelforge.runtime.spec import ModelSpec
from tests.bundles import CPU, TraceMemory
from tests.export.tiny_stages import TinyStages

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> TinyStages:
    return TinyStages.open(tiny_checkpoint)


@functools.cache
def stages(spec: ModelSpec, batch: int) -> Mapping[str, Stage]:
    return {stage.name: stage for stage in hunyuan_video_stages(spec, batch)}


def sizes(stage: Stage) -> dict[str, int]:
    return {name: math.prod(shape) * 2 for name, shape in stage.parameter_shapes().items()}


def blocks(stage: Stage) -> int:
    """The bytes of the largest block, which no limit can divide."""
    largest, bytes_of = 0, sizes(stage)
    for part in stage.parts:
        own = part.parameter_shapes()
        each = [sum(bytes_of[prefix + name] for name in own) for prefix in part.prefixes()]
        largest = max(largest, *each)
    return largest


@given(
    name=st.sampled_from(["llm", "clip", "refiner", "modulation", "dit", "vae_decoder"]),
    batch=st.sampled_from([1, 2]),
    share=st.floats(0.01, 1.5),
)
@settings(deadline=None)
def test_parts_are_the_stage_in_order(tiny: TinyStages, name: str, batch: int, share: float) -> None:
    stage = stages(tiny.spec, batch)[name]
    bytes_of, largest = sizes(stage), blocks(stage)
    total = sum(bytes_of.values())
    limit = int(total * share) + 1
    parts = partition(stage, bytes_of, limit)
    assert [key for part in parts for key in part.parameter_shapes()] == list(stage.parameter_shapes())
    assert (len(parts) == 1) == (parts == (stage,))
    if len(parts) > 1:
        assert [part.name for part in parts] == [f"{name}.{index}" for index in range(len(parts))]
    known = set(stage.inputs)
    for part in parts:
        assert set(part.inputs) <= known
        assert not set(part.inputs) & set(part.outputs)
        assert sum(bytes_of[key] for key in part.parameter_shapes()) <= max(limit, largest)
        known |= set(part.outputs)
    assert set(stage.outputs) <= known
    made = [output for part in parts for output in part.outputs]
    assert len(made) == len(set(made))


def test_parts_are_about_equal(tiny: TinyStages) -> None:
    stage = tiny.stages["dit"]
    total = sum(sizes(stage).values())
    parts = partition(stage, sizes(stage), total // 2)
    weights = [sum(sizes(stage)[key] for key in part.parameter_shapes()) for part in parts]
    assert max(weights) - min(weights) <= blocks(stage)


def written(tiny: TinyStages, stage: str, folder: Path) -> dict[str, WeightEntry]:
    """Every parameter in one file, fp32."""
    entries, position = {}, 0
    with (folder / "weights.bin").open("wb") as file:
        for name, values in tiny.parameters(stage).items():
            file.write(values.tobytes())
            entries[name] = WeightEntry(name, "F32", values.shape, "weights.bin", position, values.nbytes, "")
            position += values.nbytes
    return entries


def dit_inputs(tiny: TinyStages) -> Arrays:
    random, dit = np.random.default_rng(11), tiny.spec.dit

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    angles = normal(12, dit.head_dim // 2)
    return {
        "latents": normal(1, dit.latent_channels, 2, 4, 6),
        "text": normal(1, 5, dit.width),
        "double_modulation": normal(1, dit.double_blocks, 2, 6, dit.width) / 4,
        "single_modulation": normal(1, dit.single_blocks, 3, dit.width) / 4,
        "final_modulation": normal(1, 2, dit.width) / 4,
        "rope_cos": np.cos(angles),
        "rope_sin": np.sin(angles),
        "sigma_step": np.array(-0.25, np.float32),
    }


def modulation_inputs(tiny: TinyStages) -> Arrays:
    random, stage = np.random.default_rng(12), tiny.stages["modulation"]
    shapes = {name: stage.values[name].shape for name in stage.inputs}
    sizes = {name: [3 if size == "steps" else int(size) for size in shape] for name, shape in shapes.items()}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in sizes.items()}


INPUTS = {"dit": dit_inputs, "modulation": modulation_inputs}


@pytest.mark.parametrize("name", list(INPUTS))
def test_parts_compute_the_stage_in_pytorch(tiny: TinyStages, tmp_path: Path, name: str) -> None:
    """Exactly: the same operations in the same order."""
    stage, entries, values = tiny.stages[name], written(tiny, name, tmp_path), INPUTS[name](tiny)
    wanted = run_stage(stage, tmp_path, entries, values)
    parts = partition(stage, sizes(stage), blocks(stage))
    assert len(parts) > 3
    for part in parts:
        values |= run_stage(part, tmp_path, entries, {name: values[name] for name in part.inputs})
    for name, array in wanted.items():
        np.testing.assert_array_equal(values[name], array)


@pytest.mark.parametrize(("name", "share"), [("dit", 0.5), ("modulation", 0.5), ("modulation", 0.01)])
def test_parts_compute_the_stage_in_onnx_runtime(
    tiny: TinyStages, tmp_path: Path, trace_memory: TraceMemory, name: str, share: float
) -> None:
    """Each lowered on its own; the tolerance is that of the same graph with other fusions."""
    stage, entries, values = tiny.stages[name], written(tiny, name, tmp_path), INPUTS[name](tiny)

    def run(each: Stage, inputs: Arrays) -> Arrays:
        traces = [trace_memory(part, each.values, Precision.FP32) for part in each.parts]
        own = {name: entries[name] for name in each.parameter_shapes()}
        model = lower(assemble_stage(each, traces, Precision.FP32, own), CPU)
        data = graph_bytes(model)
        check_graph(data, f"{each.name}.onnx")
        path = tmp_path / f"{each.name}.onnx"
        path.write_bytes(data)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        assert [value.name for value in session.get_inputs()] == list(each.inputs)
        assert [value.name for value in session.get_outputs()] == list(each.outputs)
        return dict(zip(each.outputs, session.run(None, {name: inputs[name] for name in each.inputs}), strict=True))

    wanted = run(stage, values)
    for part in partition(stage, sizes(stage), int(sum(sizes(stage).values()) * share)):
        values |= run(part, values)
    for name, array in wanted.items():
        np.testing.assert_allclose(values[name], array, rtol=0, atol=1e-5)


def test_what_crosses_a_cut_has_the_stage_s_precision(tiny: TinyStages) -> None:
    stage = tiny.stages["dit"]
    first, *_ = partition(stage, sizes(stage), blocks(stage))
    types = {info.name: info.dtype for info in first.tensor_infos(first.outputs, "bfloat16")}
    assert types["image.0"] == types["text_stream.0"] == "bfloat16"
    assert types["joint_cos.0"] == "float32"
    assert {info.dtype for info in stage.tensor_infos(stage.outputs, "bfloat16")} == {"float32"}


def test_rows_of_one_output_come_from_several_parts(tiny: TinyStages) -> None:
    """Each part passes on as many as it has blocks, and the last one has the output's own name and shape."""
    stage = tiny.stages["modulation"]
    parts = partition(stage, sizes(stage), blocks(stage))
    assert len(parts) > tiny.spec.dit.double_blocks
    infos = [{info.name: info for info in part.tensor_infos(part.outputs)} for part in parts]
    for value, blocks_of_kind in (("double_modulation", tiny.spec.dit.double_blocks),
                                  ("single_modulation", tiny.spec.dit.single_blocks)):  # fmt: skip
        made = [name for each in infos for name in each if name.startswith(value)]
        assert made[-1] == value
        assert made[:-1] == [name for part in parts for name in part.inputs if name.startswith(value)]
        (last,) = (part for part in parts if value in part.outputs)
        rows = sum(int(info.shape[1]) for each in infos for name, info in each.items() if name in made[:-1])
        own = sum(part.repeat for part in last.parts if any(port.value == value for port in part.output_ports))
        assert rows + own == blocks_of_kind
        assert last.tensor_infos((value,)) == stage.tensor_infos((value,))


def test_rows_that_blocks_read_are_made_in_one_part(tiny: TinyStages) -> None:
    """They are not the stage's outputs: a later part would read them by the index of the whole."""
    stage = tiny.stages["modulation"]
    inner = replace(stage, outputs=("single_modulation", "final_modulation"))
    parts = partition(inner, sizes(inner), blocks(inner))
    makers = [part for part in parts if any("double_modulation[i]" in each.outputs for each in part.parts)]
    assert len(makers) == 1


def test_a_stage_without_weights_is_not_cut(tiny: TinyStages) -> None:
    assert partition(tiny.stages["dit"], {}, 0) == (tiny.stages["dit"],)
