"""Tells classic TensorRT about the plugins: shapes, tactics, and ahead of time compiled kernels for one architecture.

``tensorrt.plugin`` is a parameter, since TensorRT is installed where engines are built and nowhere else. What it gets
of each plugin follows from the schema. A finished engine holds the PTX and the launch expressions, and needs neither
Python nor this module. TensorRT-RTX has no such plugins: never give it a graph that names one.

Facts about the interface (as in 11.4): functions are inspected for names and annotations of their parameters;
``register`` gets attributes by name, ``aot_impl`` by place; extras are int32 expressions of shapes; tactics are
positive numbers.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelforge.plugins.compile import compile_kernels
from reelforge.plugins.schema import ACTIVATIONS, HEAD_DIMS, NAMESPACE, PLUGINS, DType, PluginSchema
from reelforge.plugins.tactics import ARCHITECTURES, Variant, tactics
from reelforge.runtime.errors import BuildError

OUTPUT_TYPE = "output_type"
"""Attribute of plugins none of whose inputs shows the 16-bit type: ``fp16`` or ``bf16``."""

_COMBINATION_NAMES = {"FLOAT": "FP32", "HALF": "FP16"}  # in tensorrt.plugin's strings; others are the types' own names


def register_plugins(
    tensorrt: Any, trtp: Any, architecture: int, cache_folder: Path | None = None, names: Iterable[str] = tuple(PLUGINS)
) -> None:
    """Register plugins with TensorRT, once per process.

    Args:
        tensorrt: The module ``tensorrt``.
        trtp: The module ``tensorrt.plugin``.
        architecture: Of the GPU that engines are built for, a key of ARCHITECTURES.
        cache_folder: Where compiled kernels are kept.
        names: Which plugins; those that the architecture cannot run are left out.

    Raises:
        BuildError: If there are no kernels for the architecture.
    """
    if architecture not in ARCHITECTURES:
        raise BuildError(
            f"there are no attention kernels for compute capability {architecture // 10}.{architecture % 10}.",
            received=f"sm_{architecture}",
            expected=", ".join(f"sm_{number}" for number in ARCHITECTURES),
            fix="build without --attention plugins",
        )
    for name in names:
        if tactics(name, architecture):
            _Registration(PLUGINS[name], tensorrt, trtp, architecture, cache_folder).register()


@dataclass(frozen=True)
class _Registration:
    """One plugin's three functions."""

    schema: PluginSchema
    tensorrt: Any
    trtp: Any
    architecture: int
    cache_folder: Path | None

    def register(self) -> None:
        plugin = f"{NAMESPACE}::{self.schema.name}"
        trtp, generic = self.trtp, types.GenericAlias  # annotations of classes that are known at run time only
        outputs = generic(tuple, (trtp.TensorDesc,) * len(self.schema.outputs))
        kernel = generic(tuple, (str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs))
        offered = generic(list, (trtp.AutoTuneCombination,))
        first, last = self._parameters(), {"outputs": outputs}
        trtp.register(plugin)(_with_signature(self.describe, first, outputs))
        trtp.autotune(plugin)(_with_signature(self.offer, first | last, offered))
        trtp.aot_impl(plugin)(_with_signature(self.build, first | last | {"tactic": int}, kernel))

    def describe(self, *inputs: Any, **attributes: int | float | str) -> tuple[Any, ...]:
        """Return the outputs' descriptions."""
        activation = self._activation(inputs, attributes)
        constants = self._constants(attributes)
        sizes = self._sizes([tensor.shape_expr for tensor in inputs])
        return tuple(
            self.trtp.from_shape_expr(
                tuple(extent.symbolic(sizes, constants, self.trtp.cdiv) for extent in tensor.shape),
                self._tensorrt_type(tensor.dtype or activation),
            )
            for tensor in self.schema.outputs
        )

    def offer(self, *arguments: Any) -> list[Any]:
        """Return the one combination of types, with the tactics that have these attributes."""
        inputs, values, _ = self._split(arguments[:-1])
        activation = self._activation(inputs, values)
        dtypes = [tensor.dtype or activation for tensor in (*self.schema.inputs, *self.schema.outputs)]
        names = [_COMBINATION_NAMES.get(dtype.tensorrt_name, dtype.tensorrt_name) for dtype in dtypes]
        fitting = [number for number, variant in enumerate(self._variants(inputs, values), 1) if variant is not None]
        if not fitting:
            raise BuildError(
                f"{self.schema.name} has no kernel with these attributes on sm_{self.architecture}.",
                received=", ".join(f"{name}={value}" for name, value in values.items()),
                expected="a key_group that the architecture's tactics have",
                fix="export the graph for this architecture",
            )
        return [self.trtp.AutoTuneCombination(", ".join(names), "LINEAR", fitting)]

    def build(self, *arguments: Any) -> tuple[str, str, Any, Any]:
        """Return the kernel's name, its PTX, how it is launched, and its extras."""
        inputs, values, tactic = self._split((*arguments[:-2], arguments[-1]))
        offered = self._variants(inputs, values)
        variant = offered[tactic - 1] if 0 < tactic <= len(offered) else None
        if variant is None:
            raise BuildError(
                f"TensorRT asks for tactic {tactic} of {self.schema.name}, which was not offered.",
                received=tactic,
                expected=f"one of {[number for number, item in enumerate(offered, 1) if item is not None]}",
                fix="this is a bug in the plugin's registration; please report it",
            )
        (kernel,) = compile_kernels([variant], self.cache_folder)
        constants = variant.constants()
        sizes = self._sizes([tensor.shape_expr for tensor in inputs])
        launch = self.trtp.KernelLaunchParams()
        grid = [extent.symbolic(sizes, constants, self.trtp.cdiv) for extent in self.schema.grid]
        launch.grid_x, launch.grid_y, launch.grid_z = grid
        launch.block_x, launch.shared_mem = kernel.threads, kernel.sheet.shared_bytes
        extras = tuple(self.trtp.SymInt32(sizes[extra.name]) for extra in self.schema.extras)
        return kernel.entry, kernel.ptx, launch, self.trtp.SymIntExprs.from_tuple(extras)

    def _parameters(self) -> dict[str, Any]:
        """Names and annotations of what all three functions take first."""
        parameters: dict[str, Any] = {tensor.name: self.trtp.TensorDesc for tensor in self.schema.inputs}
        parameters |= {attribute.name: type(attribute.default) for attribute in self.schema.attributes}
        return parameters | ({OUTPUT_TYPE: str} if self.schema.types_its_output else {})

    def _split(self, arguments: Sequence[Any]) -> tuple[Sequence[Any], dict[str, int | float | str], int]:
        """Return the inputs, the attributes by name, and the tactic (0 if there is none) of a call by place."""
        names = list(self._parameters())
        count = len(self.schema.inputs)
        values = dict(zip(names[count:], arguments[count:], strict=False))
        for name, value in values.items():
            expected = self._parameters()[name]
            if not isinstance(value, expected):
                raise BuildError(
                    f"TensorRT passes {name} of {self.schema.name} in another place than registered.",
                    received=f"{value!r}",
                    expected=expected.__name__,
                    fix="use a version of TensorRT that reelforge is tested with",
                )
        rest = arguments[len(names) :]
        return arguments[:count], values, int(rest[0]) if rest else 0

    def _variants(self, inputs: Sequence[Any], values: dict[str, int | float | str]) -> list[Variant | None]:
        """Return a variant per tactic, None where the tactic's tiles do not fit the attributes."""
        activation = self._activation(inputs, values)
        shapes = {tensor.name: tuple(found.shape) for tensor, found in zip(self.schema.inputs, inputs, strict=True)}
        head_dim = self.schema.sizes(shapes)["head_dim"]
        if head_dim not in HEAD_DIMS:
            raise BuildError(
                f"{self.schema.name} has no kernels for heads of {head_dim}.",
                received=head_dim,
                expected=f"a fixed head dimension, one of {HEAD_DIMS}",
                fix="build without --attention plugins",
            )
        attributes = tuple(sorted((name, value) for name, value in values.items() if name != OUTPUT_TYPE))
        key_group = values.get("key_group")
        offered: list[Variant | None] = []
        for tactic in tactics(self.schema.name, self.architecture):
            fits = tactic.tiles.get("BLOCK_N", key_group) == key_group
            variant = Variant(self.schema.name, self.architecture, tactic, activation, head_dim, attributes)  # type: ignore[arg-type]
            offered.append(variant if fits else None)
        return offered

    def _constants(self, attributes: dict[str, int | float | str]) -> dict[str, int | float]:
        constants = dict(self.schema.constants)
        for attribute in self.schema.attributes:
            constants[attribute.constant] = attributes[attribute.name]  # type: ignore[assignment]
        return constants

    def _sizes(self, shapes: Sequence[Any]) -> dict[str, Any]:
        """Return the symbols' expressions, each from the first input that shows it alone."""
        sizes: dict[str, Any] = {}
        for tensor, shape in zip(self.schema.inputs, shapes, strict=True):
            for axis, extent in enumerate(tensor.shape):
                if (extent.block, extent.unit, extent.closed) == (1, 1, False):
                    sizes.setdefault(extent.symbol, shape[axis])
        return sizes

    def _activation(self, inputs: Sequence[Any], attributes: dict[str, int | float | str]) -> DType:
        """Return the 16-bit type that this instance is of."""
        known = {self._tensorrt_type(dtype): dtype for dtype in ACTIVATIONS}
        if self.schema.types_its_output:
            by_name = {dtype.triton_name: dtype for dtype in ACTIVATIONS}
            given: Any = attributes[OUTPUT_TYPE]
            found = by_name.get(given)
        else:
            given = next(t.dtype for t, tensor in zip(inputs, self.schema.inputs, strict=True) if tensor.dtype is None)
            found = known.get(given)
        if found is None:
            raise BuildError(
                f"{self.schema.name} computes in 16 bits only.",
                received=given,
                expected="float16 or bfloat16",
                fix="build the dit with --precision fp16 or bf16",
            )
        return found

    def _tensorrt_type(self, dtype: DType) -> Any:
        return getattr(self.tensorrt.DataType, dtype.tensorrt_name)


def _with_signature(function: Callable[..., Any], parameters: dict[str, Any], result: Any) -> Callable[..., Any]:
    """Return ``function`` with the signature that TensorRT inspects."""

    def call(*arguments: Any, **attributes: Any) -> Any:
        return function(*arguments, **attributes)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()],
        return_annotation=result,
    )
    return call
