"""Prompts encoded ahead of their requests: loads are counted, bytes are compared, and nothing pushes them out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from reelforge.runtime import Check, Pipeline, Request, Stop
from reelforge.runtime.errors import CancelledError, DeadlineError, RequestError
from reelforge.runtime.memo import Memos
from tests.runtime.gate import Gate, gate_on_engines

PROMPTS = ["a ball", "two balls", "a red ball", "a ball"]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    with gate_on_engines(monkeypatch) as gate:
        yield gate


def request(prompt: str) -> Request:
    return Request(prompt, 32, 48, 5, 2)


def open_least(path: Path, memo_bytes: int = 1 << 20, memos: Memos | None = None) -> Pipeline:
    """One stage at a time, so that every use of a stage is a load."""
    return Pipeline.open(path, "cpu", 1, Check.SIZES, "least", memo_bytes, memos)


def test_encoders_are_loaded_once_and_the_bytes_are_the_same(fake_bundle: Path, gate: Gate) -> None:
    with open_least(fake_bundle) as alone:
        expected = [alone.generate(request(prompt)) for prompt in PROMPTS]
    assert (gate.loads["llm"], gate.loads["clip"]) == (3, 3)
    gate.loads.clear()
    gate.runs.clear()
    with open_least(fake_bundle) as pipeline:
        pipeline.prepare(PROMPTS)
        assert gate.loads == {"llm": 1, "clip": 1}
        assert gate.runs == {"llm": 3, "clip": 3}, "each prompt alone, whoever else is there"
        for prompt, frames in zip(PROMPTS, expected, strict=True):
            np.testing.assert_array_equal(pipeline.generate(request(prompt)), frames)
        assert (gate.loads["llm"], gate.loads["clip"]) == (1, 1)
        pipeline.prepare(PROMPTS)
        assert (gate.loads["llm"], gate.loads["clip"]) == (1, 1)


def test_conditions_do_not_push_text_out(fake_bundle: Path, gate: Gate) -> None:
    """Room for about one request's conditions, and for the text of all."""
    with open_least(fake_bundle, 64 << 10) as pipeline:
        pipeline.prepare(PROMPTS)
        for steps in (50, 60, 70):
            pipeline.generate(Request("other", 32, 48, 5, steps))
        assert len(pipeline._stages.memo.conditions) < 6
        gate.loads.clear()
        for prompt in PROMPTS:
            pipeline.generate(request(prompt))
        assert (gate.loads["llm"], gate.loads["clip"]) == (0, 0)


def test_pipelines_share_what_they_remember(fake_bundle: Path, gate: Gate) -> None:
    memos = Memos(1 << 20)
    with open_least(fake_bundle, memos=memos) as first, open_least(fake_bundle, memos=memos) as second:
        first.prepare(PROMPTS)
        second.generate(request(PROMPTS[1]))
        assert (gate.loads["llm"], gate.loads["clip"]) == (1, 1)
    assert len(memos.text) == 6, "closing a pipeline is not forgetting for all"


def test_without_a_memory_nothing_is_done(fake_bundle: Path, gate: Gate) -> None:
    with open_least(fake_bundle, 0) as pipeline:
        pipeline.prepare(PROMPTS)
    assert gate.runs.total() == 0


def test_it_can_be_stopped_and_refuses_what_is_no_text(fake_bundle: Path, gate: Gate) -> None:
    with open_least(fake_bundle) as pipeline:
        stop = Stop()
        stop.set("nobody wants it")
        with pytest.raises(CancelledError, match="nobody wants it"):
            pipeline.prepare(PROMPTS, stop)
        with pytest.raises(DeadlineError):
            pipeline.prepare(PROMPTS, Stop(0.0))
        with pytest.raises(RequestError, match="not valid Unicode"):
            pipeline.prepare(["a ball", "\udcff"])
        assert gate.runs.total() == 0
        pipeline.prepare(PROMPTS)
