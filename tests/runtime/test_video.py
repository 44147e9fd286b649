"""Video files: decodable with the right frames, complete or absent, refused before anything is computed."""

# ruff: noqa: PT012 - what ends a with block is the subject of these tests

from __future__ import annotations

import errno
from pathlib import Path

import av
import numpy as np
import pytest

from reelforge.runtime.errors import OutputError
from reelforge.runtime.video import VideoWriter


def clip(frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Smooth coloured frames that differ from each other."""
    y, x = np.mgrid[0:height, 0:width]
    video = np.zeros((frames, height, width, 3), np.uint8)
    for index in range(frames):
        video[index, ..., 0] = 255 * x // width
        video[index, ..., 1] = 255 * y // height
        video[index, ..., 2] = 40 + 160 * index // max(frames, 1)
    return video


def read(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def save(path: Path | str, video: np.ndarray, batch: int = 3) -> None:
    with VideoWriter(path, video.shape[1], video.shape[2], len(video), 24) as writer:
        for start in range(0, len(video), batch):
            writer.write(video[start : start + batch])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(np.float64) - b).mean()))


@pytest.mark.parametrize(("name", "least_db"), [("out.mp4", 32), ("out.webm", 32), ("out.gif", 28), ("OUT.MP4", 32)])
@pytest.mark.parametrize("frames", [1, 9])
def test_movies(tmp_path: Path, name: str, least_db: float, frames: int) -> None:
    video = clip(frames)
    save(tmp_path / name, video)
    decoded = read(tmp_path / name)
    assert decoded.shape == video.shape
    assert psnr(decoded, video) > least_db
    assert names(tmp_path) == [name]
    with av.open(str(tmp_path / name)) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == pytest.approx(24, rel=0.05)  # gif counts hundredths of a second
        if name != "out.gif":
            assert stream.codec_context.pix_fmt == "yuv420p"
            assert stream.codec_context.colorspace == 1  # BT.709, so that players agree about the colours


def test_mp4_is_h264_and_webm_is_vp9(tmp_path: Path) -> None:
    for name, codec in (("a.mp4", "h264"), ("a.webm", "vp9")):
        save(tmp_path / name, clip(2))
        with av.open(str(tmp_path / name)) as container:
            assert container.streams.video[0].codec_context.name == codec


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif"])
def test_the_same_frames_give_the_same_bytes(tmp_path: Path, name: str) -> None:
    seen = set()
    for length in range(6):
        # What lies in freed memory must not matter (it does to some encoder settings).
        del_me = [np.full(size, 31 * length, np.uint8) for size in range(100, 20_000, 100)]
        del del_me
        save(tmp_path / name, clip(9))
        seen.add((tmp_path / name).read_bytes())
    assert len(seen) == 1


def test_png_files_are_exact(tmp_path: Path) -> None:
    video = clip(3)
    save(tmp_path / "one.png", video[:1])
    np.testing.assert_array_equal(read(tmp_path / "one.png"), video[:1])
    save(f"{tmp_path}/frames/", video)
    assert names(tmp_path / "frames") == ["0001.png", "0002.png", "0003.png"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    save(tmp_path / "mine" / "f%02d.png", video)
    assert names(tmp_path / "mine") == ["f01.png", "f02.png", "f03.png", "notes.txt"]
    np.testing.assert_array_equal(read(tmp_path / "mine" / "f03.png"), video[2:])
    save(tmp_path / "mine", video)  # an existing folder
    assert (tmp_path / "mine" / "0003.png").is_file()
    assert names(tmp_path) == ["frames", "mine", "one.png"]


def test_odd_sizes(tmp_path: Path) -> None:
    video = clip(2, 33, 35)
    for name in ("a.webm", "a.gif"):
        save(tmp_path / name, video)
        assert read(tmp_path / name).shape == video.shape
    with pytest.raises(OutputError, match="even height and width"):
        save(tmp_path / "a.mp4", video)
    assert names(tmp_path) == ["a.gif", "a.webm"]


@pytest.mark.parametrize("name", ["out.avi", "out", "out%03d.mp4", "a%d%d.png", "out.mp4.txt"])
def test_names_of_no_known_format(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError) as caught:
        VideoWriter(tmp_path / name, 16, 16, 2, 24)
    assert caught.value.exit_code == 7
    assert caught.value.fix


def test_one_png_for_several_frames(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds one frame") as caught:
        VideoWriter(tmp_path / "a.png", 16, 16, 2, 24)
    assert "%04d.png" in caught.value.fix


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif", "a.png", "b/c/%04d.png"])
def test_places_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(OutputError, match="cannot be written to"):
            VideoWriter(folder / name, 16, 16, 1, 24)


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").mkdir()
    save(tmp_path / "a.mp4", clip(2))  # an existing folder takes frames, whatever its name
    assert names(tmp_path / "a.mp4") == ["0001.png", "0002.png"]


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png", "b/%04d.png"])
def test_an_interrupted_video_leaves_the_old_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"old")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, 48, 64, 1, 24) as writer:
        assert sorted(tmp_path.rglob("*")) != before  # the temporary file is there from the start
        writer.write(clip(1))
        raise KeyboardInterrupt
    assert sorted(tmp_path.rglob("*")) == before
    assert path.read_bytes() == b"old"


def test_too_few_frames_are_no_video(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="is incomplete") as caught,
        VideoWriter(tmp_path / "a.mp4", 48, 64, 5, 24) as w,
    ):
        w.write(clip(4))
    assert "4 frames" in str(caught.value)
    assert names(tmp_path) == []


def test_frames_of_another_size_or_type(tmp_path: Path) -> None:
    for wrong in (clip(1, 32, 64), clip(1).astype(np.float32)):
        with (
            pytest.raises(OutputError, match="does not fit the video"),
            VideoWriter(tmp_path / "a.mp4", 48, 64, 1, 24) as writer,
        ):
            writer.write(wrong)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
def test_a_disk_that_fills_up(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="No space left") as caught, VideoWriter(tmp_path / name, 48, 64, 1, 24) as w:
        w.write(clip(1))

        def fail(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "replace", fail)
    assert "free space" in str(caught.value)
    assert names(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif"])
def test_a_device_that_is_really_full(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from reelforge.runtime import video as module

    partial = tmp_path / "partial"
    partial.symlink_to("/dev/full")
    monkeypatch.setattr(module, "_partial_name", lambda path: partial)
    noise = np.random.default_rng(0).integers(0, 255, (30, 128, 128, 3), np.uint8)
    with pytest.raises(OutputError):
        save(tmp_path / name, noise)
    assert names(tmp_path) == []
