"""What we say of TensorRT's Python API is true of the installed library, and its own messages reach our errors."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import mmap
import re
from pathlib import Path
from typing import Any

import pytest

from reelforge.runtime.engines import tensorrt_library
from reelforge.runtime.engines.tensorrt_library import (
    DATA_TYPES,
    ITEM_BYTES,
    MODULES,
    CudaEngine,
    ExecutionContext,
    TensorRtLibrary,
    load_library,
)
from reelforge.runtime.errors import EngineError
from reelforge.runtime.recipe import Backend
from tests.runtime.fake_cuda import FakeCuda, installed
from tests.runtime.fake_tensorrt import FakeEngine, FakeRtxContext, FakeTensorRt


@pytest.fixture(params=[Backend.RTX, Backend.TRT], ids=["tensorrt_rtx", "tensorrt"])
def module(request: pytest.FixtureRequest) -> Any:
    try:
        return load_library(request.param).module
    except EngineError as error:
        pytest.skip(f"{MODULES[request.param]} is not installed: {error.received}")


def members(protocol: type) -> list[str]:
    return [name for name in (*vars(protocol), *protocol.__annotations__) if not name.startswith("_")]


def test_the_library_has_what_we_use(module: Any) -> None:
    assert [name for name in members(ExecutionContext) if not hasattr(module.IExecutionContext, name)] == []
    engine = [name for name in members(CudaEngine) if not hasattr(module.ICudaEngine, name)]
    assert engine == []
    assert all(hasattr(module.DataType, name) for name in DATA_TYPES.values())
    assert hasattr(module.TensorLocation, "DEVICE")
    assert hasattr(module.ExecutionContextAllocationStrategy, "USER_MANAGED")
    assert hasattr(module.Runtime, "deserialize_cuda_engine")
    if module.__name__ == MODULES[Backend.RTX]:
        assert hasattr(module.IExecutionContext, "is_stream_capturable")
        assert hasattr(module.IRuntimeConfig, "set_execution_context_allocation_strategy")
        assert hasattr(module.IRuntimeConfig, "dynamic_shapes_kernel_specialization_strategy")
        assert hasattr(module.DynamicShapesKernelSpecializationStrategy, "EAGER")


def test_the_type_stubs_of_classic_tensorrt_have_what_we_use() -> None:
    if importlib.util.find_spec("tensorrt_stubs") is None:
        pytest.skip("tensorrt-stubs is not installed")
    spec = importlib.util.find_spec("tensorrt_bindings")
    assert spec is not None
    assert spec.submodule_search_locations
    # By lines: the stubs of 10.13 hold a default before an argument without one, which no parser takes.
    names: dict[str, set[str]] = {}
    for line in (Path(spec.submodule_search_locations[0]) / "tensorrt.pyi").read_text().splitlines():
        if found := re.match(r"class (\w+)", line):
            current = names.setdefault(found[1], set())
        elif found := re.match(r"    (?:def )?(\w+)[(:]", line):
            current.add(found[1])
    assert set(members(ExecutionContext)) <= names["IExecutionContext"]
    assert set(members(CudaEngine)) <= names["ICudaEngine"]
    assert set(DATA_TYPES.values()) <= names["DataType"]
    assert "USER_MANAGED" in names["ExecutionContextAllocationStrategy"]
    assert "DEVICE" in names["TensorLocation"]
    assert {"INTERNAL_ERROR", "ERROR", "WARNING", "log"} <= names["ILogger"]
    assert "deserialize_cuda_engine" in names["Runtime"]


def test_the_protocols_say_what_is_called() -> None:
    """A name that the code calls and the protocols lack would not be looked for in the library either."""
    folder = Path(tensorrt_library.__file__).parent
    source = "".join((folder / f"tensorrt_{part}.py").read_text() for part in ("plan", "library"))
    called = {node.func.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)
              and isinstance(node.func, ast.Attribute)}  # fmt: skip
    known = {*members(ExecutionContext), *members(CudaEngine)}
    assert known - called <= {"num_io_tensors", "num_optimization_profiles"}
    assert set(ITEM_BYTES) == set(DATA_TYPES)


def test_the_fakes_have_the_same_arguments() -> None:
    for protocol, fake in ((ExecutionContext, FakeRtxContext), (CudaEngine, FakeEngine)):
        for name in members(protocol):
            if callable(getattr(protocol, name, None)):
                expected = list(inspect.signature(getattr(protocol, name)).parameters)
                assert len(inspect.signature(getattr(fake, name)).parameters) == len(expected), name


def test_a_refused_plan_says_why(module: Any, tmp_path: Path) -> None:
    """With and without a GPU: the header is looked at first."""
    backend = next(backend for backend, name in MODULES.items() if name == module.__name__)
    library = TensorRtLibrary(module, backend)
    path = tmp_path / "not.plan"
    path.write_bytes(b"rftv" + bytes(4092))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        assert library.deserialize(data) is None
    assert "magic" in library.messages().lower()
    assert library.messages() == f"{library.name} gave no message"
    library.close()
    library.close()


def test_only_the_last_errors_and_warnings_are_kept() -> None:
    module = FakeTensorRt(FakeCuda())
    library = TensorRtLibrary(module, Backend.RTX)
    logger = library._logger
    assert logger is not None
    for number in range(20):
        logger.log(module.ILogger.ERROR, f"error {number}\n")
        logger.log(module.ILogger.VERBOSE, "noise")
    assert library.messages() == " | ".join(f"error {number}" for number in range(12, 20))


@pytest.mark.parametrize(("backend", "extra"), [(Backend.RTX, "rtx"), (Backend.TRT, "tensorrt")])
def test_a_library_that_is_not_installed(backend: Backend, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        installed(monkeypatch, {MODULES[backend]: None}),
        pytest.raises(EngineError, match="cannot be loaded, and this bundle's engines run on it") as caught,
    ):
        load_library(backend)
    assert f"pip install reelforge[{extra}]" in str(caught.value)
