"""The bound of the plan cache and its order of removal, against a model."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from reelforge.export.cache_store import DamagedEntryError, EntryStore, NoRoomError
from tests.export.stored_entries import LIMIT, Clock, content_of, is_tidy, keep, take

KEYS = tuple("abcdef")


class CacheModel(RuleBasedStateMachine):
    """Keeps, takes, damages and trims; the model is a list of (key, size), the least recently used first."""

    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.store = EntryStore(self.root / "cache", LIMIT, self.clock)
        self.model: dict[str, int] = {}  # in order of last use
        self.plans: dict[str, int] = {}
        self.damaged: set[str] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    def forget(self, key: str) -> None:
        self.model.pop(key, None)
        self.damaged.discard(key)

    def room(self, allowed: int) -> None:
        while self.model and sum(self.model.values()) > allowed:
            self.forget(next(iter(self.model)))

    def overhead(self, key: str, size: int) -> int:
        """The bytes of an entry beside its plan, measured and not computed: what `entries` counts is tested apart."""
        entry = next(each for each in self.store.entries() if each.key == key)
        return entry.bytes - size

    @rule(key=st.sampled_from(KEYS), size=st.integers(0, LIMIT // 3) | st.integers(0, LIMIT))
    def keep(self, key: str, size: int) -> None:
        if key in self.model:
            return
        before = dict(self.model)
        try:
            keep(self.store, key, size, self.root)
        except NoRoomError:
            assert size + 600 > LIMIT  # only for what is larger than the cache
            assert {entry.key for entry in self.store.entries()} == set(before)
            return
        total = size + self.overhead(key, size)
        assert total <= LIMIT
        self.room(LIMIT - total)
        self.model[key], self.plans[key] = total, size

    @rule(key=st.sampled_from(KEYS))
    def take(self, key: str) -> None:
        if key in self.damaged:
            with pytest.raises(DamagedEntryError):
                take(self.store, key, self.root)
            self.forget(key)
            return
        data = take(self.store, key, self.root)
        assert (data is None) == (key not in self.model)
        if data is not None:
            assert data == content_of(key, self.plans[key])
            self.model[key] = self.model.pop(key)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model)))
        receipt = self.root / "cache" / "plans" / key / "receipt.json"
        receipt.write_text("?" * receipt.stat().st_size)
        self.damaged.add(key)

    @rule(limit=st.integers(LIMIT // 3, LIMIT))
    def trim(self, limit: int) -> None:
        assert self.store.trim(limit)
        self.room(limit)

    @rule()
    def another_process(self) -> None:
        self.store = EntryStore(self.root / "cache", LIMIT, self.clock)

    @invariant()
    def agrees(self) -> None:
        entries = self.store.entries()
        assert [entry.key for entry in entries] == list(self.model)
        assert [entry.bytes for entry in entries] == list(self.model.values())
        assert sum(entry.bytes for entry in entries) <= LIMIT
        assert is_tidy(self.root / "cache")


TestCacheModel = CacheModel.TestCase
TestCacheModel.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)


def test_a_plan_that_is_taken_outlives_one_that_is_newer(tmp_path: Path) -> None:
    store = EntryStore(tmp_path / "cache", LIMIT, Clock())
    for key in "abc":
        keep(store, key, 800, tmp_path)
    assert take(store, "a", tmp_path) == content_of("a", 800)
    keep(store, "d", 800, tmp_path)
    assert [entry.key for entry in store.entries()] == ["c", "a", "d"]
