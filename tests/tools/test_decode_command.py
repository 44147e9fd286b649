"""``reelforge decode`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.tools.test_generate import SMALL, bundle, names, reelforge

__all__ = ["bundle"]  # the fixture


def test_the_video_that_generate_makes(bundle: Path, tmp_path: Path) -> None:
    arguments = ["-p", "a ball", "-o", "a.mp4", *SMALL, "--save-latents", "x.npy"]
    assert reelforge("generate", bundle, *arguments, folder=tmp_path).returncode == 0
    result = reelforge("decode", bundle, "x.npy", "-o", "b.mp4", folder=tmp_path)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert "b.mp4: 5 frames of 48x32" in result.stderr
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    result = reelforge("decode", bundle, "x.npy", "-o", "f/%02d.png", "--threads", "1", "--json", folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    value = json.loads(result.stdout)
    assert {key: value[key] for key in ("frames", "height", "width", "latents")} == {
        "frames": 5, "height": 32, "width": 48, "latents": "x.npy",
    }  # fmt: skip
    assert len(names(tmp_path / "f")) == 5


@pytest.mark.parametrize(
    ("file", "code", "parts"),
    [
        ("missing.npy", 2, ["missing.npy", "cannot be read", "No such file"]),
        ("text.npy", 2, ["'text.npy' holds no latents", "generate --save-latents"]),
        ("cut.npy", 2, ["'cut.npy' holds no latents"]),
        ("pickle.npy", 2, ["holds no latents", "allow_pickle"]),
        ("doubles.npy", 2, ["the latents are not those of a video", "float64 [1, 4, 2, 4, 6]"]),
        ("nan.npy", 2, ["not finite"]),
    ],
)
def test_files_that_are_no_latents(bundle: Path, tmp_path: Path, file: str, code: int, parts: list[str]) -> None:
    values = np.zeros((1, 4, 2, 4, 6), np.float32)
    np.save(tmp_path / "doubles.npy", values.astype(np.float64))
    np.save(tmp_path / "nan.npy", np.full_like(values, np.nan))
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "cut.npy", values)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-8])
    (tmp_path / "text.npy").write_text("latents")
    before = names(tmp_path)
    result = reelforge("decode", bundle, file, "-o", "a.mp4", folder=tmp_path)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr
    assert names(tmp_path) == before


def test_help(tmp_path: Path) -> None:
    page = reelforge("decode", "-h", folder=tmp_path).stdout
    for word in ("LATENTS", "--save-latents", "Examples:", "130  interrupted"):
        assert word in page
