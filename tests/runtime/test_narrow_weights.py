"""16-bit weights of stages that run once per video, and of a large `dit`, stay in the file, with the same results."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from reelforge.runtime.budget import stage_bytes
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.engines.narrow_weights import LARGE_BYTES, Widening, widens_in_the_run
from reelforge.runtime.engines.onnxruntime_engine import engine_from_onnx
from reelforge.runtime.host_memory import return_freed
from reelforge.runtime.manifest import StageEntry, TensorInfo, WeightEntry

SIDE, LAYERS = 1024, 4
WIDE_BYTES = LAYERS * SIDE * SIDE * 4
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "F8_E4M3": 1}


@pytest.mark.parametrize(
    ("stage", "kinds", "expected"),
    [
        ("llm", {"BF16"}, True),
        ("clip", {"F16", "F32"}, True),
        ("modulation", {"BF16", "F32"}, True),
        ("refiner", {"F32"}, False),  # nothing to widen
        ("refiner", {"BF16", "I8"}, False),
        ("refiner", {"F8_E4M3", "BF16"}, False),
        ("refiner", set(), False),
        ("vae_decoder", {"BF16"}, False),
    ],
)
@pytest.mark.parametrize("widening", Widening)
def test_which_stages_outside_of_the_loop(stage: str, kinds: set[str], expected: bool, widening: Widening) -> None:
    weights = tuple(weight(kind) for kind in sorted(kinds))
    assert widens_in_the_run(entry(stage, weights), widening) is expected


@given(
    st.sampled_from(["dit", "dit_head", "dit_body", "dit_tail"]),
    st.lists(st.tuples(st.sampled_from(["F32", "F16", "BF16"]), st.integers(1, LARGE_BYTES // 8)), max_size=5),
)
def test_a_large_stage_of_the_loop_widens_in_the_run(stage: str, sizes: list[tuple[str, int]]) -> None:
    one = entry(stage, tuple(weight(kind, (count,)) for kind, count in sizes))
    copied = [count * 4 for kind, count in sizes if kind != "F32"]
    assert widens_in_the_run(one) is (sum(copied) > LARGE_BYTES)
    assert widens_in_the_run(one, Widening.RUN) is bool(copied)
    assert not widens_in_the_run(one, Widening.LOAD)


def test_where_large_begins() -> None:
    assert not widens_in_the_run(entry("dit", (weight("BF16", (LARGE_BYTES // 4,)),)))
    large = weight("BF16", (LARGE_BYTES // 4 + 1,))
    assert widens_in_the_run(entry("dit", (large,)))
    assert not widens_in_the_run(entry("dit", (large, weight("I8")))), "graphs of 8 bits count on folding"


def test_the_budget_counts_what_was_asked_for(fake_bundle: Path) -> None:
    manifest = Bundle.open(fake_bundle).manifest
    count, largest = LARGE_BYTES // 4, 1000
    dit = entry("dit", (weight("BF16", (count,)), weight("BF16", (largest,))))
    load, run = (stage_bytes(manifest, dit, {}, widening) for widening in (Widening.LOAD, Widening.RUN))
    assert stage_bytes(manifest, dit) == run
    assert (load.weights, run.weights) == ((count + largest) * 4, (count + largest) * 2)
    assert run.activations - load.activations == count * 4, "one weight at a time is wide"


def test_a_stage_that_widens_in_the_run_holds_no_copy(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weights = random.standard_normal((LAYERS, SIDE, SIDE), np.float32) / SIDE**0.5
    bits = (weights.view(np.uint32) >> 16).astype(np.uint16)
    bits.tofile(tmp_path / "w.bin")
    write_graph(tmp_path / "x.onnx")
    values = random.standard_normal((3, SIDE), np.float32)
    # Before anything is measured: its library keeps buffers.
    expected = values
    for layer in (bits.astype(np.uint32) << 16).view(np.float32):
        expected = expected @ layer
    del weights, layer
    held = {}
    kinds = [("dit", Widening.LOAD), ("dit", Widening.RUN), ("modulation", Widening.AUTO)]
    for stage, widening in kinds:  # the first also loads the library
        return_freed()
        before = anonymous_bytes()
        options = EngineOptions(widening=widening)
        engine = engine_from_onnx(tmp_path / "x.onnx", entry(stage, (weight("BF16"),)), options)
        return_freed()
        held[stage, widening] = anonymous_bytes() - before
        for _ in range(2):
            answer = engine.run({"x": values})["y"]
            np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5)
        return_freed()
        if widening is not Widening.LOAD:
            assert anonymous_bytes() - before < WIDE_BYTES * 3 // 4, "threads keep buffers, an arena its first block"
        engine.close()
    in_file, copied, once = (held[kind] for kind in (kinds[1], kinds[0], kinds[2]))
    assert in_file < WIDE_BYTES // 4
    assert once < WIDE_BYTES // 4
    assert copied > WIDE_BYTES * 3 // 4


def weight(kind: str, shape: tuple[int, ...] = (SIDE, SIDE)) -> WeightEntry:
    return WeightEntry("w", kind, shape, "w.bin", 0, math.prod(shape) * ITEM_BYTES[kind], "")


def entry(stage: str, weights: tuple[WeightEntry, ...]) -> StageEntry:
    tensors = [TensorInfo(name, "float32", ("rows", SIDE)) for name in ("x", "y")]
    return StageEntry(stage, "x.onnx", "", (tensors[0],), (tensors[1],), weights, None, None, {})


def write_graph(path: Path) -> None:
    """Write ``y = x @ float32(w0) @ float32(w1) ...`` with bfloat16 weights in a file beside it."""
    weights, nodes, length = [], [], SIDE * SIDE * 2
    for layer in range(LAYERS):
        w = TensorProto(name=f"w{layer}", data_type=TensorProto.BFLOAT16, dims=[SIDE, SIDE])
        w.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "w.bin"), ("offset", str(layer * length)), ("length", str(length))):
            w.external_data.add(key=key, value=value)
        weights.append(w)
        before, after = f"x{layer}" if layer else "x", f"x{layer + 1}" if layer + 1 < LAYERS else "y"
        nodes.append(helper.make_node("Cast", [w.name], [f"wide{layer}"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("MatMul", [before, f"wide{layer}"], [after]))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", SIDE]) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    path.write_bytes(
        onnx.ModelProto.SerializeToString(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        )
    )


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    pytest.skip("the kernel does not tell anonymous memory")
