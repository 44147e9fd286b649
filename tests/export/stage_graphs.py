"""Stages of a tiny checkpoint as graphs for a target, with weights in a folder and inputs to run them on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator

from reelforge.calibration.rules import Formats
from reelforge.calibration.weight_stream import WeightQuantisation
from reelforge.export.build_request import BuildEvents
from reelforge.export.graph_file import check_graph, graph_bytes
from reelforge.export.passes.quantise_attention import AttentionScales
from reelforge.export.passes.quantise_layers import ActivationScales
from reelforge.export.quantisation import NUMBER_FORMATS, LayerPlan, StagePlan, quantised_formats
from reelforge.export.reference import run_stage
from reelforge.export.stage import Stage
from reelforge.export.stage_compiler import StageCompiler
from reelforge.export.weights import WeightPlacer
from reelforge.runtime.bundle.write import BundleWriter
from reelforge.runtime.conditioning import rope_tables, sinusoids
from reelforge.runtime.manifest import WeightEntry
from reelforge.runtime.recipe import Precision, Recipe, Target
from tests.export.tiny_stages import TinyStages, normal

Arrays = dict[str, np.ndarray]
GRID = (3, 4, 6)
"""Latent frames, rows and columns of the inputs: 18 tokens of 2 x 2."""


@dataclass(frozen=True)
class StageGraphs:
    """Graphs, for one way of quantising each stage.

    Attributes:
        tiny: The checkpoint.
        writer: Of an unfinished bundle, whose folder holds graphs and weights.
        precision: Of the layers that a stage lets go; None quantises nothing.
        attention: Whether the attention of ``dit`` is in FP8.
    """

    tiny: TinyStages
    writer: BundleWriter
    precision: Precision | None = None
    attention: bool = False

    @cached_property
    def formats(self) -> Formats:
        if self.precision is None:
            return {}
        every = dict.fromkeys(self.tiny.stages, Precision.FP32)
        chosen = dict.fromkeys(("dit", "llm"), self.precision)
        return quantised_formats(Recipe({**every, **chosen}), self.tiny.rules, self.tiny.stages)

    def plan(self, stage: str) -> StagePlan:
        """Return a plan whose scales fit activations of scale one to four."""
        largest = 4.0
        layers = {
            layer: LayerPlan(
                WeightQuantisation(number_format, None, None),
                ActivationScales(largest / number_format.largest, (-largest * 128 / 127, largest)),
            )
            for layer, number_format in self.formats.get(stage, {}).items()
        }
        attentions = self.tiny.rules[stage].attentions if self.attention and stage in self.tiny.rules else ()
        scale = largest / NUMBER_FORMATS[Precision.FP8].largest
        return StagePlan(layers, {}, dict.fromkeys(attentions, AttentionScales(scale, scale, scale)))

    def weights(self, stage: str) -> Mapping[str, WeightEntry]:
        """Return the entries of a stage's weights, placed at the first call."""
        placed: dict[str, Mapping[str, WeightEntry]] = self.__dict__.setdefault("_placed", {})
        if stage not in placed:
            placer = WeightPlacer(self.writer)
            placed[stage] = placer.place(self.tiny.stages[stage], self.tiny.resolved[stage], self.plan(stage))
        return placed[stage]

    def graph(self, stage: str, target: Target, base: Precision) -> ir.Model:
        """Return the lowered graph of a stage, checked."""
        attentions = {name: rules.attentions for name, rules in self.tiny.rules.items()}
        compiler = StageCompiler(target, self.tiny.resolved, BuildEvents(), attentions)
        model = compiler.graph(self.tiny.stages[stage], base, self.plan(stage), self.weights(stage))
        check_graph(graph_bytes(model), stage)
        return model

    def save(self, model: ir.Model, name: str) -> Path:
        """Write a graph beside its weights."""
        path = self.writer.folder / f"{name}.onnx"
        path.write_bytes(graph_bytes(model))
        return path

    def run(self, model: ir.Model, name: str) -> Arrays:
        """Execute a graph of the stage ``name`` in ONNX Runtime without optimisation: the graph as it is written."""
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(self.save(model, name)), options, ["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, self.inputs(name)), strict=True))

    def evaluate(self, model: ir.Model, name: str) -> Arrays:
        """Execute a graph in ONNX's own evaluator, which has every type; it takes no weights behind hard links."""
        proto: onnx.ModelProto = ir.to_proto(model)
        for tensor in proto.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = {item.key: item.value for item in tensor.external_data}
                data = (self.writer.folder / place["location"]).read_bytes()
                tensor.raw_data = data[int(place["offset"]) :][: int(place["length"])]
                tensor.data_location = onnx.TensorProto.DEFAULT
                del tensor.external_data[:]
        names = [output.name for output in proto.graph.output]
        return dict(zip(names, ReferenceEvaluator(proto).run(names, self.inputs(name)), strict=True))

    def eager(self, name: str, dtype: torch.dtype = torch.float32) -> Arrays:
        """Execute the stage's modules, which are not quantised."""
        return run_stage(self.stage(name), self.writer.folder, self.weights(name), self.inputs(name), dtype)

    def stage(self, name: str) -> Stage:
        return self.tiny.stages[name]

    def inputs(self, name: str) -> Arrays:
        """Return inputs of a stage, always the same."""
        spec, random = self.tiny.spec, np.random.default_rng(11)
        dit, tokens = spec.dit, 7
        cos, sin = rope_tables((GRID[0], GRID[1] // 2, GRID[2] // 2), dit.rope_axes, dit.rope_theta)
        every = {
            "input_ids": random.integers(0, 250, (1, 19)),
            "clip_ids": random.integers(0, 250, (1, 9)),
            "text_states": normal(random, 1, tokens, dit.text_width),
            "timestep_embedding": sinusoids([1000.0, 431.0, 12.25], dit.sinusoid_width),
            "guidance_embedding": sinusoids([6000.0], dit.sinusoid_width),
            "pooled_text": normal(random, 1, dit.pooled_width),
            "latents": normal(random, 1, dit.latent_channels, *GRID),
            "text": normal(random, 1, tokens, dit.width),
            "double_modulation": 0.3 * normal(random, 1, dit.double_blocks, 2, 6, dit.width),
            "single_modulation": 0.3 * normal(random, 1, dit.single_blocks, 3, dit.width),
            "final_modulation": 0.3 * normal(random, 1, 2, dit.width),
            "rope_cos": cos,
            "rope_sin": sin,
            "sigma_step": np.array(-0.25, np.float32),
            "latent_tile": normal(random, 1, spec.vae.latent_channels, *GRID),
        }
        return {name: every[name] for name in self.stage(name).inputs}


@contextmanager
def stage_graphs(
    checkpoint: Path, folder: Path, precision: Precision | None = None, attention: bool = False
) -> Iterator[StageGraphs]:
    """Yield graphs whose files lie in a bundle that is given up afterwards."""
    with suppress(RuntimeError), BundleWriter(folder / "given_up") as writer:
        yield StageGraphs(TinyStages.open(checkpoint), writer, precision, attention)


def relative(received: np.ndarray, wanted: np.ndarray) -> float:
    """Return the root mean square of the difference over that of what is wanted."""
    difference = received.astype(np.float64) - wanted
    return float(np.sqrt(np.mean(difference**2) / np.mean(wanted.astype(np.float64) ** 2)))
