"""The queue's order: priorities, shares, and no way to gain by asking for more or by asking later."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from reelforge.runtime.scheduling.fair_queue import FairQueue

numbers = itertools.count()


@dataclass(frozen=True)
class Item:
    caller: str
    priority: int = 0
    cost: float = 1.0
    number: int = 0


def filled(*items: tuple[str, int, float]) -> FairQueue[Item]:
    queue: FairQueue[Item] = FairQueue()
    for caller, priority, cost in items:
        queue.push(Item(caller, priority, cost, next(numbers)))
    return queue


def drained(queue: FairQueue[Item]) -> list[Item]:
    items = []
    while (item := queue.pop()) is not None:
        items.append(item)
    return items


asked = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(-1, 1), st.floats(0.5, 50)), max_size=40)


def test_a_hundred_requests_do_not_keep_another_caller_waiting() -> None:
    queue = filled(*[("many", 0, 1.0)] * 100)
    queue.pop()
    queue.push(Item("one", number=next(numbers)))
    assert [item.caller for item in drained(queue)[:3]] == ["many", "one", "many"]


def test_callers_take_turns_and_each_keeps_his_order() -> None:
    queue = filled(*[("a", 0, 1.0)] * 3, *[("b", 0, 1.0)] * 3, ("c", 0, 1.0))
    items = drained(queue)
    assert "".join(item.caller for item in items) == "abcabab"
    for caller in "abc":
        own = [item.number for item in items if item.caller == caller]
        assert own == sorted(own)


def test_large_requests_count_for_more() -> None:
    queue = filled(*[("large", 0, 10.0)] * 2, *[("small", 0, 1.0)] * 12)
    assert [item.caller for item in drained(queue)] == ["large", *["small"] * 10, "large", *["small"] * 2]


def test_priorities_go_first_whoever_asks() -> None:
    queue = filled(("a", 0, 1.0), ("a", 5, 1.0), ("b", 1, 1.0), ("b", 0, 1.0), ("a", 5, 1.0))
    assert [(item.caller, item.priority) for item in drained(queue)] == [
        ("a", 5), ("a", 5), ("b", 1), ("b", 0), ("a", 0),
    ]  # fmt: skip


def test_a_caller_is_not_owed_what_he_did_not_ask_for() -> None:
    queue = filled(*[("busy", 0, 1.0)] * 20)
    for _ in range(10):
        queue.pop()
    for _ in range(5):
        queue.push(Item("late", number=next(numbers)))
    assert Counter(item.caller for item in drained(queue)[:4]) == {"busy": 2, "late": 2}


def test_leaving_and_coming_back_does_not_pay() -> None:
    queue = filled(*[("b", 0, 1.0)] * 10)
    queue.push(Item("a", cost=5.0, number=next(numbers)))
    served = ""
    for _ in range(8):
        item = queue.pop()
        assert item is not None
        served += item.caller
        if item.caller == "a":  # always one that waits, never two
            queue.push(Item("a", cost=5.0, number=next(numbers)))
    assert served == "babbbbba"


def test_whom_the_limit_keeps_is_passed_over() -> None:
    queue = filled(("a", 9, 1.0), ("b", 0, 1.0))
    item = queue.pop(lambda caller: caller != "a")
    assert item is not None
    assert item.caller == "b"
    assert queue.pop(lambda caller: False) is None
    assert len(queue) == 1


@given(asked)
def test_the_order_that_is_told_is_the_order_that_comes(items: list[tuple[str, int, float]]) -> None:
    queue = filled(*items)
    told = queue.order()
    assert sorted(item.number for item in queue) == sorted(item.number for item in told)
    assert queue.by_caller() == Counter(item.caller for item in told)
    assert drained(queue) == told
    assert len(queue) == 0


@given(st.lists(st.floats(1, 9), min_size=5, max_size=30), st.lists(st.floats(1, 9), min_size=5, max_size=30))
def test_shares_never_differ_by_more_than_the_largest_requests(a: list[float], b: list[float]) -> None:
    queue = filled(*[("a", 0, cost) for cost in a], *[("b", 0, cost) for cost in b])
    had = {"a": 0.0, "b": 0.0}
    while len(queue.by_caller()) == 2:
        item = queue.pop()
        assert item is not None
        had[item.caller] += item.cost
        assert abs(had["a"] - had["b"]) <= max(a) + max(b)


@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "remove"]), st.sampled_from("abc"), st.integers(0, 1))))
def test_nothing_is_lost_doubled_or_remembered_for_ever(actions: list[tuple[str, str, int]]) -> None:
    queue: FairQueue[Item] = FairQueue()
    inside: set[Item] = set()
    for number, (action, caller, priority) in enumerate(actions):
        if action == "push":
            item = Item(caller, priority, 1.0 + number % 3, number)
            queue.push(item)
            inside.add(item)
        elif action == "pop":
            popped = queue.pop()
            assert (popped is None) == (not inside)
            if popped is not None:
                inside.remove(popped)
        elif inside:
            gone = min(inside, key=lambda item: item.number)
            assert queue.remove(gone)
            assert not queue.remove(gone)
            inside.remove(gone)
        assert set(queue) == inside
        assert len(queue) == len(inside)
    drained(queue)
    assert queue._served == {}


def test_callers_who_come_once_are_forgotten_under_load() -> None:
    queue = filled(*[("load", 0, 1.0)] * 3000)
    for number in range(1000):
        queue.push(Item(f"caller {number}", number=next(numbers)))
        queue.pop()
        queue.pop()
    assert len(queue._served) < 10
