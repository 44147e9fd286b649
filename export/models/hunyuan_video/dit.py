"""The diffusion transformer of HunyuanVideo, cut where the compiler cuts it: patches, blocks, final layer.

Conditioning arrives as finished modulation vectors, text as refined tokens, and the last part performs the Euler
update, so a step is one engine call. Follows specification 3.4 - 3.6 with three exact rewrites: q and k in half-split
rotary layout, text cut to its valid length instead of masked, and the single block's output projection as two products
instead of one over a concatenation. What it does not know: timesteps, schedules, checkpoints' names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelforge.export.models.hunyuan_video.layers import HeadNorm, attend, gated, modulate, rotate
from reelforge.runtime.spec import DitSpec

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From rotated q and k, and v, [B, S, h, d] in one dtype, to [B, S, h * d]."""


def to_patches(latents: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Return [B, N, C * patch's volume] from [B, C, T, H, W], tokens in t-major order."""
    batch, channels, frames, height, width = latents.shape
    pt, ph, pw = patch
    grid = latents.reshape(batch, channels, frames // pt, pt, height // ph, ph, width // pw, pw)
    return grid.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, -1, channels * pt * ph * pw)


class PatchEmbedding(nn.Module):
    """Latents to image tokens, and everything that all blocks share."""

    def __init__(self, spec: DitSpec) -> None:
        super().__init__()
        self.patch = spec.patch
        features = spec.latent_channels * spec.patch[0] * spec.patch[1] * spec.patch[2]
        self.patch_embed = nn.Linear(features, spec.width)

    def forward(
        self, latents: Tensor, text: Tensor, rope_cos: Tensor, rope_sin: Tensor, token_gather: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return ``(image, text, joint_cos, joint_sin)``.

        Args:
            latents: fp32 [B, C, T, H, W].
            text: fp32 [B, L, D].
            rope_cos: fp32 [N, d/2], image tokens in the order of the result.
            rope_sin: Likewise.
            token_gather: int64 [N], the token in each place of the result, counted in t-major order; None is that
                order.

        Returns:
            image [B, N, D] and text [B, L, D] in the parameters' dtype; tables [N + L, d/2] whose text rows are the
            identity, since text carries no rotation.
        """
        dtype = self.patch_embed.weight.dtype
        patches = to_patches(latents, self.patch)
        if token_gather is not None:
            patches = patches.index_select(1, token_gather)
        ones = torch.ones_like(text[0, :, :1]).expand(-1, rope_cos.shape[-1])
        joint_cos = torch.cat((rope_cos, ones), dim=0)
        joint_sin = torch.cat((rope_sin, torch.zeros_like(ones)), dim=0)
        return self.patch_embed(patches.to(dtype)), text.to(dtype), joint_cos, joint_sin


class KeyLengths(nn.Module):
    """How many keys of the joint sequence [image, text] each video of a batch may see."""

    def forward(self, image: Tensor, text_lengths: Tensor) -> Tensor:
        """Return int64 [B] from image [B, N, D] and text_lengths int64 [B]."""
        return text_lengths + image.shape[1]


class HeadProjections(nn.Module):
    """The projections to query, key and value heads that every block has, with their norms."""

    def __init__(self, spec: DitSpec) -> None:
        super().__init__()
        self.heads, self.head_dim = spec.heads, spec.head_dim
        self.q = nn.Linear(spec.width, spec.heads * spec.head_dim)
        self.k = nn.Linear(spec.width, spec.heads * spec.head_dim)
        self.v = nn.Linear(spec.width, spec.heads * spec.head_dim)
        self.q_norm = HeadNorm(spec.head_dim, spec.norm_eps)
        self.k_norm = HeadNorm(spec.head_dim, spec.norm_eps)

    def project(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map [B, S, D] to normalised fp32 q and k, and v, each [B, S, h, d]."""
        q, k, v = (p(normed).unflatten(-1, (self.heads, self.head_dim)) for p in (self.q, self.k, self.v))
        return self.q_norm(q), self.k_norm(k), v


def attend_rotated(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
    """Rotate fp32 q and k [B, S, h, d], then attend in v's dtype; returns [B, S, h * d]."""
    return attention(rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype), v)


class Stream(HeadProjections):
    """One of the two token streams of a double block: its projections, norms and MLP."""

    def __init__(self, spec: DitSpec) -> None:
        super().__init__(spec)
        self.proj = nn.Linear(spec.heads * spec.head_dim, spec.width)
        self.fc1 = nn.Linear(spec.width, spec.mlp_width)
        self.fc2 = nn.Linear(spec.mlp_width, spec.width)
        self.eps = spec.norm_eps

    def finish(
        self, x: Tensor, attended: Tensor, gate1: Tensor, shift2: Tensor, scale2: Tensor, gate2: Tensor
    ) -> Tensor:
        """Add the attention's and the MLP's contributions to x [B, S, D]."""
        x = x + gated(self.proj(attended), gate1)
        hidden = F.gelu(self.fc1(modulate(x, shift2, scale2, self.eps)), approximate="tanh")
        return x + gated(self.fc2(hidden), gate2)


class DoubleBlock(nn.Module):
    """Image and text in separate streams with one joint attention (specification 3.6)."""

    def __init__(self, spec: DitSpec) -> None:
        super().__init__()
        self.image = Stream(spec)
        self.text = Stream(spec)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        modulation: Tensor,
        joint_cos: Tensor,
        joint_sin: Tensor,
        key_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the new ``(image, text)``.

        Args:
            image: [B, N, D].
            text: [B, L, D].
            modulation: fp32 [B, 2, 6, D]: image then text; shift, scale, gate twice.
            joint_cos: fp32 [N + L, d/2].
            joint_sin: Likewise.
            key_lengths: int64 [B] or None.
        """
        return self.compute(image, text, modulation, joint_cos, joint_sin, partial(attend, key_lengths=key_lengths))

    def compute(
        self,
        image: Tensor,
        text: Tensor,
        modulation: Tensor,
        joint_cos: Tensor,
        joint_sin: Tensor,
        attention: Attention,
    ) -> tuple[Tensor, Tensor]:
        """Return the new ``(image, text)`` of any attention."""
        i_shift1, i_scale1, i_gate1, i_shift2, i_scale2, i_gate2 = modulation[:, 0].split(1, dim=1)
        t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = modulation[:, 1].split(1, dim=1)
        image_qkv = self.image.project(modulate(image, i_shift1, i_scale1, self.image.eps))
        text_qkv = self.text.project(modulate(text, t_shift1, t_scale1, self.text.eps))
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(image_qkv, text_qkv, strict=True))
        attended = attend_rotated(q, k, v, joint_cos, joint_sin, attention)
        tokens = image.shape[1]
        return (
            self.image.finish(image, attended[:, :tokens], i_gate1, i_shift2, i_scale2, i_gate2),
            self.text.finish(text, attended[:, tokens:], t_gate1, t_shift2, t_scale2, t_gate2),
        )


class JoinStreams(nn.Module):
    """Image and text become one sequence before the single blocks."""

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Return [B, N + L, D]."""
        return torch.cat((image, text), dim=1)


class SingleBlock(HeadProjections):
    """Attention and MLP in parallel over the joint sequence (specification 3.6)."""

    def __init__(self, spec: DitSpec) -> None:
        super().__init__(spec)
        self.fc1 = nn.Linear(spec.width, spec.mlp_width)
        self.proj_attention = nn.Linear(spec.heads * spec.head_dim, spec.width)
        self.proj_mlp = nn.Linear(spec.mlp_width, spec.width, bias=False)
        self.eps = spec.norm_eps

    def forward(
        self,
        joint: Tensor,
        modulation: Tensor,
        joint_cos: Tensor,
        joint_sin: Tensor,
        key_lengths: Tensor | None = None,
    ) -> Tensor:
        """Return the new joint sequence.

        Args:
            joint: [B, S, D], image tokens first.
            modulation: fp32 [B, 3, D]: shift, scale, gate.
            joint_cos: fp32 [S, d/2].
            joint_sin: Likewise.
            key_lengths: int64 [B] or None.
        """
        return self.compute(joint, modulation, joint_cos, joint_sin, partial(attend, key_lengths=key_lengths))

    def compute(
        self, joint: Tensor, modulation: Tensor, joint_cos: Tensor, joint_sin: Tensor, attention: Attention
    ) -> Tensor:
        """Return the new joint sequence of any attention."""
        shift, scale, gate = modulation.split(1, dim=1)
        normed = modulate(joint, shift, scale, self.eps)
        attended = attend_rotated(*self.project(normed), joint_cos, joint_sin, attention)
        hidden = self.proj_mlp(F.gelu(self.fc1(normed), approximate="tanh"))
        return joint + gated(self.proj_attention(attended) + hidden, gate)


class FinalLayer(nn.Module):
    """Image tokens to velocity, and one Euler step with it (specification 3.6 and 4)."""

    def __init__(self, spec: DitSpec) -> None:
        super().__init__()
        self.patch = spec.patch
        features = spec.latent_channels * spec.patch[0] * spec.patch[1] * spec.patch[2]
        self.proj = nn.Linear(spec.width, features)
        self.eps = spec.norm_eps

    def forward(
        self,
        joint: Tensor,
        final_modulation: Tensor,
        latents: Tensor,
        sigma_step: Tensor,
        token_scatter: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return fp32 ``(velocity, next_latents)``, both [B, C, T, H, W].

        Args:
            joint: [B, N + L, D].
            final_modulation: fp32 [B, 2, D]: shift, scale.
            latents: fp32 [B, C, T, H, W].
            sigma_step: fp32 scalar, ``sigma_{i+1} - sigma_i``.
            token_scatter: int64 [tokens], the place of each image token in ``joint``; None is t-major order.
        """
        batch, channels, frames, height, width = latents.shape
        pt, ph, pw = self.patch
        grid = (frames // pt, height // ph, width // pw)
        tokens = grid[0] * grid[1] * grid[2]
        image = joint[:, :tokens] if token_scatter is None else joint.index_select(1, token_scatter[:tokens])
        shift, scale = final_modulation.split(1, dim=1)
        patches = self.proj(modulate(image, shift, scale, self.eps)).float()
        patches = patches.reshape(batch, *grid, channels, pt, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)
        velocity = patches.reshape(batch, channels, frames, height, width)
        return velocity, latents + sigma_step * velocity
