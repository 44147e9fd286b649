"""Contact sheet of a bundle: ``python -m demo.contact_sheet out/demo.bundle -o out/demo.png``.

Generates one clip per line of ``demo/prompts.txt`` through the runtime and puts their frames on one picture, prompts
above them: what a person looks at to see whether a bundle works.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from reelforge.runtime import Pipeline, Request
from reelforge.tools import console

LABEL_PIXELS, GAP_PIXELS, COLUMNS, SHOWN_FRAMES = 14, 2, 2, 5
PAPER, INK = (200, 205, 215), (20, 20, 30)


def compose(prompts: Sequence[str], clips: Sequence[NDArray[np.uint8]]) -> Image.Image:
    """Return the sheet of ``clips``, each uint8 [frames, height, width, 3]: up to five frames of each, in order."""
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


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="PNG file to write.")
@click.option("--prompts", default=Path("demo/prompts.txt"), show_default=True, type=click.Path(path_type=Path))
@click.option("--seed", default=7, show_default=True, type=click.IntRange(0))
def main(bundle: Path, output: Path, prompts: Path, seed: int) -> None:
    """Generate a clip for each prompt with BUNDLE and lay them out on one picture."""
    lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    pipeline = Pipeline.open(bundle)
    clips = [pipeline.generate(Request(line, seed=seed + number)) for number, line in enumerate(lines)]
    output.parent.mkdir(parents=True, exist_ok=True)
    compose(lines, clips).save(output, optimize=True)
    click.echo(f"wrote {output}: {len(clips)} clips")


if __name__ == "__main__":
    console.run(main)
