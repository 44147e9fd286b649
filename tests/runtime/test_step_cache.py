"""Step caching against the papers' algorithms restated in float64, and its edges: nothing skipped, NaN, first, last."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from reelforge.runtime.registers import HostRegisters
from reelforge.runtime.sampling import SamplingError, take_step
from reelforge.runtime.schedule import flow_match_sigmas, sigma_steps
from reelforge.runtime.step_cache.cached_step import CachedStep
from reelforge.runtime.step_cache.criteria import Criterion, EasyCache, FirstBlockCache, MagCache, TeaCache
from reelforge.runtime.step_cache.rescaling import Rescaling
from reelforge.runtime.step_cache.settings import Reuse
from reelforge.runtime.step_program import Evaluation, RegisterLoop
from tests.runtime import step_models
from tests.runtime.step_models import (
    HEAD_INPUTS,
    Halves,
    NumpyEngine,
    change_engine,
    head_engine,
    input_engine,
    model_engine,
    random_velocity,
    reuse_engine,
    sampled,
)

SHAPE = (1, 3, 2, 4, 2)
STEPS = 12
ROWS = np.ones((STEPS, 1, 2, 2, 6, 4), np.float32)
NEVER = Rescaling((0.0, -1.0))
"""Says that the velocity never moves, and without its floor that it moves backwards."""


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def schedule(steps: int, shift: float = 5.0) -> np.ndarray:
    return sigma_steps(flow_match_sigmas(steps, shift))


OF_VELOCITIES = [how for how in Reuse if how is not Reuse.TOKENS]
reuses = st.sampled_from(OF_VELOCITIES)
runs = st.one_of(st.none(), st.integers(1, 5))


@given(st.integers(0, 10_000), st.integers(1, 16), st.floats(0, 0.6), st.integers(2, 6), reuses, runs)
@settings(max_examples=80, deadline=None)
def test_easycache_is_the_papers(
    seed: int, steps: int, threshold: float, warmup: int, how: Reuse, max_skips: int | None
) -> None:
    velocity = random_velocity(seed, steps, SHAPE)
    expected = step_models.easycache(velocity, noise(seed), schedule(steps), threshold, warmup, how, max_skips)
    assume(min(expected.margins, default=1) > 1e-4)
    criterion = EasyCache(change_engine(), threshold, max_skips)
    latents, computed = sampled(velocity, criterion, noise(seed), schedule(steps), warmup, how)
    assert computed == expected.computed
    np.testing.assert_allclose(latents, expected.latents, atol=2e-5, rtol=2e-5)


@given(st.integers(0, 10_000), st.integers(1, 16), st.floats(0, 0.6), st.integers(2, 6), reuses, runs)
@settings(max_examples=80, deadline=None)
def test_magcache_is_the_papers(
    seed: int, steps: int, threshold: float, warmup: int, how: Reuse, max_skips: int | None
) -> None:
    velocity = random_velocity(seed, steps, SHAPE)
    ratios = np.random.default_rng(seed).uniform(0.9, 1.1, steps)
    expected = step_models.magcache(velocity, noise(seed), schedule(steps), threshold, warmup, how, max_skips, ratios)
    assume(min(expected.margins, default=1) > 1e-9)
    criterion = MagCache(list(ratios), threshold, max_skips)
    latents, computed = sampled(velocity, criterion, noise(seed), schedule(steps), warmup, how)
    assert computed == expected.computed
    np.testing.assert_allclose(latents, expected.latents, atol=2e-5, rtol=2e-5)


@given(st.integers(0, 10_000), st.integers(1, 16), st.floats(0, 0.6), st.integers(2, 6), reuses, runs)
@settings(max_examples=80, deadline=None)
def test_teacache_is_the_papers(
    seed: int, steps: int, threshold: float, warmup: int, how: Reuse, max_skips: int | None
) -> None:
    velocity = random_velocity(seed, steps, SHAPE)
    random = np.random.default_rng(seed)
    modulation = random.standard_normal((steps, 1, 2, 2, 6, 4)).astype(np.float32)
    coefficients, ends = random.uniform(-1, 1, 5), (0.05, 0.4)
    shifts = modulation.reshape(steps, -1).mean(axis=1, dtype=np.float64)
    common = (velocity, noise(seed), schedule(steps), threshold, warmup, how, max_skips, shifts)
    expected = step_models.teacache(*common, tuple(coefficients), ends)
    assume(min(expected.margins, default=1) > 1e-4)
    criterion = TeaCache(input_engine(), modulation, Rescaling(tuple(coefficients), *ends), threshold, max_skips)
    latents, computed = sampled(velocity, criterion, noise(seed), schedule(steps), warmup, how)
    assert computed == expected.computed
    np.testing.assert_allclose(latents, expected.latents, atol=2e-5, rtol=2e-5)


@given(st.integers(0, 10_000), st.integers(1, 16), st.floats(0, 1.5), st.integers(2, 6), st.sampled_from(Reuse), runs)
@settings(max_examples=120, deadline=None)
def test_first_block_cache_is_paraattentions(
    seed: int, steps: int, threshold: float, warmup: int, how: Reuse, max_skips: int | None
) -> None:
    model = Halves(seed, steps)
    expected = step_models.fbcache(model, noise(seed), schedule(steps), threshold, warmup, how, max_skips)
    assume(min(expected.margins, default=1) > 1e-4)
    parts, criterion = model.parts(), FirstBlockCache(head_engine(), threshold, max_skips)
    latents, computed = sampled(model.velocity, criterion, noise(seed), schedule(steps), warmup, how, dit=parts)
    assert computed == expected.computed
    np.testing.assert_allclose(latents, expected.latents, atol=5e-5, rtol=5e-5)
    calls = [engine.calls for engine in (parts.head, parts.body, parts.tail, parts.reuse)]
    skipped = computed.count(False)
    reused = skipped if how is Reuse.TOKENS else 0
    assert calls == [steps, steps - skipped, steps - skipped + reused, reused], "the head always, the body if computed"


@given(st.integers(0, 10_000), st.integers(3, 16), st.floats(0.05, 0.6), st.sampled_from(["easy", "mag", "tea"]))
@settings(max_examples=60, deadline=None)
def test_any_criterion_may_reuse_tokens(seed: int, steps: int, threshold: float, which: str) -> None:
    """The same steps are skipped as first-block cache would with the same decisions, and give what it gives."""
    model = Halves(seed, steps)
    criterion: Criterion = {
        "easy": EasyCache(change_engine(), threshold, 2),
        "mag": MagCache(list(np.random.default_rng(seed).uniform(0.8, 1.2, steps)), threshold, 2),
        "tea": TeaCache(input_engine(), np.ones((steps, 2), np.float32), Rescaling((1.0, 0.0)), threshold, 2),
    }[which]
    latents, computed = sampled(
        model.velocity, criterion, noise(seed), schedule(steps), 2, Reuse.TOKENS, dit=model.parts()
    )
    x, rest = noise(seed).astype(np.float64), np.zeros(SHAPE)
    for step, sigma_step in enumerate(schedule(steps)):
        image = model.head(x, step)
        rest = model.body(image, step) - image if computed[step] else rest
        x = x + float(sigma_step) * 0.5 * (image + rest)
    np.testing.assert_allclose(latents, x, atol=5e-5, rtol=5e-5)


def test_a_head_that_is_not_a_number_is_computed() -> None:
    model = Halves(1, STEPS)
    parts = model.parts()
    asked = FirstBlockCache(NumpyEngine("head_change", lambda _: {"head_change": np.array(np.nan)}, HEAD_INPUTS), 1e30)
    _, computed = sampled(model.velocity, asked, noise(), schedule(STEPS), 2, Reuse.TOKENS, dit=parts)
    assert all(computed)


def test_the_cases_are_mixed() -> None:
    """The properties above see runs with many skips and runs with few: they are not about loops that skip nothing."""
    skipped = set()
    for seed in range(20):
        velocity = random_velocity(seed, STEPS, SHAPE)
        expected = step_models.easycache(velocity, noise(seed), schedule(STEPS), 0.2, 2, Reuse.RESIDUAL)
        skipped.add(expected.computed.count(False))
    assert len(skipped) >= 4


@pytest.mark.parametrize("how", OF_VELOCITIES)
@pytest.mark.parametrize(
    "criterion",
    [EasyCache(change_engine(), 0.0), MagCache([1.0] * STEPS, 0.0, None), TeaCache(input_engine(), ROWS, NEVER, 0.0)],
)
def test_a_threshold_of_zero_computes_every_step_bit_for_bit(criterion: Criterion, how: Reuse) -> None:
    velocity = random_velocity(3, STEPS, SHAPE)
    latents, computed = sampled(velocity, criterion, noise(), schedule(STEPS), 2, how)
    assert all(computed)
    rows = {"step": np.arange(STEPS, dtype=np.float32), "sigma_step": schedule(STEPS)}
    plain = RegisterLoop(HostRegisters(), Evaluation(model_engine(velocity), {}, rows), noise())
    np.testing.assert_array_equal(latents, step_models.run(plain, STEPS)[0])


@pytest.mark.parametrize("warmup", [0, 2, 5, STEPS, 50])
@pytest.mark.parametrize("steps", [1, 2, 3, STEPS])
def test_the_first_steps_and_the_last_are_always_computed(steps: int, warmup: int) -> None:
    criterion = MagCache([1.0] * steps, 1.0, None)  # would skip everything
    velocity = random_velocity(1, steps, SHAPE)
    _, computed = sampled(velocity, criterion, noise(), schedule(steps), warmup, Reuse.RESIDUAL)
    first = max(warmup, 2)
    assert computed == [step < first or step == steps - 1 for step in range(steps)]


def test_a_skipped_step_costs_no_evaluation() -> None:
    velocity = random_velocity(1, STEPS, SHAPE)
    dit = model_engine(velocity)
    _, computed = sampled(
        velocity, MagCache([1.0] * STEPS, 1.0, 3), noise(), schedule(STEPS), 2, Reuse.VELOCITY, dit=dit
    )
    assert dit.calls == computed.count(True)
    runs_of_skips = "".join("c" if one else "s" for one in computed)
    assert runs_of_skips == "cc" + "sssc" * 2 + "sc"


def test_reuse_is_exact_where_the_model_is_what_it_assumes() -> None:
    """A velocity that never changes, one that is a line in sigma, and one whose residual never changes."""
    steps = schedule(STEPS, shift=1.0).astype(np.float64)
    sigmas = np.concatenate([[0.0], np.cumsum(steps)])
    one, other = noise(1).astype(np.float64), noise(2).astype(np.float64)
    models = {
        Reuse.VELOCITY: lambda x, step: one,
        Reuse.EXTRAPOLATE: lambda x, step: one + sigmas[step] * other,
        Reuse.RESIDUAL: lambda x, step: x + one,
    }
    for how, velocity in models.items():
        for cached in OF_VELOCITIES:
            every_second = MagCache([1.0] * STEPS, 1.0, 1)
            latents, computed = sampled(velocity, every_second, noise(), schedule(STEPS, shift=1.0), 2, cached)
            assert not all(computed)
            exact = noise().astype(np.float64)
            for step in range(STEPS):
                exact = exact + steps[step] * velocity(exact, step)
            error = float(np.abs(latents - exact).max())
            # A line through two equal velocities is that velocity.
            fits = cached is how or (how is Reuse.VELOCITY and cached is Reuse.EXTRAPOLATE)
            assert (error < 2e-5) == fits, (how, cached, error)


def test_a_change_that_is_not_a_number_is_never_small() -> None:
    """A velocity of zero divides by zero: nothing is skipped, whatever the threshold."""
    for criterion in (EasyCache(change_engine(), 1e30), TeaCache(input_engine(), 0 * ROWS, NEVER, 1e30)):
        resting = np.zeros(SHAPE, np.float32)
        _, computed = sampled(lambda x, step: np.zeros_like(x), criterion, resting, schedule(6), 2, Reuse.RESIDUAL)
        assert all(computed)


def test_latents_that_are_not_finite_stop_the_loop() -> None:
    velocity = random_velocity(1, STEPS, SHAPE)

    def broken(x: np.ndarray, step: int) -> np.ndarray:
        return velocity(x, step) if step < 3 else np.full_like(x, np.nan)

    rows = {"step": np.arange(STEPS, dtype=np.float32), "sigma_step": schedule(STEPS)}
    evaluate = Evaluation(model_engine(broken), {}, rows)
    step = CachedStep(evaluate, EasyCache(change_engine(), 0.0), reuse_engine(), schedule(STEPS))
    loop = RegisterLoop(HostRegisters(), step, noise())
    latents = noise()
    for number in range(3):
        latents = take_step(loop, number, STEPS, latents)
    kept = latents.copy()
    with pytest.raises(SamplingError, match=r"step 4 of 12 .* not finite") as caught:
        take_step(loop, 3, STEPS, latents)
    np.testing.assert_array_equal(caught.value.latents, kept)


def test_latents_before_a_step_survive_it() -> None:
    velocity = random_velocity(4, STEPS, SHAPE)
    rows = {"step": np.arange(STEPS, dtype=np.float32), "sigma_step": schedule(STEPS)}
    step = CachedStep(
        Evaluation(model_engine(velocity), {}, rows), MagCache([1.0] * STEPS, 1.0, 2), reuse_engine(), schedule(STEPS)
    )
    registers = HostRegisters()
    loop = RegisterLoop(registers, step, noise())
    latents = noise()
    for number in range(STEPS):
        kept = latents.copy()
        following = take_step(loop, number, STEPS, latents)
        np.testing.assert_array_equal(latents, kept)
        latents = following
    assert loop.skipped == STEPS - 2 - 1 - 3  # two of three between the second and the last
    assert len(registers._own) <= 9, "arrays are used again"


def test_a_line_is_followed_no_further_than_it_is_known() -> None:
    """Two computed steps beside each other and a long run of skips: the velocity stays where one more step leads."""
    one, other = noise(1).astype(np.float64), noise(2).astype(np.float64)
    steps = schedule(6, shift=1.0)
    latents, computed = sampled(
        lambda x, step: one + step * other, MagCache([1.0] * 6, 1.0, None), noise(), steps, 2, Reuse.EXTRAPOLATE
    )
    assert computed == [True, True, False, False, False, True]
    followed = [0, 1, 2, 2, 2, 5]
    expected = noise() + sum(steps[step] * (one + place * other) for step, place in enumerate(followed))
    np.testing.assert_allclose(latents, expected, atol=2e-5)
