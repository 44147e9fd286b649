"""Lines from child to parent."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelforge.export.engines.channel import Progress, Sender, read_line
from reelforge.export.engines.module import Message
from reelforge.runtime.errors import BuildError, ReelforgeError, RequestError


class Pipe:
    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def lines(self) -> list[str]:
        os.close(self.writer)
        with os.fdopen(self.reader, encoding="utf-8") as file:
            return file.readlines()


@given(st.text(max_size=200))
def test_messages_arrive_as_they_were(text: str) -> None:
    pipe = Pipe()
    text = text.encode("utf-8", "ignore").decode()
    Sender(pipe.writer).message(Message("ERROR", text))
    assert [read_line(line) for line in pipe.lines()] == [Message("ERROR", text)]


def test_verbose_messages_stay_and_long_ones_are_cut() -> None:
    pipe = Pipe()
    sender = Sender(pipe.writer)
    sender.message(Message("VERBOSE", "Layers: ..."))
    sender.message(Message("WARNING", "x" * 10_000))
    (line,) = pipe.lines()
    message = read_line(line)
    assert isinstance(message, Message)
    assert message.text == "x" * 4000


def test_progress_is_rationed() -> None:
    pipe = Pipe()
    now = iter([0.0, 0.05, 0.11, 0.12])
    sender = Sender(pipe.writer, clock=lambda: next(now))
    for step in range(4):
        sender.step("Building", step, 9)
    assert [read_line(line) for line in pipe.lines()] == [Progress("Building", 0, 9), Progress("Building", 2, 9)]


@pytest.mark.parametrize(
    "error",
    [BuildError("no.", received=3, expected="four", fix="add one"), RequestError("neither."), BuildError("x", fix="y")],
)
def test_errors_arrive_as_they_were(error: ReelforgeError) -> None:
    pipe = Pipe()
    Sender(pipe.writer).error(error)
    (line,) = pipe.lines()
    arrived = read_line(line)
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)


def test_a_line_that_was_cut_off() -> None:
    assert read_line('{"step": ["Buil') is None
