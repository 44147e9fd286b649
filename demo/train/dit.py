"""Training of the diffusion transformer on cached analytic latents and cached text states.

The network is diffusers' own ``HunyuanVideoTransformer3DModel``. It learns the flow-matching velocity
``noise - latents`` at ``(1 - sigma) * latents + sigma * noise``. No VAE and no text encoder runs in a step.

Shapes: ``B`` batch, ``C`` channels, ``T`` latent frames, ``H`` ``W`` latent cells, ``N`` trajectories.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor, nn

from demo.train import attention, bank, data, latents, optim, ranks, state, text, vae

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "num_layers": 2,
    "num_single_layers": 4,
    "num_refiner_layers": 2,
    "text_embed_dim": text.LLM_WIDTH,
    "pooled_projection_dim": text.CLIP_WIDTH,
    "rope_axes_dim": (16, 24, 24),
}
NO_GUIDANCE = 1000.0
# Below this the sampler never asks: its last of 20 steps starts at 1 / 20, before the shift.
LEAST_LEVEL = 0.03


@dataclass(frozen=True)
class Plan:
    """Settings of the transformer's training.

    Attributes:
        steps: optimiser steps.
        batch: clips per step and process; steps on single images take twice as many.
        image_every: every n-th step trains on single images.
        text_dropout: share of samples with the empty prompt.
        pooled_dropout: share of samples with the empty prompt for CLIP only, so that the LLM's states are used too.
        shift: of the noise levels: sigma = k u / (1 + (k - 1) u), u uniform.
        muon_rate: learning rate of attention and feed-forward matrices.
        adam_rate: learning rate of everything else.
        average: decay of the averaged weights.
        seed: of initial weights and batches.
    """

    steps: int = 4_400
    batch: int = 20
    image_every: int = 5
    text_dropout: float = 0.1
    pooled_dropout: float = 0.2
    shift: float = 4.0
    muon_rate: float = 1.5e-2
    adam_rate: float = 1.5e-3
    average: float = 0.995
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """One batch: latents [B, 16, T, H, W] and the rows of its captions in the text bank [B]."""

    latents: Tensor
    rows: Tensor


class World:
    """Standardised latents of every training clip, and its captions, gathered on demand.

    Attributes:
        mean: per-channel mean of the analytic latents [16].
        deviation: per-channel standard deviation [16].
        text: the encoded captions.
    """

    def __init__(self) -> None:
        """Encode the masks of all trajectories once; a painted clip is linear in them."""
        encoder = vae.projections()
        placements = bank.world_placements()
        self.masks = bank.build(placements, held_out=False)
        colours, backgrounds = bank.palette()
        plain = torch.zeros(1, data.FRAMES, data.SIZE, data.SIZE, dtype=torch.uint8).expand(3, -1, -1, -1)
        pair = torch.stack([torch.zeros(3, dtype=torch.long), torch.arange(3)], 1)
        self.plain = latents.encode(bank.paint(plain, pair), encoder)
        zero = latents.encode(torch.zeros(1, 3, data.FRAMES, data.SIZE, data.SIZE), encoder)
        parts = []
        for chunk in self.masks.masks.split(128):
            coverage = chunk.float() / 255.0
            by_channel = torch.zeros(len(chunk), 3, 3, *coverage.shape[1:])
            for channel in range(3):
                by_channel[:, channel, channel] = coverage
            parts.append((latents.encode(by_channel.flatten(0, 1), encoder) - zero).unflatten(0, (-1, 3)))
        self.parts = torch.cat(parts)
        self.contrast = colours[:, None] - backgrounds[None]
        self._standardise()
        self._index_captions(placements)

    def _standardise(self) -> None:
        stored = state.load("statistics")
        if stored is None:
            generator = torch.Generator().manual_seed(3)
            index = torch.randint(len(self.parts), (2000,), generator=generator)
            choice = torch.randint(self.masks.colours.shape[1], (2000,), generator=generator)
            sample = self._compose(index, self.masks.colours[index, choice])
            stored = {"mean": sample.mean((0, 2, 3, 4)), "deviation": sample.std((0, 2, 3, 4))}
            state.save("statistics", stored)
        self.mean, self.deviation = stored["mean"], stored["deviation"]
        self.parts /= self.deviation[:, None, None, None]
        self.plain = (self.plain - self.mean[:, None, None, None]) / self.deviation[:, None, None, None]

    def _index_captions(self, placements: list[data.Placement]) -> None:
        scenes = data.scenes()
        captions = [caption for scene in scenes for caption in (*scene.captions(), scene.image_caption())]
        self.text = text.encode(captions)
        shape = (len(data.COLOURS), len(data.SHAPES), len(data.MOTIONS), len(data.BACKGROUNDS), 4)
        self.rows = torch.tensor([self.text.index[caption] for caption in captions]).reshape(shape)
        self.shape_index = torch.tensor([data.SHAPES.index(p.shape) for p in placements])
        self.motion_index = torch.tensor([list(data.MOTIONS).index(p.motion) for p in placements])

    def _compose(self, index: Tensor, pair: Tensor) -> Tensor:
        contrast = self.contrast[pair[:, 0], pair[:, 1]]
        return self.plain[pair[:, 1]] + torch.einsum("bk,bkcthw->bcthw", contrast, self.parts[index])

    def sample(self, count: int, image: bool, generator: torch.Generator) -> Batch:
        """Return a random batch of clips, all motions equally likely, or of first frames (``image``).

        Still scenes are sometimes described without a motion; in images always, and they are half of the images.
        """
        still = list(data.MOTIONS).index("still")
        motions = torch.randint(len(data.MOTIONS), (count,), generator=generator)
        if image:
            motions = torch.where(torch.rand(count, generator=generator) < 0.5, still, motions)
        chance = (self.motion_index[None] == motions[:, None]).float()
        index = torch.multinomial(chance, 1, generator=generator)[:, 0]
        choice = torch.randint(self.masks.colours.shape[1], (count,), generator=generator)
        pair = self.masks.colours[index, choice]
        phrase = torch.randint(3, (count,), generator=generator)
        unnamed = torch.rand(count, generator=generator) < (1.0 if image else 0.25)
        phrase = torch.where(unnamed & (motions == still), 3, phrase)
        rows = self.rows[pair[:, 0], self.shape_index[index], motions, pair[:, 1], phrase]
        clean = self._compose(index, pair)
        return Batch(clean[:, :, :1] if image else clean, rows)


def initialise(model: HunyuanVideoTransformer3DModel) -> None:
    """Start with silent modulation (adaLN-zero) and a zero output."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (".norm" in f".{name}" and name.endswith(".linear")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)


def build(seed: int) -> HunyuanVideoTransformer3DModel:
    """Return an initialised transformer."""
    torch.manual_seed(seed)
    model = HunyuanVideoTransformer3DModel(**CONFIG)
    initialise(model)
    return model


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return (attention and feed-forward matrices of the blocks, everything else)."""
    inner: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        in_block = "blocks." in name and ".norm" not in name
        (inner if in_block and parameter.ndim == 2 else rest).append(parameter)
    return inner, rest


def velocity(
    model: nn.Module, noisy: Tensor, sigma: Tensor, bank_: text.TextBank, rows: Tensor, pooled: Tensor, guidance: Tensor
) -> Tensor:
    """Return the predicted velocity of ``noisy`` [B, 16, T, H, W] at noise levels ``sigma`` [B].

    ``rows`` and ``pooled`` are caption rows [B] for the LLM states and the CLIP state; ``guidance`` [B] is as embedded.
    """
    with torch.autocast("cpu", torch.bfloat16):
        output: Tensor = model(
            hidden_states=noisy,
            timestep=sigma * 1000.0,
            encoder_hidden_states=bank_.states[rows],
            encoder_attention_mask=bank_.mask[rows],
            pooled_projections=bank_.pooled[pooled],
            guidance=guidance,
            return_dict=False,
        )[0]
    return output.float()


def noise_levels(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Return stratified noise levels [count] in (0, 1)."""
    even = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    even = LEAST_LEVEL + (1 - LEAST_LEVEL) * even
    return shift * even / (1 + (shift - 1) * even)


def train(plan: Plan) -> None:
    """Train the transformer, or go on where a killed run stopped; the result is the state ``dit``."""
    world = World()
    model = build(plan.seed)
    attention.install(model)
    inner, rest = split_parameters(model)
    optimisers = [
        (optim.Muon(inner, plan.muon_rate), plan.muon_rate),
        (torch.optim.AdamW(rest, plan.adam_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True), plan.adam_rate),
    ]
    average = optim.Average(model, plan.average)
    first, seconds = optim.resume("dit", model, average, optimisers)
    began, total, count = time.process_time(), 0.0, 0
    for step in range(first, plan.steps):
        generator = ranks.generator(plan.seed, step)
        image = step % plan.image_every == plan.image_every - 1
        batch = world.sample(plan.batch * (2 if image else 1), image, generator)
        size = len(batch.rows)
        sigma = noise_levels(size, plan.shift, generator)
        noise = torch.randn(batch.latents.shape, generator=generator)
        level = sigma[:, None, None, None, None]
        drop = torch.rand(size, generator=generator)
        rows = torch.where(drop < plan.text_dropout, 0, batch.rows)
        pooled = torch.where(drop < plan.text_dropout + plan.pooled_dropout, 0, batch.rows)
        noisy = (1 - level) * batch.latents + level * noise
        output = velocity(model, noisy, sigma, world.text, rows, pooled, torch.full((size,), NO_GUIDANCE))
        loss = (output - (noise - batch.latents)).square().mean()
        loss.backward()
        ranks.mean_gradients(model)
        optim.advance(optimisers, optim.rate(step, plan.steps, 100, 0.5, 0.01))
        average.update(step)
        if not image:
            total, count = total + float(loss.detach()), count + 1
        spent = seconds + (time.process_time() - began) * ranks.size()
        if ranks.rank() > 0:
            continue
        if (step + 1) % 50 == 0:
            state.log("dit", {"step": step + 1, "loss": total / count, "cpu_seconds": spent})
            total, count = 0.0, 0
        if (step + 1) % 250 == 0 or step + 1 == plan.steps:
            optim.store("dit", step + 1, spent, model, average, optimisers)
