"""``reelforge sheet``: the picture's layout, and what it says when it cannot be made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reelforge.runtime.errors import OutputError, RequestError
from reelforge.tools.contact_sheet import GAP_PIXELS, LABEL_PIXELS, compose, sheet


def test_every_clip_has_its_first_and_last_frame_on_the_sheet() -> None:
    clips = [np.full((9, 16, 24, 3), 20 * number, np.uint8) for number in range(1, 4)]
    for clip in clips:
        clip[-1] += 5
    picture = np.asarray(compose(["one", "two", "three"], clips))
    cell_height = 16 + LABEL_PIXELS + GAP_PIXELS
    cell_width = 5 * (24 + GAP_PIXELS) + 4 * GAP_PIXELS
    assert picture.shape == (2 * cell_height, 2 * cell_width, 3)
    for number, clip in enumerate(clips):
        top, left = number // 2 * cell_height + LABEL_PIXELS, number % 2 * cell_width + GAP_PIXELS
        np.testing.assert_array_equal(picture[top : top + 16, left : left + 24], clip[0])
        last = left + 4 * (24 + GAP_PIXELS)
        np.testing.assert_array_equal(picture[top : top + 16, last : last + 24], clip[-1])


def test_one_picture_clips_are_shown_once() -> None:
    picture = np.asarray(compose(["one"], [np.zeros((1, 16, 24, 3), np.uint8)]))
    assert (picture == 0).all(axis=-1).sum() == 16 * 24


@pytest.mark.parametrize(
    ("content", "output", "error", "message"),
    [
        (b"a circle\n", "sheet.jpg", OutputError, r"sheet.jpg.*\n.*ends in .png"),
        (b"a circle\n", "missing/sheet.png", OutputError, "folder that exists"),
        (b"\n \n", "sheet.png", RequestError, "holds no prompt"),
        (b"\xff\xfe", "sheet.png", RequestError, r"cannot be read.*\n.*UTF-8"),
        (None, "sheet.png", RequestError, "cannot be read"),
    ],
)
def test_what_cannot_be_done_is_said_before_work(
    tmp_path: Path, content: bytes | None, output: str, error: type[Exception], message: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    if content is not None:
        prompts.write_bytes(content)
    arguments = ["no.bundle", "--prompts", str(prompts), "-o", str(tmp_path / output)]
    with pytest.raises(error, match=message):
        sheet.main(arguments, standalone_mode=False)
    assert not (tmp_path / output).exists()
