"""What a change of a real build means for the plan cache: which stages would be compiled again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reelforge.calibration.scale_file import write_scale_file
from reelforge.export.build_request import CalibrationRequest
from reelforge.export.cache import PlanKey
from reelforge.export.calibrate import calibrate
from reelforge.export.engines.request import Expected, PlanRequest, Profile
from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.manifest import Manifest
from reelforge.runtime.recipe import Precision, Target, VideoShape
from tests.bundles import build
from tests.calibrations import INT8, formats_of, options

pytestmark = pytest.mark.usefixtures("remembered_traces")
STAGES = ("clip", "modulation", "dit")


def stage_keys(manifest: Manifest) -> dict[str, str]:
    """Return the key of each stage's plan, with requests that follow from the manifest alone."""
    target, profiles = Target.parse("rtx:sm86"), (Profile("default", {"batch": (1, 1, 1)}),)
    keys = {}
    for entry in manifest.stages:
        scaled = (weight.name for weight in entry.weights if weight.name.endswith(".scale"))
        expected = Expected(dict.fromkeys(scaled, Precision.INT8))
        request = PlanRequest(
            entry.name, entry.graph, entry.inputs, entry.outputs, target, profiles, expected, "plan", "receipt", "/tmp"
        )
        keys[entry.name] = PlanKey(request, entry.graph_digest, "tensorrt_rtx 1.7.1.116").sha256
    return keys


def from_scales(checkpoint: Path, output: Path, scales: Path, template: Path | None = None) -> Manifest:
    calibration = CalibrationRequest(scales=scales, gated=False)
    return build(
        checkpoint, output, *STAGES, precision=Precision.INT8, calibration=calibration, prompt_template=template
    )


def test_a_template_rebuilds_nothing_and_a_scale_one_stage(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = Bundle.open(tiny_bundle, Check.SIZES)
    chosen = options(prompts=("a",), steps=1, shape=VideoShape(16, 16, 1))
    provenance, tensors = calibrate(bundle, formats_of(bundle, dit=INT8), (), chosen)
    write_scale_file(tmp_path / "scales", provenance, tensors)
    (tmp_path / "template").write_text("Draw: {}<|eot_id|>")
    first = from_scales(tiny_checkpoint, tmp_path / "a", tmp_path / "scales")

    other_template = from_scales(tiny_checkpoint, tmp_path / "b", tmp_path / "scales", tmp_path / "template")
    assert other_template.content_digest != first.content_digest
    assert stage_keys(other_template) == stage_keys(first)

    changed = {**tensors, "dit.single.0.fc1.range": tensors["dit.single.0.fc1.range"] * np.float32(1.5)}
    write_scale_file(tmp_path / "changed", provenance, changed)
    other_scale = from_scales(tiny_checkpoint, tmp_path / "c", tmp_path / "changed")
    before, after = stage_keys(first), stage_keys(other_scale)
    assert {stage for stage in STAGES if before[stage] != after[stage]} == {"dit"}


def test_another_checkpoint_file_layout_finds_the_same_plans(
    tiny_checkpoint: Path, tiny_tencent_checkpoint: Path, tmp_path: Path
) -> None:
    """Equal weights in other files, from other offsets."""
    ours = build(tiny_checkpoint, tmp_path / "a", "clip", "modulation")
    theirs = build(tiny_tencent_checkpoint, tmp_path / "b", "clip", "modulation")
    assert [weight.file for weight in ours.stages[1].weights] != [weight.file for weight in theirs.stages[1].weights]
    assert stage_keys(ours) == stage_keys(theirs)


def test_the_key_needs_the_whole_manifest_of_a_stage(tiny_bundle: Path) -> None:
    """Two stages never share a key, whatever they have in common."""
    manifest = Bundle.open(tiny_bundle, Check.SIZES).manifest
    keys = stage_keys(manifest)
    assert len(set(keys.values())) == len(manifest.stages)
    same = replace(manifest, provenance={}, content_digest="")
    assert stage_keys(same) == keys
