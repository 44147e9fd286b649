"""Verify weights: hold every weight of a bundle against the checkpoint that it should have been made from.

Digests are compared, so every bit counts. What a quantised bundle stores in 8 bits, or with a smoothing folded in, is
computed again from the checkpoint and the bundle's own scale file. The module runs no stage.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from reelforge.calibration.casts import Casts
from reelforge.calibration.scale_file import read_scale_file
from reelforge.calibration.weight_stream import WeightQuantisation, quantised_pieces
from reelforge.export.checkpoint.digest import digest
from reelforge.export.checkpoint.open import open_checkpoint
from reelforge.export.checkpoint.sources import Resolved
from reelforge.export.family import FAMILIES, Family
from reelforge.export.folded_weight import FoldedWeight
from reelforge.export.models.hunyuan_video.spec_from_checkpoint import Numerics
from reelforge.export.quantisation import StagePlan, attention_formats, plan_quantisation, quantised_formats
from reelforge.export.quantised_build import SCALES_NAME
from reelforge.export.quantised_weights import SCALE_SUFFIX, casts_for, row_pieces
from reelforge.export.stage import Stage
from reelforge.export.weights import resolve_stages
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.errors import VerificationError


def compare_weights(bundle: Bundle, checkpoint_path: Path) -> int:
    """Hold every weight of ``bundle`` against the checkpoint it should have been made from.

    Returns:
        How many weights were compared.

    Raises:
        VerificationError: Naming weights that differ.
        CheckpointError: If the checkpoint cannot be read.
        CalibrationError: If the scale file of a quantised bundle is damaged.
    """
    checkpoint = open_checkpoint(checkpoint_path)
    family = FAMILIES[bundle.manifest.spec.family]
    spec = family.spec(checkpoint, Numerics(bundle.manifest.provenance["numerics"]))
    recipe, parted = bundle.manifest.recipe, bundle.manifest.parted
    stages = {stage.name: stage for stage in family.stages(spec, recipe.batch, recipe.sparse_attention, parted)}
    resolved = resolve_stages(checkpoint, family.key_maps[checkpoint.layout], spec, tuple(stages.values()))
    plans = _plans(bundle, family, stages)
    compared, different = 0, []
    for entry in bundle.manifest.stages:
        expected = _digests(entry.name, resolved[entry.name], plans.get(stages[entry.name].origin, StagePlan()))
        for weight in entry.weights:
            compared += 1
            if expected[weight.name] != weight.sha256:
                different.append(f"{entry.name}.{weight.name}")
    if different:
        shown = ", ".join(different[:5]) + (f" and {len(different) - 5} more" if len(different) > 5 else "")
        raise VerificationError(
            f"{len(different)} of {compared} weights are not those of {checkpoint_path}.",
            received=shown,
            expected="weights with the digests in the manifest",
            fix="verify against the checkpoint that the bundle was built from, or rebuild it",
        )
    return compared


def _plans(bundle: Bundle, family: Family, stages: Mapping[str, Stage]) -> Mapping[str, StagePlan]:
    """Return what the bundle's recipe and scales do to its weights."""
    recipe = bundle.manifest.recipe
    if not recipe.calibrated:
        return {}
    rules = family.quantisation(bundle.manifest.spec)
    formats = quantised_formats(recipe, rules, stages)
    groups = tuple(group for stage in formats for group in rules[stage].groups)
    scales = read_scale_file(bundle.path / SCALES_NAME)
    return plan_quantisation(formats, attention_formats(recipe, rules), groups, scales, stages)


def _digests(stage: str, resolved: Mapping[str, Resolved], plan: StagePlan) -> dict[str, str]:
    """Return the digest of every weight as the plan would have it stored."""
    folded = {name: FoldedWeight(resolved[name], affine) for name, affine in plan.folded.items() if name in resolved}
    eight_bit = {f"{layer}.weight": layer_plan.weight for layer, layer_plan in plan.layers.items()}
    eight_bit = {name: how for name, how in eight_bit.items() if name in resolved}
    plain = {name: weight for name, weight in {**resolved, **folded}.items() if name not in eight_bit}
    digests = {name: found.sha256 for name, found in digest(plain).items()}
    casts = casts_for(resolved, eight_bit)
    with casts.one_thread_per_operation():
        for name, how in eight_bit.items():
            digests[name], digests[f"{name}{SCALE_SUFFIX}"] = _of_codes(f"{stage}.{name}", resolved[name], how, casts)
    return digests


def _of_codes(name: str, weight: Resolved, how: WeightQuantisation, casts: Casts) -> tuple[str, str]:
    scales = np.ones(weight.shape[0], np.float32)
    sha = hashlib.sha256()
    for piece in quantised_pieces(name, weight.dtype, weight.shape, row_pieces(weight), how, scales, casts):
        sha.update(piece.data)
    return sha.hexdigest(), hashlib.sha256(scales.tobytes()).hexdigest()
