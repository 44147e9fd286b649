"""Sampling with cached text states: the shipped scheduler's Euler steps, without the pipeline around them.

Shapes: ``B`` batch, latents [B, 16, T, H, W] standardised, clips [B, T, 3, H, W] in [0, 1].
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from demo.train import data, dit, text


@torch.no_grad()
def latents(
    model: nn.Module, bank: text.TextBank, rows: Tensor, seed: int, shift: float, guidance: float, frames: int = 9
) -> Tensor:
    """Return sampled latents for caption ``rows`` [B] in 20 Euler steps; ``guidance`` is as embedded."""
    return euler(
        lambda noisy, sigma: dit.velocity(model, noisy, sigma, bank, rows, rows, torch.full((len(rows),), guidance)),
        len(rows),
        seed,
        shift,
        frames,
    )


def euler(predict, count: int, seed: int, shift: float, frames: int, steps: int = 20) -> Tensor:  # type: ignore[no-untyped-def]
    """Integrate ``predict(noisy, sigma [B]) -> velocity`` from noise to latents."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1].tolist())
    cells = data.SIZE // 8
    generator = torch.Generator().manual_seed(seed)
    current = torch.randn(count, 16, (frames - 1) // 4 + 1, cells, cells, generator=generator)
    for sigma, following in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
        current = current + (following - sigma) * predict(current, sigma.expand(count))
    return current


@torch.no_grad()
def decode(vae: AutoencoderKLHunyuanVideo, codes: Tensor) -> Tensor:
    """Return clips [B, T, 3, H, W] in [0, 1] from plain (not standardised) latents."""
    parts = [vae.decoder(part) for part in codes.split(8)]
    return (torch.cat(parts).clamp(-1, 1) / 2 + 0.5).transpose(1, 2)
