"""The chain of stages against NumPy and diffusers' scheduler, the loop's buffers, and what a generation leaves."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from reelforge.runtime import Check, Frames, Notice, Pipeline, Progress, Request
from reelforge.runtime.conditioning import rope_tables
from reelforge.runtime.errors import BundleError, OutputError, RequestError
from reelforge.runtime.latents_file import UnsavedLatentsError
from reelforge.runtime.manifest import StageEntry, TensorInfo
from reelforge.runtime.noise import gaussian_noise
from reelforge.runtime.sampling import SamplingError, all_finite, begin_loop, take_step
from reelforge.runtime.stage_inputs import TextEncoding
from tests.runtime.fake_bundle import CHANNELS, SPEC, TEMPLATE, constant, write_fake_bundle

REQUEST = Request("a ball", height=32, width=48, frames=5, steps=6, seed=3, guidance=6.1, shift=5.0)
LATENTS = (1, CHANNELS, 2, 4, 6)


@pytest.fixture(scope="module")
def pipeline(fake_bundle: Path) -> Pipeline:
    return Pipeline.open(fake_bundle, threads=1)


def reference_latents(pipeline: Pipeline, noise: np.ndarray) -> np.ndarray:
    """The fake model restated with torch in float64, stepped by diffusers' own scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.models.embeddings import get_timestep_embedding
    from tokenizers import Tokenizer

    def ids(name: str, text: str) -> list[int]:
        tokenizer = Tokenizer.from_file(str(pipeline.bundle.tokenizer_path(name)))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return list(tokenizer.encode(text).ids)

    def embed(value: float) -> np.ndarray:
        values = torch.tensor([value], dtype=torch.float64)
        half = torch.exp(-np.log(10000) * torch.arange(8, dtype=torch.float64) / 8)
        assert get_timestep_embedding(values, 16, flip_sin_to_cos=True, downscale_freq_shift=0).shape == (1, 16)
        angles = values[:, None] * half
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1).numpy()

    states = constant("llm", 300, 6)[ids("llm", "Tell: a ball.")][TEMPLATE.crop_start :].astype(np.float64)
    pooled = constant("clip", 300, 4)[ids("clip", "a ball")].astype(np.float64).mean(axis=0)
    guidance = (torch.tensor([6.1], dtype=torch.bfloat16) * 1000.0).item()
    rope = rope_tables((2, 2, 3), SPEC.dit.rope_axes, 256.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, 7)[:-1])
    latents = torch.from_numpy(noise).double()
    for time in scheduler.timesteps:
        text = states @ constant("by_text", 6, 8) + embed(time.item()) @ constant("by_time", 16, 8)
        row = (
            embed(time.item()) @ constant("time", 16, 8)
            + embed(guidance) @ constant("guidance", 16, 8)
            + pooled @ constant("pooled", 4, 8)
        )
        offset = text.mean() + sum(table.astype(np.float64).mean() for table in rope)
        for name, shape in (("double", (2, 2, 6)), ("single", (3, 3)), ("final", (2,))):
            offset += (row + constant(name, 1, *shape, 8).astype(np.float64)).mean()
        velocity = 0.5 * latents + offset
        latents = scheduler.step(velocity, time, latents, return_dict=False)[0].double()
    return latents.numpy()


def test_latents_equal_the_reference(pipeline: Pipeline) -> None:
    noise = np.random.default_rng(0).standard_normal(LATENTS).astype(np.float32)
    before = noise.copy()
    resolved = pipeline.resolve(REQUEST)
    conditions = pipeline.condition(resolved, pipeline.encode_text(resolved.prompt))
    final = pipeline.sample(resolved, conditions, noise)
    np.testing.assert_allclose(final, reference_latents(pipeline, noise), atol=3e-5)
    np.testing.assert_array_equal(noise, before)
    assert final.dtype == np.float32


def test_generate_decodes_those_latents(pipeline: Pipeline, tmp_path: Path) -> None:
    noise = gaussian_noise(LATENTS, REQUEST.seed)
    path = tmp_path / "final.npy"
    frames = pipeline.generate(REQUEST, save_latents=path)
    saved = np.load(path)
    np.testing.assert_allclose(saved, reference_latents(pipeline, noise), atol=3e-5)
    assert frames.shape == (5, 32, 48, 3)
    assert frames.dtype == np.uint8
    # The fake decoder works on single pixels, so the overlaps hold equal values and tiles leave no trace.
    mixed = np.tanh(np.einsum("oc,ctyx->tyxo", constant("decoder", 3, CHANNELS, 1, 1, 1)[:, :, 0, 0, 0], saved[0]))
    expected = (mixed[[0, 1, 1, 1, 1]] / 2 + 0.5).repeat(8, axis=1).repeat(8, axis=2) * 255
    assert np.abs(frames - expected).max() < 0.51
    np.testing.assert_array_equal(frames, pipeline.generate(REQUEST))
    np.testing.assert_array_equal(frames, pipeline.generate(REQUEST, latents=noise))
    assert not np.array_equal(frames, pipeline.generate(replace(REQUEST, seed=4)))


def test_stream_yields_the_same_frames_in_batches(pipeline: Pipeline) -> None:
    request = replace(REQUEST, frames=13)
    batches = [event for event in pipeline.stream(request) if isinstance(event, Frames)]
    assert [(batch.start, len(batch.values)) for batch in batches] == [(0, 4), (4, 1), (5, 4), (9, 4)]
    assert all(batch.values.dtype == np.float32 for batch in batches)
    assert all(batch.values.min() >= 0 and batch.values.max() <= 1 for batch in batches)
    np.testing.assert_array_equal(np.concatenate([batch.pixels for batch in batches]), pipeline.generate(request))


def test_one_frame_is_an_image(pipeline: Pipeline) -> None:
    assert pipeline.generate(replace(REQUEST, frames=1)).shape == (1, 32, 48, 3)


def test_empty_and_long_prompts(pipeline: Pipeline) -> None:
    notices = [
        event.text
        for prompt in ("", "word " * 10_000)
        for event in pipeline.stream(replace(REQUEST, prompt=prompt, frames=1, steps=1))
        if isinstance(event, Notice)
    ]
    assert len(notices) == 2
    assert all("the prompt has" in notice for notice in notices)


def test_progress_counts_every_unit(pipeline: Pipeline) -> None:
    seen: list[Progress] = []
    pipeline.generate(REQUEST, on_progress=seen.append)
    phases = list(dict.fromkeys(step.phase for step in seen))
    assert phases == ["text", "conditioning", "sampling", "decoding"]
    for phase in phases:
        counts = [(step.step, step.total) for step in seen if step.phase == phase]
        assert [done for done, _ in counts] == list(range(1, counts[0][1] + 1))


def test_stages_are_loaded_one_at_a_time(fake_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reelforge.runtime.engines import onnxruntime_engine as module

    events: list[str] = []
    close, check = module.OnnxRuntimeEngine.close, module._check_signature

    def record_open(entry: StageEntry, session: object) -> None:
        events.append(f"+{entry.name}")
        check(entry, session)

    def record_close(engine: module.OnnxRuntimeEngine) -> None:
        events.append(f"-{engine.name}")
        close(engine)

    monkeypatch.setattr(module, "_check_signature", record_open)
    monkeypatch.setattr(module.OnnxRuntimeEngine, "close", record_close)
    Pipeline.open(fake_bundle, check=Check.SIZES, memory_budget="least").generate(REQUEST)
    stages = ["llm", "clip", "refiner", "modulation", "dit", "vae_decoder"]
    assert events == [sign + stage for stage in stages for sign in "+-"]


def test_a_batched_dit_gets_the_text_length(tmp_path: Path, fake_bundle: Path) -> None:
    write_fake_bundle(tmp_path / "batched", batch=2)
    batched = Pipeline.open(tmp_path / "batched", threads=1)
    resolved = batched.resolve(REQUEST)
    text = batched.encode_text(resolved.prompt)
    assert batched.condition(resolved, text).fixed["text_lengths"].tolist() == [text.states.shape[1]]
    np.testing.assert_array_equal(batched.generate(REQUEST), Pipeline.open(fake_bundle, threads=1).generate(REQUEST))


def test_errors_before_any_engine_runs(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="height=33"):
        pipeline.generate(replace(REQUEST, height=33))
    write_fake_bundle(tmp_path / "part", stages=("llm", "clip", "dit"))
    with pytest.raises(BundleError, match="has no stage 'refiner'"):
        Pipeline.open(tmp_path / "part")


@pytest.mark.parametrize("wrong", [np.zeros((1, CHANNELS, 2, 4, 5), np.float32), np.zeros(LATENTS), [0.0]])
def test_latents_that_do_not_fit(pipeline: Pipeline, wrong: np.ndarray) -> None:
    with pytest.raises(RequestError, match="initial latents do not fit"):
        pipeline.stream(REQUEST, latents=wrong)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_latents_that_are_not_finite_are_refused_before_any_work(pipeline: Pipeline, value: float) -> None:
    noise = np.zeros(LATENTS, np.float32)
    noise[0, 0, 0, 0, 0] = value
    with pytest.raises(RequestError, match="initial latents are not finite numbers") as caught:
        pipeline.stream(REQUEST, latents=noise)
    assert "1 of 192 values" in str(caught.value)


def test_latents_that_become_not_finite_stop_the_loop_at_their_step(pipeline: Pipeline) -> None:
    noise = np.zeros(LATENTS, np.float32)
    seen = []
    with pytest.raises(SamplingError, match=r"step 1 of 6 .* not finite") as caught:  # noqa: PT012 - as it goes on
        for event in pipeline.stream(REQUEST, latents=noise):
            seen.append(event)
            noise[0, 0, 0, 0, 0] = np.nan  # the loop has not begun
    assert "1 of 192 values" in str(caught.value)
    assert caught.value.step == 0
    np.testing.assert_array_equal(caught.value.latents, noise)
    assert "sampling" not in {step.phase for step in seen if isinstance(step, Progress)}


@pytest.mark.parametrize(("value", "finite"), [(0.0, True), (1e30, True), (np.nan, False), (-np.inf, False)])
def test_finite_means_neither_nan_nor_infinite(value: float, finite: bool) -> None:
    values = np.ones((2, 3), np.float32)
    values[1, 1] = value
    with np.errstate(all="raise"):  # an overflow of what is computed from the values is nobody's matter
        assert all_finite(values) is finite


@pytest.mark.parametrize("name", ["nowhere/x.npy", "."])
def test_latents_that_cannot_be_saved_are_known_before_any_work(pipeline: Pipeline, tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="latents cannot be written"):
        pipeline.stream(REQUEST, save_latents=tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_latents_that_cannot_be_saved_in_the_end_are_in_the_error(pipeline: Pipeline, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    with pytest.raises(UnsavedLatentsError, match="latents cannot be written") as caught:  # noqa: PT012
        for event in pipeline.stream(REQUEST, save_latents=folder / "x.npy"):
            if isinstance(event, Progress) and event.phase == "sampling" and event.step == 6:
                folder.rmdir()
    assert "Pipeline.decode(error.latents)" in caught.value.fix
    pixels = [np.rint(values * 255) for values in pipeline.decode(caught.value.latents)]
    np.testing.assert_array_equal(np.concatenate(pixels), pipeline.generate(REQUEST))


def test_phases_wait_for_the_turn_too(pipeline: Pipeline) -> None:
    events = pipeline.stream(REQUEST)
    next(events)
    encodings: list[TextEncoding] = []
    thread = threading.Thread(target=lambda: encodings.append(pipeline.encode_text("a ball")))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    assert not encodings
    events.close()
    thread.join(20)
    assert len(encodings) == 1


class RecordingEngine:
    """Adds one to the latents and remembers what it was given."""

    name = "dit"
    inputs: Mapping[str, TensorInfo] = {}
    outputs: Mapping[str, TensorInfo] = {}

    def __init__(self) -> None:
        self.calls: list[tuple[Mapping[str, np.ndarray], np.ndarray]] = []

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray | None] | None = None
    ) -> dict[str, np.ndarray]:
        assert outputs is not None
        target = outputs["next_latents"]
        assert target is not None
        np.add(inputs["latents"], 1, out=target)
        self.calls.append((inputs, target))
        return {"next_latents": target}

    def close(self) -> None: ...


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_loop_uses_two_buffers_and_views(steps: int) -> None:
    engine = RecordingEngine()
    latents = np.zeros(LATENTS, np.float32)
    rows = np.arange(steps * 3, dtype=np.float32).reshape(steps, 1, 3)
    per_step = {"rows": rows, "sigma_step": np.arange(steps, dtype=np.float32)}
    final = latents
    with begin_loop(engine, latents, {"fixed": rows}, per_step) as loop:
        for step in range(steps):
            before = final.copy()
            following = take_step(loop, step, steps, final)
            np.testing.assert_array_equal(final, before, "a failing step must not cost the latents before it")
            final = following
    assert (final == steps).all()
    assert (latents == 0).all()
    buffers = {call[1].__array_interface__["data"][0] for call in engine.calls}
    assert len(buffers) == min(steps, 2)
    for step, (inputs, target) in enumerate(engine.calls):
        assert inputs["rows"].base is not None
        assert np.shares_memory(inputs["rows"], rows[step])
        assert isinstance(inputs["sigma_step"], np.ndarray)
        assert inputs["sigma_step"].shape == ()
        assert not np.shares_memory(inputs["latents"], target)
        if step:
            assert inputs["latents"] is engine.calls[step - 1][1]
