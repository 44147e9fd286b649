"""The decoder in 8 bits beside fp32: the time of one tile, both in one process and in turns.

What 8 bits do to the picture is said where whole videos are compared. The module does not know how bundles are built.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.engines.engine import Engine
from reelforge.runtime.events import FloatArray
from reelforge.runtime.pipeline import Pipeline
from reelforge.tools.bench import report

ROUNDS = 5


@dataclass(frozen=True)
class Case:
    """What is decoded.

    Attributes:
        title: Of the model.
        fp32: Its bundle.
        int8: The same with ``vae_decoder`` in INT8.
        tile: Latent frames, rows and columns.
    """

    title: str
    fp32: Path
    int8: Path
    tile: tuple[int, int, int]


@dataclass(frozen=True)
class Times:
    """Seconds of one tile, one per round."""

    fp32: tuple[float, ...]
    int8: tuple[float, ...]


def measure(case: Case, rounds: int = ROUNDS) -> Times:
    """Decode one tile of noise in turns; a run of each before the rounds is not counted."""
    with Pipeline(Bundle.open(case.fp32, Check.SIZES)) as exact, Pipeline(Bundle.open(case.int8, Check.SIZES)) as codes:
        size = (1, exact.spec.vae.latent_channels, *case.tile)
        latents = np.random.default_rng(0).standard_normal(size).astype(np.float32)
        with exact.engine("vae_decoder") as fp32, codes.engine("vae_decoder") as int8:
            turns = []
            for turn in range(rounds + 1):
                order = (fp32, int8) if turn % 2 == 0 else (int8, fp32)
                taken = {engine: _seconds(engine, latents) for engine in order}
                turns.append((taken[fp32], taken[int8]))
    return Times(tuple(pair[0] for pair in turns[1:]), tuple(pair[1] for pair in turns[1:]))


def _seconds(engine: Engine, latents: FloatArray) -> float:
    began = time.perf_counter()
    engine.run({"latent_tile": latents})
    return time.perf_counter() - began


def section(cases: Sequence[Case], measured: Callable[[Case], Times] = measure) -> list[str]:
    """Return the section's lines."""
    rows = []
    for case in cases:
        times = measured(case)
        ratios = [exact / codes for exact, codes in zip(times.fp32, times.int8, strict=True)]
        rows.append(
            (
                case.title,
                "x".join(map(str, case.tile)),
                report.spread(times.fp32, digits=3),
                report.spread(times.int8, digits=3),
                report.spread(ratios, digits=2),
            )
        )
    return [
        "One tile by `vae_decoder` in fp32 and in INT8 (`--precision dit=int8,vae_decoder=int8`), in one process and",
        f"in turns: median of {ROUNDS} rounds (smallest-largest). What it does to the picture stands above.",
        "",
        *report.table(("model", "latent tile", "s in fp32", "s in INT8", "times as fast"), rows),
    ]
