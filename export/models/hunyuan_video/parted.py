"""The transformer as head, body and tail: the blocks of ``dit`` with cuts where a step cache looks in and comes back.

The head is everything up to the first double block, the tail is the final layer with the Euler update, the body is what
lies between. First-block cache (ParaAttention, https://github.com/chengzeyi/ParaAttention) decides by what the first
block adds, and a skipped step keeps what the body added: ``head_change`` and ``token_reuse``. Weights, precision and
8-bit layers are those of ``dit``. What decides about steps is in ``runtime.step_cache``.

Letters: ``B`` batch, ``N`` image tokens, ``S`` all tokens, image first, ``D`` width; steps ``i``, the last computed one
``c``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from reelforge.export.models.hunyuan_video.dit import to_patches
from reelforge.export.stage import COMPUTE, Part, Stage, Value
from reelforge.runtime.spec import DitSpec, ModelSpec


class HeadChange(nn.Module):
    """How far what the first block adds to the image tokens is from what it added in the last computed step."""

    def __init__(self, spec: DitSpec) -> None:
        super().__init__()
        self.patch = spec.patch
        features = spec.latent_channels * spec.patch[0] * spec.patch[1] * spec.patch[2]
        self.patch_embed = nn.Linear(features, spec.width)

    def forward(self, latents: Tensor, computed_latents: Tensor, image: Tensor, computed_image: Tensor) -> Tensor:
        """Return ``|r_i - r_c| / |r_c|``, fp32 [], where ``r`` is the head's image less the embedded patches.

        ``|.|`` is the mean of absolute values. What was embedded is computed again rather than kept: it is a product
        of some ten columns, and tokens take gigabytes.

        Args:
            latents: ``x_i``, fp32 [B, C, T, H, W].
            computed_latents: ``x_c``.
            image: The head's at step ``i``, [B, N, D] in the parameters' dtype.
            computed_image: At step ``c``.
        """
        before = self._added(computed_latents, computed_image)
        return (self._added(latents, image) - before).abs().mean() / before.abs().mean()

    def _added(self, latents: Tensor, image: Tensor) -> Tensor:
        embedded = self.patch_embed(to_patches(latents, self.patch).to(self.patch_embed.weight.dtype))
        return (image - embedded).float()


class TokenReuse(nn.Module):
    """Tokens for the tail of a step whose body is not computed."""

    def forward(self, tokens: Tensor, image: Tensor, computed_image: Tensor) -> Tensor:
        """Return the body's last tokens, moved by as much as the head's image has since: what it added is kept.

        Args:
            tokens: The body's at step ``c``, [B, S, D].
            image: The head's at step ``i``, [B, N, D].
            computed_image: At step ``c``.
        """
        count = image.shape[1]
        return torch.cat((tokens[:, :count] + (image - computed_image), tokens[:, count:]), dim=1)


def parted_stages(spec: ModelSpec, dit: Stage) -> tuple[Stage, ...]:
    """Return head, body and tail of a dense ``dit``, with ``head_change`` and ``token_reuse``."""
    first = next(index for index, part in enumerate(dit.parts) if part.label == "DoubleBlock")
    double = dit.parts[first]
    later = (replace(double, first=1, repeat=double.repeat - 1),) if double.repeat > 1 else ()
    ragged = ("key_lengths",) if "key_lengths" in dit.values and "text_lengths" in dit.inputs else ()
    passed = {"head_image": "image", "head_text": "text_stream"}
    tables = ("joint_cos", "joint_sin", *ragged)
    head = replace(
        dit,
        name="dit_head",
        parts=(*dit.parts[:first], replace(double, repeat=1)),
        inputs=tuple(
            name
            for name in dit.inputs
            if name in ("latents", "text", "double_modulation", "rope_cos", "rope_sin", "text_lengths")
        ),
        outputs=(*passed, *tables),
        aliases=passed,
        weights_of="dit",
    )
    body = replace(
        dit,
        name="dit_body",
        parts=(*later, *dit.parts[first + 1 : -1]),
        inputs=(*passed, *(("double_modulation",) if later else ()), "single_modulation", *tables),
        outputs=("tokens",),
        aliases={**passed, "tokens": "joint"},
        weights_of="dit",
    )
    tail = replace(
        dit,
        name="dit_tail",
        parts=dit.parts[-1:],
        inputs=("tokens", "final_modulation", "latents", "sigma_step"),
        aliases={"tokens": "joint"},
        weights_of="dit",
    )
    return head, body, tail, *_measures(spec, dit)


def _measures(spec: ModelSpec, dit: Stage) -> tuple[Stage, Stage]:
    image, joint, latents = dit.values["image"], dit.values["joint"], dit.values["latents"]
    asked = ("latents", "computed_latents", "image", "computed_image")
    change = Stage(
        name="head_change",
        component=dit.component,
        parts=(Part("", partial(HeadChange, spec.dit), asked, ("head_change",)),),
        values={
            **dict.fromkeys(asked[:2], latents),
            **dict.fromkeys(asked[2:], image),
            "head_change": Value("float32", ()),
        },
        inputs=("latents", "computed_latents", "head_image", "computed_head_image"),
        outputs=("head_change",),
        tolerance=dit.tolerance,
        aliases={"head_image": "image", "computed_head_image": "computed_image"},
        weights_of="dit",
    )
    reused = ("joint", "image", "computed_image")
    reuse = Stage(
        name="token_reuse",
        component=dit.component,
        parts=(Part("", TokenReuse, reused, ("reused",)),),
        values={"joint": joint, "image": image, "computed_image": image, "reused": Value(COMPUTE, joint.shape)},
        inputs=("tokens", "head_image", "computed_head_image"),
        outputs=("reused_tokens",),
        tolerance=dit.tolerance,
        aliases={
            "tokens": "joint",
            "head_image": "image",
            "computed_head_image": "computed_image",
            "reused_tokens": "reused",
        },
        weights_of="dit",
    )
    return change, reuse
