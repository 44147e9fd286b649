"""Step caching in whole pipelines, on ONNX Runtime and on the fake GPU, against the restatement in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reelforge.runtime import Pipeline, Progress, Request
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.errors import BundleError, EngineError, RequestError
from reelforge.runtime.noise import gaussian_noise
from reelforge.runtime.recipe import Backend
from reelforge.runtime.sampling import SamplingError
from reelforge.runtime.schedule import flow_match_sigmas, sigma_steps
from reelforge.runtime.step_cache.measure import measure_ratios, measure_rescaling
from reelforge.runtime.step_cache.ratios import MagnitudeRatios
from reelforge.runtime.step_cache.rescaling import Rescaling
from reelforge.runtime.step_cache.settings import Method, Reuse, StepCache
from tests.runtime import step_models
from tests.runtime.fake_bundle import CACHED, CHANNELS, STAGES, write_fake_bundle
from tests.runtime.fake_cuda import installed
from tests.runtime.test_tensorrt_pipeline import Machine

PLAIN = Request("a ball", height=32, width=48, frames=5, steps=14, seed=3, shift=5.0)
LATENTS = (1, CHANNELS, 2, 4, 6)
RATIOS = MagnitudeRatios(
    tuple(map(float, flow_match_sigmas(14, 5.0)[:-1])), tuple(1.0 + 0.01 * ((7 * i) % 5 - 2) for i in range(14))
)
EASY = StepCache(Method.EASYCACHE, 0.4)
MAG = StepCache(Method.MAGCACHE, 0.05, ratios=RATIOS)
TEA = StepCache(Method.TEACACHE, 0.3, coefficients=Rescaling((0.5, 1.0, 0.02), 0.0, 5.0))
CACHES = [
    EASY,
    replace(EASY, reuse=Reuse.RESIDUAL, max_skips=2),
    replace(EASY, reuse=Reuse.VELOCITY, warmup=5),
    MAG,
    replace(MAG, reuse=Reuse.RESIDUAL, max_skips=1),
    TEA,
    replace(TEA, reuse=Reuse.RESIDUAL, max_skips=99, warmup=4),
]


@pytest.fixture(scope="module")
def cached_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cached") / "cached.bundle"
    write_fake_bundle(path, stages=CACHED)
    return path


@pytest.fixture(scope="module")
def pipeline(cached_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(cached_bundle, threads=1) as opened:
        yield opened


@pytest.fixture
def machine(cached_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Backend], Machine]]:
    with ExitStack() as stack:

        def make(backend: Backend) -> Machine:
            made = Machine(Bundle.open(cached_bundle), backend)
            modules = {"cuda.bindings.runtime": made.cuda, made.library.__name__: made.library}
            stack.enter_context(installed(monkeypatch, modules))
            return made

        yield make


def sampled(pipeline: Pipeline, request: Request) -> tuple[np.ndarray, list[bool]]:
    """Final latents, and for each step whether it was computed."""
    resolved = pipeline.resolve(request)
    skipped: list[int] = []

    def note(progress: Progress) -> None:
        if progress.phase == "sampling":
            skipped.append(progress.skipped)

    pipeline.generate(request, note)
    conditions = pipeline.condition(resolved, pipeline.encode_text(resolved.prompt))
    latents = pipeline.sample(resolved, conditions)
    return latents, [later == earlier for earlier, later in zip([0, *skipped], skipped, strict=False)]


def restated(pipeline: Pipeline, request: Request) -> step_models.Expected:
    """The fake model is ``0.5 x`` and a number per step."""
    resolved = pipeline.resolve(request)
    conditions = pipeline.condition(resolved, pipeline.encode_text(resolved.prompt))
    tables = sum(table.astype(np.float64).mean() for table in conditions.fixed.values())
    names = ("text", "double_modulation", "single_modulation", "final_modulation")
    offsets = [
        tables + sum(conditions.per_step[name][step].astype(np.float64).mean() for name in names)
        for step in range(resolved.steps)
    ]
    cache = request.step_cache
    assert cache is not None
    noise, schedule = gaussian_noise(LATENTS, request.seed), sigma_steps(flow_match_sigmas(resolved.steps, 5.0))
    common = (
        lambda x, step: 0.5 * x + offsets[step], noise, schedule, cache.threshold, cache.first_steps(resolved.steps),
        cache.reuse, cache.longest_run(),
    )  # fmt: skip
    if cache.coefficients is not None:
        shifts = conditions.per_step["double_modulation"].reshape(resolved.steps, -1).mean(axis=1, dtype=np.float64)
        return step_models.teacache(*common, shifts, cache.coefficients.coefficients)
    if cache.ratios is None:
        return step_models.easycache(*common)
    return step_models.magcache(*common, np.asarray(cache.ratios.ratios))


@pytest.mark.parametrize("cache", CACHES)
def test_a_loop_is_the_papers(pipeline: Pipeline, cache: StepCache) -> None:
    request = replace(PLAIN, step_cache=cache)
    expected = restated(pipeline, request)
    assert min(expected.margins) > 1e-4, "choose another threshold: a decision hangs on the last bits"
    latents, computed = sampled(pipeline, request)
    assert computed == expected.computed
    assert 3 <= computed.count(False) <= 10
    np.testing.assert_allclose(latents, expected.latents, atol=3e-5)


@pytest.mark.parametrize("backend", [Backend.RTX, Backend.TRT])
@pytest.mark.parametrize("cache", [EASY, MAG, TEA])
def test_a_gpus_loop_is_the_cpus(
    pipeline: Pipeline, machine: Callable[[Backend], Machine], cache: StepCache, backend: Backend
) -> None:
    made = machine(backend)
    request = replace(PLAIN, step_cache=cache)
    with made.pipeline() as gpu:
        latents, computed = sampled(gpu, request)
        made.library.executions.clear()
        frames = gpu.generate(request)
        calls = [Path(path).name.partition(".")[0] for path in made.library.executions]
    expected, expected_computed = sampled(pipeline, request)
    np.testing.assert_array_equal(latents, expected)
    np.testing.assert_array_equal(frames, pipeline.generate(request))
    assert computed == expected_computed
    assert calls.count("dit") == computed.count(True)
    assert calls.count("step_reuse") == computed.count(False)
    for stage, asked in (("step_change", EASY), ("input_change", TEA)):
        assert calls.count(stage) == (PLAIN.steps - cache.first_steps(PLAIN.steps) - 1 if cache is asked else 0)
    made.require_nothing_left()


@pytest.mark.parametrize("backend", [Backend.CPU, Backend.RTX])
@pytest.mark.parametrize("guidance", [{}, {"cfg_scale": 3.0, "negative_prompt": "blurred"}])
def test_a_threshold_of_zero_is_the_plain_loop_bit_for_bit(
    pipeline: Pipeline, machine: Callable[[Backend], Machine], backend: Backend, guidance: dict[str, object]
) -> None:
    request = replace(PLAIN, **guidance)  # type: ignore[arg-type]
    expected = pipeline.generate(request)
    with pipeline if backend is Backend.CPU else machine(backend).pipeline() as used:
        for cache in CACHES:
            cached = replace(request, step_cache=replace(cache, threshold=0.0))
            np.testing.assert_array_equal(used.generate(cached), expected)


def test_guidance_is_cached_whole(pipeline: Pipeline) -> None:
    """Both evaluations of a guided step are skipped together, and the guided velocity is what is reused."""
    request = replace(PLAIN, cfg_scale=3.0, negative_prompt="blurred", step_cache=EASY)
    seen: list[Progress] = []
    pipeline.generate(request, seen.append)
    assert max(event.skipped for event in seen) >= 3


def test_a_request_may_be_repeated(pipeline: Pipeline) -> None:
    """Nothing of a loop is left for the next one."""
    request = replace(PLAIN, step_cache=EASY)
    expected = pipeline.generate(request)
    plain = pipeline.generate(PLAIN)
    assert not np.array_equal(expected, plain)
    np.testing.assert_array_equal(pipeline.generate(request), expected)
    np.testing.assert_array_equal(pipeline.generate(PLAIN), plain)


def test_a_cache_that_fails_keeps_the_latents(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from reelforge.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine

    run = OnnxRuntimeEngine.run

    def failing(self: OnnxRuntimeEngine, *arguments: object) -> object:
        if self.name == "step_change":
            raise EngineError("the power is out.")
        return run(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(OnnxRuntimeEngine, "run", failing)
    with pytest.raises(SamplingError, match=r"step 3 of 14 .* the power is out") as caught:
        pipeline.generate(replace(PLAIN, step_cache=EASY))
    assert caught.value.step == 2
    assert caught.value.latents.shape == LATENTS


def test_a_bundle_without_the_stages(fake_bundle: Path, tmp_path: Path) -> None:
    write_fake_bundle(tmp_path / "some", stages=(*STAGES, "step_reuse"))
    with Pipeline.open(tmp_path / "some", threads=1) as some:
        with pytest.raises(RequestError, match=r"step_cache=easycache is not supported") as caught:
            some.resolve(replace(PLAIN, step_cache=EASY))
        assert "the bundle has no stage 'step_change'" in str(caught.value)
        assert "rebuild with build-engine" in str(caught.value)
        some.resolve(replace(PLAIN, step_cache=MAG))
        with pytest.raises(BundleError, match="has no stage 'step_change'"):
            measure_ratios(some, [PLAIN])
        with pytest.raises(BundleError, match="has no stage 'input_change'"):
            measure_rescaling(some, [PLAIN])
        with pytest.raises(RequestError, match="step_cache=teacache is not supported") as caught:
            some.resolve(replace(PLAIN, step_cache=TEA))
        assert "the bundle has no stage 'input_change'" in str(caught.value)
    with Pipeline.open(fake_bundle, threads=1) as plain, pytest.raises(RequestError) as caught:
        plain.resolve(replace(PLAIN, step_cache=EASY))
    assert "no stage 'step_change' and no 'step_reuse'" in str(caught.value)


def test_what_a_request_gets_wrong_is_listed_with_everything_else(pipeline: Pipeline) -> None:
    wrong = replace(PLAIN, steps=0, step_cache=StepCache(Method.MAGCACHE, -1.0, warmup=0))
    with pytest.raises(RequestError) as caught:
        pipeline.resolve(wrong)
    tea = replace(PLAIN, step_cache=StepCache(Method.TEACACHE, 0.1))
    with pytest.raises(RequestError, match="step_cache teacache without coefficients is not supported") as caught:
        pipeline.resolve(tea)
    for said in ("none are published for a model of this size", "reelforge measure-coefficients"):
        assert said in str(caught.value)
    with pytest.raises(RequestError) as caught:
        pipeline.resolve(wrong)
    for said in ("steps=0", "step_cache threshold=-1.0", "step_cache warmup=0", "step_cache magcache without ratios"):
        assert said in str(caught.value)
    with pytest.raises(RequestError, match=r"step_cache='easycache:0\.1'") as caught:
        pipeline.resolve(replace(PLAIN, step_cache="easycache:0.1"))  # type: ignore[arg-type]
    assert "StepCache.parse" in str(caught.value)


def test_measured_ratios_are_the_papers(pipeline: Pipeline) -> None:
    requests = [PLAIN, replace(PLAIN, prompt="two balls", seed=4)]
    steps: list[tuple[int, int]] = []
    measured = measure_ratios(pipeline, requests, lambda *done: steps.append(done))
    assert steps == [(step, 28) for step in range(1, 29)]
    rows = []
    for request in requests:
        resolved = pipeline.resolve(request)
        conditions = pipeline.condition(resolved, pipeline.encode_text(request.prompt))
        latents, residuals = gaussian_noise(LATENTS, request.seed), []
        with pipeline.engine("dit") as dit:
            for step in range(resolved.steps):
                row = {name: rows_of[step, ...] for name, rows_of in conditions.per_step.items()}
                outputs = dit.run({"latents": latents, **conditions.fixed, **row})
                residuals.append(outputs["velocity"].astype(np.float64) - latents)
                latents = outputs["next_latents"]
        norms = [np.sqrt((residual**2).sum(axis=1)) for residual in residuals]
        rows.append([1.0, *((later / earlier).mean() for earlier, later in itertools.pairwise(norms))])
    np.testing.assert_allclose(measured.ratios, np.mean(rows, axis=0), rtol=1e-5)
    np.testing.assert_allclose(measured.spread, np.std(rows, axis=0), atol=1e-6)
    np.testing.assert_allclose(measured.sigmas, flow_match_sigmas(14, 5.0)[:-1])
    assert measured.problem() == ""
    assert (measured.generations, measured.bundle) == (2, pipeline.bundle.manifest.content_digest)
    used = replace(PLAIN, step_cache=StepCache(Method.MAGCACHE, 0.5, ratios=measured))
    assert not np.array_equal(pipeline.generate(used), pipeline.generate(PLAIN))


def test_measured_coefficients_are_the_papers(pipeline: Pipeline) -> None:
    requests = [replace(PLAIN, steps=9), replace(PLAIN, prompt="two balls", seed=4, steps=7)]
    steps: list[tuple[int, int]] = []
    measured = measure_rescaling(pipeline, requests, lambda *done: steps.append(done))
    assert steps == [(step, 16) for step in range(1, 17)]
    changes, moved = [], []
    for request in requests:
        resolved = pipeline.resolve(request)
        conditions = pipeline.condition(resolved, pipeline.encode_text(request.prompt))
        latents, given, velocities = gaussian_noise(LATENTS, request.seed), [], []
        with pipeline.engine("dit") as dit:
            for step in range(resolved.steps):
                row = {name: rows[step, ...] for name, rows in conditions.per_step.items()}
                outputs = dit.run({"latents": latents, **conditions.fixed, **row})
                given.append(latents + row["double_modulation"].astype(np.float64).mean())
                velocities.append(outputs["velocity"].astype(np.float64))
                latents = outputs["next_latents"]
        for found, series in ((changes, given), (moved, velocities)):
            found += [np.abs(b - a).mean() / np.abs(a).mean() for a, b in itertools.pairwise(series)]
    assert measured.least == pytest.approx(min(changes), rel=1e-5)
    assert measured.most == pytest.approx(max(changes), rel=1e-5)
    assert (measured.generations, measured.bundle) == (2, pipeline.bundle.manifest.content_digest)
    assert measured.problem() == ""
    expected = np.polyval(np.polyfit(changes, moved, 4), changes)
    np.testing.assert_allclose([measured.estimate(change) for change in changes], expected, atol=2e-4)
    used = replace(PLAIN, step_cache=StepCache(Method.TEACACHE, 0.5, coefficients=measured))
    assert not np.array_equal(pipeline.generate(used), pipeline.generate(PLAIN))


def test_too_few_steps_give_no_polynomial(pipeline: Pipeline) -> None:
    with pytest.raises(RequestError, match="too few steps to fit a polynomial") as caught:
        measure_rescaling(pipeline, [replace(PLAIN, steps=3), replace(PLAIN, steps=3)])
    assert "4 pairs of steps" in str(caught.value)
    assert "at least 5" in str(caught.value)


def test_a_loop_that_goes_on_computes_its_first_two_steps(pipeline: Pipeline) -> None:
    """What the steps before had computed is gone; nothing is extrapolated from it."""
    request = replace(PLAIN, step_cache=StepCache(Method.MAGCACHE, 1.0, ratios=RATIOS, max_skips=2))
    latents = gaussian_noise(LATENTS, 1)
    events = pipeline.stream(request, latents=latents, first_step=6)
    skipped = [event.skipped for event in events if isinstance(event, Progress) and event.phase == "sampling"]
    assert skipped == [0, 0, 1, 2, 2, 3, 4, 4]
