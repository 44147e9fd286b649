"""Video files, written frame by frame: mp4, webm, gif, png.

A file appears under its name only when it is complete; that it can be written is found out when the writer is opened,
before anything is computed. Knows PyAV's encoders; it does not know where frames come from.
"""

from __future__ import annotations

import os
import re
import shutil
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import av
import numpy as np
from av.video.reformatter import Colorspace
from numpy.typing import NDArray

from reelforge.runtime.errors import OutputError

Frame = NDArray[np.uint8]

FORMATS = (".mp4", ".webm", ".gif", ".png")
_EXPECTED = (
    "a path that ends in .mp4, .webm, .gif or .png (one frame), or a folder with a pattern such as frames/%04d.png"
)
_PATTERN = re.compile(r"%0?\d*d")
_BT709 = 1  # H.273's number for primaries, transfer and matrix alike


class VideoWriter:
    """Writes one video; a context manager.

    ``out.mp4`` (H.264, yuv420p), ``out.webm`` (VP9), ``out.gif`` (a palette per frame), ``out.png`` (a single frame),
    ``folder/%04d.png`` or ``folder/`` (one file per frame, from 0001). An existing file is replaced at the end.

    Args:
        path: Where the video goes.
        height: Pixels; even for mp4.
        width: Pixels; even for mp4.
        frames: How many frames will be written.
        frames_per_second: Playback rate.

    Raises:
        OutputError: On construction for a name of no known format, a size that it cannot hold, or a place that cannot
            be written; later if the disk fills up; at the end if fewer frames came than announced.
    """

    def __init__(self, path: str | Path, height: int, width: int, frames: int, frames_per_second: int) -> None:
        self.path = Path(path)
        self._shape = (height, width, 3)
        self._frames = frames
        self._written = 0
        folder, name = _destination(self.path, str(path).endswith(("/", os.sep)), frames)
        suffix = Path(name).suffix.lower()
        if suffix == ".mp4" and (height % 2 or width % 2):
            raise OutputError(
                "H.264 in an mp4 file needs an even height and width.",
                received=f"{width}x{height} pixels",
                expected="even numbers",
                fix="write .webm, .gif or .png instead, or change the size",
            )
        try:
            if _PATTERN.search(name):
                self._sink: _Sink = _PngFolder(folder, name)
            elif suffix == ".png":
                self._sink = _PngFile(folder / name)
            else:
                self._sink = _Movie(folder / name, height, width, frames_per_second)
        except OSError as error:
            raise self._unwritable(error) from error

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, frames: Frame) -> None:
        """Append frames, uint8 ``[n, height, width, 3]`` RGB.

        Raises:
            OutputError: If they cannot be written.
        """
        if frames.dtype != np.uint8 or frames.shape[1:] != self._shape:
            raise OutputError(
                "a frame does not fit the video.",
                received=f"{frames.dtype} {list(frames.shape)}",
                expected=f"uint8 [n, {', '.join(map(str, self._shape))}]",
            )
        try:
            for frame in frames:
                self._sink.write(np.ascontiguousarray(frame))
                self._written += 1
        except OSError as error:
            raise self._unwritable(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._sink.abandon()
            return
        if self._written != self._frames:
            self._sink.abandon()
            raise OutputError(
                f"the video {str(self.path)!r} is incomplete and was not kept.",
                received=f"{self._written} frames",
                expected=f"{self._frames} frames",
            )
        try:
            self._sink.finish()
        except BaseException as failure:
            self._sink.abandon()
            if isinstance(failure, OSError):
                raise self._unwritable(failure) from failure
            raise

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(
            f"the video cannot be written to {str(self.path)!r}: {error.strerror or error}.",
            expected="a file in an existing folder that this user may write, on a disk with free space",
            fix="choose another path with -o",
        )


class _Sink(Protocol):
    def write(self, frame: Frame) -> None: ...
    def finish(self) -> None: ...
    def abandon(self) -> None: ...


class _Movie:
    """mp4, webm and gif: one container, encoded as frames come."""

    def __init__(self, path: Path, height: int, width: int, frames_per_second: int) -> None:
        self._path = path
        self._partial = _partial_name(path)
        self._time_base = Fraction(1, frames_per_second)
        self._next = 0
        self._graph: Any = None
        self._is_gif = path.suffix.lower() == ".gif"
        self._partial.open("wb").close()  # av.open defers the file to the first packet; the user should know now
        try:
            options = {"fflags": "+bitexact"}  # no random identifiers, no versions: the same frames, the same bytes
            if path.suffix.lower() == ".mp4":
                options["movflags"] = "+faststart"  # players can begin before the whole file is there
            self._container = av.open(str(self._partial), "w", format=path.suffix[1:].lower(), options=options)
            codec, settings = {
                # x264's macroblock tree reads memory that it has not written when pictures are small, and gives
                # another file each time; without it the same frames give the same bytes.
                ".mp4": ("libx264", {"crf": "18", "preset": "medium", "x264-params": "mbtree=0"}),
                ".webm": ("libvpx-vp9", {"crf": "24", "b": "0", "row-mt": "1", "cpu-used": "4"}),
                ".gif": ("gif", {}),
            }[path.suffix.lower()]
            self._stream: Any = self._container.add_stream(codec, rate=frames_per_second, options=settings)
            self._stream.height, self._stream.width = height, width
            self._stream.pix_fmt = "pal8" if self._is_gif else "yuv420p"
            self._stream.codec_context.time_base = self._time_base
            if self._is_gif:
                self._graph = _palette_graph(height, width, self._time_base)
            else:
                for attribute in ("color_primaries", "color_trc", "colorspace", "color_range"):
                    setattr(self._stream.codec_context, attribute, _BT709)  # range 1 is the limited one
        except BaseException:
            self._partial.unlink(missing_ok=True)
            raise

    def write(self, frame: Frame) -> None:
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.time_base = self._time_base
        picture.pts = self._next
        if self._graph is not None:
            self._graph.push(picture)
            picture = self._graph.pull()
        else:
            picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
        picture.time_base = self._time_base
        picture.pts = self._next
        self._next += 1
        self._container.mux(self._stream.encode(picture))

    def finish(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()
        _flush(self._partial)
        self._partial.replace(self._path)

    def abandon(self) -> None:
        try:
            self._container.close()
        except (OSError, ValueError):
            pass  # the error that led here is the one to report
        finally:
            self._partial.unlink(missing_ok=True)


class _PngFile:
    """One picture."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = _partial_name(path)
        self._partial.open("wb").close()

    def write(self, frame: Frame) -> None:
        self._partial.write_bytes(_png(frame))

    def finish(self) -> None:
        self._partial.replace(self._path)

    def abandon(self) -> None:
        self._partial.unlink(missing_ok=True)


class _PngFolder:
    """One picture per frame, gathered in a folder next to the destination and moved there at the end."""

    def __init__(self, folder: Path, pattern: str) -> None:
        self._folder = folder
        self._pattern = pattern
        self._names: list[str] = []
        # Inside of a folder that exists: its parent may be closed to this user.
        self._partial = _partial_name(folder / "frames" if folder.is_dir() else folder)
        shutil.rmtree(self._partial, ignore_errors=True)  # from a killed process that had our number
        self._partial.mkdir()

    def write(self, frame: Frame) -> None:
        name = self._pattern % (len(self._names) + 1)
        (self._partial / name).write_bytes(_png(frame))
        self._names.append(name)

    def finish(self) -> None:
        self._folder.mkdir(exist_ok=True)
        for name in self._names:
            (self._partial / name).replace(self._folder / name)
        self._partial.rmdir()

    def abandon(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)


def _destination(path: Path, names_folder: bool, frames: int) -> tuple[Path, str]:
    """Return the folder and the file name, or the file pattern, of an output path."""
    if names_folder or (path.is_dir() and path.name):
        folder, name = path, "%04d.png"
    else:
        folder, name = path.parent, path.name
    patterns = _PATTERN.findall(name)
    if Path(name).suffix.lower() not in FORMATS or (patterns and Path(name).suffix.lower() != ".png"):
        raise OutputError(
            f"the output path {str(path)!r} names no known format.",
            received=Path(name).suffix or "no ending",
            expected=_EXPECTED,
            fix="write for example -o out.mp4",
        )
    if name.count("%") > 1:
        raise OutputError(
            f"the output path {str(path)!r} has more than one pattern.",
            received=name,
            expected="one %04d",
            fix="write %04d.png",
        )
    if Path(name).suffix.lower() == ".png" and not patterns and frames > 1:
        raise OutputError(
            f"the picture {str(path)!r} holds one frame, and the video has more.",
            received=f"{frames} frames",
            expected="1 frame, or a pattern",
            fix=f"write -o {path.with_suffix('')}/%04d.png, or choose .mp4",
        )
    return folder, name


def _partial_name(path: Path) -> Path:
    return path.parent / (f".{path.stem}.partial-{os.getpid()}{path.suffix}")


def _png(frame: Frame) -> bytes:
    encoder: Any = av.CodecContext.create("png", "w")
    encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = *frame.shape[:2], "rgb24", Fraction(1, 1)
    packets = [*encoder.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")), *encoder.encode(None)]
    return b"".join(bytes(packet) for packet in packets)


def _palette_graph(height: int, width: int, time_base: Fraction) -> Any:
    """Return a filter graph that gives every frame its own palette, so that frames can stream."""
    graph: Any = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=time_base)
    split = graph.add("split")
    palette = graph.add("palettegen", "stats_mode=single")
    use = graph.add("paletteuse", "new=1:dither=sierra2_4a")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
