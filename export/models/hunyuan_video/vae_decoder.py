"""The decoder of HunyuanVideo's causal 3D VAE, one tile per call (specification 5.1).

Parameter names are the checkpoint's own. Two exact rewrites: the middle attention runs frame by frame instead of under
a mask, and temporal upsampling doubles every frame instead of treating the first frame apart: the copy of the first
stands for one of the two that the causal convolution behind it would pad. GroupNorm statistics span the tile; the
module does not know how a video is cut into tiles.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from reelforge.export.portable import frame_causal_attention
from reelforge.runtime.spec import VaeSpec


class CausalConv3d(nn.Module):
    """Convolution that pads time in front only, by replication.

    Args:
        in_channels: C.
        out_channels: C'.
        kernel: Its size in every direction.
        repeated: How often its input begins with the first frame already, beside the frame itself.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, repeated: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel)
        side = kernel // 2
        self.padding = (side, side, side, side, kernel - 1 - repeated, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, T, H, W] to [B, C', T - repeated, H, W]."""
        return self.conv(F.pad(x, self.padding, mode="replicate") if any(self.padding) else x)


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, with a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, spec: VaeSpec) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(spec.norm_groups, in_channels, eps=spec.norm_eps)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3)
        self.norm2 = nn.GroupNorm(spec.norm_groups, out_channels, eps=spec.norm_eps)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3)
        self.conv_shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, T, H, W] to [B, C', T, H, W]."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class MidAttention(nn.Module):
    """Single-head, frame-causal attention over all positions of the tile."""

    def __init__(self, channels: int, spec: VaeSpec) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(spec.norm_groups, channels, eps=spec.norm_eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, T, H, W] to the same shape."""
        batch, channels, frames, height, width = x.shape
        tokens = self.group_norm(x).permute(0, 2, 3, 4, 1).reshape(batch, frames, height * width, channels)
        attended = frame_causal_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        out = self.to_out[0](attended).reshape(batch, frames, height, width, channels)
        return x + out.permute(0, 4, 1, 2, 3)


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the innermost resolution."""

    def __init__(self, channels: int, spec: VaeSpec) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, spec) for _ in range(2)])
        self.attentions = nn.ModuleList([MidAttention(channels, spec)])

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, T, H, W] to the same shape."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Upsample(nn.Module):
    """Nearest upsampling, in time all frames but the first, then a convolution."""

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__()
        self.factor = (2.0, 2.0, 2.0) if in_time else (1.0, 2.0, 2.0)
        self.conv = CausalConv3d(channels, channels, 3, repeated=1 if in_time else 0)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, T, H, W] to [B, C, 2T-1 or T, 2H, 2W]."""
        return self.conv(F.interpolate(x, scale_factor=self.factor, mode="nearest"))


class UpBlock(nn.Module):
    """Residual blocks of one level, then its upsampling."""

    def __init__(
        self, in_channels: int, out_channels: int, layers: int, upsampler: Upsample | None, spec: VaeSpec
    ) -> None:
        super().__init__()
        widths = pairwise([in_channels] + [out_channels] * layers)
        self.resnets = nn.ModuleList([ResnetBlock(before, after, spec) for before, after in widths])
        self.upsamplers = None if upsampler is None else nn.ModuleList([upsampler])

    def forward(self, x: Tensor) -> Tensor:
        """Run the level."""
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class Decoder(nn.Module):
    """Latents after ``post_quant_conv`` to pixels."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        widths = spec.block_widths[::-1]
        levels = len(widths)
        spatial_levels = spec.spatial_compression.bit_length() - 1
        temporal_levels = spec.temporal_compression.bit_length() - 1
        self.conv_in = CausalConv3d(spec.latent_channels, widths[0], 3)
        self.mid_block = MidBlock(widths[0], spec)
        blocks = []
        for level, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            in_time = levels - 1 - temporal_levels <= level < levels - 1
            upsampler = Upsample(width, in_time) if level < spatial_levels else None
            blocks.append(UpBlock(before, width, spec.layers_per_block + 1, upsampler, spec))
        self.up_blocks = nn.ModuleList(blocks)
        self.conv_norm_out = nn.GroupNorm(spec.norm_groups, widths[-1], eps=spec.norm_eps)
        self.conv_out = CausalConv3d(widths[-1], 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, T, H, W] to [B, 3, 4T-3, 8H, 8W]."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VaeDecoder(nn.Module):
    """One tile of latents to one tile of video."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        self.scaling_factor = spec.scaling_factor
        self.post_quant_conv = nn.Conv3d(spec.latent_channels, spec.latent_channels, 1)
        self.decoder = Decoder(spec)

    def forward(self, latent_tile: Tensor) -> Tensor:
        """Map fp32 latents [1, C, T, H, W], as sampled, to fp32 frames [1, 3, 4T-3, 8H, 8W] in about [-1, 1]."""
        scaled = (latent_tile / self.scaling_factor).to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(scaled)).float()
