"""Assemble: the traces of a stage's parts to one graph whose weights point into files.

Each kind is stamped out once per repeat with its parameters' names prefixed. A weight stored in another dtype than the
stage computes in is cast in the graph, so a bf16 checkpoint is referenced in place whatever the precision. The module
knows neither models nor targets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from reelforge.export.capture import OPSET, Trace
from reelforge.export.portable import DOMAIN
from reelforge.export.stage import COMPUTE, Part, Stage
from reelforge.runtime.manifest import WeightEntry
from reelforge.runtime.recipe import Precision

STORED_DTYPES = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
}
EIGHT_BIT_DTYPES = {"I8": ir.DataType.INT8, "F8_E4M3": ir.DataType.FLOAT8E4M3FN}
COMPUTE_IR_DTYPES = {
    Precision.FP32: ir.DataType.FLOAT,
    Precision.BF16: ir.DataType.BFLOAT16,
    Precision.FP16: ir.DataType.FLOAT16,
}
_IR_DTYPES = {"float32": ir.DataType.FLOAT, "int32": ir.DataType.INT32, "int64": ir.DataType.INT64}


def assemble_stage(
    stage: Stage, traces: Sequence[Trace], precision: Precision, weights: Mapping[str, WeightEntry]
) -> ir.Model:
    """Build the stage's graph.

    Args:
        stage: What to build.
        traces: Of its parts, in order (``export.capture``).
        precision: Dtype of its parameters and ``compute`` values.
        weights: Where each parameter lies, by name.

    Returns:
        A model with named inputs and outputs, external weights, and portable operators not yet lowered.
    """
    return _Assembly(stage, precision, weights).model(traces)


class _Assembly:
    def __init__(self, stage: Stage, precision: Precision, weights: Mapping[str, WeightEntry]) -> None:
        self.stage, self.precision, self.weights = stage, precision, weights
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.environment: dict[str, ir.Value] = {stage.value_of(name): self._boundary(name) for name in stage.inputs}
        self.collected: dict[str, list[ir.Value]] = {}

    def model(self, traces: Sequence[Trace]) -> ir.Model:
        inputs = list(self.environment.values())
        for part, trace in zip(self.stage.parts, traces, strict=True):
            for index, prefix in enumerate(part.prefixes(), part.first):
                self._stamp(part, trace, index, prefix)
        for name, rows in self.collected.items():
            before = [self.environment[earlier] for earlier in self.stage.earlier.get(name, ())]
            self.environment[name] = self._emit("Concat", [*before, *rows], name, {"axis": 1})
        outputs = [self._output(name) for name in self.stage.outputs]
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": OPSET, DOMAIN: 1},
            name=self.stage.name,
        )
        return ir.Model(graph, ir_version=11, producer_name="reelforge")

    def _boundary(self, name: str) -> ir.Value:
        value = self.stage.values[self.stage.value_of(name)]
        if value.dtype != COMPUTE:
            dtype = _IR_DTYPES[value.dtype]
        elif name in self.stage.aliases:
            dtype = COMPUTE_IR_DTYPES[self.precision]
        else:
            raise AssertionError(f"{self.stage.name}.{name} crosses a boundary in a precision-dependent dtype")
        return ir.Value(name=name, shape=ir.Shape(value.shape), type=ir.TensorType(dtype))

    def _stamp(self, part: Part, trace: Trace, index: int, prefix: str) -> None:
        path = prefix or f"{part.label}."
        mapped: dict[ir.Value, ir.Value] = {}
        for port, source in zip(part.input_ports, trace.graph.inputs[: trace.inputs], strict=True):
            value = self.environment[port.value]
            mapped[source] = self._row(value, index, f"{path}{port.value}") if port.indexed else value
        for name, source in zip(trace.parameters, trace.graph.inputs[trace.inputs :], strict=True):
            mapped[source] = self._weight(prefix + name)
        for constant in trace.graph.initializers.values():
            mapped[constant] = self._constant(constant)
        for node in trace.graph:
            self._copy(node, path, mapped)
        for port, result in zip(part.output_ports, trace.graph.outputs, strict=True):
            value = mapped[result]
            if port.indexed:
                axis = self._constant_ints([1])
                row = self._emit("Unsqueeze", [value, axis], f"{path}{port.value}")
                self.collected.setdefault(port.value, []).append(row)
            else:
                self.environment[port.value] = value

    def _copy(self, node: ir.Node, path: str, mapped: dict[ir.Value, ir.Value]) -> None:
        name = f"{path}{node.name}"
        suffixes = [""] if len(node.outputs) == 1 else [f":{k}" for k in range(len(node.outputs))]
        outputs = [
            ir.Value(name=name + suffix, type=output.type, shape=_static_shape(output.shape))
            for output, suffix in zip(node.outputs, suffixes, strict=True)
        ]
        mapped.update(zip(node.outputs, outputs, strict=True))
        self.nodes.append(
            ir.Node(
                node.domain,
                node.op_type,
                [None if value is None else mapped[value] for value in node.inputs],
                node.attributes,
                outputs=outputs,
                name=name,
            )
        )

    def _weight(self, name: str) -> ir.Value:
        """Return the weight as the stage computes with it.

        One that is stored in 8 bits is an initialiser without a value, which its layer's quantisation replaces.
        """
        entry = self.weights[name]
        if entry.dtype in EIGHT_BIT_DTYPES:
            kind = ir.TensorType(COMPUTE_IR_DTYPES[self.precision])
            self.initializers[name] = ir.Value(name=name, shape=ir.Shape(entry.shape), type=kind)
            return self.initializers[name]
        stored = STORED_DTYPES[entry.dtype]
        dtype = COMPUTE_IR_DTYPES[self.precision]
        cast = f"{name}.{dtype.name}"
        if cast in self.environment:
            return self.environment[cast]
        shape = ir.Shape(entry.shape)
        tensor = ir.ExternalTensor(entry.file, entry.offset, entry.length, stored, shape=shape, name=name)
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(stored), const_value=tensor)
        self.initializers[name] = value
        used = value if stored == dtype else self._emit("Cast", [value], f"{name}.Cast", {"to": int(dtype)}, dtype)
        self.environment[cast] = used
        return used

    def _constant(self, value: ir.Value) -> ir.Value:
        """Return a graph-wide initialiser with this content: equal constants of all repeats are one."""
        tensor = value.const_value
        if tensor is None:
            raise AssertionError(f"initialiser {value.name} of a trace has no value")
        content = tensor.tobytes()
        key = f"{tensor.dtype.name}{tuple(tensor.shape)}".encode() + content
        name = f"constant.{hashlib.sha256(key).hexdigest()[:16]}"
        if name not in self.initializers:
            array = tensor.numpy()
            copy = ir.tensor(array, dtype=tensor.dtype, name=name)
            self.initializers[name] = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(copy.dtype), const_value=copy
            )
        return self.initializers[name]

    def _constant_ints(self, numbers: list[int] | int) -> ir.Value:
        tensor = ir.tensor(numbers, dtype=ir.DataType.INT64)
        return self._constant(ir.Value(name="", const_value=tensor))

    def _row(self, value: ir.Value, index: int, name: str) -> ir.Value:
        return self._emit("Gather", [value, self._constant_ints(index)], f"{name}.Gather", {"axis": 1})

    def _emit(
        self,
        operator: str,
        inputs: list[ir.Value],
        name: str,
        attributes: dict[str, int] | None = None,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        kind = inputs[0].type if dtype is None else ir.TensorType(dtype)
        output = ir.Value(name=name, type=kind)
        encoded = [ir.AttrInt64(key, number) for key, number in (attributes or {}).items()]
        self.nodes.append(ir.Node("", operator, inputs, encoded, outputs=[output], name=name))
        return output

    def _output(self, name: str) -> ir.Value:
        """Give the value its boundary name, dtype and named dimensions."""
        value, declared = self.environment[self.stage.value_of(name)], self._boundary(name)
        value.name, value.shape, value.type = name, declared.shape, declared.type
        return value


def _static_shape(shape: ir.Shape | None) -> ir.Shape | None:
    """Keep fixed sizes and rank; a trace's symbols mean nothing outside of it."""
    return None if shape is None else ir.Shape([size if isinstance(size, int) else None for size in shape])
