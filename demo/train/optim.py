"""Optimisers and schedules: Muon for matrices and convolutions beside AdamW for the rest, and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from demo.train import state

Rated = tuple[torch.optim.Optimizer, float]
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return approximately orthogonal matrices with the singular vectors of ``matrices`` [N, rows, columns]."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    current = (matrices.mT if tall else matrices) / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    current = current.bfloat16()
    for _ in range(steps):
        gram = current @ current.mT
        current = a * current + (b * gram + c * gram @ gram) @ current
    return (current.mT if tall else current).to(matrices.dtype)


class Muon(torch.optim.Optimizer):  # type: ignore[misc]
    """Momentum with orthogonalised updates for weights of two or more dimensions, batched over equal shapes."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        """Store the settings; every parameter is seen as a matrix [first dimension, rest]."""
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: None = None) -> None:  # noqa: ARG002
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                nesterov = parameter.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                by_shape.setdefault(tuple(nesterov.shape), []).append((parameter, nesterov))
            for (rows, columns), members in by_shape.items():
                updates = orthogonalised(torch.stack([matrix for _, matrix in members]))
                gain = max(1.0, rows / columns) ** 0.5
                for (parameter, _), update in zip(members, updates, strict=True):
                    parameter.add_(update.view_as(parameter), alpha=-group["lr"] * gain)


def rate(step: int, steps: int, warm_up: int, hold: float, floor: float) -> float:
    """Return the learning-rate factor: linear warm-up, constant to ``hold`` * steps, then cosine down to ``floor``."""
    if step < warm_up:
        return (step + 1) / warm_up
    start = hold * steps
    if step <= start:
        return 1.0
    progress = min(1.0, (step - start) / max(1.0, steps - start))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


class Average:
    """Exponential moving average of a module's parameters, with a short memory at the beginning."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Copy the current parameters of ``module``."""
        self.decay = decay
        self.live = list(module.parameters())
        self.names = [name for name, _ in module.named_parameters()]
        self.values = [p.detach().clone() for p in self.live]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def update(self, step: int) -> None:
        """Move the average towards the parameters after optimiser step ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.live], 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged parameters by name."""
        return dict(zip(self.names, self.values, strict=True))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore averaged parameters saved by ``state_dict``."""
        for name, value in zip(self.names, self.values, strict=True):
            value.copy_(state[name])


def advance(optimisers: list[Rated], factor: float) -> None:
    """Step every optimiser at its base rate times ``factor`` and clear the gradients."""
    for optimiser, base in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = base * factor
        optimiser.step()
        optimiser.zero_grad()


def store(name: str, step: int, seconds: float, model: nn.Module, average: Average, optimisers: list[Rated]) -> None:
    """Save everything that a job needs to go on after ``step`` steps and ``seconds`` of CPU time."""
    state.save(
        name,
        {
            "step": step,
            "seconds": seconds,
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser, _ in optimisers],
        },
    )


def resume(name: str, model: nn.Module, average: Average, optimisers: list[Rated]) -> tuple[int, float]:
    """Restore what ``store`` saved; return (steps done, CPU seconds spent), zeros for a fresh start."""
    stored = state.load(name)
    if stored is None:
        return 0, 0.0
    model.load_state_dict(stored["model"])
    average.load_state_dict(stored["average"])
    for (optimiser, _), saved in zip(optimisers, stored["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
    return stored["step"], stored["seconds"]
