"""Stage: one network to compile, as data.

A stage is a list of parts over a shared set of named values. A part is one module, or one *kind* of module that repeats
with other weights (``double.{i}``): the compiler traces a kind once and stamps it out. Values carry a dtype and named
dimensions, so that nothing about tracing, assembling or running a stage is written by hand. The module knows no model
and no ONNX.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from reelforge.runtime.manifest import TensorInfo

COMPUTE = "compute"  # stands for the dtype of the stage's precision
_INDEXED = re.compile(r"(\w+)\[i\]")


@dataclass(frozen=True)
class Value:
    """A tensor between parts. ``dtype`` is ``float32``, ``int64`` or ``compute``; a string dimension is dynamic."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Port:
    """A value as a part sees it: whole, or row ``i`` along axis 1 of a value that all repeats share."""

    value: str
    indexed: bool

    @classmethod
    def parse(cls, text: str) -> Port:
        """Read ``name`` or ``name[i]``."""
        match = _INDEXED.fullmatch(text)
        return cls(match.group(1), True) if match else cls(text, False)


@dataclass(frozen=True)
class Part:
    """One module of a stage, or one kind of module that repeats.

    Args:
        path: Prefix of its parameters and nodes, ``""`` for none; ``{i}`` stands for the repeat's index.
        build: Makes the module; called where tensors have no storage.
        inputs: Values by name in the order of ``forward``; ``name[i]`` takes row i along axis 1.
        outputs: Likewise; ``name[i]`` collects the repeats' results along a new axis 1.
        repeat: How many times.
        first: Index of the first repeat; above zero in a part of a stage that is cut (see ``export.partition``).
    """

    path: str
    build: type[nn.Module] | partial[nn.Module]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    repeat: int = 1
    first: int = 0

    @property
    def label(self) -> str:
        """The module's class name, which names the nodes of a part without a path."""
        return self.build.func.__name__ if isinstance(self.build, partial) else self.build.__name__

    @property
    def input_ports(self) -> tuple[Port, ...]:
        """The inputs, parsed."""
        return tuple(Port.parse(text) for text in self.inputs)

    @property
    def output_ports(self) -> tuple[Port, ...]:
        """The outputs, parsed."""
        return tuple(Port.parse(text) for text in self.outputs)

    def prefixes(self) -> Iterator[str]:
        """Yield each repeat's parameter prefix, with its trailing dot."""
        for index in range(self.first, self.first + self.repeat):
            path = self.path.format(i=index)
            yield f"{path}." if path else ""

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the module's own parameters and their shapes; nothing is allocated."""
        return dict(_shapes(self.build))  # type: ignore[arg-type]  # classes and partials are hashed by identity


@functools.lru_cache(maxsize=128)
def _shapes(build: Callable[[], nn.Module]) -> Mapping[str, tuple[int, ...]]:
    """What a module has; asked for again and again, by everything that cuts, places or assembles stages."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in build().named_parameters()}


@dataclass(frozen=True)
class Stage:
    """One network to compile.

    Args:
        name: The stage's name and its graph's file name.
        component: The checkpoint component that holds its weights.
        parts: In execution order.
        values: Every value that a part reads or writes.
        inputs: Names of the values that come from outside.
        outputs: Names of the values that leave.
        tolerance: Largest accepted absolute difference from the fp32 reference, at output scale 1-4, per precision
        name.
        aliases: Outer name -> value, for inputs and outputs that are called otherwise outside: a value that a cut
            stage both reads and writes.
        earlier: Collected value -> inputs that hold the rows of the repeats before this stage's own, in order: where a
            cut goes through what collects an output.
        weights_of: The stage of which this one is another view: its parameters are some of that stage's, under the same
            names, and lie in the same files. Empty for a stage with weights of its own.
    """

    name: str
    component: str
    parts: tuple[Part, ...]
    values: dict[str, Value]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tolerance: dict[str, float]
    aliases: dict[str, str] = field(default_factory=dict)
    earlier: dict[str, tuple[str, ...]] = field(default_factory=dict)
    weights_of: str = ""

    @property
    def origin(self) -> str:
        """The stage whose weights, precision and 8-bit layers these are: of a part, or of another view, the whole's."""
        return self.weights_of or self.name.partition(".")[0]

    def value_of(self, name: str) -> str:
        """Return the value behind the name of an input or output."""
        return self.aliases.get(name, name)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every parameter's name and shape, in execution order."""
        shapes: dict[str, tuple[int, ...]] = {}
        for part in self.parts:
            own = part.parameter_shapes()
            for prefix in part.prefixes():
                shapes.update({prefix + name: shape for name, shape in own.items()})
        return shapes

    def tensor_infos(self, names: tuple[str, ...], compute: str = COMPUTE) -> tuple[TensorInfo, ...]:
        """Describe the stage's own inputs or outputs for a manifest.

        Args:
            names: Of inputs or outputs.
            compute: Type of values that have the stage's precision, which cross only the cuts within a stage.
        """
        values = ((name, self.values[self.value_of(name)]) for name in names)
        return tuple(
            TensorInfo(name, compute if value.dtype == COMPUTE else value.dtype, value.shape) for name, value in values
        )
