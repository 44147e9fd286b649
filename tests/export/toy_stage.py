"""A stage that is no model: every feature of parts and values in a few numbers, so that capturing takes seconds."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from reelforge.export.stage import COMPUTE, Part, Stage, Value

WIDTH, REPEATS = 4, 3


class Enter(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.to(self.fc.weight.dtype))


class Repeated(nn.Module):
    """Takes a row of its own of ``rows`` and gives one of ``sums``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width, bias=False)})
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.inner["down"](torch.tanh(self.inner["up"](x))) * self.scale * row.to(x.dtype) * 0.5
        return x, x.sum(dim=1).float()


class Leave(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def toy_stage() -> Stage:
    hidden = Value(COMPUTE, ("batch", "text_tokens", WIDTH))
    return Stage(
        name="toy",
        component="toy",
        parts=(
            Part("", partial(Enter, WIDTH), ("x",), ("hidden",)),
            Part("blocks.{i}", partial(Repeated, WIDTH), ("hidden", "rows[i]"), ("hidden", "sums[i]"), REPEATS),
            Part("", Leave, ("hidden",), ("y",)),
        ),
        values={
            "x": Value("float32", ("batch", "text_tokens", WIDTH)),
            "rows": Value("float32", (1, REPEATS, WIDTH)),
            "hidden": hidden,
            "sums": Value("float32", ("batch", REPEATS, WIDTH)),
            "y": Value("float32", hidden.shape),
        },
        inputs=("x", "rows"),
        outputs=("y", "sums"),
        tolerance={"fp32": 2e-5, "fp16": 2e-2},
    )
