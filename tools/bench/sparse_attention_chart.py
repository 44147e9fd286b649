"""The chart of the benchmark of sparse attention: what is visited against PSNR and against accuracy.

Knows results and matplotlib, which is imported when a chart is drawn; it measures nothing.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from typing import Any

from reelforge.tools.bench.sparse_attention_measure import Result

INK, PAPER, GRID = "#1d2733", "#ffffff", "#d9dee5"
COLOURS = {"sliding-tile": "#4d8bcb", "radial": "#e0803f", "topk": "#4f9d69"}
MOST_DB = 60.0
"""Ratios above are drawn here: no eye sees the difference."""


def draw(results: Sequence[Result], dense: float) -> bytes:
    """Return the chart as a PNG file.

    Args:
        results: Of all settings.
        dense: Accuracy of dense attention.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.2), dpi=120, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _points(left, results, lambda result: min(statistics.median(result.psnr_db), MOST_DB))
    _points(right, results, lambda result: statistics.mean(result.rates["together"]))
    right.axhline(dense, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    right.annotate("dense", (0.0, dense), xytext=(4, 3), textcoords="offset points", fontsize=8, color=INK)
    for axes, title in ((left, "median PSNR against dense, dB"), (right, "videos that agree with their prompt")):
        axes.set_title(title, fontsize=9.5, color=INK, loc="left")
        axes.set_xlabel("visited share of pairs of blocks", fontsize=8.5, color=INK)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, None if axes is left else 1.02)
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, colors=INK, length=0)
        for side in axes.spines.values():
            side.set_visible(False)
    _legend(figure, results)
    file = io.BytesIO()
    # Without the version of matplotlib: equal measurements give equal bytes.
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _points(axes: Any, results: Sequence[Result], value: Any) -> None:
    steps = sorted({result.dense_steps for result in results})
    for pattern, colour in COLOURS.items():
        for count in steps:
            for fine in (True, False):
                found = [
                    result
                    for result in results
                    if (result.pattern, result.dense_steps) == (pattern, count) and (result.blocks == (1, 1)) == fine
                ]
                axes.scatter(
                    [result.density for result in found],
                    [value(result) for result in found],
                    s=34,
                    marker="o" if fine else "s",
                    facecolors=colour if count == steps[0] else PAPER,
                    edgecolors=colour,
                    linewidths=1.4,
                    zorder=3,
                )


def _legend(figure: Any, results: Sequence[Result]) -> None:
    from matplotlib.lines import Line2D

    steps = sorted({result.dense_steps for result in results})
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colour, label=pattern) for pattern, colour in COLOURS.items()
    ]
    handles += [
        Line2D([], [], marker="o", linestyle="", color=INK, label="blocks of one token"),
        Line2D([], [], marker="s", linestyle="", color=INK, label="blocks of 2x2 tokens"),
    ]
    for count in steps:
        face = INK if count == steps[0] else PAPER
        label = "no dense steps" if count == 0 else f"{count} dense steps first"
        handles.append(
            Line2D([], [], marker="D", linestyle="", color=INK, markerfacecolor=face, markersize=5, label=label)
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
