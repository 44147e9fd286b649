"""From a prompt to frames: our pipeline from the bundle against diffusers' pipeline from the checkpoint.

Same weights, prompt and noise. Nothing in between is shared: tokenisation, template, padding, schedule, conditioning,
sampling loop, tiling and blending are each side's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

from reelforge.export.models.hunyuan_video.spec_from_checkpoint import Numerics
from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.events import Frames as Batch
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.request import Request
from reelforge.runtime.spec import GuidanceRounding, VaeTiling
from reelforge.tools.bench.tencent_tiling import tencent_decode
from tests.bundles import TraceMemory, build
from tests.checkpoints import TEMPLATE

PROMPT = "A cat walks on the grass, realistic style."
Frames = np.ndarray


@pytest.fixture(scope="module", autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def theirs(tiny_checkpoint: Path) -> HunyuanVideoPipeline:
    pipeline = HunyuanVideoPipeline.from_pretrained(tiny_checkpoint, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def ours(tiny_bundle: Path) -> Pipeline:
    return Pipeline.open(tiny_bundle, threads=1)


def noise(pipeline: Pipeline, height: int, width: int, frames: int) -> torch.Tensor:
    shape = (1, *pipeline.spec.latent_shape(height, width, frames))
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


def run_theirs(pipeline: HunyuanVideoPipeline, ours: Pipeline, request: Request, latents: torch.Tensor) -> Frames:
    """Return float64 [frames, height, width, 3] in [0, 1]."""
    template = {"template": TEMPLATE, "crop_start": ours.bundle.manifest.prompt_template.crop_start}
    pipeline.scheduler.register_to_config(shift=request.shift)
    pipeline.scheduler.set_shift(request.shift)
    result = pipeline(
        prompt=request.prompt,
        height=request.height,
        width=request.width,
        num_frames=request.frames,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        true_cfg_scale=request.cfg_scale or 1.0,
        negative_prompt=request.negative_prompt,
        latents=latents.clone(),
        prompt_template=template,
        output_type="np",
    )
    return np.asarray(result.frames[0], np.float64)


def run_ours(pipeline: Pipeline, request: Request, latents: torch.Tensor) -> Frames:
    return np.concatenate(
        [event.values for event in pipeline.stream(request, latents.numpy()) if isinstance(event, Batch)]
    ).astype(np.float64)


def psnr(one: Frames, other: Frames) -> float:
    assert one.shape == other.shape
    return float(-10 * np.log10(np.mean((one - other) ** 2) + 1e-20))


def require_pictures(frames: Frames) -> None:
    """Frames with contrast that are not at the ends of the range: there any two videos look alike."""
    assert frames.std() > 0.1
    assert ((frames > 0) & (frames < 1)).mean() > 0.5


@pytest.mark.parametrize(
    "request_",
    [
        Request(PROMPT, 48, 80, 9, steps=4, guidance=6.0, shift=7.0),
        Request(PROMPT, 64, 32, 1, steps=3, guidance=3.5, shift=5.0),  # image mode
        Request("", 32, 32, 5, steps=1, guidance=1.0, shift=1.0),  # no words, one step
        Request("\n Ein Käfer krabbelt über 猫 🐈\n", 32, 48, 29, steps=2, guidance=6.0, shift=7.0),  # temporal windows
        Request("many words " * 100, 16, 16, 5, steps=2, guidance=6.0, shift=7.0),  # truncated by both
        Request(PROMPT, 32, 48, 5, 3, 0, 1.0, 7.0, cfg_scale=3.0, negative_prompt="out of focus, letters"),
        Request(PROMPT, 32, 48, 5, 3, 0, 1.0, 7.0, cfg_scale=3.0, negative_prompt=""),
    ],
    ids=["video", "image", "empty prompt", "windows", "long prompt", "negative prompt", "empty negative prompt"],
)
def test_frames_are_diffusers(theirs: HunyuanVideoPipeline, ours: Pipeline, request_: Request) -> None:
    latents = noise(ours, request_.height or 0, request_.width or 0, request_.frames or 0)
    stripped = replace(request_, prompt=request_.prompt.strip())  # ours strips: specification 2
    expected = run_theirs(theirs, ours, stripped, latents)
    received = run_ours(ours, request_, latents)
    require_pictures(expected)
    assert expected.shape == (request_.frames, request_.height, request_.width, 3)
    assert psnr(received, expected) >= 60
    assert np.abs(received - expected).max() <= 1e-3


def test_tiles_in_space_and_time_are_diffusers(theirs: HunyuanVideoPipeline, ours: Pipeline) -> None:
    """Small tiles on both sides, so that a small video has rows, columns and windows of them."""
    tiling = VaeTiling(tile=4, stride=3, frame_window=2, frame_stride=1)
    spec = replace(ours.spec, tiling=tiling)
    small = Pipeline(replace(ours.bundle, manifest=replace(ours.bundle.manifest, spec=spec)), EngineOptions(1))
    theirs.vae.enable_tiling(
        tile_sample_min_height=32,
        tile_sample_min_width=32,
        tile_sample_min_num_frames=8,
        tile_sample_stride_height=24,
        tile_sample_stride_width=24,
        tile_sample_stride_num_frames=4,
    )
    request = Request(PROMPT, 64, 80, 13, steps=2, guidance=6.0, shift=7.0)
    latents = noise(small, 64, 80, 13)
    try:
        expected = run_theirs(theirs, small, request, latents)
    finally:
        theirs.vae.disable_tiling()
        theirs.vae.tile_sample_min_num_frames, theirs.vae.tile_sample_stride_num_frames = 16, 12
    received = run_ours(small, request, latents)
    require_pictures(expected)
    assert psnr(received, expected) >= 60
    # The tiles are visible: with one tile for all of it the frames are others.
    assert psnr(run_ours(ours, request, latents), expected) < 50


@pytest.mark.parametrize("change", ["prompt", "noise", "guidance", "shift", "steps"])
def test_the_comparison_sees_a_difference(theirs: HunyuanVideoPipeline, ours: Pipeline, change: str) -> None:
    """Every input matters at this size: the comparison above is not one of pictures that are the same anyway."""
    request = Request(PROMPT, 32, 32, 5, steps=3, guidance=6.0, shift=7.0)
    latents = noise(ours, 32, 32, 5)
    usual = run_ours(ours, request, latents)
    others: dict[str, Callable[[], Frames]] = {
        "prompt": lambda: run_ours(ours, replace(request, prompt=PROMPT.replace("cat", "dog")), latents),
        "noise": lambda: run_ours(ours, request, latents + 0.1 * torch.randn(latents.shape)),
        "guidance": lambda: run_ours(ours, replace(request, guidance=6.016), latents),
        "shift": lambda: run_ours(ours, replace(request, shift=6.9), latents),
        "steps": lambda: run_ours(ours, replace(request, steps=4), latents),
    }
    assert psnr(others[change](), usual) < 60


# Tencent's numerics. Its package is not at hand, so the two points in which it differs are restated from the
# specification around diffusers' networks: guidance in bfloat16 (3.2), and its tiles (5.2), here of 4 latents.


def test_tencent_s_numerics(
    tiny_checkpoint: Path, tmp_path: Path, trace_memory: TraceMemory, theirs: HunyuanVideoPipeline
) -> None:
    with trace_memory.used():
        build(tiny_checkpoint, tmp_path / "b", numerics=Numerics.TENCENT)
    bundle = Bundle.open(tmp_path / "b", Check.SIZES)
    assert bundle.manifest.spec.guidance_rounding is GuidanceRounding.BF16
    assert bundle.manifest.spec.tiling == VaeTiling(32, 24, 16, 12)
    tiling = VaeTiling(4, 3, 4, 3)  # same proportions of tile and stride
    spec = replace(bundle.manifest.spec, tiling=tiling)
    ours = Pipeline(replace(bundle, manifest=replace(bundle.manifest, spec=spec)), EngineOptions(1))
    request = Request(PROMPT, 48, 64, 29, steps=2, guidance=6.0, shift=7.0)
    latents = noise(ours, 48, 64, 29)
    received = run_ours(ours, request, latents)

    vae = AutoencoderKLHunyuanVideo.from_pretrained(tiny_checkpoint / "vae").double()
    transformer = HunyuanVideoTransformer3DModel.from_pretrained(tiny_checkpoint / "transformer")
    text = ours.encode_text(PROMPT)
    states, pooled = torch.from_numpy(text.states), torch.from_numpy(text.pooled)
    levels = np.array([1.0, 0.5])
    sigmas = np.append(7.0 * levels / (1 + 6.0 * levels), 0.0)
    x = latents.double()
    for sigma, following in pairwise(sigmas):
        velocity = transformer(
            x.float(),
            torch.tensor([1000 * sigma], dtype=torch.float32),
            states,
            torch.ones(states.shape[:2], dtype=torch.int64),
            pooled,
            guidance=torch.tensor([6.0], dtype=torch.bfloat16).mul(1000).float(),  # 6016
            return_dict=False,
        )[0]
        x = x + (following - sigma) * velocity.double()

    def decode(tile: np.ndarray) -> np.ndarray:
        frames: np.ndarray = vae.decoder(vae.post_quant_conv(torch.from_numpy(tile.copy()))).numpy()
        return frames

    decoded = tencent_decode((x / vae.config.scaling_factor).numpy(), decode, tiling, 8, 4)
    expected = np.clip(decoded[0].transpose(1, 2, 3, 0) / 2 + 0.5, 0, 1)
    require_pictures(expected)
    assert psnr(received, expected) >= 60
    other = Pipeline(
        replace(
            ours.bundle, manifest=replace(bundle.manifest, spec=replace(spec, guidance_rounding=GuidanceRounding.NONE))
        ),
        EngineOptions(1),
    )
    assert psnr(run_ours(other, request, latents), expected) < 60  # 6000 instead of 6016 is visible
