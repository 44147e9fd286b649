"""Classifier-free guidance: the loop of two evaluations against NumPy in float64, and what a request may say of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reelforge.runtime import Notice, Pipeline, Progress, Request
from reelforge.runtime.errors import EngineError, RequestError
from reelforge.runtime.sampling import SamplingError
from reelforge.runtime.stage_inputs import Conditions
from tests.runtime.fake_bundle import CHANNELS, GUIDED, write_fake_bundle

REQUEST = Request(
    "a ball", height=32, width=48, frames=5, steps=6, seed=3, cfg_scale=4.5, negative_prompt="blurred letters"
)
LATENTS = (1, CHANNELS, 2, 4, 6)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    path = tmp_path_factory.mktemp("guided") / "guided.bundle"
    write_fake_bundle(path, stages=GUIDED)
    return Pipeline.open(path, threads=1)


def told(pipeline: Pipeline, prompt: str) -> Conditions:
    return pipeline.condition(pipeline.resolve(replace(REQUEST, prompt=prompt)), pipeline.encode_text(prompt))


def velocity(conditions: Conditions, latents: np.ndarray, step: int) -> np.ndarray:
    """The fake model's, restated in float64."""
    rows = [array[step] for name, array in conditions.per_step.items() if name != "sigma_step"]
    means = [array.astype(np.float64).mean() for array in (*rows, *conditions.fixed.values())]
    return 0.5 * latents + sum(means)


@pytest.mark.parametrize("negative_prompt", ["blurred letters", "", None])
def test_latents_follow_both_velocities(pipeline: Pipeline, tmp_path: Path, negative_prompt: str | None) -> None:
    noise = np.random.default_rng(0).standard_normal(LATENTS).astype(np.float32)
    prompt, negative = told(pipeline, REQUEST.prompt), told(pipeline, negative_prompt or "")
    expected = noise.astype(np.float64)
    for step in range(6):
        one, other = velocity(prompt, expected, step), velocity(negative, expected, step)
        assert np.abs(one - other).max() > 1e-3, "the prompts must make a difference"
        expected = expected + prompt.per_step["sigma_step"][step] * (other + 4.5 * (one - other))
    before = noise.copy()
    request = replace(REQUEST, negative_prompt=negative_prompt)
    pipeline.generate(request, latents=noise, save_latents=tmp_path / "final.npy")
    np.testing.assert_allclose(np.load(tmp_path / "final.npy"), expected, atol=3e-5)
    np.testing.assert_array_equal(noise, before)


def test_a_scale_of_one_is_the_plain_loop_and_loads_no_second_engine(pipeline: Pipeline) -> None:
    plain = replace(REQUEST, cfg_scale=None, negative_prompt=None)
    assert pipeline.resolve(replace(plain, cfg_scale=1)).negative_prompt is None
    np.testing.assert_array_equal(pipeline.generate(replace(plain, cfg_scale=1.0)), pipeline.generate(plain))
    assert not np.array_equal(pipeline.generate(REQUEST), pipeline.generate(plain))


def test_progress_is_that_of_one_prompt(pipeline: Pipeline) -> None:
    seen = [event for event in pipeline.stream(REQUEST) if isinstance(event, Progress) and event.phase != "decoding"]
    assert [(event.phase, event.step, event.total) for event in seen] == [
        ("text", 1, 2), ("text", 2, 2), ("conditioning", 1, 2), ("conditioning", 2, 2),
        *(("sampling", step, 6) for step in range(1, 7)),
    ]  # fmt: skip


def test_latents_that_are_not_finite_name_the_step(pipeline: Pipeline) -> None:
    noise = np.zeros(LATENTS, np.float32)
    with pytest.raises(SamplingError, match="step 1 of 6"):  # noqa: PT012
        for _ in pipeline.stream(REQUEST, latents=noise):
            noise[0, 0, 0, 0, 0] = np.inf  # the loop has not begun


def test_a_long_negative_prompt_is_cut_with_a_notice(pipeline: Pipeline) -> None:
    request = replace(REQUEST, negative_prompt="word " * 10_000, steps=1, frames=1)
    notices = [event.text for event in pipeline.stream(request) if isinstance(event, Notice)]
    assert notices
    assert all(notice.startswith("the negative prompt has ") for notice in notices)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cfg_scale": 0.5}, "cfg_scale of at least 1"),
        ({"cfg_scale": float("nan")}, "cfg_scale a number"),
        ({"cfg_scale": "6"}, "cfg_scale a number"),
        ({"cfg_scale": 1}, "no negative_prompt without a cfg_scale above 1"),
        ({"cfg_scale": None}, "no negative_prompt without a cfg_scale above 1"),
        ({"negative_prompt": 7}, "negative_prompt=7"),
        ({"negative_prompt": "\ud800"}, "negative_prompt="),
    ],
)
def test_what_a_request_gets_wrong(pipeline: Pipeline, changes: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        pipeline.resolve(replace(REQUEST, **changes))  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_a_bundle_without_the_stage(fake_bundle: Path) -> None:
    with Pipeline.open(fake_bundle, threads=1) as plain, pytest.raises(RequestError) as caught:
        plain.resolve(REQUEST)
    assert "the bundle has no stage 'guidance'" in str(caught.value)
    assert "rebuild the bundle" in str(caught.value)


def test_an_engine_that_fails_keeps_the_latents(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from reelforge.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine

    run, calls = OnnxRuntimeEngine.run, []

    def failing(self: OnnxRuntimeEngine, *arguments: object) -> object:
        calls.append(self.name)
        if calls.count("guidance") == 3 and self.name == "guidance":
            raise EngineError("the power is out.")
        return run(self, *arguments)  # type: ignore[arg-type]

    seen: list[Progress] = []
    monkeypatch.setattr(OnnxRuntimeEngine, "run", failing)
    with pytest.raises(SamplingError, match=r"step 3 of 6 .* the power is out") as caught:
        pipeline.generate(REQUEST, seen.append)
    assert caught.value.latents.shape == LATENTS
    assert seen[-1].step == 2
