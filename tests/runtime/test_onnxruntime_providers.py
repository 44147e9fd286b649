"""ONNX Runtime on a GPU: the provider that was asked for, or an error; never the CPU in silence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from reelforge.runtime import Pipeline, Request
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.engines.narrow_weights import Widening
from reelforge.runtime.errors import EngineError
from reelforge.runtime.recipe import Backend, Target
from tests.runtime.fake_cuda import installed

REQUEST = Request("a ball", height=32, width=48, frames=5, steps=2, seed=3)
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT, RTX = "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"


class FakeBinding:
    """A binding of a GPU's session: values of the host are copied when they are bound, and not when it runs."""

    def __init__(self, session: Any, on_device: list[Any]) -> None:
        self.inner = session.io_binding()
        self._on_device = on_device
        self._copies: dict[str, np.ndarray] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        if not any(value is other for other in self._on_device):
            self._copies[name] = value.numpy().copy()
            value = onnxruntime.OrtValue.ortvalue_from_numpy(self._copies[name])
        self.inner.bind_ortvalue_input(name, value)


class FakeOnnxRuntime:
    """onnxruntime-gpu, but that the sessions compute on the CPU."""

    def __init__(self, *available: str, starts: bool = True) -> None:
        self.available, self.starts = available, starts
        self.asked: list[Any] = []
        self._on_device: list[Any] = []
        self._memory: list[np.ndarray] = []
        self.OrtValue = SimpleNamespace(ortvalue_from_numpy=self._value)

    def _value(self, array: np.ndarray, device: str = "cpu", index: int = 0) -> Any:
        if device == "cpu":
            return onnxruntime.OrtValue.ortvalue_from_numpy(array)
        assert (device, index) == ("cuda", 1)
        self._memory.append(array.copy())
        self._on_device.append(onnxruntime.OrtValue.ortvalue_from_numpy(self._memory[-1]))
        return self._on_device[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime, name)

    def get_available_providers(self) -> list[str]:
        return [*self.available, CPU]

    def InferenceSession(self, source: Any, settings: Any, providers: list[Any]) -> Any:
        self.asked.append(providers)
        session = onnxruntime.InferenceSession(source, settings, providers=[CPU])
        active = [provider[0] for provider in providers] if self.starts else []
        return SimpleNamespace(
            get_providers=lambda: [*active, CPU], get_inputs=session.get_inputs, get_outputs=session.get_outputs,
            io_binding=lambda: FakeBinding(session, self._on_device),
            run_with_iobinding=lambda bound, options: session.run_with_iobinding(bound.inner, options),
        )  # fmt: skip


@pytest.fixture
def bundle(fake_bundle: Path) -> Bundle:
    opened = Bundle.open(fake_bundle)
    return Bundle(opened.path, replace(opened.manifest, target=Target(Backend.CUDA)))


@pytest.mark.parametrize(
    ("provider", "available", "asked"),
    [
        (None, (CUDA,), (CUDA,)),
        ("cuda", (TENSORRT, CUDA), (CUDA,)),
        ("tensorrt", (TENSORRT, CUDA), (TENSORRT, CUDA)),
        ("rtx", (RTX,), (RTX,)),
        ("rtx", (RTX, CUDA), (RTX, CUDA)),
    ],
)
def test_the_provider_is_the_one_asked_for(
    bundle: Bundle, fake_bundle: Path, monkeypatch: pytest.MonkeyPatch, provider: str | None,
    available: tuple[str, ...], asked: tuple[str, ...],
) -> None:  # fmt: skip
    fake = FakeOnnxRuntime(*available)
    with installed(monkeypatch, {"onnxruntime": fake}):
        frames = Pipeline(bundle, EngineOptions(threads=1, device=1, provider=provider)).generate(REQUEST)
    np.testing.assert_array_equal(frames, Pipeline.open(fake_bundle, threads=1).generate(REQUEST))
    assert fake.asked == [[(name, {"device_id": "1"}) for name in asked]] * 6


def test_a_provider_that_is_not_there(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="this onnxruntime has no CUDAExecutionProvider") as caught:
        Pipeline(bundle).generate(REQUEST)  # the real onnxruntime of the tests, which is for the CPU
    assert f"onnxruntime {onnxruntime.__version__} with" in str(caught.value)
    assert "pip install reelforge[cuda]" in str(caught.value)
    with (
        installed(monkeypatch, {"onnxruntime": FakeOnnxRuntime(CUDA)}),
        pytest.raises(EngineError, match="has no TensorrtExecutionProvider"),
    ):
        Pipeline(bundle, EngineOptions(provider="tensorrt")).generate(REQUEST)


def test_a_provider_that_does_not_start(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        installed(monkeypatch, {"onnxruntime": FakeOnnxRuntime(CUDA, starts=False)}),
        pytest.raises(EngineError, match="ONNX Runtime could not start CUDAExecutionProvider") as caught,
    ):
        Pipeline(bundle).generate(REQUEST)
    assert f"received: a session with {CPU}" in str(caught.value)


def test_settings_that_mean_nothing(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="the provider is not known") as caught:
        Pipeline(bundle, EngineOptions(provider="gpu")).generate(REQUEST)
    assert "expected: cuda or tensorrt or rtx" in str(caught.value)
    with pytest.raises(EngineError, match="'cuda_graph' means nothing to ONNX Runtime on a GPU"):
        Pipeline(bundle, EngineOptions(cuda_graph=False)).generate(REQUEST)
    with pytest.raises(EngineError, match="'widening' means nothing to ONNX Runtime on a GPU"):
        Pipeline(bundle, EngineOptions(widening=Widening.RUN)).generate(REQUEST)


def test_onnxruntime_that_is_not_installed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        installed(monkeypatch, {"onnxruntime": None}),
        pytest.raises(EngineError, match="onnxruntime is not installed") as caught,
    ):
        Pipeline(bundle).generate(REQUEST)
    assert "pip install reelforge[cuda]" in str(caught.value)


@pytest.mark.gpu
def test_a_real_gpu(bundle: Bundle, fake_bundle: Path) -> None:
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip(f"onnxruntime {onnxruntime.__version__} has no {CUDA}: pip install onnxruntime-gpu")
    frames = Pipeline(bundle).generate(REQUEST).astype(int)
    assert np.abs(frames - Pipeline.open(fake_bundle, threads=1).generate(REQUEST)).max() <= 1
