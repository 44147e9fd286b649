"""Benchmark of numbers: ``python -m reelforge.tools.bench.parity``, from a checkout. Writes ``benchmarks/parity.md``.

Random small checkpoints, diffusers and transformers as oracle: each stage alone, tiled decoding, the whole pipeline
from prompt to frames, and the same model in both checkpoint formats. Development only.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline

from reelforge.export.build import build_bundle
from reelforge.export.build_request import BuildRequest
from reelforge.export.models.hunyuan_video.spec_from_checkpoint import Numerics
from reelforge.runtime.events import Frames
from reelforge.runtime.manifest import Manifest
from reelforge.runtime.noise import gaussian_noise
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.recipe import Target
from reelforge.runtime.request import Request
from reelforge.tools.bench import oracle as by_hand
from reelforge.tools.bench import report
from reelforge.tools.bench.tencent_tiling import tencent_decode
from tests.checkpoints import make_diffusers_checkpoint, make_tencent_checkpoint

PACKAGES = ("torch", "diffusers", "transformers", "onnxruntime")
TOLERANCE, GOAL_DB, STEPS = 2e-5, 60.0, 20
# (T, h, w, L): one frame and one token, ragged text, several frames with one token, more text than image.
SHAPES = [(1, 2, 2, 1), (1, 6, 8, 7), (3, 6, 8, 1), (5, 2, 10, 4), (2, 12, 4, 40)]
TILES = [(1, 2, 2), (1, 5, 3), (2, 4, 4), (3, 2, 6), (5, 3, 2)]
# Latents of several tiles: in time (6 windows of diffusers, 2 of Tencent) and width, and in height and width.
TILED = [(18, 2, 34), (2, 34, 36)]
REQUESTS = [
    ("a red circle moving right on a black background", (64, 96, 17)),
    ("two blue squares", (48, 48, 9)),
    ("", (64, 64, 1)),
]


def stage_rows(stages: by_hand.Stages, oracle: by_hand.Oracle) -> Iterator[tuple[str, str, float]]:
    """Yield (stage, what was compared, largest difference) for every stage."""
    config = oracle.transformer.config
    times = torch.tensor([1000.0, 937.5, 12.25])
    worst = 0.0
    for tokens in (1, 2, 9, 40):
        states = by_hand.normal(tokens, 1, tokens, config.text_embed_dim)
        longer, mask = by_hand.padded(states, tokens + 5)
        received = by_hand.our_text(stages, oracle, states, times)
        for row, time in enumerate(times):
            expected = oracle.transformer.context_embedder(longer, time[None], mask)[:, :tokens]
            worst = max(worst, by_hand.difference(received[row : row + 1], expected))
    yield "refiner", "L = 1, 2, 9, 40; padded by 5 in diffusers; 3 timesteps", worst
    for *grid, tokens in SHAPES:
        latents = by_hand.normal(1, 1, config.in_channels, *grid)
        states = by_hand.normal(2, 1, tokens, config.text_embed_dim)
        pooled = by_hand.normal(3, 1, config.pooled_projection_dim)
        longer, mask = by_hand.padded(states, tokens + 6)
        velocity = by_hand.their_velocity(oracle, latents, longer, mask, pooled, 925.3)
        step = by_hand.our_step(stages, oracle, latents, states, pooled, 925.3)
        difference = max(
            by_hand.difference(step["velocity"], velocity),
            by_hand.difference(step["next_latents"], latents - 0.25 * velocity),
        )
        yield "refiner, modulation, dit", f"velocity and Euler step, T h w L = {(*grid, tokens)}", difference
    for tile in TILES:
        latents = 0.5 * by_hand.normal(7, 1, oracle.vae.config.latent_channels, *tile)
        received = stages("vae_decoder", latent_tile=latents.numpy())["frame_tile"]
        yield "vae_decoder", f"tile T h w = {tile}", by_hand.difference(received, by_hand.their_frames(oracle, latents))
    for tokens in (1, 19, 60):
        ids = torch.randint(0, 250, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        received = stages("llm", input_ids=ids.numpy())["prompt_states"]
        expected = by_hand.their_prompt_states(oracle, ids, tokens + 7)
        yield "llm", f"{tokens} tokens; padded by 7 in transformers", by_hand.difference(received, expected)
    for words in (1, 9, 75):
        ids = by_hand.clip_ids(oracle, words)
        received = stages("clip", clip_ids=ids.numpy())["pooled_text"]
        expected = by_hand.their_pooled(oracle, ids)
        yield "clip", f"{words} tokens; padded to 77 in transformers", by_hand.difference(received, expected)


def tiled_rows(checkpoint: Path, bundles: dict[Numerics, Path]) -> Iterator[tuple[str, str, float]]:
    """Yield (reference, what, largest difference) of tiled decoding through the bundles' pipelines."""
    vae = AutoencoderKLHunyuanVideo.from_pretrained(checkpoint / "vae").eval()
    vae.enable_tiling()
    exact = AutoencoderKLHunyuanVideo.from_pretrained(checkpoint / "vae").eval().double()
    pipelines = {numerics: Pipeline.open(bundle) for numerics, bundle in bundles.items()}
    tencent = pipelines[Numerics.TENCENT].spec

    def decode_exactly(tile: Any) -> Any:
        return exact.decoder(exact.post_quant_conv(torch.from_numpy(np.ascontiguousarray(tile)))).numpy()

    def largest_difference(numerics: Numerics, latents: Any, expected: Any) -> float:
        ours = np.concatenate(list(pipelines[numerics].decode(latents))) * 2.0 - 1.0
        return float(np.abs(ours - np.clip(expected[0].transpose(1, 2, 3, 0), -1.0, 1.0)).max())

    for size in TILED:
        latents = 0.5 * by_hand.normal(11, 1, vae.config.latent_channels, *size).numpy()
        scaled = torch.from_numpy(latents / np.float32(vae.config.scaling_factor))
        theirs = vae.decode(scaled, return_dict=False)[0].numpy()
        shape = f"latents T h w = {size}"
        yield "diffusers, enable_tiling()", shape, largest_difference(Numerics.DIFFUSERS, latents, theirs)
        compression = tencent.vae.spatial_compression, tencent.vae.temporal_compression
        restated = tencent_decode(scaled.double().numpy(), decode_exactly, tencent.tiling, *compression)
        label = "Tencent's procedure, restated, all in float64"
        yield label, shape, largest_difference(Numerics.TENCENT, latents, restated)


def pipeline_rows(checkpoint: Path, bundle: Path) -> Iterator[tuple[str, str, float]]:
    """Yield (prompt, shape, PSNR in dB) of the whole pipeline against diffusers, same noise, 20 steps."""
    template = json.loads((checkpoint / "prompt_template.json").read_text())
    pipeline = Pipeline.open(bundle)
    theirs = HunyuanVideoPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    theirs.vae.enable_tiling()
    theirs.set_progress_bar_config(disable=True)
    for seed, (prompt, (height, width, frames)) in enumerate(REQUESTS):
        noise = gaussian_noise((1, *pipeline.spec.latent_shape(height, width, frames)), seed)
        request = Request(prompt, height=height, width=width, frames=frames, steps=STEPS)
        received = np.concatenate(
            [event.values for event in pipeline.stream(request, noise) if isinstance(event, Frames)]
        )
        expected = theirs(
            prompt=prompt,
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=STEPS,
            sigmas=None,
            guidance_scale=pipeline.spec.defaults.guidance,
            latents=torch.from_numpy(noise),
            prompt_template=template,
            output_type="np",
        ).frames[0]
        error = float(np.mean((received.astype(np.float64) - expected) ** 2))
        yield repr(prompt), f"{height}x{width}x{frames}", 10 * np.log10(1 / error)


def build(checkpoint: Path, bundle: Path, numerics: Numerics) -> Manifest:
    """Build a bundle quietly."""
    return build_bundle(BuildRequest(checkpoint, bundle, Target.parse("cpu"), numerics=numerics))


def _met(met: bool) -> str:
    return "met" if met else "**missed**"


def _differences(rows: list[tuple[str, str, float]], first: str) -> list[str]:
    return report.table(
        (first, "compared", "largest difference", f"at most {TOLERANCE:.0e}"),
        [(name, what, f"{value:.1e}", _met(value <= TOLERANCE)) for name, what, value in rows],
    )


@click.command()
@click.option("--output", default=Path("benchmarks/parity.md"), show_default=True, type=click.Path(path_type=Path))
def main(output: Path) -> None:
    """Compare every stage, tiled decoding and the whole pipeline with diffusers and transformers."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        work = Path(name)
        checkpoint = make_diffusers_checkpoint(work / "diffusers", seed=1)
        twin = make_tencent_checkpoint(work / "tencent", checkpoint)
        bundles = {numerics: work / f"{numerics.value}.bundle" for numerics in Numerics}
        digests = [build(checkpoint, bundles[numerics], numerics).content_digest for numerics in Numerics]
        of_twin = build(twin, work / "twin.bundle", Numerics.TENCENT).content_digest
        of_original = digests[list(Numerics).index(Numerics.TENCENT)]
        stages = list(stage_rows(by_hand.Stages(bundles[Numerics.DIFFUSERS]), by_hand.Oracle(checkpoint)))
        tiled = list(tiled_rows(checkpoint, bundles))
        videos = list(pipeline_rows(checkpoint, bundles[Numerics.DIFFUSERS]))
    lines = [
        "# Parity",
        "",
        *report.environment("python -m reelforge.tools.bench.parity", PACKAGES),
        "",
        "fp32 bundles of a random small model of the full architecture, run by ONNX Runtime, against independent",
        "implementations. Every oracle output has a standard deviation between 0.3 and 4; differences are absolute, in",
        "proportion where the largest value is above 4.",
        "",
        "## Stages, against diffusers and transformers",
        "",
        *_differences(stages, "stage"),
        "",
        "## Tiled decoding",
        "",
        *_differences(tiled, "reference"),
        "",
        f"## Whole pipeline: prompt to frames, same noise, {STEPS} steps, against diffusers' pipeline",
        "",
        *report.table(
            ("prompt", "shape", "PSNR dB", f"at least {GOAL_DB:.0f} dB"),
            [(prompt, shape, f"{value:.1f}", _met(value >= GOAL_DB)) for prompt, shape, value in videos],
        ),
        "",
        "## Both checkpoint formats",
        "",
        *report.table(
            ("format", "content digest of the bundle"),
            [("diffusers", f"`{of_original}`"), ("Tencent", f"`{of_twin}`")],
        ),
        "",
        f"One digest: {_met(of_original == of_twin)}.",
    ]
    report.write(output, lines)
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
