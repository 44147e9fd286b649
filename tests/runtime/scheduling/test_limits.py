"""What a pool turns away, and in which words: a full queue, one caller's share, arguments and requests that are bad."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from reelforge.runtime.errors import DeadlineError, RequestError
from reelforge.runtime.scheduling.job import Job, State
from reelforge.runtime.scheduling.limits import QueueFullError, QueueLimits
from tests.runtime.scheduling.fake_pipeline import WAIT_S, Open, World, small


def test_a_full_queue_says_when_to_come_back(opened: Open, world: World) -> None:
    pool = opened(waiting=2)
    pool.submit(small("quick")).result(WAIT_S)
    hold = world.hold("slow")
    jobs = [pool.submit(small("slow"))]
    hold.wait_until_reached()
    jobs += [pool.submit(small("waits")) for _ in range(2)]
    with pytest.raises(QueueFullError, match="the queue is full") as caught:
        pool.submit(small("too much"))
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s >= 0
    assert "2 requests that wait" in str(caught.value)
    assert "ask again in about" in caught.value.fix
    assert pool.statistics().refused == 1
    hold.release()
    assert all(job.wait(WAIT_S) for job in jobs)
    assert pool.submit(small("again")).wait(WAIT_S)


def test_before_anything_was_measured_there_is_no_estimate(opened: Open, world: World) -> None:
    pool = opened(waiting=1)
    hold = world.hold("slow")
    pool.submit(small("slow"))
    hold.wait_until_reached()
    pool.submit(small("waits"))
    with pytest.raises(QueueFullError) as caught:
        pool.submit(small("too much"))
    assert caught.value.retry_after_s is None
    assert "ask again in a while" in caught.value.fix


def test_one_caller_cannot_fill_the_queue(opened: Open, world: World) -> None:
    pool = opened(waiting=9, waiting_per_caller=2)
    pool.submit(small("quick")).result(WAIT_S)
    hold = world.hold("slow")
    pool.submit(small("slow"), caller="many")
    hold.wait_until_reached()
    for _ in range(2):
        pool.submit(small("waits"), caller="many")
    with pytest.raises(QueueFullError, match="caller 'many' has as many") as caught:
        pool.submit(small("too much"), caller="many")
    assert caught.value.retry_after_s is not None
    pool.submit(small("welcome"), caller="other")
    assert pool.statistics().waiting_by_caller == {"many": 2, "other": 1}


def test_one_caller_cannot_take_all_devices(opened: Open, world: World) -> None:
    pool = opened(devices=2, running_per_caller=1)
    first, other = world.hold("first"), world.hold("other")
    one = pool.submit(small("first"), caller="many", priority=5)
    first.wait_until_reached()
    two = pool.submit(small("second"), caller="many", priority=5)
    three = pool.submit(small("other"), caller="other")
    other.wait_until_reached()
    assert two.state is State.WAITING
    first.release()
    assert two.wait(WAIT_S)
    other.release()
    assert one.wait(WAIT_S)
    assert three.wait(WAIT_S)


def test_waiting_for_a_place(opened: Open, world: World) -> None:
    pool = opened(waiting=1)
    hold = world.hold("slow")
    pool.submit(small("slow"))
    hold.wait_until_reached()
    waits = pool.submit(small("waits"))
    with pytest.raises(QueueFullError):
        pool.submit(small("late"), block_s=0.02)
    with pytest.raises(DeadlineError, match="before there was a place in the queue"):
        pool.submit(small("late"), block_s=None, deadline_s=0.02)
    late: list[Job] = []
    thread = threading.Thread(target=lambda: late.append(pool.submit(small("late"), block_s=None)))
    thread.start()
    hold.release()
    thread.join(WAIT_S)
    assert waits.wait(WAIT_S)
    assert late[0].wait(WAIT_S)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"waiting": 0}, "limit waiting is not usable"),
        ({"waiting": True}, "limit waiting is not usable"),
        ({"waiting_per_caller": 0}, "limit waiting_per_caller is not usable"),
        ({"running_per_caller": 1.5}, "limit running_per_caller is not usable"),
        ({"stall_s": 0}, "limit stall_s is not usable"),
        ({"stall_s": float("nan")}, "limit stall_s is not usable"),
        ({"frames_ahead": None}, "limit frames_ahead is not usable"),
        ({"encode_together": 0}, "limit encode_together is not usable"),
    ],
)
def test_limits_that_mean_nothing(limits: dict[str, int], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        QueueLimits(**limits)


def test_requests_are_checked_whole_before_they_take_a_place(opened: Open) -> None:
    pool = opened()
    with pytest.raises(RequestError, match=r"height=17, steps=0, seed=-1 are not supported"):
        pool.submit(replace(small("x"), height=17, steps=0, seed=-1))
    with pytest.raises(RequestError) as caught:
        pool.submit(small("x"), caller=7, priority=True, deadline_s=float("nan"), block_s=-1)  # type: ignore[arg-type]
    assert "caller, priority, deadline_s, block_s cannot be used" in caught.value.where
    assert pool.statistics().accepted == 0
