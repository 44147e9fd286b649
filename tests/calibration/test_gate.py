"""The gate on real pipelines: what is measured, what is not run twice, what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from reelforge.calibration.comparison import Checks, changed_stages, compare
from reelforge.calibration.gate import measure_quality, meets, require_quality, summarise
from reelforge.calibration.number_formats import FP8_E4M3, INT8
from reelforge.calibration.quality import cosine, drift, psnr, ssim
from reelforge.calibration.reference_run import ReferenceRun, run_reference
from reelforge.export.variants import LayerScales, Variants
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.codec import from_json, to_json
from reelforge.runtime.engines.engine import Array, Engine
from reelforge.runtime.errors import RequestError, VerificationError
from reelforge.runtime.events import Progress
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.quality import QualityReport, QualityThresholds, StageQuality
from reelforge.runtime.recipe import VideoShape
from reelforge.runtime.request import Request
from tests.export.passes.layer_model import around_zero
from tests.variants import PROMPTS, SHAPE, STEPS, input_maxima, layer_scales

SEED = 3
REPORT = QualityReport(
    prompts=("a", "b", "c"),
    seed=1,
    shape=VideoShape(32, 48, 5),
    steps=2,
    stages={"dit": StageQuality(0.99, 0.995, 0.1, 0.05)},
    velocity_cosine=(0.9991, 0.9925),
    latent_drift=(0.01, 0.03),
    psnr_db=(35.0, 25.5, None),
    ssim=(0.97, 0.9, 1.0),
)


class Counting(Pipeline):
    """Counts engines loaded and runs; knows how many were loaded at the same time, and may spoil an output."""

    def __init__(self, inner: Pipeline, spoil: str = "") -> None:
        super().__init__(inner.bundle, inner.options)
        self.inner, self.spoil = inner, spoil
        self.loads: Counter[str] = Counter()
        self.runs: Counter[str] = Counter()
        self.open: set[str] = set()
        self.together: set[frozenset[str]] = set()

    @contextmanager
    def engine(self, stage: str) -> Iterator[Engine]:
        self.loads[stage] += 1
        self.open.add(stage)
        self.together.add(frozenset(self.open))
        with self.inner.engine(stage) as engine:
            yield _CountingEngine(engine, self)
        self.open.remove(stage)


class _CountingEngine:
    def __init__(self, engine: Engine, owner: Counting) -> None:
        self.engine, self.owner = engine, owner
        self.name, self.inputs, self.outputs = engine.name, engine.inputs, engine.outputs

    def run(self, inputs: dict[str, Array], outputs: dict[str, Array | None] | None = None) -> dict[str, Array]:
        self.owner.runs[self.name] += 1
        result = self.engine.run(inputs, outputs)
        if self.owner.spoil == self.name:
            next(iter(result.values())).reshape(-1)[-1] = np.nan
        return result

    def close(self) -> None:
        self.engine.close()


@pytest.fixture(scope="module")
def reference(tiny_bundle: Path) -> Pipeline:
    return Pipeline.open(tiny_bundle)


@pytest.fixture(scope="module")
def maxima(reference: Pipeline) -> dict[str, float]:
    return input_maxima(reference, INT8)


@pytest.fixture(scope="module")
def candidate(reference: Pipeline, maxima: dict[str, float]) -> Pipeline:
    variants = Variants(reference, "dit", layer_scales(maxima, INT8))
    return variants.pipeline_of(variants.layers)


@pytest.fixture(scope="module")
def run(reference: Pipeline) -> ReferenceRun:
    return run_reference(reference, PROMPTS, SEED, STEPS, SHAPE)


@pytest.fixture(scope="module")
def report(run: ReferenceRun, candidate: Pipeline) -> QualityReport:
    return summarise(run, compare(run, candidate))


def with_modulation(pipeline: Pipeline) -> Pipeline:
    """The same pipeline, whose manifest says that its modulation is another."""
    manifest = pipeline.bundle.manifest
    entries = tuple(
        dataclasses.replace(entry, graph_digest="other") if entry.name == "modulation" else entry
        for entry in manifest.stages
    )
    return Pipeline(Bundle(pipeline.bundle.path, dataclasses.replace(manifest, stages=entries)), pipeline.options)


def test_the_reference_run_is_the_pipeline_s_own(reference: Pipeline, run: ReferenceRun) -> None:
    request = reference.resolve(Request(PROMPTS[1], SHAPE.height, SHAPE.width, SHAPE.frames, STEPS, SEED + 1))
    final = reference.sample(request, reference.condition(request, reference.encode_text(request.prompt)))
    assert run.videos[1].request == request
    assert np.array_equal(run.videos[1].latents[-1], final)
    assert [len(video.latents) for video in run.videos] == [STEPS + 1] * 2
    assert [len(video.velocities) for video in run.videos] == [STEPS] * 2


def test_the_numbers_of_a_report(
    reference: Pipeline, candidate: Pipeline, run: ReferenceRun, report: QualityReport
) -> None:
    """Again, with the pipelines' own methods."""
    assert report.prompts == PROMPTS
    assert (report.seed, report.shape, report.steps) == (SEED, SHAPE, STEPS)
    assert list(report.stages) == ["dit"]
    finals, cosines, drifts = [], [], []
    for video in run.videos:
        conditions = candidate.condition(video.request, candidate.encode_text(video.request.prompt))
        finals.append(candidate.sample(video.request, conditions))
        trajectory, latents = [], video.latents[0]
        with candidate.engine("dit") as dit:
            for step in range(STEPS):
                rows = {name: row[step, ...] for name, row in conditions.per_step.items()}
                velocity = dit.run({"latents": video.latents[step], **conditions.fixed, **rows})["velocity"]
                cosines.append(cosine(velocity, video.velocities[step]))
                latents = dit.run({"latents": latents, **conditions.fixed, **rows})["next_latents"]
                trajectory.append(latents)
        assert np.array_equal(trajectory[-1], finals[-1])
        drifts.append(drift(trajectory, video.latents[1:]))
    by_step = np.array(cosines).reshape(2, STEPS).min(axis=0)
    assert report.velocity_cosine == pytest.approx(by_step, abs=1e-8)
    assert report.latent_drift == pytest.approx(np.max(drifts, axis=0), rel=1e-4)
    assert report.stages["dit"].cosine_min == pytest.approx(min(cosines), abs=1e-8)
    assert report.stages["dit"].cosine_median == pytest.approx(np.median(cosines), abs=1e-8)
    for index, (video, final) in enumerate(zip(run.videos, finals, strict=True)):
        expected = np.concatenate(list(reference.decode(video.latents[-1])))
        received = np.concatenate(list(reference.decode(final)))
        assert report.psnr_db[index] == pytest.approx(psnr(received, expected), abs=1e-3)
        assert report.ssim[index] == pytest.approx(ssim(received, expected), abs=1e-6)
    assert 20 < report.psnr_median_db < 80
    assert 0.99 < report.velocity_cosine_worst < 1


def test_stages_that_are_the_same_run_once(reference: Pipeline, candidate: Pipeline) -> None:
    counted, other = Counting(reference), Counting(candidate)
    phases: list[Progress] = []
    measure_quality(counted, other, PROMPTS, SEED, STEPS, SHAPE, phases.append)
    assert other.loads == {"dit": 1}
    assert other.runs == {"dit": 2 * 2 * STEPS}  # on the reference's trajectory and on its own
    assert counted.loads == dict.fromkeys(("llm", "clip", "refiner", "modulation", "dit", "vae_decoder"), 1)
    assert counted.runs["dit"] == 2 * STEPS
    assert counted.runs["llm"] == counted.runs["modulation"] == 2
    assert not counted.open
    assert not other.open
    for together in counted.together:
        assert "dit" not in together or len(together) == 1
    assert {phase.phase for phase in phases if phase.step == phase.total} == {phase.phase for phase in phases}


def test_a_bundle_against_itself(reference: Pipeline) -> None:
    other = Counting(reference)
    report = measure_quality(reference, other, PROMPTS[:1], SEED, STEPS, SHAPE)
    assert not other.loads
    assert report.stages == {}
    assert report.velocity_cosine == (1.0,) * STEPS
    assert report.latent_drift == (0.0,) * STEPS
    assert (report.psnr_db, report.ssim) == ((None,), (1.0,))
    assert report.psnr_median_db == report.psnr_worst_db == math.inf
    require_quality(report, QualityThresholds(psnr_db=200, velocity_cosine=1))


def test_modulation_is_judged_together_with_dit(reference: Pipeline, run: ReferenceRun) -> None:
    """Smoothing moves factors between them, so that dit must get the candidate's vectors."""
    other = Counting(with_modulation(reference))
    assert changed_stages(reference, other) == {"modulation"}
    comparison = compare(run, other, Checks(video=False))
    assert other.loads == {"modulation": 1, "dit": 1}
    assert list(comparison.stages) == ["dit"]
    assert all(loss.relative_error < 1e-6 for loss in comparison.stages["dit"])


@pytest.mark.parametrize(
    ("stage", "layer", "scale"),
    [("llm", "layers.0.mlp.up_proj", 0.1), ("vae_decoder", "decoder.mid_block.resnets.0.conv1.conv", 0.03)],
)
def test_a_stage_around_the_loop(reference: Pipeline, stage: str, layer: str, scale: float) -> None:
    candidate = Variants(reference, stage, {layer: LayerScales(INT8, around_zero(scale))}).pipeline_of((layer,))
    report = measure_quality(reference, candidate, PROMPTS[:1], SEED, 2, SHAPE)
    assert list(report.stages) == [stage]
    quality = report.stages[stage]
    assert 0.9 < quality.cosine_min <= quality.cosine_median < 1
    assert 0 < quality.relative_error_median <= quality.relative_error_max < 1
    assert (report.latent_drift[-1] > 0) == (stage == "llm")
    assert (report.velocity_cosine[-1] < 1) == (stage == "llm")
    assert (report.psnr_db[0] or 999) < 200


def test_fp8_is_measured_too(reference: Pipeline, maxima: dict[str, float], run: ReferenceRun) -> None:
    variants = Variants(reference, "dit", layer_scales(maxima, FP8_E4M3))
    comparison = compare(run, variants.pipeline_of(variants.layers), Checks(video=False))
    assert 0.99 < min(loss.cosine for loss in comparison.stages["dit"]) < 1


def test_a_report_survives_json(report: QualityReport) -> None:
    for value in (report, REPORT):
        text = json.dumps(to_json(value), allow_nan=False)
        assert from_json(QualityReport, json.loads(text)) == value


def test_median_and_worst() -> None:
    assert (REPORT.psnr_median_db, REPORT.psnr_worst_db) == (35.0, 25.5)
    assert (REPORT.ssim_median, REPORT.ssim_worst) == (0.97, 0.9)
    assert REPORT.velocity_cosine_worst == 0.9925


def test_default_thresholds() -> None:
    assert QualityThresholds.for_precisions(["int8", "fp32"]) == QualityThresholds(30.0)
    assert QualityThresholds.for_precisions(["fp8"]) == QualityThresholds(33.0)
    assert QualityThresholds.for_precisions(["fp8", "int8"]) == QualityThresholds(30.0)
    assert QualityThresholds.for_precisions(["fp16"]) == QualityThresholds(0.0)


@pytest.mark.parametrize(
    "thresholds",
    [QualityThresholds(35.0), QualityThresholds(), QualityThresholds(0, 0.9925), QualityThresholds(34.99, 0.99)],
)
def test_what_is_accepted(thresholds: QualityThresholds) -> None:
    assert meets(REPORT, thresholds)
    require_quality(REPORT, thresholds)


def test_zero_disables_the_gate() -> None:
    """Even where the videos have nothing in common."""
    lost = dataclasses.replace(REPORT, psnr_db=(-3.0,), velocity_cosine=(0.0,))
    require_quality(lost, QualityThresholds())


def test_what_is_refused_and_what_the_message_says() -> None:
    thresholds = QualityThresholds(40.0, 0.999)
    assert not meets(REPORT, thresholds)
    with pytest.raises(VerificationError) as caught:
        require_quality(REPORT, thresholds, ["dit.single.3.fc1", "dit.single.3.v"])
    assert caught.value.exit_code == 6
    text = str(caught.value)
    for part in (
        "VerificationError: the quantised bundle is further from its reference than the recipe allows; the worst "
        "layers are dit.single.3.fc1, dit.single.3.v.",
        "received: median PSNR 35.00 dB (worst 25.50 dB), velocity cosine 0.99250 at step 1",
        "expected: at least 40 dB, at least 0.999",
        "fix: keep these layers in high precision: dit.single.3.fc1, dit.single.3.v; or calibrate with another method "
        "or with smoothing, find the layers to keep with `reelforge sensitivity --quality-budget`, or accept less",
    ):
        assert part in text
    with pytest.raises(VerificationError, match="than the recipe allows\\.\n"):
        require_quality(REPORT, thresholds)


@pytest.mark.parametrize("stage", ["llm", "dit", "vae_decoder"])
def test_numbers_that_are_not_finite(reference: Pipeline, candidate: Pipeline, run: ReferenceRun, stage: str) -> None:
    manifest = candidate.bundle.manifest
    entries = tuple(
        dataclasses.replace(entry, graph_digest="other") if entry.name == stage else entry for entry in manifest.stages
    )
    other = Pipeline(Bundle(candidate.bundle.path, dataclasses.replace(manifest, stages=entries)), candidate.options)
    with pytest.raises(VerificationError) as caught:
        compare(run, Counting(other, spoil=stage), Checks(steps=(1,)))
    text = str(caught.value)
    assert f"of stage {stage!r}" in text
    assert "is not finite" in text
    assert "NaN or infinite of" in text
    assert "keep more layers of the stage in high precision" in text


def test_there_is_no_video_without_a_loop() -> None:
    with pytest.raises(ValueError, match="no video without the loop"):
        Checks(loop=False)


def test_no_prompts(reference: Pipeline) -> None:
    with pytest.raises(RequestError, match="there is no prompt to compare videos of"):
        measure_quality(reference, reference, [], SEED)


def test_two_models(reference: Pipeline, run: ReferenceRun) -> None:
    manifest = reference.bundle.manifest
    spec = dataclasses.replace(manifest.spec, defaults=dataclasses.replace(manifest.spec.defaults, shift=1.5))
    other = Pipeline(Bundle(reference.bundle.path, dataclasses.replace(manifest, spec=spec)), reference.options)
    with pytest.raises(RequestError, match="are of different models"):
        compare(run, other)
