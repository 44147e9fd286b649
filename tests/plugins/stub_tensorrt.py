"""A stand-in for TensorRT's native module, so that the real ``tensorrt.plugin`` of NVIDIA's wheel runs without a GPU.

Dimension expressions are plain integers that remember whether they are constants. Only what the plugin module touches
is here. ``drive`` calls a plugin as a builder does: shapes, types, tactics, kernel.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

ENUMS = {
    "DataType": "FLOAT HALF BF16 INT8 INT32 INT64 FP8 INT4 BOOL UINT8",
    "TensorFormat": "LINEAR HWC",
    "DimensionOperation": "SUM PROD MAX MIN SUB EQUAL LESS FLOOR_DIV CEIL_DIV",
    "PluginFieldType": "UNKNOWN FLOAT16 FLOAT32 FLOAT64 INT8 INT16 INT32 INT64 CHAR",
    "PluginArgType": "INT",
    "PluginArgDataType": "INT8 INT16 INT32",
    "QuickPluginCreationRequest": "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT",
    "TensorRTPhase": "BUILD RUNTIME",
}


@dataclass
class DimensionExpr:
    """An expression that is evaluated at once; only a constant says so."""

    value: int
    constant: bool

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        return self.value

    def is_size_tensor(self) -> bool:
        return False


class ExprBuilder:
    def __init__(self, operations: Any) -> None:
        self.compute = {
            operations.SUM: lambda a, b: a + b,
            operations.SUB: lambda a, b: a - b,
            operations.PROD: lambda a, b: a * b,
            operations.FLOOR_DIV: lambda a, b: a // b,
            operations.CEIL_DIV: lambda a, b: -(-a // b),
        }

    def constant(self, value: int) -> DimensionExpr:
        return DimensionExpr(value, True)

    def operation(self, operation: Any, a: DimensionExpr, b: DimensionExpr) -> DimensionExpr:
        return DimensionExpr(self.compute[operation](a.value, b.value), a.constant and b.constant)


class Dims(list):  # type: ignore[type-arg]
    MAX_DIMS = 8


class DimsExprs(list):  # type: ignore[type-arg]
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


@dataclass
class PluginTensorDesc:
    dims: Any = None
    type: Any = None
    format: Any = None
    scale: float = 0.0


@dataclass
class DynamicPluginTensorDesc:
    desc: PluginTensorDesc
    min: Any = None
    max: Any = None
    opt: Any = None


@dataclass
class PluginField:
    name: str
    data: Any
    type: Any


@dataclass
class Registry:
    creators: dict[str, Any] = field(default_factory=dict)

    def register_creator(self, creator: Any, namespace: str) -> None:
        # The class keeps its plugin's name; its constructor's loop variable would hide it.
        self.creators[f"{namespace}::{creator.name}"] = creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[f"{namespace}::{name}"]


def make_module() -> ModuleType:
    module = ModuleType("tensorrt")
    for name, members in ENUMS.items():
        setattr(module, name, enum.Enum(name, members.split()))
    interfaces = "IPluginV3 IPluginV3QuickCore IPluginV3QuickBuild IPluginV3QuickRuntime IPluginV3QuickAOTBuild"
    for name in (*interfaces.split(), "IPluginCreatorV3Quick", "ISymExpr", "ITensor", "IExprBuilder"):
        setattr(module, name, type(name, (), {"__init__": lambda self: None}))
    module.IDimensionExpr = DimensionExpr  # type: ignore[attr-defined]
    registry = Registry()
    plain = {
        "Dims": Dims,
        "DimsExprs": DimsExprs,
        "PluginTensorDesc": PluginTensorDesc,
        "DynamicPluginTensorDesc": DynamicPluginTensorDesc,
        "PluginField": PluginField,
        "PluginFieldCollection": list,
        "get_plugin_registry": lambda: registry,
        "nptype": lambda dtype: np.float32,
    }
    for name, value in plain.items():
        setattr(module, name, value)
    logger = type("Logger", (), {"WARNING": 1, "log": lambda self, level, text: None})
    module.Logger = logger  # type: ignore[attr-defined]
    for short, long in {"float32": "FLOAT", "float16": "HALF", "int32": "INT32"}.items():
        setattr(module, short, module.DataType[long])  # type: ignore[attr-defined]
    return module


def wheel_folder() -> Path | None:
    """Where the wheel's pure Python plugin module is, or None; the wheel's native part is never loaded."""
    for entry in sys.path:
        folder = Path(entry) / "tensorrt_bindings" / "plugin"
        if (folder / "__init__.py").is_file():
            return folder
    return None


@contextmanager
def stubbed_tensorrt() -> Iterator[tuple[ModuleType, Any]]:
    """Yield ``tensorrt`` (the stub) and ``tensorrt.plugin`` (NVIDIA's), both gone afterwards."""
    folder = wheel_folder()
    assert folder is not None
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "tensorrt"}
    for name in before:
        del sys.modules[name]
    stub = make_module()
    sys.modules["tensorrt"] = stub
    try:
        spec = importlib.util.spec_from_file_location(
            "tensorrt.plugin", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        plugin = importlib.util.module_from_spec(spec)
        sys.modules["tensorrt.plugin"] = plugin
        stub.plugin = plugin  # type: ignore[attr-defined]
        spec.loader.exec_module(plugin)
        yield stub, plugin
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt"]:
            del sys.modules[name]
        sys.modules.update(before)


@dataclass
class Built:
    """What TensorRT would put into an engine."""

    output_shapes: list[tuple[int, ...]]
    output_types: list[Any]
    tactics: list[int]
    kernel: str
    ptx: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    extras: list[int]


def drive(
    tensorrt: Any,
    plugin: str,
    shapes: list[tuple[int, ...]],
    types: list[Any],
    attributes: dict[str, Any],
    tactic: int | None = None,
) -> Built:
    """Call a registered plugin as a builder does."""
    namespace, name = plugin.split("::")
    fields = []
    for key, value in attributes.items():
        data = np.frombuffer(value.encode(), np.int8) if isinstance(value, str) else np.array([value])
        fields.append(PluginField(key, data, None))
    request = tensorrt.QuickPluginCreationRequest.STRICT_AOT
    creator = tensorrt.get_plugin_registry().get_creator(name, "1", namespace)
    instance = creator.create_plugin(name, namespace, fields, tensorrt.TensorRTPhase.BUILD, request)
    builder = ExprBuilder(tensorrt.DimensionOperation)
    output_types = instance.get_output_data_types(types, [len(shape) for shape in shapes])
    # Head counts and sizes are fixed in a network, the rest is dynamic.
    exprs = [[DimensionExpr(size, axis >= 2) for axis, size in enumerate(shape)] for shape in shapes]
    outputs = [tuple(e.value for e in dims) for dims in instance.get_output_shapes(exprs, [], builder)]
    linear = tensorrt.TensorFormat.LINEAR
    in_out = [
        DynamicPluginTensorDesc(PluginTensorDesc(Dims(shape), dtype, linear))
        for shape, dtype in zip([*shapes, *outputs], [*types, *output_types], strict=True)
    ]
    offered = instance.get_supported_format_combinations(in_out, len(shapes))
    assert [item.type for item in offered] == [*types, *output_types]
    instance.configure_plugin(in_out[: len(shapes)], in_out[len(shapes) :])
    tactics = sorted(instance.get_valid_tactics())
    instance.set_tactic(tactics[0] if tactic is None else tactic)
    launch = SimpleNamespace()
    setter = type("Setter", (dict,), {})()
    instance.get_launch_params(exprs, in_out, len(shapes), launch, setter, builder)
    descs = [item.desc for item in in_out]
    kernel, ptx = instance.get_kernel(descs[: len(shapes)], descs[len(shapes) :])
    value = {name: getattr(launch, name).expr.value for name in vars(launch)}
    return Built(
        outputs,
        output_types,
        tactics,
        kernel,
        ptx.decode(),
        (value["grid_x"], value["grid_y"], value["grid_z"]),
        (value["block_x"], value["block_y"], value["block_z"]),
        value["shared_mem"],
        [setter[index].expr.value for index in range(setter.nbSymExprs)],
    )
