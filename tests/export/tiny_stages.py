"""A tiny checkpoint's stages as plain arrays, run in fp32: what tests of folding and placing weights share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reelforge.calibration.number_formats import INT8
from reelforge.calibration.rules import Formats, SmoothingGroup, StageRules
from reelforge.calibration.scale_file import Provenance, ScaleFile, ScaleKind, tensor_name
from reelforge.export.checkpoint.open import open_checkpoint
from reelforge.export.checkpoint.sources import Resolved, loaded
from reelforge.export.family import FAMILIES
from reelforge.export.models.hunyuan_video.spec_from_checkpoint import Numerics
from reelforge.export.quantisation import StagePlan, plan_quantisation
from reelforge.export.reference import run_stage
from reelforge.export.stage import Stage
from reelforge.export.weights import resolve_stages
from reelforge.runtime.conditioning import rope_tables, sinusoids
from reelforge.runtime.manifest import WeightEntry
from reelforge.runtime.spec import ModelSpec

Arrays = Mapping[str, NDArray[np.float32]]
FAMILY = FAMILIES["hunyuan_video"]
PROVENANCE = Provenance("checkpoint", "prompts", 0, "max", "int8", {})


@dataclass(frozen=True)
class TinyStages:
    """An opened checkpoint: its stages, where their weights lie, and what may be quantised."""

    spec: ModelSpec
    stages: Mapping[str, Stage]
    resolved: Mapping[str, Mapping[str, Resolved]]
    rules: Mapping[str, StageRules]

    @classmethod
    def open(cls, path: Path) -> TinyStages:
        checkpoint = open_checkpoint(path)
        spec = FAMILY.spec(checkpoint, Numerics.TENCENT)
        stages = FAMILY.stages(spec, 1)
        resolved = resolve_stages(checkpoint, FAMILY.key_maps[checkpoint.layout], spec, stages)
        return cls(spec, {stage.name: stage for stage in stages}, resolved, FAMILY.quantisation(spec))

    def parameters(self, stage: str) -> dict[str, NDArray[np.float32]]:
        return {name: loaded(weight).astype(np.float32) for name, weight in self.resolved[stage].items()}

    def run(self, stage: str, parameters: Arrays, folder: Path, **inputs: NDArray[np.generic]) -> Arrays:
        """Run a stage in fp32 with these parameters, which go through a file in ``folder``."""
        file = folder / "parameters.bin"
        file.write_bytes(b"".join(values.tobytes() for values in parameters.values()))
        entries, position = {}, 0
        for name, values in parameters.items():
            assert values.dtype == np.float32
            entries[name] = WeightEntry(name, "F32", values.shape, file.name, position, values.nbytes, "")
            position += values.nbytes
        return run_stage(self.stages[stage], folder, entries, inputs)

    def plans(self, formats: Formats, groups: tuple[SmoothingGroup, ...], scales: ScaleFile) -> dict[str, StagePlan]:
        """Return the plans of 8-bit layers; attention stays in high precision."""
        return plan_quantisation(formats=formats, attentions={}, groups=groups, scales=scales, stages=self.stages)

    def velocity(self, parameters: Mapping[str, Arrays], folder: Path) -> NDArray[np.float32]:
        """Return the velocity of one step: ``modulation`` and then ``dit``, on inputs that are always the same."""
        dit, random = self.spec.dit, np.random.default_rng(7)
        latents = normal(random, 1, dit.latent_channels, 2, 4, 6)
        modulations = self.run(
            "modulation",
            parameters["modulation"],
            folder,
            timestep_embedding=sinusoids([431.0], dit.sinusoid_width),
            guidance_embedding=sinusoids([6000.0], dit.sinusoid_width),
            pooled_text=normal(random, 1, dit.pooled_width),
        )
        cos, sin = rope_tables((2, 2, 3), dit.rope_axes, dit.rope_theta)
        inputs = {"rope_cos": cos, "rope_sin": sin, "sigma_step": np.float32(-0.25)}
        text = normal(random, 1, 5, dit.width)
        result = self.run("dit", parameters["dit"], folder, latents=latents, text=text, **modulations, **inputs)
        return result["velocity"]

    def prompt_states(self, parameters: Mapping[str, Arrays], folder: Path) -> NDArray[np.float32]:
        """Return what ``llm`` makes of a few tokens."""
        return self.run("llm", parameters["llm"], folder, input_ids=np.array([[3, 141, 59, 26, 5]]))["prompt_states"]


def normal(random: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return random.standard_normal(shape).astype(np.float32)


def random_factors(
    tiny: TinyStages, groups: tuple[SmoothingGroup, ...], random: np.random.Generator
) -> dict[str, NDArray[np.float32]]:
    """Return smoothing factors from 1/8 to 8 for each group, under the names of a scale file."""
    tensors = {}
    for group in groups:
        channels = tiny.stages[group.stage].parameter_shapes()[f"{group.layers[0]}.weight"][1]
        factors = np.exp2(random.uniform(-3, 3, channels)).astype(np.float32)
        tensors.update({tensor_name(group.stage, layer, ScaleKind.SMOOTHING): factors for layer in group.layers})
    return tensors


def scale_file(formats: Formats, smoothing: Arrays | None = None) -> ScaleFile:
    """Return a scale file for every layer of ``formats``.

    Scales count up from 0.5, ranges from 0..50, those of outputs from -1..60.
    """
    layers = [(stage, layer) for stage, names in formats.items() for layer in names]
    tensors = {
        tensor_name(stage, layer, ScaleKind.ACTIVATION): np.float32(0.5 + index)
        for index, (stage, layer) in enumerate(layers)
    }
    ranges = {
        tensor_name(stage, layer, ScaleKind.RANGE): np.array([-index, 50 + index], np.float32)
        for index, (stage, layer) in enumerate(layers)
        if formats[stage][layer] is INT8
    }
    outputs = {  # of more layers than have one, which does no harm
        name.removesuffix(ScaleKind.RANGE.value) + ScaleKind.OUTPUT.value: limits + np.array([-1, 10], np.float32)
        for name, limits in ranges.items()
    }
    return ScaleFile(Path("test.scales"), PROVENANCE, {**tensors, **ranges, **outputs, **(smoothing or {})})


def changed(parameters: Arrays, plan: StagePlan | None) -> dict[str, NDArray[np.float32]]:
    """Return the parameters with a plan's smoothing folded in, nothing rounded to 8 bits: in float64, then to fp32."""
    result = {}
    for name, stored in parameters.items():
        values = stored.astype(np.float64)
        layer = name.removesuffix(".weight") if name.endswith(".weight") else ""
        if plan is not None and layer in plan.layers:
            how = plan.layers[layer].weight
            if how.column_factors is not None:
                values *= how.column_factors.reshape(1, -1, *[1] * (values.ndim - 2))
            if how.row_divisors is not None:
                values /= how.row_divisors.reshape(-1, *[1] * (values.ndim - 1))
        elif plan is not None and name in plan.folded:
            rows, affine = [-1, *[1] * (values.ndim - 1)], plan.folded[name]
            values = values * affine.multiplier.reshape(rows) + affine.offset.reshape(rows)
        result[name] = values.astype(np.float32)
    return result
