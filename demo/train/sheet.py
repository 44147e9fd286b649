"""Contact sheets: one row per clip, its prompt above its frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from demo.train import data
from demo.train.data import Array

LABEL_PIXELS = 14
GAP_PIXELS = 2
COLUMNS = 2


def write(path: Path, prompts: Sequence[str], clips: Sequence[Array], every: int = 2) -> None:
    """Write every ``every``-th frame of ``clips`` [T, 3, H, W] in [0, 1] with their prompts as PNG to ``path``."""
    frames = len(range(0, len(clips[0]), every))
    width = frames * (data.SIZE + GAP_PIXELS) + 4 * GAP_PIXELS
    height = data.SIZE + LABEL_PIXELS + GAP_PIXELS
    rows = -(-len(clips) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width, rows * height), (200, 205, 215))
    draw = ImageDraw.Draw(sheet)
    for number, (prompt, clip) in enumerate(zip(prompts, clips, strict=True)):
        row, column = divmod(number, COLUMNS)
        left, top = column * width + GAP_PIXELS, row * height
        draw.text((left, top + 1), prompt, fill=(20, 20, 30))
        for place, frame in enumerate(clip[::every]):
            pixels = (frame.transpose(1, 2, 0) * 255).round().astype(np.uint8)
            sheet.paste(Image.fromarray(pixels), (left + place * (data.SIZE + GAP_PIXELS), top + LABEL_PIXELS))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
