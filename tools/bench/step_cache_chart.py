"""The plot of ``benchmarks/step_cache.md``: evaluations saved against distance from the full run.

Knows points and matplotlib, which is imported when the plot is drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from reelforge.tools.bench.step_cache_runs import Point

INK, PAPER, GRID = "#1d2733", "#ffffff", "#d9dee5"
COLOURS = {
    "fewer steps": "#7d8793",
    "EasyCache": "#1f4e86",
    "EasyCache as published": "#7fb0e0",
    "MagCache": "#b3541e",
    "MagCache as published": "#e9b872",
    "TeaCache": "#2c7a4b",
    "TeaCache as published": "#8fcf9f",
    "First-block cache": "#7a3b8f",
    "First-block cache as published": "#cfa3dd",
}
GOAL_FACTOR, GOAL_DB = 1.8, 30.0


def draw_chart(points: Sequence[Point], steps: int) -> bytes:
    """Return the plot as a PNG file: solid lines for all videos together, dotted ones for the worst video.

    Args:
        points: Of all series; those that skipped nothing are left out.
        steps: Of the full run.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Made without pyplot, which would choose a window system and keep figures alive.
    figure = Figure(figsize=(9.6, 6.4), dpi=120, facecolor=PAPER)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for series, colour in COLOURS.items():
        chosen = [one for one in points if one.setting.series == series and math.isfinite(one.psnr_db)]
        chosen.sort(key=lambda point: -point.mean_evaluations)
        factors = [steps / point.mean_evaluations for point in chosen]
        style: dict[str, Any] = {"color": colour, "markersize": 4.5, "zorder": 2 if series == "fewer steps" else 3}
        axes.plot(factors, [one.psnr_db for one in chosen], marker="o", linewidth=1.8, label=series, **style)
        axes.plot(factors, [one.lowest_db for one in chosen], marker=".", linestyle=":", linewidth=1.2, **style)
    _style(axes, points, steps)
    file = io.BytesIO()
    # Without the version of matplotlib: equal measurements give equal bytes.
    figure.savefig(file, format="png", bbox_inches="tight", metadata={"Software": None})
    return file.getvalue()


def _style(axes: Any, points: Sequence[Point], steps: int) -> None:
    highest = max((one.psnr_db for one in points if math.isfinite(one.psnr_db)), default=GOAL_DB)
    axes.axhline(GOAL_DB, color=INK, linewidth=0.8, linestyle="--", zorder=1)
    axes.axvline(GOAL_FACTOR, color=INK, linewidth=0.8, linestyle="--", zorder=1)
    axes.annotate(
        f"goal: at least {GOAL_FACTOR}x fewer, {GOAL_DB:.0f} dB",
        xy=(GOAL_FACTOR, GOAL_DB),
        xytext=(6, 5),
        textcoords="offset points",
        fontsize=8,
        color=INK,
    )
    axes.set_xlim(1, 4.1)
    axes.set_ylim(min(GOAL_DB - 6, *(one.lowest_db for one in points)) - 1, highest + 3)
    axes.set_xlabel(f"times fewer evaluations of the model than the {steps} of the full run", fontsize=9, color=INK)
    axes.set_ylabel("PSNR against the full run, dB", fontsize=9, color=INK)
    axes.grid(color=GRID, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK, length=0)
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title(
        "Step caching against fewer steps (solid: all videos, dotted: the worst one)",
        fontsize=10.5,
        color=INK,
        fontweight="bold",
        loc="left",
    )
    axes.legend(loc="upper right", frameon=False, fontsize=8)
