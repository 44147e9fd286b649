"""The ``reelforge sheet`` command: clips of several prompts on one picture, prompts above them.

What a person looks at to see whether a bundle works. Text is drawn by Pillow, which only this command needs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from numpy.typing import NDArray

from reelforge.runtime.errors import OutputError, RequestError
from reelforge.tools import console

if TYPE_CHECKING:
    from PIL import Image

LABEL_PIXELS, GAP_PIXELS, COLUMNS, SHOWN_FRAMES = 14, 2, 2, 5
PAPER, INK = (200, 205, 215), (20, 20, 30)


def compose(prompts: Sequence[str], clips: Sequence[NDArray[np.uint8]]) -> Image.Image:
    """Return the sheet of ``clips``, each uint8 [frames, height, width, 3]: up to five frames of each, in order."""
    from PIL import Image, ImageDraw

    frames, height, width = clips[0].shape[:3]
    chosen = np.linspace(0, frames - 1, min(SHOWN_FRAMES, frames)).round().astype(int)
    cell_width = len(chosen) * (width + GAP_PIXELS) + 4 * GAP_PIXELS
    cell_height = height + LABEL_PIXELS + GAP_PIXELS
    rows = -(-len(clips) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * cell_width, rows * cell_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (prompt, clip) in enumerate(zip(prompts, clips, strict=True)):
        row, column = divmod(number, COLUMNS)
        left, top = column * cell_width + GAP_PIXELS, row * cell_height
        draw.text((left, top + 1), prompt, fill=INK)
        for place, frame in enumerate(clip[chosen]):
            sheet.paste(Image.fromarray(frame), (left + place * (width + GAP_PIXELS), top + LABEL_PIXELS))
    return sheet


@click.command("sheet", epilog=console.EXIT_CODES)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompts", required=True, type=click.Path(path_type=Path), help="UTF-8 file with one prompt per line.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="PNG file to write.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the first clip; then counted up."
)
def sheet(bundle: Path, prompts: Path, output: Path, seed: int) -> None:
    """Generate a clip for each line of a file with BUNDLE and lay out their frames on one picture.

    Sizes and steps are the bundle's defaults. Needs Pillow: pip install pillow.
    """
    lines = _lines(prompts)
    if output.suffix.lower() != ".png" or not output.parent.is_dir():
        raise OutputError(
            f"the sheet cannot be written to '{output}'.",
            expected="a name that ends in .png, in a folder that exists",
            fix="choose another path with -o",
        )
    if importlib.util.find_spec("PIL") is None:
        raise RequestError("Pillow is not installed.", fix="pip install pillow")
    from reelforge.runtime import Pipeline, Request

    pipeline = Pipeline.open(bundle)
    clips = [pipeline.generate(Request(line, seed=seed + number)) for number, line in enumerate(lines)]
    compose(lines, clips).save(output, optimize=True)
    click.echo(f"{output}: {len(clips)} clips")


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"the prompts '{path}' cannot be read.", received=str(error), expected="a UTF-8 file, one prompt per line"
        ) from error
    if not lines:
        raise RequestError(f"the file '{path}' holds no prompt.", expected="one prompt per line", fix="write some")
    return lines
