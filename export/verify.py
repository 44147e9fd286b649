"""Verify: run every stage of a bundle against its reference.

Stages are chained as in the pipeline, on small inputs: the reference's text states feed the refiner, its modulation
feeds the DiT, so that each stage sees values of realistic scale. Differences are absolute, divided by the output's
scale where that is above the range 1-4 that tolerances are stated for. It says nothing about pictures: see the
benchmarks for those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from reelforge.export.family import FAMILIES
from reelforge.export.reference import run_stage
from reelforge.export.stage import Stage
from reelforge.runtime.attention.inputs import JointSequence, attention_inputs
from reelforge.runtime.attention.table import Pattern, usual_table
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.conditioning import guidance_value, rope_tables, sinusoids
from reelforge.runtime.engines.onnxruntime_engine import engine_from_onnx
from reelforge.runtime.errors import VerificationError
from reelforge.runtime.manifest import Manifest
from reelforge.runtime.recipe import Recipe, SparseKind
from reelforge.runtime.schedule import flow_match_sigmas, timesteps
from reelforge.runtime.spec import ModelSpec

_SEED = 20240711
_STEPS = 3
_PROMPT_TOKENS, _TEXT_TOKENS, _CLIP_TOKENS = 19, 7, 5
_LATENT_FRAMES, _LATENT_SIZE = 3, 6
_LATENT_LIKE = (
    "velocity",
    "negative_velocity",
    "previous_latents",
    "computed_latents",
    "earlier_latents",
    "earlier_velocity",
)
_PASSED = ("head_image", "head_text", "joint_cos", "joint_sin", "key_lengths", "tokens")
"""From head to body and tail, as they are."""
_WEIGHTS = {"scale": 6.0, "residual_weight": 1.0, "trend_weight": 0.5}


@dataclass(frozen=True)
class StageParity:
    """How far one stage's engine is from its reference."""

    stage: str
    difference: float
    tolerance: float

    @property
    def within(self) -> bool:
        """Whether the difference is inside the tolerance."""
        return self.difference <= self.tolerance


def measure_stages(folder: Path, manifest: Manifest, stages: Sequence[Stage]) -> list[StageParity]:
    """Run each stage of the bundle in ``folder`` and its reference on the same inputs.

    Args:
        folder: The bundle's folder; it need not be sealed.
        manifest: Its manifest.
        stages: The stages to run, in pipeline order.
    """
    values = _inputs(manifest.spec, manifest.recipe)
    results = []
    for stage in stages:
        entry = manifest.stage(stage.name)
        if entry is None or entry.tolerance is None:  # a quantised stage is measured by its build's gate
            continue
        feed = {name: values[name] for name in stage.inputs}
        given = {info.name: feed[info.name].astype(info.dtype, copy=False) for info in entry.inputs}
        weights = {weight.name: weight for weight in entry.weights}
        expected = run_stage(stage, folder, weights, feed)
        engine = engine_from_onnx(folder / entry.graph, entry)
        try:
            received = engine.run(given)
        finally:
            engine.close()
        # NumPy's maximum: Python's would pass over a NaN.
        difference = float(np.max([_difference(received[name], expected[name]) for name in stage.outputs]))
        results.append(StageParity(stage.name, difference, entry.tolerance))
        values.update(_as_next_inputs(expected, manifest.recipe.batch))
    return results


def measure_parity(folder: Path, manifest: Manifest, stages: Sequence[Stage]) -> Manifest:
    """Return the manifest with each stage's measured difference; of a quantised stage there is none.

    Raises:
        VerificationError: If one is outside its tolerance.
    """
    measured = {parity.stage: parity for parity in measure_stages(folder, manifest, stages)}
    require_within(list(measured.values()))
    entries = tuple(
        replace(entry, parity=measured[entry.name].difference) if entry.name in measured else entry
        for entry in manifest.stages
    )
    return replace(manifest, stages=entries)


def require_within(parities: Sequence[StageParity]) -> None:
    """Raise VerificationError naming the stages outside their tolerance."""
    outside = [parity for parity in parities if not parity.within]
    if outside:
        raise VerificationError(
            "stages differ from their reference by more than their tolerance.",
            received=", ".join(f"{parity.stage} {parity.difference:.1e}" for parity in outside),
            expected=", ".join(f"{parity.stage} at most {parity.tolerance:.0e}" for parity in outside),
            fix="rebuild with --precision fp32; if that differs too, report it with the checkpoint's configuration",
        )


def bundle_stages(bundle: Bundle) -> tuple[Stage, ...]:
    """Return the stages that ``bundle`` was built from."""
    manifest = bundle.manifest
    stages = FAMILIES[manifest.spec.family].stages(
        manifest.spec, manifest.recipe.batch, manifest.recipe.sparse_attention, manifest.parted
    )
    return tuple(stage for stage in stages if manifest.stage(stage.name) is not None)


def _difference(received: np.ndarray, expected: np.ndarray) -> float:
    scale = max(1.0, float(np.abs(expected).max()) / 4.0)
    return float(np.abs(received.astype(np.float64) - expected).max()) / scale


def _inputs(spec: ModelSpec, recipe: Recipe) -> dict[str, np.ndarray]:
    """Return inputs of every stage; outputs of earlier stages replace the random ones as they become known."""
    random = np.random.Generator(np.random.Philox(_SEED))
    dit, llm, clip = spec.dit, spec.llm, spec.clip
    videos = recipe.batch
    latents = (videos, dit.latent_channels, _LATENT_FRAMES, _LATENT_SIZE, _LATENT_SIZE + 2)
    grid = (_LATENT_FRAMES, _LATENT_SIZE // dit.patch[1], (_LATENT_SIZE + 2) // dit.patch[2])
    cos, sin = rope_tables(grid, dit.rope_axes, dit.rope_theta)
    sigmas = flow_match_sigmas(_STEPS, spec.defaults.shift)

    chosen: dict[str, np.ndarray] = {}
    if recipe.sparse_attention is not None:
        pattern = Pattern.TOP_K if recipe.sparse_attention.kind is SparseKind.TOP_K else Pattern.SLIDING_TILE
        sequence = JointSequence(grid, _TEXT_TOKENS, dit.heads)
        attention = attention_inputs(usual_table(pattern), recipe.sparse_attention, sequence, _STEPS, (cos, sin))
        chosen = {**attention.fixed, **{name: rows[0, ...] for name, rows in attention.per_step.items()}}

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    return {
        "input_ids": random.integers(0, llm.vocabulary, (1, _PROMPT_TOKENS)),
        "clip_ids": random.integers(0, clip.vocabulary, (1, _CLIP_TOKENS)),
        "text_states": normal(1, _TEXT_TOKENS, dit.text_width),
        "timestep_embedding": sinusoids(timesteps(sigmas), dit.sinusoid_width),
        "guidance_embedding": sinusoids(
            [guidance_value(spec.defaults.guidance, spec.guidance_rounding)], dit.sinusoid_width
        ),
        "pooled_text": normal(1, dit.pooled_width),
        "latents": normal(*latents),
        "text": normal(videos, _TEXT_TOKENS, dit.width),
        "double_modulation": 0.3 * normal(videos, dit.double_blocks, 2, 6, dit.width),
        "single_modulation": 0.3 * normal(videos, dit.single_blocks, 3, dit.width),
        "final_modulation": 0.3 * normal(videos, 2, dit.width),
        "rope_cos": cos,
        "rope_sin": sin,
        "sigma_step": np.array(sigmas[1] - sigmas[0], dtype=np.float32),
        "text_lengths": np.arange(videos, dtype=np.int64) % _TEXT_TOKENS + 1,
        "latent_tile": normal(1, spec.vae.latent_channels, _LATENT_FRAMES, _LATENT_SIZE, _LATENT_SIZE + 2),
        **{name: normal(*latents) for name in _LATENT_LIKE},
        **{name: np.array(weight, np.float32) for name, weight in _WEIGHTS.items()},
        "previous_modulation": 0.3 * normal(videos, dit.double_blocks, 2, 6, dit.width),
        "computed_head_image": normal(videos, grid[0] * grid[1] * grid[2], dit.width),
        **chosen,
    }


def _as_next_inputs(outputs: Mapping[str, np.ndarray], batch: int) -> dict[str, np.ndarray]:
    """Return what later stages take from a stage's outputs: the last prompt tokens, and the rows of the first step."""
    following: dict[str, np.ndarray] = {}
    for name, value in outputs.items():
        if name == "prompt_states":
            following["text_states"] = value[:, -_TEXT_TOKENS:]
        elif name == "pooled_text" or name in _PASSED:
            following[name] = value
        elif name == "text" or name.endswith("_modulation"):
            following[name] = np.repeat(value[:1], max(batch, 1), axis=0)
    return following
