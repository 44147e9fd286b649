"""Turns: one at a time, in order, over threads; a waiter can be stopped; nobody waits for himself."""

from __future__ import annotations

import threading
import time

import pytest

from reelforge.runtime.control import Stop
from reelforge.runtime.errors import CancelledError, DeadlineError, EngineError
from reelforge.runtime.turns import Turns


def wait_until(condition: object, timeout_s: float = 10.0) -> None:
    assert callable(condition)
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def test_turns_come_in_the_order_of_asking_and_never_overlap() -> None:
    turns, order, inside = Turns(), [], []
    threads = []
    with turns.take(Stop()):
        for number in range(5):

            def work(number: int = number) -> None:
                with turns.take(Stop()):
                    inside.append(number)
                    assert len(inside) == 1
                    order.append(number)
                    inside.remove(number)

            threads.append(threading.Thread(target=work))
            threads[-1].start()
            wait_until(lambda number=number: len(turns._waiting) == number + 1)
        assert order == []
    for thread in threads:
        thread.join(10)
    assert order == list(range(5))


def test_who_has_the_turn_does_not_wait_for_himself() -> None:
    turns = Turns()
    with (
        turns.take(Stop()),
        pytest.raises(EngineError, match="would wait for itself") as caught,
        turns.take(Stop()),
    ):
        pass
    assert "use another thread" in str(caught.value)
    with turns.take(Stop()):
        pass


@pytest.mark.parametrize(("deadline_s", "error"), [(0.2, DeadlineError), (None, CancelledError)])
def test_a_waiter_that_is_stopped_leaves_the_line(deadline_s: float | None, error: type[Exception]) -> None:
    turns, caught, stop = Turns(), [], Stop(deadline_s)

    def wait() -> None:
        try:
            with turns.take(stop):
                pass
        except CancelledError as problem:
            caught.append(problem)

    with turns.take(Stop()):
        thread = threading.Thread(target=wait)
        thread.start()
        wait_until(lambda: turns._waiting or caught)
        if error is CancelledError:
            stop.set("nobody wants it")
        thread.join(10)
    assert [type(problem) for problem in caught] == [error]
    assert "before its turn came" in str(caught[0])
    with turns.take(Stop()):
        pass


def test_another_thread_may_end_a_turn() -> None:
    turns = Turns()
    turn = turns.take(Stop())
    thread = threading.Thread(target=turn.__enter__)
    thread.start()
    thread.join(10)
    turn.__exit__(None, None, None)
    with turns.take(Stop()):
        pass
