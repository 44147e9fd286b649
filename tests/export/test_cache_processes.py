"""The plan cache under several processes: one builds and the others wait, killed ones are in nobody's way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from reelforge.export.cache_store import EntryStore

# Each process builds plans through the cache, of the seeds that it is given: a plan is the seed's digit, many times.
# What it does goes to one log that all processes append to; where it is told to wait, it waits until a file appears.
CHILD = """
import os, shutil, sys, time
from dataclasses import replace
from pathlib import Path
from reelforge.export import cache_store
from reelforge.export.cache import PlanCache, PlanKey
from reelforge.export.engines.request import Expected, PlanRequest, Profile
from reelforge.runtime.recipe import Target

root, wait_at, limit, *seeds = sys.argv[1:]
root = Path(root)

def log(text):
    with (root / "log").open("a") as file:
        file.write(f"{os.getpid()} {text}\\n")

def pause(moment):
    if moment == wait_at:
        log(f"pauses {moment}")
        while not (root / "go").exists():
            time.sleep(0.005)

def watched(owner, name, moment):
    original = getattr(owner, name)
    def call(*arguments, **options):
        pause(moment)
        return original(*arguments, **options)
    setattr(owner, name, call)

watched(cache_store, "_fsync", "flush")
watched(cache_store.EntryStore, "_make_room", "room")
cache = PlanCache(root / "cache", int(limit), lambda text: log(f"notice {text}"))
profiles = (Profile("default", {}),)
request = PlanRequest("dit", "g", (), (), Target.parse("rtx:sm86"), profiles, Expected(), "p", "r", "s")
for number, seed in enumerate(seeds):
    plan, receipt = root / f"{os.getpid()}-{number}.plan", root / f"{os.getpid()}-{number}.json"

    def build(plan, receipt):
        log(f"builds {seed}")
        plan.write_bytes(b"?" * 500)
        pause("build")
        time.sleep(0.01)
        plan.write_bytes(seed.encode() * 1000)
        receipt.write_text(seed)

    hit = cache.fetch_or_build(PlanKey(request, seed, "b"), build, plan, receipt)
    assert plan.read_bytes() == seed.encode() * 1000, plan
    assert receipt.read_text() == seed, receipt
    log(f"{'hit' if hit else 'built'} {seed}")
"""


class Builds:
    """Starts processes and reads what they say."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self.root, self._stack = root, stack

    def start(self, *seeds: str, wait_at: str = "", limit: int = 10**9) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(self.root), wait_at, str(limit), *seeds],
            stderr=subprocess.PIPE,
            text=True,
        )

        def end() -> None:
            process.kill()
            process.communicate()

        self._stack.callback(end)
        return process

    def log(self) -> list[str]:
        path = self.root / "log"
        return path.read_text().splitlines() if path.exists() else []

    def said(self, process: subprocess.Popen[str]) -> list[str]:
        return [line.split(" ", 1)[1] for line in self.log() if line.startswith(f"{process.pid} ")]

    def wait_for(self, process: subprocess.Popen[str], text: str) -> None:
        deadline = time.monotonic() + 60
        while not any(text in line for line in self.said(process)):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.01)

    def finish(self, process: subprocess.Popen[str]) -> list[str]:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        return self.said(process)

    def go(self) -> None:
        (self.root / "go").touch()


@pytest.fixture
def builds(tmp_path: Path) -> Iterator[Builds]:
    with ExitStack() as stack:
        yield Builds(tmp_path, stack)


WAITS = "notice another build compiles the same plan of stage dit; waiting for it."


def test_two_builds_of_one_plan(builds: Builds) -> None:
    """The second waits, says so, and takes what the first has built; another plan is not waited for."""
    first = builds.start("1", wait_at="build")
    builds.wait_for(first, "pauses build")
    second, third = builds.start("1"), builds.start("2")
    builds.wait_for(second, "waiting for it")
    assert builds.finish(third) == ["builds 2", "built 2"]
    assert second.poll() is None
    builds.go()
    assert builds.finish(first) == ["builds 1", "pauses build", "built 1"]
    assert builds.finish(second) == [WAITS, "hit 1"]


@pytest.mark.parametrize("moment", ["build", "flush", "room"])
def test_kill_9_of_the_builder(builds: Builds, moment: str) -> None:
    """While it compiles, while it writes the entry, and while it makes room with the lock of all."""
    first = builds.start("1", wait_at=moment)
    builds.wait_for(first, f"pauses {moment}")
    second = builds.start("1")
    builds.wait_for(second, "waiting for it")
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert builds.finish(second) == [WAITS, "builds 1", "built 1"]
    assert builds.finish(builds.start("1")) == ["hit 1"]
    cache = builds.root / "cache"
    assert list((cache / "locks").iterdir()) == []
    assert len(list((cache / "plans").iterdir())) == 1


def test_what_a_killed_build_leaves_is_removed_by_another_plan_s(builds: Builds) -> None:
    first = builds.start("1", wait_at="flush")
    builds.wait_for(first, "pauses flush")
    first.kill()
    first.wait()
    plans = builds.root / "cache" / "plans"
    assert [path.suffix for path in plans.iterdir()] == [".partial"]
    builds.finish(builds.start("2"))
    assert [path.suffix for path in plans.iterdir()] == [""]


def test_ctrl_c_while_waiting(builds: Builds) -> None:
    first = builds.start("1", wait_at="build")
    builds.wait_for(first, "pauses build")
    second = builds.start("1")
    builds.wait_for(second, "waiting for it")
    time.sleep(0.05)
    second.send_signal(signal.SIGINT)
    _, errors = second.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    builds.go()
    assert builds.finish(first)[-1] == "built 1"


def test_many_builds_with_little_room(builds: Builds) -> None:
    """Five processes, six plans, room for three: whatever is built, taken and removed, every plan is right."""
    limit = 3 * 2200
    processes = [builds.start(*orders, limit=limit) for orders in ("123456", "654321", "135246", "111222", "666555")]
    said = Counter(line.split()[0] for process in processes for line in builds.finish(process))
    assert said["hit"] + said["built"] == 30
    assert said["builds"] == said["built"] >= 6
    assert not [line for line in builds.log() if "damaged" in line or "not used" in line]
    store = EntryStore(builds.root / "cache", limit)
    entries = store.entries()
    assert 1 <= len(entries) <= 3
    assert sum(entry.bytes for entry in entries) <= limit
    assert os.listdir(builds.root / "cache" / "locks") == []  # noqa: PTH208 - names only
