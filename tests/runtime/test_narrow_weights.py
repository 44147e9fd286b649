"""16-bit weights of stages that run once per video stay in their mapped file, with the same results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from reelforge.runtime.engines.narrow_weights import widens_in_the_run
from reelforge.runtime.engines.onnxruntime_engine import engine_from_onnx
from reelforge.runtime.host_memory import return_freed
from reelforge.runtime.manifest import StageEntry, TensorInfo, WeightEntry

SIDE = 2048
WIDE_BYTES = SIDE * SIDE * 4


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
        ("dit", {"BF16"}, False),
        ("vae_decoder", {"BF16"}, False),
    ],
)
def test_which_stages(stage: str, kinds: set[str], expected: bool) -> None:
    weights = tuple(weight(kind) for kind in sorted(kinds))
    assert widens_in_the_run(entry(stage, weights)) is expected


def test_a_stage_that_runs_once_holds_no_copy(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    bits = (random.standard_normal((SIDE, SIDE), np.float32).view(np.uint32) >> 16).astype(np.uint16)
    bits.tofile(tmp_path / "w.bin")
    write_graph(tmp_path / "x.onnx")
    values = random.standard_normal((3, SIDE), np.float32)
    # Before anything is measured: its library keeps buffers.
    expected = values @ (bits.astype(np.uint32) << 16).view(np.float32)
    held = {}
    for stage in ("dit", "modulation"):  # the first also loads the library
        return_freed()
        before = anonymous_bytes()
        engine = engine_from_onnx(tmp_path / "x.onnx", entry(stage, (weight("BF16"),)))
        return_freed()
        held[stage] = anonymous_bytes() - before
        for _ in range(2):
            answer = engine.run({"x": values})["y"]
            np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-2)
        return_freed()
        if stage == "modulation":
            assert anonymous_bytes() - before < WIDE_BYTES * 3 // 4, "after a run, threads keep their buffers"
        engine.close()
    assert held["modulation"] < WIDE_BYTES // 4
    assert held["dit"] > WIDE_BYTES * 3 // 4


def weight(kind: str) -> WeightEntry:
    return WeightEntry("w", kind, (SIDE, SIDE), "w.bin", 0, SIDE * SIDE * 2, "")


def entry(stage: str, weights: tuple[WeightEntry, ...]) -> StageEntry:
    tensors = [TensorInfo(name, "float32", ("rows", SIDE)) for name in ("x", "y")]
    return StageEntry(stage, "x.onnx", "", (tensors[0],), (tensors[1],), weights, None, None, {})


def write_graph(path: Path) -> None:
    """Write ``y = x @ float32(w)`` with the bfloat16 weight ``w`` in a file beside it."""
    w = TensorProto(name="w", data_type=TensorProto.BFLOAT16, dims=[SIDE, SIDE], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", str(SIDE * SIDE * 2))):
        w.external_data.add(key=key, value=value)
    nodes = [
        helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "wide"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", SIDE]) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "g", [x], [y], [w])
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
