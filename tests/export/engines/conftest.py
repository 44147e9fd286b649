"""Plans that several tests look at; each is compiled once per session and worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reelforge.export.engines.compile import compile_plan
from reelforge.export.engines.module import load_module
from reelforge.export.engines.request import PlanRequest, Profile
from reelforge.runtime.receipt import Receipt
from reelforge.runtime.recipe import Backend, Precision
from tests.export.engines.tiny_graphs import expect_linears, request_for, save_linears

TWO_PROFILES = (Profile("small", {"tokens": (1, 8, 64)}), Profile("large", {"tokens": (65, 512, 1024)}))


@pytest.fixture(scope="session")
def rtx() -> Any:
    return load_module(Backend.RTX)


@pytest.fixture(scope="session")
def float8_request(tmp_path_factory: pytest.TempPathFactory) -> PlanRequest:
    folder = tmp_path_factory.mktemp("float8")
    graph = save_linears(folder / "float8.onnx", Precision.FP8)
    return request_for(graph, "rtx:sm89+sm120", expect_linears(Precision.FP8), TWO_PROFILES)


@pytest.fixture(scope="session")
def float8_plan(float8_request: PlanRequest) -> tuple[Path, Receipt]:
    """A compiled plan with two profiles, and its receipt."""
    return Path(float8_request.plan), compile_plan(float8_request)
