"""Who is next: higher priorities first; among equals the caller who has had least so far; of one caller, the first.

What a caller has had is counted in work and not in requests (start-time fair queueing: Goyal, Vin and Cheng, 1996): two
callers with enough to do never differ by more than their largest requests, whatever they ask for and however many
requests they queue. A caller who comes back is not owed what he did not ask for meanwhile: he begins where the least
served of those who wait stands. Priorities are strict: as long as higher ones keep coming, lower ones wait.

The module knows no threads, clocks or pipelines; whoever uses it holds a lock.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar


class Ticket(Protocol):
    """What the queue must know of a request."""

    @property
    def caller(self) -> str:
        """Whose it is."""
        ...

    @property
    def priority(self) -> int:
        """Higher goes first."""
        ...

    @property
    def number(self) -> int:
        """Counts up with every request, and is never used twice."""
        ...

    @property
    def cost(self) -> float:
        """The work it is, above 0, in any unit."""
        ...


Item = TypeVar("Item", bound=Ticket)


class FairQueue(Generic[Item]):
    """Requests that wait."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Item]] = {}  # by caller, next first
        self._served: dict[str, float] = {}  # of all who wait, and of others while it is more than any of these had
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Item]:
        for items in self._waiting.values():
            yield from items

    def by_caller(self) -> dict[str, int]:
        """Return how many requests of each caller wait."""
        return {caller: len(items) for caller, items in self._waiting.items()}

    def push(self, item: Item) -> None:
        """Add a request."""
        if item.caller not in self._waiting:
            least = min((self._served[caller] for caller in self._waiting), default=0.0)
            self._served[item.caller] = max(self._served.get(item.caller, least), least)
            self._waiting[item.caller] = []
        insort(self._waiting[item.caller], item, key=_own_order)
        self._size += 1

    def pop(self, allowed: Callable[[str], bool] | None = None) -> Item | None:
        """Take out the next request of those whose caller is ``allowed``; None if there is none."""
        heads = [items[0] for caller, items in self._waiting.items() if allowed is None or allowed(caller)]
        if not heads:
            return None
        item = min(heads, key=lambda head: (-head.priority, self._served[head.caller], head.number))
        self._served[item.caller] += item.cost
        self._take_out(item)
        return item

    def remove(self, item: Item) -> bool:
        """Take out a request that will not be served; False if it does not wait."""
        if item not in self._waiting.get(item.caller, ()):
            return False
        self._take_out(item)
        return True

    def order(self) -> list[Item]:
        """Return all requests as they would be popped if no other came."""
        ranked = []
        for caller, items in self._waiting.items():
            served = self._served[caller]
            for item in items:
                ranked.append((-item.priority, served, item.number, item))
                served += item.cost
        return [item for *_, item in sorted(ranked, key=lambda rank: rank[:3])]

    def _take_out(self, item: Item) -> None:
        items = self._waiting[item.caller]
        items.remove(item)
        self._size -= 1
        if not items:
            del self._waiting[item.caller]
        least = min((self._served[caller] for caller in self._waiting), default=None)
        # Nobody waits: nobody was kept from anything, and all begin anew. Else only debts are remembered.
        kept = {} if least is None else self._served
        self._served = {name: had for name, had in kept.items() if name in self._waiting or had > (least or 0.0)}


def _own_order(item: Ticket) -> tuple[int, int]:
    return -item.priority, item.number
