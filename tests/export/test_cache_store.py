"""The files of the plan cache: what is linked and copied, damage, faults at every step, locks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from reelforge.export import cache_store
from reelforge.export.cache_store import DamagedEntryError, EntryStore, NoRoomError, file_lock
from tests.export.stored_entries import LIMIT, Clock, content_of, is_tidy, keep, take


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def store(folder: Path) -> EntryStore:
    return EntryStore(folder, LIMIT, Clock())


@pytest.fixture
def work(tmp_path: Path) -> Path:
    path = tmp_path / "work"
    path.mkdir()
    return path


def test_what_an_entry_counts(store: EntryStore, folder: Path, work: Path) -> None:
    keep(store, "a", 1000, work)
    [entry] = store.entries()
    files = list((folder / "plans" / "a").iterdir())
    assert {path.name for path in files} == {"plan", "receipt.json", "entry.json"}
    assert entry.bytes == sum(path.stat().st_size for path in files)
    assert (entry.key, entry.content, entry.last_used_ns) == ("a", {"stage": "a"}, 10**9)


# What is brought where.


def test_links_and_copies(store: EntryStore, folder: Path, work: Path) -> None:
    """The plan is one file with the bundle's; the receipt is not, so that nobody damages the cache by editing it."""
    keep(store, "a", 100, work)
    with store.locked("a", pytest.fail):
        assert store.take("a", work / "p", work / "r")
    entry = folder / "plans" / "a"
    assert (work / "p").samefile(entry / "plan")
    assert not (work / "r").samefile(entry / "receipt.json")
    (work / "r").write_text("edited")
    assert take(store, "a", work) == content_of("a", 100)


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_across_file_systems(
    store: EntryStore, folder: Path, work: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    keep(store, "a", 100, work)
    with store.locked("a", pytest.fail):
        assert store.take("a", work / "p", work / "r")
    assert (work / "p").read_bytes() == content_of("a", 100)
    assert not (work / "p").samefile(folder / "plans" / "a" / "plan")


def test_a_bundle_survives_the_cache(store: EntryStore, work: Path) -> None:
    keep(store, "a", 100, work)
    with store.locked("a", pytest.fail):
        store.take("a", work / "p", work / "r")
    assert store.trim(0)
    assert store.entries() == []
    assert (work / "p").read_bytes() == content_of("a", 100)


def test_no_room_in_the_bundle(store: EntryStore, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing half-copied is left, and the entry is as it was."""
    keep(store, "a", 100, work)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space left"), store.locked("a", pytest.fail):
            store.take("a", work / "p", work / "r")
    assert list(work.iterdir()) == []
    assert take(store, "a", work) == content_of("a", 100)


# Damage.


def cut(entry: Path) -> None:
    os.truncate(entry / "plan", 99)


def alter(entry: Path) -> None:
    with (entry / "plan").open("r+b") as file:
        file.seek(50)
        file.write(b"!")


def no_plan(entry: Path) -> None:
    (entry / "plan").unlink()


def other_receipt(entry: Path) -> None:
    (entry / "receipt.json").write_text('"b"')


def no_record(entry: Path) -> None:
    (entry / "entry.json").unlink()


def half_a_record(entry: Path) -> None:
    text = (entry / "entry.json").read_text()
    (entry / "entry.json").write_text(text[: len(text) // 2])


def another_record(entry: Path) -> None:
    (entry / "entry.json").write_text('{"plan_bytes": 100}')


def binary_record(entry: Path) -> None:
    (entry / "entry.json").write_bytes(b"\xff\xfe")


def plan_is_a_folder(entry: Path) -> None:
    size = (entry / "plan").stat().st_size
    (entry / "plan").unlink()
    (entry / "plan").mkdir()
    record = json.loads((entry / "entry.json").read_text())
    record["plan_bytes"] = (entry / "plan").stat().st_size
    assert size == 100
    (entry / "entry.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "plan has 99 bytes instead of 100"),
        (alter, "plan is altered"),
        (no_plan, "plan is missing"),
        (other_receipt, "receipt.json is altered"),
        (no_record, "entry.json is missing"),
        (half_a_record, "entry.json is altered"),
        (another_record, "entry.json is altered"),
        (binary_record, "entry.json is altered"),
        (plan_is_a_folder, "it cannot be read: .*Is a directory"),
    ],
)
def test_damage(store: EntryStore, folder: Path, work: Path, damage: Callable[[Path], None], message: str) -> None:
    keep(store, "a", 100, work)
    damage(folder / "plans" / "a")
    assert len(store.entries()) == 1  # it can still be listed, and be removed for want of room
    with pytest.raises(DamagedEntryError, match=message):
        take(store, "a", work)
    assert list(work.iterdir()) == []
    assert store.entries() == []
    keep(store, "a", 100, work)
    assert take(store, "a", work) == content_of("a", 100)
    damage(folder / "plans" / "a")
    assert store.trim(0)
    assert store.entries() == []


def test_an_entry_that_is_a_file(store: EntryStore, folder: Path, work: Path) -> None:
    (folder / "plans" / "a").write_text("")
    with pytest.raises(DamagedEntryError, match="cannot be read"):
        take(store, "a", work)
    assert store.entries() == []


# Faults at every step of keeping an entry.

STEPS = ("mkdir", "link", "copyfile", "write_text", "utime", "fsync", "rename", "rmtree")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_fault_while_keeping(
    store: EntryStore, folder: Path, work: Path, monkeypatch: pytest.MonkeyPatch, step: str, kind: BaseException
) -> None:
    keep(store, "old", 3000, work)  # has to make room
    owner = {"mkdir": Path, "write_text": Path, "copyfile": shutil, "rmtree": shutil}.get(step, os)
    original = getattr(owner, step)
    calls = 0

    def fail(*arguments: object, **options: object) -> object:
        nonlocal calls
        if not any("plans" in str(argument) for argument in arguments) and step != "fsync":
            return original(*arguments, **options)
        calls += 1
        if calls == wanted:
            raise kind
        return original(*arguments, **options)

    for wanted in range(1, 4):
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(owner, step, fail)
            try:
                keep(store, "new", 2000, work)
            except type(kind):
                pass
            else:
                assert calls < wanted or step == "rmtree"  # rmtree ignores it where nothing depends on it
        assert step == "rmtree" or not list((folder / "plans").glob("*.partial"))
        keys = [entry.key for entry in store.entries()]
        assert keys in (["old"], ["new"], [])
        if "new" in keys:
            assert take(store, "new", work) == content_of("new", 2000)
            with store.locked("new", pytest.fail):
                store.remove("new")
        if "old" in keys:
            assert take(store, "old", work) == content_of("old", 3000)
        assert not list((folder / "locks").iterdir())
        assert store.trim()
        assert is_tidy(folder)


def test_the_cache_was_removed_meanwhile(store: EntryStore, folder: Path, work: Path) -> None:
    shutil.rmtree(folder)
    assert take(store, "a", work) is None
    shutil.rmtree(folder)
    keep(store, "a", 10, work)
    assert take(store, "a", work) == content_of("a", 10)


# Locks between threads; between processes they are the same, see test_cache_processes.py.


def test_an_entry_in_use_is_not_removed(store: EntryStore, folder: Path, work: Path) -> None:
    keep(store, "a", 1500, work)
    keep(store, "b", 1500, work)
    with store.locked("a", pytest.fail):  # by somebody who takes it: the oldest, but not to be had
        keep(store, "c", 1500, work)
        assert [entry.key for entry in store.entries()] == ["a", "c"]
        assert not store.trim(0)
        assert [entry.key for entry in store.entries()] == ["a"]
        with pytest.raises(NoRoomError):
            keep(store, "d", 3000, work)
    assert store.trim(0)
    assert is_tidy(folder)


def test_a_partial_folder_of_nobody_is_removed(store: EntryStore, folder: Path, work: Path) -> None:
    for name in ("x", "y"):
        (folder / "plans" / f"{name}.partial").mkdir()
        (folder / "plans" / f"{name}.partial" / "plan").write_bytes(b"1" * 5000)
    with store.locked("y", pytest.fail):
        keep(store, "a", 10, work)
        assert [path.name for path in (folder / "plans").glob("*.partial")] == ["y.partial"]
    keep(store, "y", 10, work)
    assert is_tidy(folder)


def test_one_at_a_time(tmp_path: Path) -> None:
    """Many threads, each holding the lock for a moment: never two, though the file is removed each time."""
    path = tmp_path / "lock"
    inside, most, total = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, total
        for _ in range(60):
            with file_lock(path):
                with guard:
                    inside += 1
                    most = max(most, inside)
                total += 1  # not atomic: it is the file lock that protects it
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, total) == (1, 360)
    assert not path.exists()


def test_who_has_waited_holds_a_lock_that_others_see(tmp_path: Path) -> None:
    """The file that it waited on is removed by then: it must hold the lock of the one that is there instead."""
    path = tmp_path / "lock"
    waiting, entered, leave = threading.Event(), threading.Event(), threading.Event()

    def wait() -> None:
        with file_lock(path, waiting.set):
            entered.set()
            leave.wait(20)

    thread = threading.Thread(target=wait)
    with file_lock(path):
        thread.start()
        assert waiting.wait(20)
        time.sleep(0.05)  # it waits for the system now
    assert entered.wait(20)
    with cache_store._unused(path) as unused:
        assert not unused
    leave.set()
    thread.join()
    assert not path.exists()


def test_room_is_made_by_one_at_a_time(store: EntryStore, folder: Path, work: Path) -> None:
    thread = threading.Thread(target=keep, args=(store, "a", 10, work))
    with file_lock(folder / "locks" / "space.lock"):
        thread.start()
        while not (folder / "plans" / "a.partial" / "entry.json").exists():
            time.sleep(0.001)
        time.sleep(0.1)
        assert store.entries() == []
    thread.join()
    assert [entry.key for entry in store.entries()] == ["a"]


def test_waiting_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    told: list[str] = []
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with file_lock(path):
            held.set()
            free.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)

    def on_wait() -> None:
        told.append("waits")
        free.set()

    with file_lock(path, on_wait):
        pass
    thread.join()
    assert told == ["waits"]


def test_a_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), file_lock(tmp_path / "lock"):
        raise ValueError("inside")
    with file_lock(tmp_path / "lock", pytest.fail):
        pass
    assert cache_store._unused(tmp_path / "lock").__enter__()
