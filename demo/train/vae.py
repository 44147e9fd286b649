"""Training of the VAE's decoder on analytic latents (see ``latents``); the encoder needs no training.

Shapes: ``B`` batch, ``C`` channels, ``T`` frames, ``H`` ``W`` pixels or latent cells. Pixels in [-1, 1].
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor, nn

from demo.train import bank, latents, optim, ranks, state

CONFIG: dict[str, Any] = {"block_out_channels": (16, 16, 32, 64), "layers_per_block": 1, "norm_num_groups": 4}
CROP_CELLS = 4


@dataclass(frozen=True)
class Plan:
    """Settings of the decoder's training.

    Attributes:
        steps: optimiser steps; the first half sees object crops of 32x32 pixels, the second half whole clips.
        crops: crops per step in the first half.
        clips: clips per step in the second half.
        image_every: every n-th step trains on single images instead.
        muon_rate: learning rate of the convolutions.
        adam_rate: learning rate of everything else.
        average: decay of the averaged weights.
        foreground: extra loss weight of pixels that the object touches.
        noise: standard deviation of the noise on the latents at the beginning and the end.
        seed: of initial weights and batches.
    """

    steps: int = 2500
    crops: int = 12
    clips: int = 3
    image_every: int = 8
    muon_rate: float = 2.5e-3
    adam_rate: float = 1.5e-3
    average: float = 0.99
    foreground: float = 4.0
    noise: tuple[float, float] = (0.05, 0.02)
    seed: int = 0


def projections() -> list[latents.Projection]:
    """Return the analytic encoder of this world: fitted once, then kept in the state folder."""
    stored = state.load("projections")
    if stored is None:
        generator = torch.Generator().manual_seed(1)
        on_marks = bank.build(bank.world_placements(fine=True), held_out=False)
        off_marks = bank.build(bank.jittered_placements(1), held_out=False)
        clips = torch.cat([bank.sample_clips(each, 400, generator) for each in (on_marks, off_marks)])
        fitted = latents.fit(clips)
        stored = [{"weight": p.weight, "bias": p.bias} for p in fitted]
        state.save("projections", stored)
    return [latents.Projection(**entry) for entry in stored]


@torch.no_grad()  # type: ignore[untyped-decorator]
def initialise(vae: AutoencoderKLHunyuanVideo) -> None:
    """Start the decoder as a smooth interpolation: silent residual branches, bilinear upsampling convolutions."""
    decoder = vae.decoder
    for module in decoder.modules():
        kind = module.__class__.__name__
        if kind == "HunyuanVideoResnetBlockCausal3D":
            nn.init.zeros_(module.conv2.conv.weight)
            nn.init.zeros_(module.conv2.conv.bias)
            if module.conv_shortcut is not None:
                nn.init.orthogonal_(module.conv_shortcut.conv.weight)
                nn.init.zeros_(module.conv_shortcut.conv.bias)
        elif kind == "HunyuanVideoUpsampleCausal3D":
            weight = module.conv.conv.weight
            smooth = torch.tensor([0.25, 0.5, 0.25])
            nn.init.zeros_(weight)
            for channel in range(weight.shape[0]):
                weight[channel, channel, 2] = torch.outer(smooth, smooth)
            nn.init.zeros_(module.conv.conv.bias)
    for attention in decoder.mid_block.attentions:
        nn.init.zeros_(attention.to_out[0].weight)
        nn.init.zeros_(attention.to_out[0].bias)
    vae.post_quant_conv.weight[:] = torch.eye(latents.LATENT_CHANNELS)[:, :, None, None, None]
    nn.init.zeros_(vae.post_quant_conv.bias)


def build(seed: int) -> AutoencoderKLHunyuanVideo:
    """Return a VAE with the analytic encoder and an initialised decoder, in plain (not standardised) latents."""
    torch.manual_seed(seed)
    vae = AutoencoderKLHunyuanVideo(**CONFIG)
    latents.write_encoder(vae, projections())
    initialise(vae)
    return vae


def loss_of(output: Tensor, target: Tensor, foreground: float) -> Tensor:
    """Return foreground-weighted L1 + L2 plus half the L1 of spatial gradients; tensors [B, 3, T, H, W]."""
    corner = target[:, :, :, :1, :1]
    weight = 1 + foreground * ((target - corner).abs().amax(1, keepdim=True) > 0.02)
    error = output - target
    pixel = (weight * (error.abs() + error.square())).mean()
    gradient = error.diff(dim=3).abs().mean() + error.diff(dim=4).abs().mean()
    return pixel + 0.5 * gradient


def crop_to_object(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Return [B, 3, T, 32, 32] crops on the 8-pixel grid around a random frame of each object."""
    side = CROP_CELLS * 8
    cells = pixels.shape[-1] // 8
    touched = (pixels - pixels[..., :1, :1]).abs().amax((1, 2)) > 0.1
    crops = []
    for clip, mask in zip(pixels, touched, strict=True):
        places = mask.nonzero()
        row, column = places[int(torch.randint(len(places), (1,), generator=generator))].tolist()
        top, left = (
            min(max(0, place // 8 - int(torch.randint(CROP_CELLS, (1,), generator=generator))), cells - CROP_CELLS) * 8
            for place in (row, column)
        )
        crops.append(clip[:, :, top : top + side, left : left + side])
    return torch.stack(crops)


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return (matrices and convolution kernels, everything else) of a module."""
    kernels = [p for p in module.parameters() if p.ndim >= 2]
    return kernels, [p for p in module.parameters() if p.ndim < 2]


def train(plan: Plan) -> None:
    """Train the decoder, or go on where a killed run stopped; the result is the state ``vae``."""
    encoder = projections()
    vae = build(plan.seed)
    decoder = vae.decoder
    kernels, others = split_parameters(decoder)
    optimisers = [
        (optim.Muon(kernels, plan.muon_rate), plan.muon_rate),
        (torch.optim.AdamW(others, plan.adam_rate, weight_decay=0.0, foreach=True), plan.adam_rate),
    ]
    average = optim.Average(decoder, plan.average)
    first, seconds = optim.resume("vae", decoder, average, optimisers)
    banks = [
        bank.build(bank.world_placements(fine=True), held_out=False),
        bank.build(bank.jittered_placements(2), held_out=False),
    ]
    began, total = time.process_time(), 0.0
    for step in range(first, plan.steps):
        generator = ranks.generator(plan.seed, step)
        whole = step >= plan.steps // 2
        count = plan.clips if whole else plan.crops
        image = step % plan.image_every == plan.image_every - 1
        pixels = bank.sample_clips(banks[step % 2], count * (4 if image else 1), generator)
        if image:
            pixels = pixels[:, :, :1]
        if not whole:
            pixels = crop_to_object(pixels, generator)
        progress = step / plan.steps
        noise = plan.noise[0] + (plan.noise[1] - plan.noise[0]) * progress
        codes = latents.encode(pixels, encoder)
        codes = codes + noise * torch.randn(codes.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            output = decoder(codes)
        loss = loss_of(output.float(), pixels, plan.foreground)
        loss.backward()
        optim.advance(optimisers, optim.rate(step, plan.steps, 40, 0.35, 0.02))
        average.update(step)
        total += float(loss.detach())
        spent = seconds + time.process_time() - began
        if (step + 1) % 50 == 0:
            state.log("vae", {"step": step + 1, "loss": total / 50, "cpu_seconds": spent})
            total = 0.0
        if (step + 1) % 250 == 0 or step + 1 == plan.steps:
            state.log("vae_psnr", {"step": step + 1, "psnr": psnr(vae, average, 24, plan.seed)})
            optim.store("vae", step + 1, spent, decoder, average, optimisers)


@torch.no_grad()  # type: ignore[untyped-decorator]
def psnr(vae: AutoencoderKLHunyuanVideo, average: optim.Average, count: int, seed: int) -> float:
    """Return the PSNR in dB (mean over clips, pixels in [0, 1]) of the averaged decoder on held-out combinations."""
    generator = torch.Generator().manual_seed(seed + 77)
    places = bank.world_placements()
    pixels = bank.sample_clips(bank.build(places, held_out=True), count, generator)
    codes = latents.encode(pixels, projections())
    output = torch.func.functional_call(vae.decoder, average.state_dict(), (codes,)).clamp(-1, 1)
    return float((10 * torch.log10(4 / (output - pixels).square().mean((1, 2, 3, 4)))).mean())


def trained() -> AutoencoderKLHunyuanVideo:
    """Return the VAE with the averaged decoder of the last saved state.

    Raises:
        FileNotFoundError: before the first save.
    """
    stored = state.load("vae")
    if stored is None:
        raise FileNotFoundError("no trained decoder in the state folder\n  fix: run `python -m demo.train vae` first")
    vae = build(0)
    vae.decoder.load_state_dict(stored["average"])
    return vae.eval()
