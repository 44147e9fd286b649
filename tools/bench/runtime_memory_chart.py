"""The picture of ``runtime_memory``: anonymous memory over time, a panel per model and a curve per video.

Knows curves and matplotlib, which is imported when the picture is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INK, PAPER, GRID = "#1d2733", "#ffffff", "#d9dee5"
COLOURS = ("#9bb8d3", "#4d8bcb", "#e0803f", "#5a9a68")
_PANEL_INCHES = (9.0, 2.9)


@dataclass(frozen=True)
class Curve:
    """One video.

    Attributes:
        label: For the legend.
        points: Seconds since the request, and bytes.
        begin: When the output path begins, in seconds since the request.
        end: When it ends.
    """

    label: str
    points: tuple[tuple[float, int], ...]
    begin: float
    end: float


def draw(panels: Sequence[tuple[str, Sequence[Curve]]], path: Path) -> None:
    """Write the picture as SVG; the part of a curve that is the output path is drawn thick.

    Args:
        panels: Title and curves of each.
        path: The file.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    width, height = _PANEL_INCHES
    # Made without pyplot, which would choose a window system and keep figures alive.
    figure = Figure(figsize=(width, height * len(panels)), facecolor=PAPER, layout="constrained")
    FigureCanvasSVG(figure)
    for index, (title, curves) in enumerate(panels):
        _panel(figure.add_subplot(len(panels), 1, index + 1), title, curves)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Equal measurements give equal bytes: no date, and names of elements that do not depend on chance.
    with mpl.rc_context({"svg.hashsalt": "reelforge", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def _panel(axes: Any, title: str, curves: Sequence[Curve]) -> None:
    for curve, colour in zip(curves, COLOURS, strict=False):
        output = [point for point in curve.points if curve.begin <= point[0] <= curve.end]
        for points, style in ((curve.points, {"linewidth": 0.8, "alpha": 0.6}), (output, {"linewidth": 2.0})):
            label = curve.label if points is output else None
            axes.plot([at for at, _ in points], [size / 1e6 for _, size in points], color=colour, label=label, **style)
    axes.set_title(f"{title} (thick: decoding and encoding)", fontsize=10, color=INK, loc="left", fontweight="bold")
    axes.set_xlabel("seconds since the request", fontsize=8.5, color=INK)
    axes.set_ylabel("anonymous MB", fontsize=8.5, color=INK)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
