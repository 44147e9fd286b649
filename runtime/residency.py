"""Which engines are in memory: loaded when they are needed, kept while the budget allows, closed when it does not.

A request uses the stages in one order, again and again, so the stage that was used last is the one that is needed
latest: what least-recently-used would keep is what is of least use. Of those that must go, the one that is needed
latest goes first, and the stage that takes longest to load goes last of all, whatever its place. The module knows
stages by name, and not what they compute.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from reelforge.runtime.budget import StageBytes
from reelforge.runtime.engines.engine import Engine
from reelforge.runtime.errors import EngineError, NotFiniteError, OutOfMemoryError


@dataclass
class _Held:
    """An engine that is loaded. ``users`` are leases; one that is not ``kept`` is closed with the last of them."""

    engine: Engine
    users: int = 0
    kept: bool = True


class Residency:
    """Lends engines, which it loads and closes. Any thread may ask; engines are lent to several users at once.

    Args:
        load: Loads the engine of a stage.
        needs: Returns what a stage takes.
        budget: Returns how many bytes engines may take together, once the first was asked for. What does not fit even
            alone is loaded alone.
        order: Stages as a request uses them.
        precious: The stage that is closed only if nothing else can be.
        shared_arena: Whether activations are in one block that is as large as the largest stage that is loaded needs;
            otherwise a stage that waits holds none.

    Attributes:
        loads: How often an engine was loaded.
        evictions: How often one was closed to make room.
    """

    def __init__(
        self,
        load: Callable[[str], Engine],
        needs: Callable[[str], StageBytes],
        budget: Callable[[], int],
        order: Sequence[str],
        precious: str,
        shared_arena: bool = False,
    ) -> None:
        self._load = load
        self._needs = needs
        self._budget = budget
        self._order = {stage: number for number, stage in enumerate(order)}
        self._precious = precious
        self._shared_arena = shared_arena
        self._held: dict[str, _Held] = {}
        self._lock = threading.RLock()
        self.loads = 0
        self.evictions = 0

    @property
    def resident(self) -> dict[str, int]:
        """The stages that are loaded, and the bytes of their weights."""
        with self._lock:
            return {stage: self._needs(stage).weights for stage in self._held}

    @contextmanager
    def lease(self, stage: str) -> Iterator[Engine]:
        """Lend the engine of a stage for the duration of a ``with`` block.

        An engine that fails in it is not kept: in which state it is, nobody knows. One whose numbers are not finite has
        not failed, and stays.
        """
        with self._lock:
            held = self._held.get(stage)
            if held is None:
                self._make_room_for(stage)
                held = self._held[stage] = _Held(self._loaded(stage))
            held.users += 1
        try:
            yield held.engine
        except EngineError as error:
            held.kept = held.kept and isinstance(error, NotFiniteError)
            raise
        finally:
            with self._lock:
                held.users -= 1
                if not held.users and not (held.kept and self._used(stage) <= self._budget()):
                    self._close(stage, held)

    def make_room(self) -> bool:
        """Close what nobody uses, and return whether there was any."""
        with self._lock:
            idle = [stage for stage, held in self._held.items() if not held.users]
            for stage in idle:
                self.evictions += 1
                self._close(stage, self._held[stage])
            return bool(idle)

    def close(self) -> None:
        """Close what is loaded; what is lent, when it is given back."""
        with self._lock:
            for stage, held in list(self._held.items()):
                held.kept = False
                if held.users:
                    del self._held[stage]
                else:
                    self._close(stage, held)

    def _loaded(self, stage: str) -> Engine:
        self.loads += 1
        try:
            return self._load(stage)
        except OutOfMemoryError:
            if not self.make_room():
                raise
        return self._load(stage)

    def _close(self, stage: str, held: _Held) -> None:
        if self._held.get(stage) is held:
            del self._held[stage]
        held.engine.close()

    def _make_room_for(self, stage: str) -> None:
        """Close what is needed latest, until the stage fits beside the others or nothing is left to close."""
        while self._used(stage) > self._budget():
            idle = [other for other, held in self._held.items() if not held.users]
            if not idle:
                return
            victim = max(idle, key=lambda other: (other != self._precious, self._distance(stage, other)))
            self.evictions += 1
            self._close(victim, self._held[victim])

    def _used(self, stage: str) -> int:
        """Return what is taken when ``stage`` runs: all weights, and activations."""
        needs = {name: self._needs(name) for name in {*self._held, stage}}
        running = needs.values() if self._shared_arena else (needs[stage],)
        return sum(need.weights for need in needs.values()) + max(need.activations for need in running)

    def _distance(self, now: str, stage: str) -> int:
        """Return how many stages from ``now`` on it is until ``stage`` is used."""
        known = self._order
        if now not in known or stage not in known:
            return len(known)
        return (known[stage] - known[now]) % len(known)
