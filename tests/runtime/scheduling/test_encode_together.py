"""Text encoders are loaded once for all prompts that wait; turns stay as they were, and a bad prompt costs one job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reelforge.runtime import Check, Pipeline, Request
from reelforge.runtime.control import Stop
from reelforge.runtime.errors import CancelledError
from reelforge.runtime.scheduling.job import State
from reelforge.runtime.scheduling.limits import QueueLimits
from reelforge.runtime.scheduling.pool import PipelinePool
from tests.runtime.gate import WAIT_S, Gate, gate_on_engines
from tests.runtime.scheduling.fake_pipeline import FakePipeline, World, engine_error, small

WAITING = 6


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    with gate_on_engines(monkeypatch) as gate:
        yield gate


def request(prompt: str) -> Request:
    return Request(prompt, 32, 48, 5, 2)


@pytest.mark.parametrize(("together", "loads"), [(1, 1 + WAITING), (3, 1 + WAITING // 3), (8, 2)])
def test_the_encoders_are_loaded_less_often(fake_bundle: Path, gate: Gate, together: int, loads: int) -> None:
    """The first job finds an empty queue; the others wait meanwhile, and their prompts are encoded in groups."""
    limits = QueueLimits(encode_together=together)
    with PipelinePool.open(fake_bundle, ["cpu"], limits, threads=1, check=Check.SIZES, memory_budget="least") as pool:
        gate.hold("dit")
        jobs = [pool.submit(request("first"))]
        assert gate.entered.wait(WAIT_S)
        jobs += [pool.submit(request(f"{number} balls"), caller=f"{number % 2}") for number in range(WAITING)]
        gate.open()
        frames = [job.result(WAIT_S) for job in jobs]
        counted = pool.statistics().encoded_together
    assert (gate.loads["llm"], gate.loads["clip"]) == (loads, loads)
    assert gate.runs["llm"] == gate.runs["clip"] == 1 + WAITING
    assert counted == WAITING - (loads - 1)
    with Pipeline.open(fake_bundle, "cpu", threads=1, check=Check.SIZES) as pipeline:
        for job, made in zip(jobs, frames, strict=True):
            np.testing.assert_array_equal(made, pipeline.generate(job.order.request))


def test_what_one_pipeline_has_encoded_another_uses(fake_bundle: Path, gate: Gate) -> None:
    with PipelinePool.open(fake_bundle, ["cpu", "cpu"], threads=1, check=Check.SIZES, memory_budget="least") as pool:
        gate.hold("dit")
        jobs = [pool.submit(request("first"))]
        assert gate.entered.wait(WAIT_S)
        jobs.append(pool.submit(request("second")))
        while gate.runs["dit"] < 2:
            jobs[0].wait(0.01)
        jobs += [pool.submit(request(f"{number} balls")) for number in range(WAITING)]
        gate.open()
        assert all(job.wait(WAIT_S) for job in jobs)
        assert {job.state for job in jobs} == {State.FINISHED}
    # The two that found nobody waiting, and one or, if both pipelines ask at the same moment, two for the six others.
    assert gate.loads["llm"] in (3, 4)


class PreparingPipeline(FakePipeline):
    """Notes what it is to prepare; fails where the world says so."""

    prepared: list[list[str]]

    def prepare(self, prompts: Sequence[str], stop: Stop | None = None) -> None:
        assert stop is not None
        stop.check("encoding")
        PreparingPipeline.prepared.append(list(prompts))
        for prompt in prompts:
            if prompt in self.world.unencodable:
                raise self.world.unencodable[prompt]


class PreparingWorld(World):
    unencodable: dict[str, BaseException]

    def open(self, device: str) -> PreparingPipeline:
        self.opened[device] += 1
        return PreparingPipeline(self, device)


@pytest.fixture
def preparing(world: World) -> PreparingWorld:
    PreparingPipeline.prepared = []
    preparing = PreparingWorld(world.manifest)
    preparing.unencodable = {}
    return preparing


def test_turns_are_what_they_were(preparing: PreparingWorld) -> None:
    with PipelinePool(preparing.open, ["a"], QueueLimits(encode_together=3)) as pool:
        hold = preparing.hold("first")
        jobs = [pool.submit(small("first"), caller="many")]
        hold.wait_until_reached()
        jobs += [pool.submit(small(f"many {number}"), caller="many") for number in range(4)]
        jobs += [pool.submit(small("one"), caller="one"), pool.submit(small("urgent"), caller="one", priority=1)]
        hold.release()
        assert all(job.wait(WAIT_S) for job in jobs)
    assert preparing.ran == ["first", "urgent", "many 0", "many 1", "one", "many 2", "many 3"]
    assert PreparingPipeline.prepared == [["urgent", "many 0", "many 1"], ["one", "many 2", "many 3"]]


def test_a_prompt_that_cannot_be_encoded_fails_its_own_job(preparing: PreparingWorld) -> None:
    with PipelinePool(preparing.open, ["a"]) as pool:
        hold = preparing.hold("first")
        first = pool.submit(small("first"))
        hold.wait_until_reached()
        preparing.unencodable["bad"] = preparing.failures["bad"] = engine_error("stage 'llm' failed.")
        jobs = [pool.submit(small(prompt)) for prompt in ("good", "bad", "fine")]
        hold.release()
        assert all(job.wait(WAIT_S) for job in (first, *jobs))
        assert [job.state for job in jobs] == [State.FINISHED, State.FAILED, State.FINISHED]
        assert pool.statistics().encoded_together == 0


def test_a_bug_while_preparing_is_not_lost(preparing: PreparingWorld, caplog: pytest.LogCaptureFixture) -> None:
    with PipelinePool(preparing.open, ["a"]) as pool:
        hold = preparing.hold("first")
        pool.submit(small("first"))
        hold.wait_until_reached()
        preparing.unencodable["bad"] = ZeroDivisionError("a bug")
        jobs = [pool.submit(small(prompt)) for prompt in ("one", "bad", "two")]
        hold.release()
        with pytest.raises(ZeroDivisionError):
            jobs[0].result(WAIT_S)
        with pytest.raises(ZeroDivisionError):
            jobs[1].result(WAIT_S)
        assert jobs[2].wait(WAIT_S)
        assert jobs[2].state is State.FINISHED
    assert "a bug" in caplog.text


def test_who_is_cancelled_while_his_prompt_is_encoded(preparing: PreparingWorld) -> None:
    with PipelinePool(preparing.open, ["a"]) as pool:
        hold = preparing.hold("first")
        pool.submit(small("first"))
        hold.wait_until_reached()
        leader, other = pool.submit(small("leader")), pool.submit(small("other"))
        preparing.unencodable["leader"] = CancelledError("the generation was stopped.")
        hold.release()
        assert other.wait(WAIT_S)
        assert leader.wait(WAIT_S)
        assert other.state is State.FINISHED


def test_negative_prompts_are_encoded_with_the_others(
    preparing: PreparingWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = FakePipeline.resolve
    monkeypatch.setattr(
        FakePipeline, "resolve", lambda self, one: replace(resolve(self, one), cfg_scale=6.0, negative_prompt="ugly")
    )
    with PipelinePool(preparing.open, ["a"]) as pool:
        assert pool.submit(small("x")).wait(WAIT_S)
    assert PreparingPipeline.prepared == [["x", "ugly"]]
