"""EntryStore: the files of the plan cache, with their locks, their digests and the bound on their size.

```
<folder>/plans/<key>/          plan, receipt.json, and entry.json: what they are and their digests
<folder>/plans/<key>.partial/  an entry that is being written or removed; worthless without a process at work
<folder>/locks/<key>.lock      held by whoever builds, takes or removes that entry; gone when nobody does
<folder>/locks/space.lock      held while room is made, so that two processes do not both remove the oldest
```

An entry appears and disappears by one rename. Locks are ``flock``, which the system gives back when a process dies, so
there is nothing to clean up after a crash but partial folders, and whoever makes room removes those.

**Last use** is the modification time of ``entry.json``, set whenever the entry is taken. An index file would be one
more thing to lock and to lose; access times are switched off on many machines; and the plan's own times are shared with
every bundle that it is linked into. The bound counts each entry's bytes, also of plans that a bundle holds too:
removing such an entry frees room on the disk only when the bundle goes.

The module knows keys as names. What goes into one is the matter of ``export.cache``.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelforge.runtime.bundle.copying import copy_with_holes
from reelforge.runtime.bundle.digest import sha256_of_file
from reelforge.runtime.codec import CodecError, from_json, to_json

PLAN_NAME, RECEIPT_NAME, ENTRY_NAME = "plan", "receipt.json", "entry.json"
_PARTIAL = ".partial"
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES}


@dataclass(frozen=True)
class EntryRecord:
    """What ``entry.json`` says.

    Attributes:
        plan_bytes: The plan's size.
        plan_sha256: Of its bytes.
        receipt_bytes: The receipt's size.
        receipt_sha256: Of its bytes.
        content: What the key was made of, for people and for :meth:`EntryStore.entries`.
    """

    plan_bytes: int
    plan_sha256: str
    receipt_bytes: int
    receipt_sha256: str
    content: Any


@dataclass(frozen=True)
class CachedEntry:
    """One entry as :meth:`EntryStore.entries` lists it.

    Attributes:
        key: Its name.
        bytes: Of all its files.
        last_used_ns: Since 1970; 0 if that cannot be told.
        content: See :class:`EntryRecord`; None if ``entry.json`` cannot be read.
    """

    key: str
    bytes: int
    last_used_ns: int
    content: Any


class DamagedEntryError(Exception):
    """An entry is not what was stored; its message says in which way."""


class NoRoomError(Exception):
    """An entry does not fit under the bound, even without any other that may be removed."""


class EntryStore:
    """Entries below ``folder``, together at most ``limit_bytes``.

    Methods that take a key expect its lock to be held, but for :meth:`locked`, :meth:`entries` and :meth:`trim`.

    Args:
        folder: Is made if needed.
        limit_bytes: The bound.
        clock: Returns nanoseconds since 1970.

    Raises:
        OSError: If the folder cannot be made or written.
    """

    def __init__(self, folder: Path, limit_bytes: int, clock: Callable[[], int] = time.time_ns) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._clock = clock
        self._plans, self._locks = folder / "plans", folder / "locks"
        self._make_folders()
        with file_lock(self._locks / f"probe-{os.getpid()}.lock"):  # a folder that is there need not be writable
            pass

    @contextmanager
    def locked(self, key: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold the lock of ``key``; ``on_wait`` is called first if another process or thread has it."""
        self._make_folders()  # somebody may have removed the whole cache meanwhile
        with file_lock(self._locks / f"{key}.lock", on_wait):
            yield

    def take(self, key: str, plan: Path, receipt: Path) -> bool:
        """Bring an entry to ``plan`` (a hard link, or a copy across file systems) and ``receipt`` (a copy).

        Returns:
            Whether there was one.

        Raises:
            DamagedEntryError: If the entry is incomplete or altered; it is removed.
            OSError: If the two files cannot be written where they are wanted; neither is left.
        """
        entry = self._plans / key
        if not os.path.lexists(entry):
            return False
        problem = _problem(entry)
        if problem is not None:
            with suppress(OSError):  # keep will say so
                self.remove(key)
            raise DamagedEntryError(problem)
        now = self._clock()
        with suppress(PermissionError):  # another user's entry, which may be taken all the same
            os.utime(entry / ENTRY_NAME, ns=(now, now))
        try:
            link_or_copy(entry / PLAN_NAME, plan)
            # Small, and so a copy: whoever edits the receipt of a bundle does not damage the cache with it.
            shutil.copyfile(entry / RECEIPT_NAME, receipt)
        except OSError:
            plan.unlink(missing_ok=True)
            receipt.unlink(missing_ok=True)
            raise
        return True

    def keep(self, key: str, content: Any, plan: Path, receipt: Path) -> None:
        """Add an entry from finished files, and remove those that were not used for longest until it fits.

        Raises:
            NoRoomError: If it does not fit; nothing is stored.
            OSError: If the disk is full or the cache cannot be written; nothing is stored.
        """
        record = EntryRecord(
            plan.stat().st_size, sha256_of_file(plan), receipt.stat().st_size, sha256_of_file(receipt), content
        )
        text = json.dumps(to_json(record), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        needed = record.plan_bytes + record.receipt_bytes + len(text.encode())
        if needed > self.limit_bytes:
            raise NoRoomError
        self._make_folders()
        partial = self._plans / f"{key}{_PARTIAL}"
        shutil.rmtree(partial, ignore_errors=True)  # a killed process left it: the key's lock is ours
        try:
            partial.mkdir()
            link_or_copy(plan, partial / PLAN_NAME)
            shutil.copyfile(receipt, partial / RECEIPT_NAME)
            (partial / ENTRY_NAME).write_text(text, encoding="utf-8", newline="\n")
            now = self._clock()
            os.utime(partial / ENTRY_NAME, ns=(now, now))
            for path in (partial / PLAN_NAME, partial / RECEIPT_NAME, partial / ENTRY_NAME, partial):
                _fsync(path)
            with file_lock(self._locks / "space.lock"):
                if not self._make_room(self.limit_bytes - needed):
                    raise NoRoomError
                os.rename(partial, self._plans / key)  # noqa: PTH104 - the atomic step, spelt as the system call
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _fsync(self._plans)

    def remove(self, key: str) -> None:
        """Remove an entry: from the first moment on it is no entry any more.

        Raises:
            OSError: If the cache cannot be written.
        """
        partial = self._plans / f"{key}{_PARTIAL}"
        shutil.rmtree(partial, ignore_errors=True)
        os.rename(self._plans / key, partial)  # noqa: PTH104 - see keep
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial)
        else:
            partial.unlink()

    def entries(self) -> list[CachedEntry]:
        """Return all entries, the one that was not used for longest first; others may come and go meanwhile."""
        found = (_listed(path) for path in self._plans.iterdir() if not path.name.endswith(_PARTIAL))
        return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.last_used_ns)

    def trim(self, limit_bytes: int | None = None) -> bool:
        """Remove what was not used for longest until at most ``limit_bytes`` (the bound by default) are left.

        Returns:
            Whether that was possible: an entry that another process is taking is left alone.
        """
        with file_lock(self._locks / "space.lock"):
            return self._make_room(self.limit_bytes if limit_bytes is None else limit_bytes)

    def _make_room(self, allowed_bytes: int) -> bool:
        self._remove_stale_partials()
        entries = self.entries()
        total = sum(entry.bytes for entry in entries)
        for entry in entries:
            if total <= allowed_bytes:
                break
            with _unused(self._locks / f"{entry.key}.lock") as unused:
                if unused:
                    if (self._plans / entry.key).exists():  # its user may have found it damaged and removed it
                        self.remove(entry.key)
                    total -= entry.bytes
        return total <= allowed_bytes

    def _remove_stale_partials(self) -> None:
        for partial in self._plans.glob(f"*{_PARTIAL}"):
            with _unused(self._locks / f"{partial.name.removesuffix(_PARTIAL)}.lock") as unused:
                if unused:
                    shutil.rmtree(partial, ignore_errors=True)

    def _make_folders(self) -> None:
        self._plans.mkdir(parents=True, exist_ok=True)
        self._locks.mkdir(parents=True, exist_ok=True)


@contextmanager
def file_lock(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock of the file ``path``, which exists as long as somebody holds it.

    Whoever gives the lock back removes the file first. Another process that has waited on that file then holds the lock
    of a file without a name, notices, and begins again.

    Args:
        path: Its folder must exist.
        on_wait: Called once if somebody else holds the lock.

    Raises:
        OSError: If the file cannot be made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait is not None:
                    on_wait()
                    on_wait = None
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, path):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def _unused(path: Path) -> Iterator[bool]:
    """Hold the lock of ``path`` if nobody does; yields whether it is held."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        if not _is_at(descriptor, path):  # given back and taken again in this very moment
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), named)


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to ``source``, or a copy where there can be none.

    Raises:
        OSError: If neither is possible.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        copy_with_holes(source, target)


def _problem(entry: Path) -> str | None:
    """Say what is wrong with an entry, or None."""
    try:
        record = _read_record(entry)
        for name, size, sha256 in (
            (PLAN_NAME, record.plan_bytes, record.plan_sha256),
            (RECEIPT_NAME, record.receipt_bytes, record.receipt_sha256),
        ):
            found = (entry / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
            if sha256_of_file(entry / name) != sha256:
                return f"{name} is altered"
    except (CodecError, UnicodeDecodeError, json.JSONDecodeError):
        return f"{ENTRY_NAME} is altered"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, EOFError) as error:
        return f"it cannot be read: {error}"
    return None


def _read_record(entry: Path) -> EntryRecord:
    return from_json(EntryRecord, json.loads((entry / ENTRY_NAME).read_text(encoding="utf-8")))


def _listed(path: Path) -> CachedEntry | None:
    """Return an entry as it is listed; None if it is gone by now."""
    last_used, size, content = 0, 0, None
    try:
        for file in path.iterdir():
            about = file.stat()
            size += about.st_size
            if file.name == ENTRY_NAME:
                last_used = about.st_mtime_ns
        content = _read_record(path).content
    except (CodecError, UnicodeDecodeError, json.JSONDecodeError, NotADirectoryError):
        pass  # damaged: of unknown content, and found out when it is taken
    except FileNotFoundError:
        if not path.exists():
            return None
    return CachedEntry(path.name, size, last_used, content)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
