"""A GPU's peak, on the CPU's provider and on a stand-in for a GPU's: graphs, where tensors lie, what is left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.engines.onnxruntime_providers import CPU, Provider, gpu_provider
from reelforge.runtime.errors import EngineError
from reelforge.tools.profiling import gpu_peak, machine_peak
from reelforge.tools.profiling.gpu_peak import measure_gpu_peak, open_gpu
from reelforge.tools.profiling.probe_graph import BFLOAT16, FLOAT, FLOAT16, INT8, INT32, UINT8, Chain, graph_of
from tests.runtime.fake_cuda import FakeCuda, installed

CUDA = "CUDAExecutionProvider"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_peak, "_PROBE_S", 0.01)
    monkeypatch.setattr(gpu_peak, "_SIZE", 96)
    monkeypatch.setattr(gpu_peak, "_ELEMENTS", 1 << 12)


@pytest.mark.parametrize(
    ("chain", "operators"),
    [
        (Chain("MatMul", (200, 200), (FLOAT, FLOAT), FLOAT), ["MatMul"]),
        (Chain("MatMulInteger", (200, 200), (UINT8, INT8), INT32), ["MatMulInteger"]),
        (Chain("MatMul", (200, 200), (FLOAT, FLOAT), BFLOAT16, 3, BFLOAT16), ["Cast", "Cast", *["MatMul"] * 3]),
        (Chain("Neg", (70_000,), (FLOAT,), FLOAT, 2), ["Neg", "Neg"]),
    ],
    ids=["product", "integers", "cast", "one tensor"],
)
def test_the_probes_graph_is_one(chain: Chain, operators: list[str]) -> None:
    model = onnx.load_from_string(graph_of(chain))
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == operators
    assert [value.name for value in model.graph.input] == ["a", "b"][: len(chain.inputs)]


def test_a_constant_is_part_of_the_graph() -> None:
    constant = np.full((200, 200), 2, np.float32)
    graph = graph_of(Chain("MatMul", (200, 200), (FLOAT, FLOAT), FLOAT, 3), constant.tobytes())
    model = onnx.load_from_string(graph)
    assert [value.name for value in model.graph.input] == ["a"]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(model.graph.initializer[0]), constant)
    a = np.eye(200, dtype=np.float32)
    (c,) = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]).run(None, {"a": a})
    np.testing.assert_array_equal(c, constant @ constant @ constant)


def test_a_chain_is_the_operator_several_times() -> None:
    a, b = (np.random.default_rng(seed).standard_normal((8, 8), np.float32) for seed in (0, 1))
    session = onnxruntime.InferenceSession(
        graph_of(Chain("MatMul", (8, 8), (FLOAT, FLOAT), FLOAT, 3)), providers=["CPUExecutionProvider"]
    )
    np.testing.assert_allclose(session.run(None, {"a": a, "b": b})[0], a @ b @ b @ b, rtol=1e-4)


def test_the_peak_of_the_processors_provider() -> None:
    peak = measure_gpu_peak(CPU, "a processor")
    assert peak.name == "a processor"
    assert peak.measured
    assert 1e6 < peak.flops["fp32"] < 1e15
    assert peak.bandwidth > 1e6
    # This onnxruntime has no product in bf16 on the processor: it is left out, and not taken from another precision.
    assert "bf16" not in peak.flops
    assert "CPUExecutionProvider" in peak.source


class Binding:
    """A binding that notes where tensors lie, and computes on the processor."""

    def __init__(self, session: Any, places: list[Any]) -> None:
        self.inner, self._places = session.io_binding(), places

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.inner.bind_ortvalue_input(name, value)

    def bind_output(self, name: str, *place: Any) -> None:
        self._places.append((name, *place))
        self.inner.bind_output(name, "cpu")


class FakeOnnxRuntime:
    """onnxruntime-gpu whose sessions compute on the processor, but for operators in ``lacks``."""

    def __init__(self, lacks: tuple[str, ...] = ()) -> None:
        self.lacks = lacks
        self.places: list[Any] = []
        self.settings: list[Any] = []
        self.OrtValue = SimpleNamespace(ortvalue_from_numpy=self._value)

    def _value(self, array: np.ndarray, *place: Any) -> Any:
        self.places.append(place)
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime, name)

    def get_available_providers(self) -> list[str]:
        return [CUDA, "CPUExecutionProvider"]

    def InferenceSession(self, graph: bytes, settings: Any, providers: list[Any]) -> Any:
        assert providers == [(CUDA, {"device_id": "1"})]
        self.settings.append(settings.get_session_config_entry("session.disable_cpu_ep_fallback"))
        if any(node.op_type in self.lacks for node in onnx.load_from_string(graph).graph.node):
            raise onnxruntime.capi.onnxruntime_pybind11_state.Fail("no kernel, and fallback is off")
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        return SimpleNamespace(
            get_providers=lambda: [CUDA, "CPUExecutionProvider"],
            io_binding=lambda: Binding(session, self.places),
            run_with_iobinding=lambda bound: session.run_with_iobinding(bound.inner),
        )


def provider() -> Provider:
    return gpu_provider(EngineOptions(device=1))


def test_a_gpus_tensors_are_in_its_memory_and_the_processor_never_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeOnnxRuntime()
    with installed(monkeypatch, {"onnxruntime": fake}):
        peak = measure_gpu_peak(provider(), "Fake GPU")
    assert {"fp32", "int8"} <= set(peak.flops)
    assert set(fake.places) == {("cuda", 1), ("c", "cuda", 1)}
    assert set(fake.settings) == {"1"}
    assert CUDA in peak.source


def test_what_a_provider_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(monkeypatch, {"onnxruntime": FakeOnnxRuntime(("Neg", "MatMulInteger"))}):
        peak = measure_gpu_peak(provider(), "Fake GPU")
    assert "int8" not in peak.flops
    assert peak.bandwidth == 0
    with (
        installed(monkeypatch, {"onnxruntime": FakeOnnxRuntime(("MatMul", "MatMulInteger"))}),
        pytest.raises(EngineError, match="the peak of Fake GPU cannot be measured") as caught,
    ):
        measure_gpu_peak(provider(), "Fake GPU")
    assert f"received: {CUDA} without a kernel for products in fp32, fp16, bf16, int8" in str(caught.value)


def test_16_bit_products_are_16_bit() -> None:
    model = onnx.load_from_string(graph_of(Chain("MatMul", (4, 4), (FLOAT, FLOAT), FLOAT16, 1, FLOAT16)))
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    assert {value.type.tensor_type.elem_type for value in inferred.graph.value_info} == {FLOAT16}


def test_the_gpus_name_or_why_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(monkeypatch, {"cuda.bindings.runtime": FakeCuda()}):
        gpu, reason = open_gpu(EngineOptions())
    assert gpu is not None
    assert (gpu.device.name, reason) == ("Fake GPU", "")
    with installed(monkeypatch, {"cuda.bindings.runtime": None}):
        gpu, reason = open_gpu(EngineOptions())
    assert gpu is None
    assert "could not be asked for its name and memory: cuda-python is not installed" in reason
    assert "pip install cuda-python" in reason
