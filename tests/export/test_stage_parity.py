"""Every stage in ONNX Runtime against diffusers and transformers, which were written by other people.

Tolerance: 2e-5 absolute where the oracle's largest value is at most 4, in proportion above. fp32 has 24 bits, so one
rounding at 4 is 2.4e-7; the two sides add up the same products in different orders (split or fused projections, other
attention kernels, text cut instead of masked), and a few dozen layers of a random walk of such roundings stay below a
hundred of them. Each output must have a standard deviation of 0.3 to 4: on outputs near zero any tolerance passes. That
the comparison would notice a wrong parameter is tested too, for each of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from reelforge.runtime.conditioning import sinusoids
from reelforge.runtime.recipe import Precision
from reelforge.tools.bench.oracle import (
    Oracle,
    Stages,
    clip_ids,
    difference,
    normal,
    our_modulation,
    our_rope,
    our_step,
    our_text,
    padded,
    their_frames,
    their_pooled,
    their_prompt_states,
    their_velocity,
)
from tests.bundles import TraceMemory, build, once, session_folder
from tests.checkpoints import make_diffusers_checkpoint

TOLERANCE = 2e-5

# (T, h, w, L): one frame, one token, odd frames, one row of patches, more text than image.
SHAPES = [(1, 2, 2, 1), (1, 6, 8, 7), (3, 6, 8, 1), (5, 2, 10, 4), (2, 12, 4, 40)]


@pytest.fixture(scope="module", autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def stages(tiny_bundle: Path) -> Stages:
    return Stages(tiny_bundle)


@pytest.fixture(scope="module")
def oracle(tiny_checkpoint: Path) -> Oracle:
    return Oracle(tiny_checkpoint)


@pytest.mark.parametrize("text_tokens", [1, 2, 9, 40])
@pytest.mark.parametrize("steps", [1, 3])
def test_refiner(stages: Stages, oracle: Oracle, text_tokens: int, steps: int) -> None:
    states = normal(text_tokens, 1, text_tokens, oracle.transformer.config.text_embed_dim)
    times = torch.tensor([1000.0, 937.5, 12.25])[:steps]
    longer, mask = padded(states, text_tokens + 5)
    received = our_text(stages, oracle, states, times)
    for row, time in enumerate(times):
        expected = oracle.transformer.context_embedder(longer, time[None], mask)[:, :text_tokens]
        assert difference(received[row : row + 1], expected) <= TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_step(stages: Stages, oracle: Oracle, shape: tuple[int, int, int, int]) -> None:
    _step_is_diffusers(stages, oracle, shape)


def _step_is_diffusers(stages: Stages, oracle: Oracle, shape: tuple[int, int, int, int]) -> None:
    *grid, text_tokens = shape
    config = oracle.transformer.config
    latents = normal(1, 1, config.in_channels, *grid)
    states, pooled = normal(2, 1, text_tokens, config.text_embed_dim), normal(3, 1, config.pooled_projection_dim)
    longer, mask = padded(states, text_tokens + 6)
    velocity = their_velocity(oracle, latents, longer, mask, pooled, 925.3)
    received = our_step(stages, oracle, latents, states, pooled, 925.3)
    assert difference(received["velocity"], velocity) <= TOLERANCE
    assert difference(received["next_latents"], latents - 0.25 * velocity) <= TOLERANCE


def test_euler_steps_are_the_scheduler_s(stages: Stages, oracle: Oracle) -> None:
    """Four steps, each from diffusers' own latents and with its scheduler's update."""
    config = oracle.transformer.config
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.25, 4))
    latents = normal(4, 1, config.in_channels, 3, 4, 6)
    states, pooled = normal(5, 1, 5, config.text_embed_dim), normal(6, 1, config.pooled_projection_dim)
    mask = torch.ones(1, 5, dtype=torch.int64)
    text = our_text(stages, oracle, states, scheduler.timesteps)
    modulation = our_modulation(stages, oracle, pooled, scheduler.timesteps)
    for step, time in enumerate(scheduler.timesteps):
        velocity = their_velocity(oracle, latents, states, mask, pooled, float(time))
        following = scheduler.step(velocity, time, latents, return_dict=False)[0]
        received = stages(
            "dit",
            latents=latents.numpy(),
            text=text[step : step + 1],
            **{name: rows[step : step + 1] for name, rows in modulation.items()},
            **our_rope(stages, latents),
            sigma_step=(scheduler.sigmas[step + 1] - scheduler.sigmas[step]).numpy(),
        )
        assert difference(received["next_latents"], following) <= TOLERANCE
        latents = following


TILES = [(1, 2, 2), (1, 5, 3), (2, 4, 4), (3, 2, 6), (5, 3, 2)]


@pytest.mark.parametrize("tile", TILES)
def test_vae_decoder(stages: Stages, oracle: Oracle, tile: tuple[int, int, int]) -> None:
    latents = 0.5 * normal(7, 1, oracle.vae.config.latent_channels, *tile)
    received = stages("vae_decoder", latent_tile=latents.numpy())["frame_tile"]
    assert received.shape == (1, 3, 4 * tile[0] - 3, 8 * tile[1], 8 * tile[2])
    assert difference(received, their_frames(oracle, latents)) <= TOLERANCE


@pytest.mark.parametrize("prompt_tokens", [1, 2, 19, 60])
def test_llm(stages: Stages, oracle: Oracle, prompt_tokens: int) -> None:
    ids = torch.randint(0, 250, (1, prompt_tokens), generator=torch.Generator().manual_seed(prompt_tokens))
    received = stages("llm", input_ids=ids.numpy())["prompt_states"]
    assert difference(received, their_prompt_states(oracle, ids, prompt_tokens + 7)) <= TOLERANCE


@pytest.mark.parametrize("words", [1, 2, 9, 75])
def test_clip(stages: Stages, oracle: Oracle, words: int) -> None:
    ids = clip_ids(oracle, words)
    received = stages("clip", clip_ids=ids.numpy())["pooled_text"]
    assert difference(received, their_pooled(oracle, ids)) <= TOLERANCE


def test_text_encoders_take_several_texts_of_one_length(stages: Stages, oracle: Oracle) -> None:
    ids = torch.cat([clip_ids(oracle, 6), clip_ids(oracle, 6).flip(1).roll(-1, 1)])
    expected = torch.cat([their_pooled(oracle, row[None]) for row in ids])
    assert difference(stages("clip", clip_ids=ids.numpy())["pooled_text"], expected) <= TOLERANCE
    expected = torch.cat([their_prompt_states(oracle, row[None], 9) for row in ids])
    assert difference(stages("llm", input_ids=ids.numpy())["prompt_states"], expected) <= TOLERANCE


@pytest.mark.parametrize("value", [1000.0, 997.0927, 500.5, 125.0, 6000.0, 6016.0])
def test_sinusoids_are_diffusers_formula_in_float64(oracle: Oracle, value: float) -> None:
    """Diffusers computes the same in fp32, where an angle of 6016 is off by up to 4e-4 (specification 8)."""
    projection = oracle.transformer.time_text_embed.time_proj
    assert (projection.flip_sin_to_cos, projection.downscale_freq_shift, projection.num_channels) == (True, 0, 256)
    angles = np.float32(value).astype(np.float64) * np.exp(-np.log(10_000.0) * np.arange(128) / 128)
    expected = np.concatenate([np.cos(angles), np.sin(angles)])
    ours = sinusoids(np.array([value], np.float32), 256)[0]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=6e-8)  # half a unit in the last place below one
    theirs = projection(torch.tensor([value]))[0].numpy()
    assert np.abs(theirs - expected).max() <= 5e-7 * max(value, 1.0)


# Would the comparisons above notice? For every single parameter of every network: yes.

# Softmax does not see what is added to all scores of a row, and q . k_bias is. In the DiT the norms come in between.
INVISIBLE = {
    "transformer": ("attn.to_k.bias", "context_embedder.token_refiner."),
    "vae": ("to_k.bias", ""),
    "clip": ("k_proj.bias", ""),
}


def _insensitive(network: str, module: torch.nn.Module, run: Callable[[], torch.Tensor], unused: str) -> list[str]:
    """Return the parameters of ``module`` whose change by a fifth moves the output by less than ten tolerances."""
    ending, part = INVISIBLE.get(network, ("nothing", ""))
    usual, found = run(), []
    for number, (name, parameter) in enumerate(module.named_parameters()):
        if name.startswith(tuple(unused.split())) or (name.endswith(ending) and part in name):
            continue
        kept = parameter.data
        parameter.data = kept + 0.2 * kept.abs().mean() * normal(number, *kept.shape)
        moved = (run() - usual).abs().max() / max(1.0, float(usual.abs().max()) / 4)
        parameter.data = kept
        if moved < 10 * TOLERANCE:
            found.append(f"{name} {moved:.1e}")
    assert torch.equal(run(), usual)
    return found


def test_the_comparison_sees_every_parameter(oracle: Oracle) -> None:
    latents, states = normal(1, 1, 4, 3, 6, 8), normal(2, 1, 7, 64)
    mask, pooled = torch.ones(1, 7, dtype=torch.int64), normal(3, 1, 32)
    ids = torch.arange(2, 40)[None]
    ends = torch.tensor([[*range(40), int(oracle.clip.config.eos_token_id)]])
    cases: list[tuple[str, torch.nn.Module, Callable[[], torch.Tensor], str]] = [
        (
            "transformer",
            oracle.transformer,
            lambda: their_velocity(oracle, latents, states, mask, pooled, 925.3),
            "none",
        ),
        ("vae", oracle.vae, lambda: their_frames(oracle, 0.5 * latents[..., :3, :2]), "encoder. quant_conv."),
        ("llm", oracle.llm, lambda: their_prompt_states(oracle, ids, 38), "layers.2. layers.3. norm."),
        ("clip", oracle.clip, lambda: their_pooled(oracle, ends), "none"),
    ]
    found = {name: _insensitive(name, module, run, unused) for name, module, run, unused in cases}
    assert found == {name: [] for name in found}


# Other sizes, several videos, half precision.


@contextmanager
def _built(
    factory: pytest.TempPathFactory, memory: TraceMemory, name: str, checkpoint: Path, *stage_names: str, **options: int
) -> Iterator[Path]:
    precision = Precision.FP16 if options.pop("fp16", 0) else Precision.FP32

    def make(path: Path) -> None:
        with memory.used():
            build(checkpoint, path, *stage_names, precision=precision, **options)

    yield once(session_folder(factory) / name, make)


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other numbers everywhere: heads, blocks, channels, no guidance, unusual rotary axes, a deeper VAE."""
    path = session_folder(tmp_path_factory) / "other"
    return once(
        path,
        lambda folder: make_diffusers_checkpoint(
            folder,
            seed=5,
            heads=3,
            head_dim=16,
            double_blocks=1,
            single_blocks=3,
            refiner_blocks=1,
            latent_channels=8,
            guidance_embedding=False,
            rope_axes=(4, 8, 4),
            llm_kv_heads=4,
            vae_widths=(8, 16, 16, 32),
            vae_layers=2,
            vae_groups=4,
        ),
    )


@pytest.mark.slow
def test_another_configuration(
    tmp_path_factory: pytest.TempPathFactory, trace_memory: TraceMemory, other_checkpoint: Path
) -> None:
    names = ("refiner", "modulation", "dit", "vae_decoder")
    oracle = Oracle(other_checkpoint)
    with _built(tmp_path_factory, trace_memory, "other.bundle", other_checkpoint, *names) as path:
        stages = Stages(path)
        for shape in SHAPES[1:3]:
            _step_is_diffusers(stages, oracle, shape)
        latents = 0.5 * normal(8, 1, 8, 2, 3, 4)
        received = stages("vae_decoder", latent_tile=latents.numpy())["frame_tile"]
        assert difference(received, their_frames(oracle, latents)) <= TOLERANCE


@pytest.mark.slow
def test_several_videos_with_texts_of_different_lengths(
    tmp_path_factory: pytest.TempPathFactory,
    trace_memory: TraceMemory,
    tiny_checkpoint: Path,
    stages: Stages,
    oracle: Oracle,
) -> None:
    """A graph for several videos masks the keys after each text's end; what stands there changes nothing."""
    with _built(tmp_path_factory, trace_memory, "batch.bundle", tiny_checkpoint, "dit", batch=3) as path:
        batched = Stages(path)
    for lengths in ([9, 1, 4], [3, 3], [5]):
        videos, longest = len(lengths), max(lengths) + 2
        latents, pooled = normal(1, videos, 4, 3, 4, 6), normal(2, videos, 32)
        states = normal(3, videos, longest, 64)
        mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
        velocity = their_velocity(oracle, latents, states, mask, pooled, 925.3)
        times = torch.tensor([925.3])
        text = 1e3 * normal(4, videos, longest, 64).numpy()
        for video, length in enumerate(lengths):
            text[video, :length] = our_text(stages, oracle, states[video : video + 1, :length], times)[0]
        rows = [our_modulation(stages, oracle, pooled[video : video + 1], times) for video in range(videos)]
        received = batched(
            "dit",
            latents=latents.numpy(),
            text=text,
            **{name: np.concatenate([row[name] for row in rows]) for name in rows[0]},
            **our_rope(stages, latents),
            sigma_step=np.array(-0.25, np.float32),
            text_lengths=np.array(lengths),
        )
        assert difference(received["velocity"], velocity) <= TOLERANCE
        assert difference(received["next_latents"], latents - 0.25 * velocity) <= TOLERANCE


@pytest.mark.slow
def test_half_precision(
    tmp_path_factory: pytest.TempPathFactory, trace_memory: TraceMemory, tiny_checkpoint: Path, oracle: Oracle
) -> None:
    """Each stage in fp16 against the oracle in fp32, within the tolerance that the bundle states for it."""
    with _built(tmp_path_factory, trace_memory, "fp16.bundle", tiny_checkpoint, fp16=1) as path:
        stages = Stages(path)
    times = torch.tensor([925.3])
    latents, states, pooled = normal(1, 1, 4, 3, 6, 8), normal(2, 1, 7, 64), normal(3, 1, 32)
    mask = torch.ones(1, 7, dtype=torch.int64)
    ids, ends = torch.arange(2, 40)[None], clip_ids(oracle, 20)
    tile = 0.5 * latents[..., :4, :4]
    velocity = their_velocity(oracle, latents, states, mask, pooled, 925.3)
    measured = {
        "llm": difference(
            stages("llm", input_ids=ids.numpy())["prompt_states"], their_prompt_states(oracle, ids, 38)
        ),
        "clip": difference(stages("clip", clip_ids=ends.numpy())["pooled_text"], their_pooled(oracle, ends)),
        "refiner": difference(
            our_text(stages, oracle, states, times), oracle.transformer.context_embedder(states, times, mask)
        ),
        "dit": difference(our_step(stages, oracle, latents, states, pooled, 925.3)["velocity"], velocity),
        "vae_decoder": difference(
            stages("vae_decoder", latent_tile=tile.numpy())["frame_tile"], their_frames(oracle, tile)
        ),
    }  # fmt: skip
    assert {name: value for name, value in measured.items() if value > stages.tolerance[name]} == {}
    # fp16 it is: with fp32 arithmetic the differences would be three orders of magnitude smaller.
    assert min(measured.values()) > 10 * TOLERANCE


def test_the_bundle_states_these_tolerances(stages: Stages) -> None:
    assert set(stages.tolerance.values()) == {TOLERANCE}


def test_without_the_checkpoint(tiny_bundle: Path, tmp_path: Path, oracle: Oracle) -> None:
    """A bundle that was copied elsewhere needs nothing from the place where it was built."""
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy.bundle"))
    ids = clip_ids(oracle, 3)
    assert difference(Stages(copy)("clip", clip_ids=ids.numpy())["pooled_text"], their_pooled(oracle, ids)) <= TOLERANCE
