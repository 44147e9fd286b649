"""Writing a bundle: a partial folder next to the destination that becomes the bundle by one rename.

Usage::

    with BundleWriter(Path("my.bundle")) as writer:  # 'output folder exists' is found here, before any work
        writer.add_bytes("dit.onnx", graph)
        writer.add_file(Path("tokenizer.json"), "tokenizers/llm.json")
        writer.link_weight_file(shard, "weights/transformer-00001.safetensors")
        stream_to(writer.path("weights/dit.safetensors"))          # or write into the partial folder directly
        manifest = writer.seal(manifest_without_files_and_digest)  # the bundle exists from here on

Whatever ends the block before ``seal`` has returned (an error, Ctrl-C, a full disk) removes the partial folder; a
killed process leaves it, and the next build to the same destination removes it. At no moment is there a destination
that is not complete. The module knows files, not graphs: the caller's manifest says what they are.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import TracebackType

from reelforge.runtime.bundle.copying import copy_with_holes
from reelforge.runtime.bundle.digest import ByteRange, sha256_of_ranges
from reelforge.runtime.bundle.open import MANIFEST_NAME
from reelforge.runtime.codec import to_json
from reelforge.runtime.errors import BuildError
from reelforge.runtime.manifest import FileEntry, Manifest

WEIGHTS_FOLDER = "weights"
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES}


class Placement(enum.Enum):
    """How a weight file came into the bundle."""

    LINKED = "hard link"  # no bytes were copied; checkpoint and bundle share the file
    COPIED = "copy"  # the checkpoint is on another file system, or the file system has no hard links


class BundleWriter:
    """Context manager that builds one bundle (see the module's docstring).

    Args:
        destination: The bundle's folder; it must not exist. Its parents are made if needed.

    Raises:
        BuildError: On entering, if the destination exists or its parent cannot be written.
    """

    def __init__(self, destination: str | Path) -> None:
        self.destination = Path(os.path.abspath(destination))  # noqa: PTH100 - a symbolic link stays as the user wrote it
        self._partial = self.destination.parent / f"{self.destination.name}.partial-{os.getpid()}"
        self._lock: int | None = None
        self._sealed = False
        self._linked: set[str] = set()

    def __enter__(self) -> BundleWriter:
        self._require_absent()
        try:
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            self._remove_stale_folders()
            self._partial.mkdir()
            self._lock = os.open(self._partial, os.O_RDONLY | os.O_DIRECTORY)
            # The lock tells the folder of a live build from one that a killed process left behind.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._abandon()
            if error.errno in _FULL_DISK:
                raise self._disk_full(None) from error
            raise BuildError(
                f"the bundle cannot be written to {str(self.destination)!r}: {error.strerror or error}.",
                received=str(self.destination.parent),
                expected="a folder that this user may write",
                fix="choose another destination with -o",
            ) from error
        except BaseException:  # Ctrl-C between mkdir and the caller's block: __exit__ would not run
            self._abandon()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._abandon()
        if isinstance(error, OSError) and error.errno in _FULL_DISK:  # from the caller's own writes below path()
            raise self._disk_full(None) from error
        if error is None and not self._sealed:
            raise RuntimeError("BundleWriter was left without seal(): nothing was written")

    @property
    def folder(self) -> Path:
        """The unfinished folder, for reading back what was written."""
        return self._partial

    def path(self, name: str) -> Path:
        """Return where to write file ``name`` (relative to the bundle, ``/`` between folders); its folder is made."""
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or str(relative) in (".", MANIFEST_NAME):
            raise ValueError(f"{name!r} is not the name of a file of a bundle")
        path = self._partial / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add_bytes(self, name: str, data: bytes | memoryview) -> Path:
        """Write ``data`` as file ``name`` and return its path.

        Raises:
            BuildError: If the disk is full.
        """
        with self._disk_errors(len(data)):
            path = self.path(name)
            with path.open("xb") as file:
                file.write(data)
        return path

    def add_file(self, source: str | Path, name: str) -> Path:
        """Copy file ``source`` as file ``name`` and return its path.

        Raises:
            BuildError: If the disk is full.
        """
        with self._disk_errors(Path(source).stat().st_size):
            path = self.path(name)
            shutil.copyfile(source, path)
        return path

    def link_weight_file(self, source: str | Path, name: str) -> Placement:
        """Bring a checkpoint's file into the bundle as ``name`` (``weights/...``), without copying where possible.

        Returns:
            ``Placement.LINKED``, or ``Placement.COPIED`` where hard links are impossible (another file system).

        Raises:
            BuildError: If it must be copied and the disk is full.
        """
        if PurePosixPath(name).parts[0] != WEIGHTS_FOLDER:
            raise ValueError(f"{name!r} is not below {WEIGHTS_FOLDER}/")
        original = Path(source).resolve()  # download caches hold symbolic links; link the file itself
        path = self.path(name)
        try:
            os.link(original, path)
        except OSError as error:
            if error.errno in _FULL_DISK:
                raise self._disk_full(None) from error
            if error.errno not in _NO_LINK:
                raise
        else:
            self._linked.add(name)
            return Placement.LINKED
        with self._disk_errors(original.stat().st_size):
            copy_with_holes(original, path)
        return Placement.COPIED

    def require_space(self, needed_bytes: int) -> None:
        """Fail now rather than hours later if the disk has less than ``needed_bytes`` free.

        Raises:
            BuildError: With the bytes needed and free.
        """
        if shutil.disk_usage(self._partial).free < needed_bytes:
            raise self._disk_full(needed_bytes)

    def seal(self, manifest: Manifest) -> Manifest:
        """Complete the bundle: list and digest its files, write the manifest last, and rename the folder into place.

        Args:
            manifest: Everything but ``files`` and ``content_digest``, which are replaced.

        Returns:
            The manifest as written.

        Raises:
            BuildError: If the disk is full, or the destination has appeared in the meantime.
        """
        with self._disk_errors(None):
            sealed = replace(manifest, files=self._list_files()).with_content_digest()
            text = json.dumps(to_json(sealed), indent=1, ensure_ascii=False) + "\n"
            with (self._partial / MANIFEST_NAME).open("x", encoding="utf-8", newline="\n") as file:
                file.write(text)
            self._flush_to_disk([*(entry.path for entry in sealed.files), MANIFEST_NAME])
        self._require_absent()  # os.rename would replace an empty folder
        try:
            os.rename(self._partial, self.destination)  # noqa: PTH104 - the atomic step, spelt as the system call
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise self._exists() from error
            raise
        self._sealed = True
        _fsync(self.destination.parent)
        return sealed

    def _abandon(self) -> None:
        """Remove the partial folder unless it has become the bundle, and give up the lock."""
        if not self._sealed:
            shutil.rmtree(self._partial, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _list_files(self) -> tuple[FileEntry, ...]:
        paths = sorted(
            path.relative_to(self._partial).as_posix() for path in self._partial.rglob("*") if path.is_file()
        )
        sizes = {name: (self._partial / name).stat().st_size for name in paths}
        hashed = [name for name in paths if PurePosixPath(name).parts[0] != WEIGHTS_FOLDER]
        ranges = (ByteRange(self._partial / name, 0, sizes[name]) for name in hashed)
        digests = dict(zip(hashed, (digest for _, digest in sha256_of_ranges(ranges)), strict=True))
        return tuple(FileEntry(name, sizes[name], digests.get(name)) for name in paths)

    def _flush_to_disk(self, names: list[str]) -> None:
        for name in names:
            if name not in self._linked:  # linked files were on disk before
                _fsync(self._partial / name)
        for folder in sorted({(self._partial / name).parent for name in names} | {self._partial}):
            _fsync(folder)

    def _require_absent(self) -> None:
        if os.path.lexists(self.destination):
            raise self._exists()

    def _exists(self) -> BuildError:
        return BuildError(
            f"the output folder {str(self.destination)!r} exists.",
            expected="a path where nothing is yet",
            fix="remove it, or choose another destination with -o",
        )

    def _remove_stale_folders(self) -> None:
        """Remove partial folders of this destination whose process is gone (killed, or the machine stopped)."""
        prefix = f"{self.destination.name}.partial-"
        for folder in sorted(self.destination.parent.glob(f"{_glob_escape(prefix)}*")):
            pid = folder.name.removeprefix(prefix)
            if not pid.isdecimal() or not folder.is_dir() or folder.is_symlink():
                continue
            # The number alone is not enough (containers reuse small numbers), the lock alone neither (there is a moment
            # between mkdir and flock), so both must say that nobody works there.
            if (int(pid) == os.getpid() or not _is_alive(int(pid))) and _is_unlocked(folder):
                shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _disk_errors(self, needed_bytes: int | None) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _FULL_DISK:
                raise self._disk_full(needed_bytes) from error
            raise

    def _disk_full(self, needed_bytes: int | None) -> BuildError:
        folder = next(path for path in (self._partial, *self._partial.parents) if path.is_dir())
        free = shutil.disk_usage(folder).free
        return BuildError(
            f"the disk is full while writing the bundle {str(self.destination)!r}.",
            received=f"{free:,} bytes free",
            expected=f"{needed_bytes:,} bytes more for the file being written" if needed_bytes else "more free space",
            fix="free space or choose another disk with -o; the unfinished bundle was removed",
        )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _glob_escape(text: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _is_unlocked(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
