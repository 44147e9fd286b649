"""Scales for the tiny bundle's ``dit``, observed by the shortest way: every layer's input as an output of the graph."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from reelforge.calibration.number_formats import NumberFormat
from reelforge.calibration.reference_run import run_reference
from reelforge.calibration.scale_file import Provenance
from reelforge.export.graph_file import graph_bytes
from reelforge.export.passes.layers import weighted_layers
from reelforge.export.variants import LayerScales, formats_of
from reelforge.runtime.engines.onnxruntime_engine import engine_from_bytes
from reelforge.runtime.manifest import TensorInfo
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.recipe import VideoShape
from reelforge.runtime.sampling import step_inputs
from tests.export.passes.layer_model import around_zero

PROVENANCE = Provenance("0" * 64, "0" * 64, 0, "max", "int8", {})
PROMPTS = ("a red ball", "two blue squares rise")
SHAPE = VideoShape(32, 48, 5)
STEPS = 3


def input_maxima(pipeline: Pipeline, number_format: NumberFormat) -> dict[str, float]:
    """Return the largest magnitude of every quantisable layer's input, over two prompts and all steps."""
    model = ir.load(pipeline.bundle.graph("dit"))
    layers = {name: weighted_layers(model.graph)[name] for name in formats_of(pipeline, "dit", number_format)}
    values = {layer.activation.name: layer.activation for layer in layers.values()}
    model.graph.outputs.extend(values.values())
    entry = pipeline.bundle.stage("dit")
    names = [str(name) for name in values]
    outputs = tuple(TensorInfo(name, "float32", (f"{name}.rows", f"{name}.columns")) for name in names)
    observed = replace(entry, outputs=(*entry.outputs, *outputs))
    engine = engine_from_bytes(graph_bytes(model), pipeline.bundle.path, observed)
    largest = dict.fromkeys(names, 0.0)
    for video in run_reference(pipeline, PROMPTS, 100, STEPS, SHAPE).videos:
        for step in range(STEPS):
            rows = step_inputs(video.conditions.per_step, step)
            result = engine.run({"latents": video.latents[step], **video.conditions.fixed, **rows})
            for name in names:
                largest[name] = max(largest[name], float(np.abs(result[name]).max()))
    engine.close()
    return {name: largest[str(layer.activation.name)] for name, layer in layers.items()}


def layer_scales(maxima: dict[str, float], number_format: NumberFormat) -> dict[str, LayerScales]:
    """Return scales by the method ``max``."""
    return {
        name: LayerScales(number_format, around_zero(float(np.float32(value / number_format.largest))))
        for name, value in maxima.items()
    }
