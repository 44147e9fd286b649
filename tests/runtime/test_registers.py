"""Registers on the host and on a fake GPU: the same tests for both, and each one's own."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.engines.device_registers import DeviceRegisters
from reelforge.runtime.engines.device_session import open_session
from reelforge.runtime.engines.engine import Engine, EngineOptions
from reelforge.runtime.engines.onnxruntime_engine import engine_from_onnx
from reelforge.runtime.engines.tensorrt_engine import TensorRtEngine, engine_from_plans
from reelforge.runtime.errors import EngineError
from reelforge.runtime.recipe import Backend
from reelforge.runtime.registers import HostRegisters, Registers, registers_for
from reelforge.runtime.sampling import SamplingError, take_step
from reelforge.runtime.step_program import Evaluation, RegisterLoop
from tests.runtime.fake_cuda import FakeCuda, installed
from tests.runtime.fake_tensorrt import FakeTensorRt, add_plans
from tests.runtime.loops import run_loop
from tests.runtime.test_engine import dit_inputs
from tests.runtime.test_tensorrt_engine import STEPS, loop_inputs


@dataclass
class Place:
    """Where registers are: an engine, and what it runs on."""

    engine: Engine
    registers: Registers
    cuda: FakeCuda | None = None
    library: FakeTensorRt | None = None


@pytest.fixture(params=["host", "device"])
def place(request: pytest.FixtureRequest, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    bundle = Bundle.open(bundle_copy)
    if request.param == "host":
        engine: Engine = engine_from_onnx(bundle.graph("dit"), bundle.stage("dit"), EngineOptions(1, False))
        registers = registers_for(engine)
        assert isinstance(registers, HostRegisters)
        yield Place(engine, registers)
        registers.close()
        registers.close()
        return
    cuda = FakeCuda()
    library = FakeTensorRt(cuda)
    planned = add_plans(bundle, library)
    with installed(monkeypatch, {"cuda.bindings.runtime": cuda, "tensorrt_rtx": library}):
        session = open_session(Backend.RTX, 0)
    engine = engine_from_plans(session, planned, "dit")
    registers = registers_for(engine)
    assert isinstance(registers, DeviceRegisters)
    yield Place(engine, registers, cuda, library)
    registers.close()
    registers.close()
    session.close()
    del engine
    gc.collect()
    assert cuda.leaks() == {}
    assert library.misuse == []


def given(place: Place) -> dict[str, np.ndarray]:
    inputs = dit_inputs()
    for name, array in inputs.items():
        place.registers.write(name, array)
    return inputs


def identity(inputs: dict[str, np.ndarray], **others: str) -> dict[str, str]:
    return {name: others.get(name, name) for name in inputs}


def test_a_call_is_a_run(place: Place) -> None:
    inputs = given(place)
    place.registers.call(place.engine, identity(inputs), {"velocity": "v", "next_latents": "next"})
    expected = place.engine.run(inputs)
    np.testing.assert_array_equal(place.registers.read("v"), expected["velocity"])
    np.testing.assert_array_equal(place.registers.read("next"), expected["next_latents"])
    np.testing.assert_array_equal(place.registers.read("latents"), inputs["latents"])


def test_values_with_a_name_are_never_overwritten(place: Place) -> None:
    """As variables: what a name was given stays, through any number of calls into the name that it was given from."""
    inputs, registers = given(place), place.registers
    kept: dict[str, np.ndarray] = {}
    state = inputs["latents"]
    for step in range(6):
        registers.call(place.engine, identity(inputs), {"next_latents": "latents"})  # its own input
        state = place.engine.run({**inputs, "latents": state})["next_latents"]
        if step in (1, 4):
            registers.let(f"kept {step}", "latents")
            kept[f"kept {step}"] = state
        np.testing.assert_array_equal(registers.read("latents"), state)
    for name, values in kept.items():
        np.testing.assert_array_equal(registers.read(name), values)
    np.testing.assert_array_equal(inputs["latents"], dit_inputs()["latents"], "what was written is only borrowed")


def test_memory_is_used_again(place: Place) -> None:
    inputs, registers = given(place), place.registers
    used = []
    for _ in range(8):
        registers.call(place.engine, identity(inputs), {"next_latents": "next"})
        registers.let("latents", "next")
        registers.drop("next")
        registers.drop("never there")
        if isinstance(registers, HostRegisters):
            used.append(len(registers._own))
        else:
            assert place.cuda is not None
            used.append(place.cuda.used_bytes())
    assert len(set(used[2:])) == 1
    if isinstance(registers, HostRegisters):
        assert used[-1] == 2


def test_one_value_may_be_two_inputs(place: Place) -> None:
    inputs = given(place)
    place.registers.let("rope_sin", "rope_cos")
    place.registers.call(place.engine, identity(inputs), {"velocity": "v"})
    expected = place.engine.run({**inputs, "rope_sin": inputs["rope_cos"].copy()})["velocity"]
    np.testing.assert_array_equal(place.registers.read("v"), expected)


def test_sizes_may_change(place: Place) -> None:
    for frames in (1, 3, 2, 1):
        inputs = dit_inputs(frames)
        for name, array in inputs.items():
            place.registers.write(name, array)
        place.registers.call(place.engine, identity(inputs), {"next_latents": "next"})
        np.testing.assert_array_equal(place.registers.read("next"), place.engine.run(inputs)["next_latents"])


def test_what_is_not_there_or_does_not_fit(place: Place) -> None:
    inputs, registers = given(place), place.registers
    with pytest.raises(EngineError, match="the register 'velocity' was read before it was written"):
        registers.read("velocity")
    with pytest.raises(EngineError, match="'nothing' was read before"):
        registers.let("other", "nothing")
    with pytest.raises(EngineError, match="'nothing' was read before"):
        registers.call(place.engine, identity(inputs, text="nothing"), {"velocity": "v"})
    with pytest.raises(EngineError, match="other inputs than it takes"):
        registers.call(place.engine, {"latents": "latents"}, {"velocity": "v"})
    with pytest.raises(EngineError, match="tensor 'text' of stage 'dit' has another type or shape"):
        registers.call(place.engine, identity(inputs, text="latents"), {"velocity": "v"})
    with pytest.raises(EngineError, match=r"no (such )?output"):
        registers.call(place.engine, identity(inputs), {"speed": "v"})
    registers.call(place.engine, identity(inputs), {"velocity": "v"})  # and nothing of that did any harm
    np.testing.assert_array_equal(registers.read("v"), place.engine.run(inputs)["velocity"])


def test_a_failed_call_leaves_all_registers_as_they_were(place: Place) -> None:
    if place.library is None:
        pytest.skip("ONNX Runtime is not made to fail here")
    inputs, registers = given(place), place.registers
    place.library.failing_executions = ["broken"]
    with pytest.raises(EngineError, match="failed in TensorRT-RTX"):
        registers.call(place.engine, identity(inputs), {"next_latents": "latents"})
    np.testing.assert_array_equal(registers.read("latents"), inputs["latents"])
    registers.call(place.engine, identity(inputs), {"next_latents": "latents"})
    np.testing.assert_array_equal(registers.read("latents"), place.engine.run(inputs)["next_latents"])


def test_calls_and_runs_may_take_turns(place: Place) -> None:
    inputs, other = given(place), dit_inputs(3)
    expected, expected_other = place.engine.run(inputs), place.engine.run(other)
    for _ in range(3):
        place.registers.call(place.engine, identity(inputs), {"velocity": "v"})
        np.testing.assert_array_equal(place.registers.read("v"), expected["velocity"])
        np.testing.assert_array_equal(place.engine.run(other)["velocity"], expected_other["velocity"])


def test_a_loop_of_evaluations_is_the_plain_loop(place: Place) -> None:
    latents, fixed, rows = loop_inputs()
    before = latents.copy()
    expected = run_loop(place.engine, latents, fixed, rows)
    loop = RegisterLoop(place.registers, Evaluation(place.engine, fixed, rows), latents)
    reached = latents
    for step in range(STEPS):
        kept = reached.copy()
        following = take_step(loop, step, STEPS, reached)
        np.testing.assert_array_equal(reached, kept, "a failing step must not cost the latents before it")
        reached = following
    np.testing.assert_array_equal(reached, expected)
    np.testing.assert_array_equal(latents, before)
    assert loop.skipped == 0
    loop.close()


def test_two_evaluations_share_registers(place: Place) -> None:
    """As guidance with a negative prompt has them: own inputs, own velocities, one step."""
    latents, fixed, rows = loop_inputs()
    others = {name: array + 1 for name, array in rows.items()}
    one = Evaluation(place.engine, fixed, rows)
    two = Evaluation(
        place.engine, fixed, others, prefix="negative ", velocity="negative velocity", next_latents="unused"
    )
    place.registers.write("latents", latents)
    for step in range(2):
        one(place.registers, step)
        two(place.registers, step)
        for per_step, name in ((rows, "velocity"), (others, "negative velocity")):
            row = {key: array[step, ...] for key, array in per_step.items()}
            expected = place.engine.run({"latents": latents, **fixed, **row})["velocity"]
            np.testing.assert_array_equal(place.registers.read(name), expected)


def test_a_step_that_fails_keeps_the_latents_before_it(place: Place) -> None:
    latents, fixed, rows = loop_inputs()
    rows["text"][2, ...] = np.nan
    loop = RegisterLoop(place.registers, Evaluation(place.engine, fixed, rows), latents)
    for step in range(2):
        latents = take_step(loop, step, STEPS, latents)
    kept = latents.copy()
    with pytest.raises(SamplingError, match="step 3 of 5") as caught:
        take_step(loop, 2, STEPS, latents)
    np.testing.assert_array_equal(caught.value.latents, kept)


def test_a_step_after_the_first_allocates_nothing_on_the_device(place: Place) -> None:
    if place.cuda is None:
        pytest.skip("the host's registers are arrays")
    latents, fixed, rows = loop_inputs()
    loop = RegisterLoop(place.registers, Evaluation(place.engine, fixed, rows), latents)
    for step in range(3):
        loop.advance(step)
    allocated = place.cuda.log.count("cudaMalloc")
    place.cuda.log.clear()
    loop.advance(3)
    assert not [entry for entry in place.cuda.log if entry.startswith(("cudaMalloc", "cudaFree"))], allocated
    uploads = [entry for entry in place.cuda.log if "HostToDevice" in entry]
    assert len(uploads) == len(rows), "only the rows: latents and what all steps share are there already"


def test_registers_of_a_gpu_take_its_engines_only(place: Place, fake_bundle: Path) -> None:
    if place.cuda is None:
        pytest.skip("the host's registers take any engine")
    bundle = Bundle.open(fake_bundle)
    inputs = given(place)
    stranger = engine_from_onnx(bundle.graph("dit"), bundle.stage("dit"), EngineOptions(1, False))
    with pytest.raises(EngineError, match="does not compute where these registers are") as caught:
        place.registers.call(stranger, identity(inputs), {"velocity": "v"})
    assert "OnnxRuntimeEngine" in str(caught.value)
    assert isinstance(place.engine, TensorRtEngine)
    latents, fixed, rows = loop_inputs()
    loop = place.engine.loop(latents, fixed, rows)
    with pytest.raises(EngineError, match="while a sampling loop uses it"):
        place.registers.call(place.engine, identity(inputs), {"velocity": "v"})
    loop.close()
    place.registers.close()
    with pytest.raises(EngineError, match="registers were used after they were closed"):
        place.registers.call(place.engine, identity(inputs), {"velocity": "v"})
