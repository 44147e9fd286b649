"""What tests of the plan cache's files share: entries of known content, a clock, and whether anything is left over."""

from __future__ import annotations

from pathlib import Path

import pytest

from reelforge.export.cache_store import EntryStore

LIMIT = 4000
"""Bytes that the stores of these tests may hold."""


class Clock:
    """Counts seconds by itself, so that every use has its own time."""

    now = 0

    def __call__(self) -> int:
        self.now += 10**9
        return self.now


def content_of(key: str, size: int) -> bytes:
    return (key.encode() * size)[:size]


def keep(store: EntryStore, key: str, size: int, work: Path) -> None:
    plan, receipt = work / f"{key}.plan", work / f"{key}.json"
    plan.write_bytes(content_of(key, size))
    receipt.write_text(f'"{key}"')
    try:
        with store.locked(key, pytest.fail):
            store.keep(key, {"stage": key}, plan, receipt)
    finally:
        plan.unlink()
        receipt.unlink()


def take(store: EntryStore, key: str, work: Path) -> bytes | None:
    plan, receipt = work / "taken.plan", work / "taken.json"
    with store.locked(key, pytest.fail):
        if not store.take(key, plan, receipt):
            assert not plan.exists()
            assert not receipt.exists()
            return None
    assert receipt.read_text() == f'"{key}"'
    data = plan.read_bytes()
    plan.unlink()
    receipt.unlink()
    return data


def is_tidy(folder: Path) -> bool:
    return not list((folder / "locks").iterdir()) and not list((folder / "plans").glob("*.partial"))
