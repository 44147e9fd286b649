"""Products of uint8 and int8 on the CPU: exact, also where x86's older instructions would saturate.

With VNNI the numbers are exact either way; in an emulator of a processor without it (``qemu-x86_64 -cpu Haswell``) the
first test fails without the setting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.engines import onnxruntime_library
from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.engines.onnxruntime_engine import engine_from_onnx
from reelforge.runtime.engines.onnxruntime_library import EXACT_PRODUCTS, product_settings
from reelforge.runtime.engines.onnxruntime_providers import gpu_provider
from reelforge.runtime.manifest import TensorInfo
from tests.runtime.fake_cuda import installed
from tests.runtime.test_onnxruntime_providers import CUDA, FakeOnnxRuntime

ROWS, WIDTH, OUTPUTS = 16, 64, 32
OLD = "processor\t: 0\nflags\t\t: sse2 avx2 fma\n"


@pytest.fixture(scope="module")
def bundle(fake_bundle: Path) -> Bundle:
    return Bundle.open(fake_bundle)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Return a function that lets the system say what its processors have."""

    def is_said(lines: str) -> None:
        path = tmp_path / "cpuinfo"
        path.write_text(lines)
        monkeypatch.setattr(onnxruntime_library, "_PROCESSORS", path)

    return is_said


@pytest.mark.parametrize(
    ("lines", "settings"),
    [
        (OLD, EXACT_PRODUCTS),
        ("flags\t\t: sse2 avx2 avx512f avx512_vnni\n", {}),
        ("flags\t\t: sse2 avx2 avx_vnni\n", {}),
        ("Features\t: fp asimd asimddp\n", {}),  # not x86
    ],
)
def test_the_setting_is_for_x86_without_vnni(
    processor: Callable[[str], None], lines: str, settings: dict[str, str]
) -> None:
    processor(lines)
    assert product_settings() == settings


def test_a_system_that_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnxruntime_library, "_PROCESSORS", tmp_path / "nothing")
    assert product_settings() == {}


def test_a_quantised_layer_of_the_largest_codes(
    bundle: Bundle, tmp_path: Path, processor: Callable[[str], None]
) -> None:
    processor(OLD)
    random = np.random.default_rng(0)
    weight = random.choice(np.array([-127, 127], np.int8), (OUTPUTS, WIDTH))
    values = random.choice(np.array([-128.0, 127.0], np.float32), (ROWS, WIDTH))  # as uint8 around 128: 0 and 255
    entry = replace(
        bundle.stage("llm"),
        inputs=(TensorInfo("values", "float32", ("rows", WIDTH)),),
        outputs=(TensorInfo("sums", "float32", ("rows", OUTPUTS)),),
    )
    (tmp_path / "layer.onnx").write_bytes(layer(weight))
    engine = engine_from_onnx(tmp_path / "layer.onnx", entry, EngineOptions(threads=1))
    np.testing.assert_array_equal(engine.run({"values": values})["sums"], values @ weight.T.astype(np.float32))


def layer(weight: np.ndarray) -> bytes:
    """A layer as ``LowerIntegerLinearPass`` leaves it: codes stored by outputs, transposed in front of the product."""
    constants = {
        "one": np.float32(1), "zero": np.int8(0), "middle": np.uint8(128), "codes": weight,
    }  # fmt: skip
    operands = ["rows", "columns", "one", "one", "middle", "zero"]
    nodes = [
        helper.make_node("QuantizeLinear", ["values", "one", "middle"], ["rows"]),
        helper.make_node("Transpose", ["codes"], ["columns"], perm=[1, 0]),
        helper.make_node("MatMulIntegerToFloat", operands, ["sums"], domain="com.microsoft"),
    ]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("values", TensorProto.FLOAT, ["rows", WIDTH])],
        [helper.make_tensor_value_info("sums", TensorProto.FLOAT, ["rows", OUTPUTS])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


def test_a_stage_on_the_cpu_asks_for_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, processor: Callable[[str], None]
) -> None:
    processor(OLD)
    asked = watched(monkeypatch)
    engine_from_onnx(bundle.graph("dit"), bundle.stage("dit"))
    assert [one.get_session_config_entry(name) for one in asked for name in EXACT_PRODUCTS] == ["1"]


def test_a_gpus_session_does_not(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, processor: Callable[[str], None]
) -> None:
    processor(OLD)
    asked = watched(monkeypatch)
    with installed(monkeypatch, {"onnxruntime": FakeOnnxRuntime(CUDA)}):
        engine_from_onnx(bundle.graph("dit"), bundle.stage("dit"), provider=gpu_provider(EngineOptions()))
    assert len(asked) == 1
    for name in EXACT_PRODUCTS:
        with pytest.raises(RuntimeError, match=name):
            asked[0].get_session_config_entry(name)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that every session's settings will be in."""
    asked: list[Any] = []
    make = onnxruntime.InferenceSession

    def session(source: Any, settings: Any, providers: list[Any]) -> Any:
        asked.append(settings)
        return make(source, settings, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return asked
