"""Finished videos and half-done work on disk, below the service's own folder.

``videos/<id>.mp4`` is whole if it exists: it is written elsewhere on the same file system, flushed, and renamed. Names
are made of ids that the store has, never of what a caller sent. The module knows no jobs.

.. code-block:: text

    data/
      jobs.sqlite3        the store
      lock                held by the process that serves
      videos/<id>.mp4     finished
      work/<id>/          latents of an interrupted job, and a video that is being written
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from pathlib import Path
from typing import IO

from reelforge.runtime.errors import OutputError

_ID = re.compile(r"video_[0-9a-f]{32}")


class Videos:
    """The files of one service.

    Args:
        data: The folder; made if it is not there.

    Raises:
        OutputError: If it cannot be written, or another process serves from it.
    """

    def __init__(self, data: Path) -> None:
        self.data = data
        self._videos, self._work = data / "videos", data / "work"
        try:
            for folder in (self._videos, self._work):
                folder.mkdir(parents=True, exist_ok=True)
            data.chmod(0o700)
            self._lock: IO[bytes] | None = (data / "lock").open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            taken = error.errno in (errno.EWOULDBLOCK, errno.EACCES) and isinstance(error, BlockingIOError)
            raise OutputError(
                f"the service's folder {str(data)!r} cannot be used: "
                f"{'another service uses it' if taken else error.strerror or error}.",
                expected="a folder of this service's own that this user may write",
                fix="stop the other service, or choose another folder with --data",
            ) from error

    @property
    def database(self) -> Path:
        """Where the store is."""
        return self.data / "jobs.sqlite3"

    def close(self) -> None:
        """Let another process serve from the folder. Closing twice is harmless."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()

    def video(self, job_id: str) -> Path:
        """Return where a job's video is."""
        return self._videos / f"{_checked(job_id)}.mp4"

    def kept(self, job_id: str) -> Path:
        """Return the folder of a job's latents, which may not exist."""
        return self._work / _checked(job_id)

    def unfinished(self, job_id: str, call: int) -> Path:
        """Return where a job's video is written, in a folder that is made now.

        Raises:
            OutputError: If the folder cannot be made.
        """
        folder = self.kept(job_id)
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from error
        return folder / f"{call}.mp4"

    def publish(self, job_id: str, unfinished: Path) -> None:
        """Make a finished video the job's; after this it survives a loss of power.

        Raises:
            OutputError: If that fails.
        """
        target = self.video(job_id)
        try:
            _flush(unfinished)
            unfinished.replace(target)
            _flush(self._videos)
        except OSError as error:
            raise _unwritable(target, error) from error

    def exists(self, job_id: str) -> bool:
        """Return whether a job's video is there."""
        return self.video(job_id).is_file()

    def delete(self, job_id: str) -> None:
        """Delete a video, if it is there."""
        self.video(job_id).unlink(missing_ok=True)

    def clear(self, job_id: str) -> None:
        """Delete what is left of a job's work."""
        shutil.rmtree(self.kept(job_id), ignore_errors=True)

    def worked_on(self) -> list[str]:
        """Return the jobs of which there is unfinished work."""
        return [path.name for path in self._work.iterdir() if _ID.fullmatch(path.name)]

    def stored(self) -> list[str]:
        """Return the jobs of which there is a video."""
        return [path.stem for path in self._videos.iterdir() if path.suffix == ".mp4" and _ID.fullmatch(path.stem)]

    def drop_unfinished_videos(self) -> None:
        """Delete videos that were being written when the process ended; latents stay."""
        for path in (*self._work.glob("*/*.mp4"), *self._work.glob("*/.*.mp4"), *self._work.glob("*/.*.partial-*")):
            path.unlink(missing_ok=True)

    def free_bytes(self) -> int:
        """Return the room that is left; none, if the folder cannot be asked."""
        try:
            return shutil.disk_usage(self.data).free
        except OSError:
            return 0


def _checked(job_id: str) -> str:
    """Refuse what is no id: a bug, since ids come from the store."""
    if _ID.fullmatch(job_id) is None:
        raise ValueError(f"{job_id[:80]!r} is no id of a job")
    return job_id


def _flush(path: Path) -> None:
    """Have a file or folder on the disk, whoever has written it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"the video cannot be written to {str(path)!r}: {error.strerror or error}.",
        expected="a disk with free space",
        fix="make room, or shorten --retention",
    )


def is_full(error: BaseException) -> bool:
    """Return whether an error says that there is no room on the disk."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        if isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        seen.add(id(one))
        one = one.__cause__ or one.__context__
    return False
