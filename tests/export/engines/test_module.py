"""Compilers that are not there."""

from __future__ import annotations

import sys
import types

import pytest

from reelforge.export.engines.module import backend_name, load_module
from reelforge.runtime.errors import BuildError
from reelforge.runtime.recipe import Backend


@pytest.mark.parametrize(
    ("backend", "name", "extra"), [(Backend.RTX, "tensorrt_rtx", "rtx"), (Backend.TRT, "tensorrt", "tensorrt")]
)
def test_not_installed(monkeypatch: pytest.MonkeyPatch, backend: Backend, name: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BuildError, match=f"{name} cannot be imported") as caught:
        load_module(backend)
    assert f"fix: pip install reelforge[export,{extra}]" in str(caught.value)


def test_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("tensorrt")
    module.__dict__.update(__version__="8.6.1", Builder=object, OnnxParser=object)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(BuildError, match="too old") as caught:
        load_module(Backend.TRT)
    assert "tensorrt 8.6.1 without IStreamWriter" in str(caught.value)


@pytest.mark.parametrize("backend", [Backend.CPU, Backend.CUDA])
def test_a_backend_without_plans(backend: Backend) -> None:
    with pytest.raises(BuildError, match=f"{backend.value}' compiles no plans") as caught:
        load_module(backend)
    assert "expected: rtx or trt" in str(caught.value)


def test_installed(rtx: types.ModuleType) -> None:
    assert backend_name(rtx).startswith("tensorrt_rtx 1.")
