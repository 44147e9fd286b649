"""Distillation of classifier-free guidance into the guidance embedding, as in the released model.

The trained transformer is the teacher: its velocities with and without prompt are extrapolated by a strength that the
student reads from its guidance embedding. One pass of the student then does what two passes of the teacher do.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from demo.train import attention, dit, optim, ranks, state


@dataclass(frozen=True)
class Plan:
    """Settings of the distillation.

    Attributes:
        steps: optimiser steps.
        batch: clips per step and process; image steps take twice as many.
        image_every: every n-th step is on single images.
        largest_scale: guidance scales are drawn from 1 to this.
        slope: teacher strength per unit of guidance scale above 1.
        empty: share of samples with the empty prompt, where guidance does nothing.
        shift: of the noise levels, as in ``dit.Plan``.
        muon_rate: learning rate of attention and feed-forward matrices.
        adam_rate: learning rate of everything else.
        average: decay of the averaged weights.
        seed: of the batches.
    """

    steps: int = 250
    batch: int = 16
    image_every: int = 5
    largest_scale: float = 8.0
    slope: float = 0.1
    empty: float = 0.05
    shift: float = 4.0
    muon_rate: float = 1e-3
    adam_rate: float = 2e-4
    average: float = 0.99
    seed: int = 5


def strength(scale: Tensor, slope: float) -> Tensor:
    """Return the teacher's guidance strength for an embedded scale: 1 (none) at 1, growing by ``slope``."""
    return 1.0 + slope * (scale - 1.0)


def train(plan: Plan) -> None:
    """Distil the state ``dit`` into the state ``distilled``, or go on where a killed run stopped.

    Raises:
        FileNotFoundError: before the transformer's training has saved anything.
    """
    base = state.load("dit")
    if base is None:
        raise FileNotFoundError("no trained transformer in the state folder\n  fix: run `python -m demo.train dit`")
    world = dit.World()
    teacher, student = dit.build(0), dit.build(0)
    for model in (teacher, student):
        model.load_state_dict(base["average"])
        attention.install(model)
    teacher.requires_grad_(False)
    inner, rest = dit.split_parameters(student)
    optimisers = [
        (optim.Muon(inner, plan.muon_rate), plan.muon_rate),
        (torch.optim.AdamW(rest, plan.adam_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True), plan.adam_rate),
    ]
    average = optim.Average(student, plan.average)
    first, seconds = optim.resume("distilled", student, average, optimisers)
    began, total = time.process_time(), 0.0
    for step in range(first, plan.steps):
        generator = ranks.generator(plan.seed, step)
        image = step % plan.image_every == plan.image_every - 1
        batch = world.sample(plan.batch * (2 if image else 1), image, generator)
        size = len(batch.rows)
        sigma = dit.noise_levels(size, plan.shift, generator)
        level = sigma[:, None, None, None, None]
        noisy = (1 - level) * batch.latents + level * torch.randn(batch.latents.shape, generator=generator)
        rows = torch.where(torch.rand(size, generator=generator) < plan.empty, 0, batch.rows)
        scale = 1.0 + (plan.largest_scale - 1.0) * torch.rand(size, generator=generator)
        with torch.no_grad():
            both = torch.cat([rows, torch.zeros_like(rows)])
            unguided = torch.full((2 * size,), dit.NO_GUIDANCE)
            answer = dit.velocity(
                teacher, noisy.repeat(2, 1, 1, 1, 1), sigma.repeat(2), world.text, both, both, unguided
            )
            with_prompt, without = answer.chunk(2)
            factor = strength(scale, plan.slope)[:, None, None, None, None]
            target = without + factor * (with_prompt - without)
        output = dit.velocity(student, noisy, sigma, world.text, rows, rows, scale * 1000.0)
        loss = (output - target).square().mean()
        loss.backward()
        ranks.mean_gradients(student)
        optim.advance(optimisers, optim.rate(step, plan.steps, 20, 0.3, 0.01))
        average.update(step)
        total += float(loss.detach())
        spent = seconds + (time.process_time() - began) * ranks.size()
        if ranks.rank() > 0:
            continue
        if (step + 1) % 50 == 0:
            state.log("distilled", {"step": step + 1, "loss": total / 50, "cpu_seconds": spent})
            total = 0.0
        if (step + 1) % 100 == 0 or step + 1 == plan.steps:
            optim.store("distilled", step + 1, spent, student, average, optimisers)
