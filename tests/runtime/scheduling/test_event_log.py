"""What a job says, in bounded memory: old progress is dropped, frames never, and a writer waits for a reader."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from reelforge.runtime.control import Stop
from reelforge.runtime.errors import CancelledError, DeadlineError
from reelforge.runtime.events import Event, Frames, Notice, Progress
from reelforge.runtime.scheduling.event_log import PROGRESS_KEPT, EventLog

WAIT_S = 30.0


def frames(start: int) -> Frames:
    return Frames(start, np.zeros((1, 2, 2, 3), np.float32))


def read_all(log: EventLog) -> list[Event]:
    events: list[Event] = []
    after = 0
    while (numbered := log.take(after)) is not None:
        after, event = numbered
        events.append(event)
    return events


def test_events_come_in_order_whatever_they_are() -> None:
    log = EventLog(2, WAIT_S)
    said: list[Event] = [Progress("text", 1, 2), Notice("cut"), Progress("text", 2, 2)]
    for event in said:
        log.tell(event)  # type: ignore[arg-type]
    log.hand_over(frames(0), Stop())
    log.tell(Progress("decoding", 2, 2))
    events = read_all(log)
    assert events[:3] == said
    assert isinstance(events[3], Frames)
    assert events[4] == Progress("decoding", 2, 2)


def test_progress_that_nobody_reads_takes_no_memory() -> None:
    log = EventLog(2, WAIT_S)
    log.tell(Notice("first"))
    for step in range(10_000):
        log.tell(Progress("sampling", step, 10_000))
    events = read_all(log)
    assert len(events) == PROGRESS_KEPT + 1
    assert events[0] == Notice("first")
    assert events[-1] == Progress("sampling", 9999, 10_000)


def test_progress_can_be_read_by_many_and_frames_by_one() -> None:
    log = EventLog(2, WAIT_S)
    log.tell(Progress("text", 1, 2))
    log.hand_over(frames(0), Stop())
    assert [len(read_all(log)), len(read_all(log))] == [2, 1]


def test_whoever_brings_frames_waits_for_room() -> None:
    log = EventLog(2, WAIT_S)
    brought: list[int] = []
    third = threading.Event()

    def bring() -> None:
        for start in range(5):
            if start == 2:
                third.set()
            log.hand_over(frames(start), Stop())
            brought.append(start)
        log.end()

    thread = threading.Thread(target=bring)
    thread.start()
    assert third.wait(WAIT_S)
    assert brought == [0, 1]
    after, taken = 0, []
    while (numbered := log.wait_and_take(after)) is not None:
        after, event = numbered
        assert isinstance(event, Frames)
        taken.append(event.start)
        assert len(log._frames) <= 2
    thread.join(WAIT_S)
    assert taken == brought == list(range(5))


def test_frames_that_nobody_reads_are_given_up() -> None:
    log = EventLog(1, 0.05)
    log.hand_over(frames(0), Stop())
    with pytest.raises(CancelledError, match=r"not read for 0\.05 s") as caught:
        log.hand_over(frames(1), Stop())
    assert "submit with stream=False" in str(caught.value)


def test_a_stop_ends_the_waiting_for_a_reader() -> None:
    log, stop = EventLog(1, WAIT_S), Stop()
    log.hand_over(frames(0), stop)
    caught: list[CancelledError] = []

    def bring() -> None:
        try:
            log.hand_over(frames(1), stop)
        except CancelledError as error:
            caught.append(error)

    thread = threading.Thread(target=bring)
    thread.start()
    stop.set("nobody wants it")
    log.wake()
    thread.join(WAIT_S)
    assert [str(error) for error in caught] == [
        "CancelledError: the generation was stopped before frame 1: nobody wants it."
    ]
    with pytest.raises(DeadlineError):
        log.hand_over(frames(1), Stop(0.02))


def test_frames_can_be_read_after_the_end() -> None:
    log = EventLog(2, WAIT_S)
    log.hand_over(frames(0), Stop())
    log.end()
    assert log.wait_for_end(0)
    assert log.wait_and_take(0) is not None
    assert log.wait_and_take(0) is None


def test_listeners_hear_of_every_change_until_they_leave() -> None:
    log, heard = EventLog(2, WAIT_S), []

    def listener() -> None:
        heard.append(1)

    log.listen(listener)
    log.tell(Notice("a"))
    log.hand_over(frames(0), Stop())
    log.end()
    assert len(heard) == 3
    log.unlisten(listener)
    log.wake()
    assert len(heard) == 3
    assert not log.wait_for_end(0) or log.ended
