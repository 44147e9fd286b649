"""Analytic latents: a causal block PCA that a stock HunyuanVideo encoder computes without training.

Every latent cell describes 4 frames x 8 x 8 pixels (the first frame stands alone, as four copies of itself). The pixels
are reduced in three stages, exactly where the encoder's strided convolutions lie: 1x2x2, 2x2x2 and 2x2x2 blocks, each
followed by a principal component projection. The map is affine and local to the cell, so the latents of a crop are the
crop of the latents. ``write_encoder`` stores the map into the encoder's weights.

Shapes: ``B`` batch, ``C`` channels, ``T`` frames, ``H`` ``W`` rows and columns. Pixels in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor, nn

LATENT_CHANNELS = 16
STAGES = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
WIDTHS = (12, 16, LATENT_CHANNELS)
VARIANCE_POWER = -0.3
LOG_VARIANCE = -12.0
CARRIER = 64.0


@dataclass(frozen=True)
class Projection:
    """One stage: ``weight`` [out, in * block], ``bias`` [out], applied to flattened (C, t, h, w) blocks."""

    weight: Tensor
    bias: Tensor


def blocks(features: Tensor, stage: tuple[int, int, int]) -> Tensor:
    """Cut [B, C, T, H, W] into causal blocks of size ``stage`` and flatten each: [B, C * t * h * w, T', H', W'].

    With t = 2 the first frame is paired with a copy of itself, as the encoder's replicated padding does.
    """
    time, height, width = stage
    if time == 2:
        features = torch.cat([features[:, :, :1], features], 2)
    batch, channels, frames, rows, columns = features.shape
    cut = features.reshape(batch, channels, frames // time, time, rows // height, height, columns // width, width)
    return cut.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(
        batch, channels * time * height * width, frames // time, rows // height, columns // width
    )


def project(features: Tensor, stage: tuple[int, int, int], projection: Projection) -> Tensor:
    """Apply one stage to [B, C, T, H, W]."""
    cut = blocks(features, stage)
    return torch.einsum("oi,bithw->bothw", projection.weight, cut) + projection.bias[:, None, None, None]


def encode(pixels: Tensor, projections: list[Projection]) -> Tensor:
    """Return the latents [B, 16, (T - 1) / 4 + 1, H / 8, W / 8] of ``pixels`` [B, 3, T, H, W]."""
    for stage, projection in zip(STAGES, projections, strict=True):
        pixels = project(pixels, stage, projection)
    return pixels


def fit(pixels: Tensor) -> list[Projection]:
    """Fit the three projections to example clips [B, 3, T, H, W].

    The last one is scaled per channel by variance ** -0.3, between plain and fully whitened principal components.
    """
    projections: list[Projection] = []
    features = pixels
    for stage, width in zip(STAGES, WIDTHS, strict=True):
        cut = blocks(features, stage)
        rows = cut.permute(0, 2, 3, 4, 1).reshape(-1, cut.shape[1])
        mean = rows.mean(0)
        covariance = (rows - mean).T @ (rows - mean) / len(rows)
        variances, directions = torch.linalg.eigh(covariance.double())
        weight = directions[:, -width:].flip(1).T.float()
        if len(projections) == len(STAGES) - 1:
            weight = weight * variances[-width:].flip(0).float().pow(VARIANCE_POWER)[:, None]
        projections.append(Projection(weight, -weight @ mean))
        features = project(features, stage, projections[-1])
    return projections


def _zero(convolution: nn.Conv3d) -> None:
    nn.init.zeros_(convolution.weight)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)


def _write_stage(convolution: nn.Conv3d, stage: tuple[int, int, int], projection: Projection) -> None:
    """Store a block projection in a strided 3x3x3 convolution: block offset k is tap k + 1 (time: the last t)."""
    time, height, width = stage
    outputs, flat = projection.weight.shape
    inputs = flat // (time * height * width)
    _zero(convolution)
    taps = projection.weight.reshape(outputs, inputs, time, height, width)
    convolution.weight[:outputs, :inputs, 3 - time :, 1 : 1 + height, 1 : 1 + width] = taps
    assert convolution.bias is not None
    convolution.bias[:outputs] = projection.bias


@torch.no_grad()  # type: ignore[untyped-decorator]
def write_encoder(vae: AutoencoderKLHunyuanVideo, projections: list[Projection]) -> None:
    """Write the analytic map into ``vae``'s encoder, and the identity into ``quant_conv``.

    Residual branches are zero, so everything up to the last normalisation is linear. There each latent is carried as a
    pair +z, -z beside constants +-``CARRIER`` in every GroupNorm group: the constants fix the group's deviation, and
    SiLU(x) - SiLU(-x) = x undoes the activation. Needs a last width of at least 4 times the latent channels.
    """
    encoder = vae.encoder
    _zero(encoder.conv_in.conv)
    for channel in range(3):
        encoder.conv_in.conv.weight[channel, channel, 2, 1, 1] = 1.0
    for module in encoder.modules():
        if module.__class__.__name__ == "HunyuanVideoResnetBlockCausal3D":
            _zero(module.conv2.conv)
            if module.conv_shortcut is not None:
                _zero(module.conv_shortcut.conv)
                for channel in range(module.conv_shortcut.conv.in_channels):
                    module.conv_shortcut.conv.weight[channel, channel] = 1.0
    for block, stage, projection in zip(encoder.down_blocks, STAGES, projections, strict=False):
        _write_stage(block.downsamplers[0].conv.conv, stage, projection)
    for attention in encoder.mid_block.attentions:
        nn.init.zeros_(attention.to_out[0].weight)
        nn.init.zeros_(attention.to_out[0].bias)

    norm = encoder.conv_norm_out
    width, groups = norm.num_channels, norm.num_groups
    per_group, latents_per_group = width // groups, LATENT_CHANNELS // groups
    shortcut = encoder.down_blocks[-1].resnets[0].conv_shortcut.conv
    _zero(shortcut)
    _zero(encoder.conv_out.conv)
    constants = per_group - 2 * latents_per_group
    scale = CARRIER * (constants / per_group) ** 0.5
    for latent in range(LATENT_CHANNELS):
        group, place = divmod(latent, latents_per_group)
        positive = group * per_group + 2 * place
        for channel, sign in ((positive, 1.0), (positive + 1, -1.0)):
            shortcut.weight[channel, latent] = sign
            encoder.conv_out.conv.weight[latent, channel, 2, 1, 1] = sign * scale
    for group in range(groups):
        for place in range(constants):
            shortcut.bias[group * per_group + 2 * latents_per_group + place] = CARRIER * (-1.0) ** place
    encoder.conv_out.conv.bias[LATENT_CHANNELS:] = LOG_VARIANCE
    vae.quant_conv.weight[:] = torch.eye(2 * LATENT_CHANNELS)[:, :, None, None, None]
    nn.init.zeros_(vae.quant_conv.bias)
