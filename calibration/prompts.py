"""Calibration prompts: the built-in ones, those of a file, and which of them are kept back for the gate.

The module knows no tokenizer and no model; a prompt is any Unicode text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from reelforge.calibration.errors import CalibrationError

COMMENT = "#"

DEFAULT_PROMPTS = (
    "a small dog runs along a wet beach at sunrise, camera following from the side",
    "an old fisherman mends a net on a wooden pier, close-up of his hands",
    "a busy street crossing at night in the rain, neon signs mirrored in puddles",
    "a red ball rolls slowly to the left on a white floor",
    "time lapse of clouds passing over a green valley with a winding river",
    "a woman in a yellow coat laughs and turns towards the camera, shallow depth of field",
    "macro shot of honey dripping from a spoon onto toast",
    "a paper boat drifts down a gutter, cartoon style, bright flat colours",
    "aerial view of a steam train crossing a stone bridge in autumn",
    "a robot waters plants on the balcony of a tall building, golden hour",
    "two children build a snowman while snow falls heavily",
    "ink drops spreading in a glass of clear water against a black background",
    "a black cat jumps from a bookshelf onto a sofa, slow motion",
    "oil painting of a storm at sea, the waves are moving",
    "a chef slices vegetables very fast in a restaurant kitchen, steam in the air",
    "an astronaut walks through a field of sunflowers under two moons",
)
"""Short and long, people and things, photographs and drawings, fast and slow."""


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read one prompt per line of a UTF-8 text file; blank lines and lines that begin with ``#`` are skipped.

    Raises:
        CalibrationError: If the file cannot be read, is not UTF-8, or holds no prompt.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CalibrationError(
            f"the calibration prompts {str(path)!r} cannot be read: {error.strerror or error}.",
            expected="a UTF-8 text file with one prompt per line",
            fix="check the path",
        ) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The decoder counts from behind a byte order mark.
        offset = error.start + len(content) - len(error.object)
        line = content[:offset].count(b"\n") + 1
        raise CalibrationError(
            f"the calibration prompts {str(path)!r} are not UTF-8 in line {line}.",
            received=f"byte 0x{content[offset]:02x} at offset {offset}",
            expected="UTF-8 text",
            fix="save the file as UTF-8",
        ) from error
    lines = (line.strip() for line in text.split("\n"))
    prompts = tuple(line for line in lines if line and not line.startswith(COMMENT))
    if not prompts:
        raise CalibrationError(
            f"the calibration prompts {str(path)!r} are empty.",
            received=f"{len(content)} bytes without a prompt",
            expected="one prompt per line",
            fix="write what the model will be asked for, 8 to 32 prompts, or leave the option out",
        )
    return prompts


def split_prompts(prompts: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the prompts to calibrate with and those kept back for measuring the result.

    The last quarter is kept back, at least one; a single prompt serves as both.
    """
    if len(prompts) < 2:
        return tuple(prompts), tuple(prompts)
    kept = max(1, len(prompts) // 4)
    return tuple(prompts[:-kept]), tuple(prompts[-kept:])


def prompts_sha256(prompts: Sequence[str]) -> str:
    """Return the digest of the prompts and their order, in hex."""
    text = json.dumps(list(prompts), ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
