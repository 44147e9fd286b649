"""Pipelines of a high-precision bundle in which chosen layers of one stage are in 8 bits, made in memory.

For trying things out: nothing is written, codes live in the graph, and everything else stays where the bundle has it.
Smoothing is not folded but divided out of the layer's input, which gives the same numbers and lets every layer be
tried alone. The module does not know why layers are chosen, nor what is measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from reelforge.calibration.errors import CalibrationError
from reelforge.calibration.number_formats import FORMATS, NumberFormat, quantise
from reelforge.calibration.scale_file import ScaleFile, ScaleKind, tensor_name
from reelforge.calibration.scale_methods import weight_scales
from reelforge.calibration.smoothing import fold_into_weight
from reelforge.export.family import FAMILIES
from reelforge.export.graph_file import graph_bytes
from reelforge.export.passes.editing import GraphEditor
from reelforge.export.passes.layers import Layer, weighted_layers
from reelforge.export.passes.lower_float8 import LowerFloat8Pass
from reelforge.export.passes.quantise_layers import ActivationScales, IntegerInputs, QuantisedLayer, QuantiseLayersPass
from reelforge.export.quantisation import activation_scales
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.engines.engine import Engine
from reelforge.runtime.engines.onnxruntime_engine import engine_from_bytes
from reelforge.runtime.errors import RequestError
from reelforge.runtime.pipeline import Pipeline

MAX_GRAPH_BYTES = 2**31 - 1
"""The largest message of Protocol Buffers, in which ONNX graphs are stored."""

_STORED = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_CODE_TYPES = {"int8": ir.DataType.INT8, "float8_e4m3fn": ir.DataType.FLOAT8E4M3FN}
assert set(_CODE_TYPES) == set(FORMATS)


@dataclass(frozen=True, eq=False)
class LayerScales:
    """How one layer is quantised.

    Attributes:
        number_format: Of its weight and its input.
        activation: How its input may be quantised, after smoothing.
        smoothing: What its input is divided by and its weight's columns are multiplied with, fp32 ``[in]``; or None.
    """

    number_format: NumberFormat
    activation: ActivationScales
    smoothing: NDArray[np.float32] | None = None


def formats_of(pipeline: Pipeline, stage: str, number_format: NumberFormat) -> dict[str, NumberFormat]:
    """Return the layers of a stage that the model's family lets go to 8 bits, all in one format.

    Raises:
        RequestError: If the family keeps the stage in high precision.
        BundleError: If the bundle has no such stage.
    """
    graph = pipeline.bundle.graph(stage)
    rules = FAMILIES[pipeline.spec.family].quantisation(pipeline.spec)
    if stage not in rules:
        raise RequestError(
            f"the stage {stage!r} cannot be computed in 8 bits.",
            received=stage,
            expected=" or ".join(rules),
            fix="choose one of these with --stage",
        )
    return {name: number_format for name in weighted_layers(ir.load(graph).graph) if rules[stage].covers(name)}


def scales_of(scale_file: ScaleFile, stage: str, formats: Mapping[str, NumberFormat]) -> dict[str, LayerScales]:
    """Return the scales of a stage's layers.

    Args:
        scale_file: From a calibration.
        stage: The stage.
        formats: The layers that are wanted, with the number format of each.

    Raises:
        CalibrationError: If the file lacks one of them, or was made for other formats.
    """
    _require_formats(scale_file, stage, {number_format.name for number_format in formats.values()})
    result = {}
    for layer, number_format in formats.items():
        activation = activation_scales(scale_file, stage, layer, number_format)
        smoothing = scale_file.tensors.get(tensor_name(stage, layer, ScaleKind.SMOOTHING))
        result[layer] = LayerScales(number_format, activation, smoothing)
    return result


class Variants:
    """The variants of one stage of a bundle.

    Args:
        pipeline: Of a bundle whose stage is in high precision.
        stage: The stage.
        scales: Of every layer that may be in 8 bits.

    Raises:
        RequestError: If a layer is not in the stage, or is not stored as floating-point numbers.
    """

    def __init__(self, pipeline: Pipeline, stage: str, scales: Mapping[str, LayerScales]) -> None:
        self.pipeline = pipeline
        self.stage = stage
        entry = pipeline.bundle.stage(stage)
        weights = {weight.name: weight for weight in entry.weights}
        found = weighted_layers(self._load().graph)
        missing = [name for name in scales if name not in found]
        stored = {name: weights.get(f"{name}.weight") for name in scales}
        wrong = [name for name, weight in stored.items() if weight is None or weight.dtype not in _STORED]
        if missing or wrong:
            raise RequestError(
                f"stage {stage!r} of bundle {pipeline.bundle.name!r} cannot be quantised layer by layer.",
                received=f"scales for {len(scales)} layers, of which {(missing or wrong)[0]!r} is "
                + ("not in the graph" if missing else "not stored in floating point"),
                expected="a bundle in fp32 or fp16, and scales that were calibrated for it",
                fix="build the bundle with --precision fp32 and calibrate that",
            )
        # In the order in which the stage runs them.
        self.scales = {name: scales[name] for name in found if name in scales}
        self._weights = {name: weight for name, weight in stored.items() if weight is not None}

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers that may be in 8 bits, in execution order."""
        return tuple(self.scales)

    def weight_bytes(self, layer: str) -> int:
        """Return how many bytes the layer's weight takes in high precision."""
        return self._weights[layer].length

    def pipeline_of(self, layers: Collection[str]) -> Pipeline:
        """Return the pipeline with ``layers`` in 8 bits; the bundle's own if there are none.

        Raises:
            RequestError: If the codes are too many for a graph.
        """
        return _VariantPipeline(self.pipeline, self.stage, self.graph_of(layers)) if layers else self.pipeline

    def graph_of(self, layers: Collection[str]) -> bytes:
        """Return the stage's graph with ``layers`` in 8 bits.

        Raises:
            RequestError: If the codes are too many for a graph.
        """
        size = sum(int(np.prod(self._weights[name].shape)) for name in layers)
        if size > MAX_GRAPH_BYTES * 0.95:  # the rest is for scales and the graph itself
            raise RequestError(
                f"{len(layers)} layers of stage {self.stage!r} are too many to be tried in memory.",
                received=f"{size} bytes of codes",
                expected=f"at most {int(MAX_GRAPH_BYTES * 0.95)}",
                fix="build the bundle with build-engine --precision and --recipe; its gate measures the same",
            )
        model = self._load()
        found = weighted_layers(model.graph)
        chosen = [name for name in self.scales if name in set(layers)]
        plan = {}
        for name in chosen:
            scales = self.scales[name]
            weight = self._weight(name)
            if scales.smoothing is not None:
                _divide_input(model.graph, found[name], scales.smoothing)
                weight = fold_into_weight(weight, scales.smoothing)
            plan[name] = _quantised(weight, scales)
        for graph_pass in (
            QuantiseLayersPass(plan, IntegerInputs.UNSIGNED),
            LowerFloat8Pass(),
            common.CommonSubexpressionEliminationPass(),  # layers that share an input share its quantised form
            common.RemoveUnusedNodesPass(),
        ):
            graph_pass(model)
        return graph_bytes(model)

    def _load(self) -> ir.Model:
        return ir.load(self.pipeline.bundle.graph(self.stage))

    def _weight(self, layer: str) -> NDArray[np.float32]:
        """Read a weight itself: onnx-ir refuses files with several hard links."""
        entry = self._weights[layer]
        raw = np.fromfile(self.pipeline.bundle.path / entry.file, np.uint8, entry.length, offset=entry.offset)
        weight: NDArray[np.float32] = raw.view(_STORED[entry.dtype]).reshape(entry.shape).astype(np.float32)
        return weight


class _VariantPipeline(Pipeline):
    """A pipeline with another graph for one stage, whose weights are where the bundle has them."""

    def __init__(self, inner: Pipeline, stage: str, graph: bytes) -> None:
        manifest = inner.bundle.manifest
        digest = hashlib.sha256(graph).hexdigest()
        entries = tuple(
            replace(entry, graph_digest=digest) if entry.name == stage else entry for entry in manifest.stages
        )
        super().__init__(Bundle(inner.bundle.path, replace(manifest, stages=entries)), inner.options)
        self._inner = inner
        self._stage = stage
        self._graph = graph

    @contextmanager
    def engine(self, stage: str) -> Iterator[Engine]:
        """Load a stage for the duration of a ``with`` block."""
        if stage != self._stage:
            with self._inner.engine(stage) as engine:
                yield engine
            return
        variant = engine_from_bytes(self._graph, self.bundle.path, self.bundle.stage(stage), self.options)
        with closing(variant) as engine:
            yield engine


def _require_formats(scale_file: ScaleFile, stage: str, names: set[str]) -> None:
    """Refuse scales of another number format: they are finite and positive, and wrong by orders of magnitude."""
    stated = dict(part.split("=", 1) for part in scale_file.provenance.format.split(",") if "=" in part)
    if stage in stated and not names <= set(stated[stage].split("+")):
        raise CalibrationError(
            f"the scale file {scale_file.path} was made for another number format.",
            received=f"{stage}={stated[stage]}",
            expected=f"{stage}={'+'.join(sorted(names))}",
            fix="calibrate again with the precision that will be built",
        )


def _quantised(weight: NDArray[np.float32], scales: LayerScales) -> QuantisedLayer:
    per_channel = weight_scales(weight, scales.number_format)
    codes = quantise(weight, per_channel, scales.number_format, axis=0)
    kind = _CODE_TYPES[scales.number_format.name]
    return QuantisedLayer(ir.tensor(codes, dtype=kind), ir.tensor(per_channel), scales.activation)


def _divide_input(graph: ir.Graph, layer: Layer, factors: NDArray[np.float32]) -> None:
    """Divide what the layer reads by the factors of its input channels; only layers of ``[rows, in]`` have some."""
    name = f"{layer.name}.smoothing"
    tensor = ir.tensor(factors, name=name)
    value = ir.Value(name=name, shape=ir.Shape(factors.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    source = layer.activation
    divided = GraphEditor(graph, layer.node, layer.name).emit("Div", [source, value], kind=source.type)
    divided.shape = source.shape
    layer.node.replace_input_with(0, divided)
