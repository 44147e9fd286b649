"""Which engines stay in memory: never more than the budget holds, and of those that fit the ones that cost most."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelforge.runtime.budget import StageBytes
from reelforge.runtime.engines.engine import Array
from reelforge.runtime.errors import CancelledError, EngineError, OutOfMemoryError
from reelforge.runtime.manifest import TensorInfo
from reelforge.runtime.residency import Residency

ORDER = ("llm", "clip", "refiner", "modulation", "dit", "vae_decoder")
WEIGHTS = {"llm": 15, "clip": 1, "refiner": 2, "modulation": 7, "dit": 19, "vae_decoder": 3}


class FakeEngine:
    inputs: Mapping[str, TensorInfo] = {}
    outputs: Mapping[str, TensorInfo] = {}

    def __init__(self, name: str, machine: Machine) -> None:
        self.name = name
        self.machine = machine
        self.closed = False

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None] | None = None) -> dict[str, Array]:
        assert not self.closed
        return {}

    def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True
        self.machine.alive.remove(self.name)
        self.machine.log.append(f"-{self.name}")


class Machine:
    """Memory in which engines are; loading fails beyond ``real``, whatever the budget says."""

    def __init__(self, budget: int, activations: int = 0, real: int = 10**9, shared_arena: bool = False) -> None:
        self.alive: list[str] = []
        self.log: list[str] = []
        self.real = real
        self.activations = activations
        self.residency = Residency(
            self.load, lambda stage: StageBytes(WEIGHTS[stage], activations), lambda: budget, ORDER, "dit", shared_arena
        )

    def load(self, stage: str) -> FakeEngine:
        if sum(WEIGHTS[name] for name in (*self.alive, stage)) > self.real:
            raise OutOfMemoryError(f"there is no room for {stage}.")
        self.alive.append(stage)
        self.log.append(f"+{stage}")
        return FakeEngine(stage, self)

    def request(self) -> list[str]:
        """Use all stages once, and return what was loaded and closed."""
        self.log.clear()
        for stage in ORDER:
            with self.residency.lease(stage) as engine:
                engine.run({})
        return list(self.log)


def test_everything_stays_where_it_fits() -> None:
    machine = Machine(sum(WEIGHTS.values()))
    assert machine.request() == [f"+{stage}" for stage in ORDER]
    assert machine.request() == []
    assert machine.residency.resident == WEIGHTS
    assert (machine.residency.loads, machine.residency.evictions) == (6, 0)
    machine.residency.close()
    assert machine.alive == []


def test_nothing_stays_without_a_budget() -> None:
    machine = Machine(0)
    assert machine.request() == [sign + stage for stage in ORDER for sign in "+-"]


def test_encoders_leave_before_the_loop_and_the_transformer_stays() -> None:
    machine = Machine(34)  # the transformer beside the largest encoder
    assert machine.request()[4:] == ["-modulation", "-refiner", "-clip", "+dit", "-llm", "+vae_decoder"]
    assert machine.request() == [
        "-vae_decoder", "+llm", "-llm", "+clip", "+refiner", "+modulation", "+vae_decoder",
    ]  # fmt: skip


def test_what_is_needed_latest_goes_first() -> None:
    machine = Machine(40)
    machine.request()  # before the loop, the modulation is what was used last, and is needed again after all others
    assert machine.alive == ["llm", "clip", "refiner", "dit", "vae_decoder"]


def test_activations_count_while_a_stage_runs() -> None:
    assert Machine(48, activations=0).request() == [f"+{stage}" for stage in ORDER]
    assert "-modulation" in Machine(48, activations=2).request()


def test_a_stage_that_fits_nowhere_is_loaded_alone() -> None:
    machine = Machine(16)
    log = machine.request()
    assert log[log.index("+dit") - 1].startswith("-")
    assert log[log.index("+dit") + 1] == "-dit"


def test_an_engine_that_failed_is_not_kept() -> None:
    machine = Machine(100)
    with pytest.raises(EngineError), machine.residency.lease("dit"):
        raise EngineError("a fault.")
    assert machine.alive == []
    with pytest.raises(CancelledError), machine.residency.lease("dit"):
        raise CancelledError("enough.")
    assert machine.alive == ["dit"]


def test_a_machine_with_less_memory_than_the_budget_says() -> None:
    machine = Machine(100, real=20)
    with machine.residency.lease("llm"):
        pass
    with machine.residency.lease("dit"):
        assert machine.alive == ["dit"]
        with pytest.raises(OutOfMemoryError), machine.residency.lease("llm"):
            pass
        assert machine.residency.resident == {"dit": 19}
    assert machine.residency.make_room()
    assert not machine.residency.make_room()


def test_closing_waits_for_those_who_use_an_engine() -> None:
    machine = Machine(100)
    with machine.residency.lease("llm") as engine, machine.residency.lease("llm") as same:
        assert engine is same
        machine.residency.close()
        engine.run({})
        with machine.residency.lease("llm") as other:
            assert other is not engine
        assert machine.alive == ["llm", "llm"]
    assert machine.alive == ["llm"]


def test_threads_get_one_engine() -> None:
    machine = Machine(100)
    started = threading.Barrier(4)

    def work() -> None:
        started.wait()
        for _ in range(50):
            with machine.residency.lease("clip") as engine:
                engine.run({})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert machine.residency.loads == 1


uses = st.lists(st.tuples(st.sampled_from(ORDER), st.sampled_from(["run", "fail", "nested"])), max_size=30)


@settings(max_examples=200, deadline=None)
@given(uses, st.integers(0, 60), st.integers(0, 5), st.booleans())
def test_the_budget_holds_whatever_is_asked(
    wanted: list[tuple[str, str]], budget: int, activations: int, shared: bool
) -> None:
    machine = Machine(budget, activations, shared_arena=shared)
    for stage, how in wanted:
        try:
            with machine.residency.lease(stage) as engine:
                engine.run({})
                used = sum(WEIGHTS[name] for name in machine.alive) + activations
                assert used <= budget or machine.alive == [stage]
                if how == "nested":
                    with machine.residency.lease("clip") as inner:
                        inner.run({})
                        engine.run({})
                if how == "fail":
                    raise EngineError("a fault.")
        except EngineError:
            assert stage not in machine.alive
        assert sorted(machine.alive) == sorted(machine.residency.resident)
        assert sum(WEIGHTS[name] for name in machine.alive) <= budget
    machine.residency.close()
    assert machine.alive == []
