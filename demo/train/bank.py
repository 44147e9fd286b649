"""Cached masks and latents of the whole training world, so that a training step only gathers and blends.

Shapes: ``N`` trajectories, ``B`` batch, ``T`` frames, ``H`` ``W`` pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from demo.train import data


@dataclass(frozen=True)
class MaskBank:
    """Rendered trajectories.

    Attributes:
        placements: the N trajectories.
        masks: coverage as bytes [N, T, H, W], 255 is full.
        colours: for each trajectory the (colour, background) index pairs to draw from, [N, P, 2].
    """

    placements: list[data.Placement]
    masks: Tensor
    colours: Tensor


def pairs(shape: str, motion: str, held_out: bool) -> list[tuple[int, int]]:
    """Return the (colour, background) index pairs of a shape and motion that are in training, or held out."""
    return [
        (colour_index, background_index)
        for colour_index, colour in enumerate(data.COLOURS)
        for background_index, background in enumerate(data.BACKGROUNDS)
        if data.Scene(colour, shape, motion, background).held_out == held_out
    ]


def build(placements: Sequence[data.Placement], held_out: bool) -> MaskBank:
    """Render ``placements`` and list the colour pairs of the chosen split."""
    masks = torch.stack([torch.from_numpy((data.render_mask(p) * 255.0).round().astype(np.uint8)) for p in placements])
    allowed = [pairs(p.shape, p.motion, held_out) for p in placements]
    return MaskBank(list(placements), masks, torch.tensor(allowed))


def world_placements(fine: bool = False) -> list[data.Placement]:
    """Return every trajectory of the world, in a fixed order; ``fine`` for the decoder's finer grid."""
    return [p for shape in data.SHAPES for motion in data.MOTIONS for p in data.placements(shape, motion, fine)]


def jittered_placements(seed: int) -> list[data.Placement]:
    """Return one off-mark variant of every trajectory of the finer grid."""
    rng = np.random.default_rng(seed)
    return [data.jittered(p, rng) for p in world_placements(fine=True)]


def palette() -> tuple[Tensor, Tensor]:
    """Return the object colours [5, 3] and background colours [3, 3] in [-1, 1]."""
    return (
        torch.tensor(list(data.COLOURS.values())) * 2 - 1,
        torch.tensor(list(data.BACKGROUNDS.values())) * 2 - 1,
    )


def paint(masks: Tensor, pair: Tensor) -> Tensor:
    """Return clips [B, 3, T, H, W] in [-1, 1] from byte masks [B, T, H, W] and (colour, background) pairs [B, 2]."""
    colours, backgrounds = palette()
    front = colours[pair[:, 0]][:, :, None, None, None]
    back = backgrounds[pair[:, 1]][:, :, None, None, None]
    return back + (masks[:, None].float() / 255.0) * (front - back)


def sample_clips(bank: MaskBank, count: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` random clips [B, 3, T, H, W] in [-1, 1] of the bank's split."""
    index = torch.randint(len(bank.placements), (count,), generator=generator)
    choice = torch.randint(bank.colours.shape[1], (count,), generator=generator)
    return paint(bank.masks[index], bank.colours[index, choice])
