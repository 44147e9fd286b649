"""The bar chart of ``reelforge sensitivity``: what each layer and each block loses in 8 bits.

Knows a table of sensitivities and matplotlib, which is imported when a chart is drawn; it measures nothing.
"""

from __future__ import annotations

import io
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reelforge.export.sensitivity import SensitivityRow, SensitivityTable

MAX_LAYERS = 80
"""Beyond this only the worst layers are drawn: the picture would be taller than anyone scrolls."""

INK, PAPER, GRID = "#1d2733", "#ffffff", "#d9dee5"
LAYER, BLOCK, KEPT, LOOP = "#4d8bcb", "#dfe9f4", "#e0803f", "#10161d"
_ROW_INCHES, _WIDTH_INCHES, _DPI = 0.19, 9.0, 120
_DECADES = 1.2  # what the smallest bar is shown with, at least, left of it


def draw_chart(table: SensitivityTable, kept: Collection[str] = ()) -> bytes:
    """Return the chart as a PNG file.

    Layers are grouped by block in execution order; a bar is the relative error at the stage's output when the layer
    alone is in 8 bits, the pale bar behind it that of its whole block, the tick the error of the final latents.

    Args:
        table: What was measured.
        kept: Layers of a recipe that stay in high precision, drawn in another colour.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _shown(table)
    # Made without pyplot, which would choose a window system and keep figures alive.
    figure = Figure(figsize=(_WIDTH_INCHES, _ROW_INCHES * len(rows) + 1.7), dpi=_DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_blocks(axes, table, rows)
    _draw_layers(axes, rows, kept)
    _style(axes, table, rows)
    _add_legend(figure, axes, table, rows, kept)
    file = io.BytesIO()
    # Without the version of matplotlib: equal measurements give equal bytes.
    figure.savefig(file, format="png", bbox_inches="tight", metadata={"Software": None})
    return file.getvalue()


def _shown(table: SensitivityTable) -> list[SensitivityRow]:
    rows = list(table.layers)
    if len(rows) > MAX_LAYERS:
        worst = {row.name for row in sorted(rows, key=lambda row: -row.relative_error)[:MAX_LAYERS]}
        rows = [row for row in rows if row.name in worst]
    return sorted(rows, key=lambda row: _first_of_block(table, row.block))


def _first_of_block(table: SensitivityTable, block: str) -> int:
    """Two blocks may take turns in execution order (the streams of a double block): keep each together."""
    return next(index for index, row in enumerate(table.layers) if row.block == block)


def _draw_blocks(axes: Any, table: SensitivityTable, rows: list[SensitivityRow]) -> None:
    errors = {row.name: row.relative_error for row in table.blocks}
    for block, (first, last) in _spans(rows).items():
        if block in errors:
            axes.barh((first + last) / 2, errors[block], height=last - first + 0.94, color=BLOCK, zorder=1)
        if first:
            axes.axhline(first - 0.5, color=GRID, linewidth=0.8, zorder=0.5)


def _draw_layers(axes: Any, rows: list[SensitivityRow], kept: Collection[str]) -> None:
    colours = [KEPT if row.name in kept else LAYER for row in rows]
    places = range(len(rows))
    axes.barh(places, [row.relative_error for row in rows], height=0.62, color=colours, zorder=2)
    loops = [(place, row.latent_error) for place, row in zip(places, rows, strict=True) if row.latent_error]
    if loops:
        axes.scatter(
            [error for _, error in loops], [place for place, _ in loops], marker="|", s=42, color=LOOP, zorder=3
        )


def _style(axes: Any, table: SensitivityTable, rows: list[SensitivityRow]) -> None:
    errors = [row.relative_error for row in (*rows, *table.blocks) if row.relative_error > 0]
    errors += [row.latent_error for row in rows if row.latent_error]
    axes.set_xscale("log")
    axes.set_xlim(min(errors, default=1e-4) / _DECADES**2, max(errors, default=1.0) * 1.6)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    labels = [row.name.removeprefix(f"{row.block}.") for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7.5, color=INK)
    for block, (first, last) in _spans(rows).items():
        axes.annotate(
            block,
            xy=(1.0, (first + last) / 2),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            fontweight="bold",
            color=INK,
        )
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, colors=INK, top=True, labeltop=True)
    axes.grid(axis="x", which="major", color=GRID, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("relative error (L2, worst prompt and step, logarithmic)", fontsize=8.5, color=INK)


def _add_legend(
    figure: Any, axes: Any, table: SensitivityTable, rows: list[SensitivityRow], kept: Collection[str]
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=LAYER, label=f"one layer: output of {table.stage}")]
    if any(row.name in kept for row in rows):
        handles.append(Patch(color=KEPT, label="likewise, kept in high precision"))
    if table.blocks:
        handles.append(Patch(color=BLOCK, label="its whole block"))
    if any(row.latent_error for row in rows):
        tick = Line2D([], [], marker="|", linestyle="", color=LOOP, label="one layer: end of the sampling loop")
        handles.append(tick)
    shown = f", the worst {len(rows)} of {len(table.layers)} layers" if len(rows) < len(table.layers) else ""
    formats = " and ".join(sorted({row.format for row in table.layers}))
    title = f"What {formats} costs {table.stage}, one layer at a time{shown}"
    axes.set_title(title, fontsize=10.5, color=INK, fontweight="bold", loc="left", pad=40)
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 1, 1, 0),
        bbox_transform=axes.transAxes + _offset(figure, 20),
        ncols=len(handles),
        frameon=False,
        fontsize=8,
        borderaxespad=0,
        handlelength=1.2,
        columnspacing=1.4,
    )


def _offset(figure: Any, points: float) -> Any:
    from matplotlib.transforms import ScaledTranslation

    return ScaledTranslation(0, points / 72, figure.dpi_scale_trans)


def _spans(rows: list[SensitivityRow]) -> dict[str, tuple[int, int]]:
    """Return the first and last place of each block."""
    spans: dict[str, tuple[int, int]] = {}
    for place, row in enumerate(rows):
        spans[row.block] = (spans.get(row.block, (place, place))[0], place)
    return spans
