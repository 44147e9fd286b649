"""What a sampling loop on ONNX Runtime holds between its steps, and that it is gone when the loop ends, at any step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from reelforge.runtime.engines.onnxruntime_engine import engine_from_onnx
from reelforge.runtime.host_memory import anonymous_bytes, return_freed
from reelforge.runtime.manifest import StageEntry, TensorInfo

ROWS, NARROW, WIDE = 4096, 8, 2048
ACTIVATIONS_BYTES = ROWS * WIDE * 4  # of the wide tensor
SHAPE = ("rows", NARROW)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_loop_keeps_its_activations_until_it_ends(tmp_path: Path, steps: int) -> None:
    up, down = write_graph(tmp_path / "dit.onnx")
    latents, scales = TensorInfo("latents", "float32", SHAPE), TensorInfo("scale", "float32", (1,))
    entry = StageEntry(
        "dit", "dit.onnx", "", (latents, scales), (TensorInfo("next_latents", "float32", SHAPE),), (), None, None, {}
    )
    engine = engine_from_onnx(tmp_path / "dit.onnx", entry)
    values = np.random.default_rng(0).standard_normal((ROWS, NARROW), np.float32)
    rows = np.linspace(0.5, 1.5, 5, dtype=np.float32)[:, None]
    expected = values
    for step in range(steps):
        expected = np.maximum(expected * rows[step] @ up, 0) @ down
    before = held_bytes()
    loop = engine.loop(values, {}, {"scale": rows})
    for step in range(steps):  # of five: the others end early, as a stopped video does
        loop.advance(step)
    assert held_bytes() - before > ACTIVATIONS_BYTES * 3 // 4, "the next step finds its memory"
    result = loop.latents()
    loop.close()
    assert held_bytes() - before < ACTIVATIONS_BYTES // 4
    # Two products of 8 and of 2048 terms in float32, in each step.
    np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-5)
    again = engine.run({"latents": values, "scale": rows[0]})["next_latents"]
    np.testing.assert_allclose(again, np.maximum(values * rows[0] @ up, 0) @ down, rtol=1e-3, atol=1e-5)
    engine.close()


def held_bytes() -> int:
    return_freed()
    held = anonymous_bytes()
    if held is None:
        pytest.skip("the kernel does not tell anonymous memory")
    return held


def write_graph(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write ``next_latents = relu(latents * scale @ up) @ down``; return ``up`` and ``down``."""
    random = np.random.default_rng(1)
    up = random.standard_normal((NARROW, WIDE), np.float32) / NARROW
    down = random.standard_normal((WIDE, NARROW), np.float32) / WIDE**0.5
    nodes = [
        helper.make_node("Mul", ["latents", "scale"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "up"], ["wide"]),
        helper.make_node("Relu", ["wide"], ["positive"]),
        helper.make_node("MatMul", ["positive", "down"], ["next_latents"]),
    ]
    tensors = {"latents": SHAPE, "scale": (1,), "next_latents": SHAPE}
    infos = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in tensors.items()}
    graph = helper.make_graph(
        nodes,
        "g",
        [infos["latents"], infos["scale"]],
        [infos["next_latents"]],
        [numpy_helper.from_array(up, "up"), numpy_helper.from_array(down, "down")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return up, down
