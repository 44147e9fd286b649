"""TensorRT engines on the fakes: buffers, profiles, graphs, lifetimes, and one error for whatever can be wrong."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.engines.device_session import DeviceSession, open_session
from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.engines.onnxruntime_engine import engine_from_onnx
from reelforge.runtime.engines.tensorrt_engine import TensorRtEngine, engine_from_plans
from reelforge.runtime.engines.tensorrt_plan import choose_plans, choose_profile
from reelforge.runtime.errors import EngineError, ReelforgeError
from reelforge.runtime.manifest import PlanEntry, ProfileEntry, StageEntry
from reelforge.runtime.recipe import Backend
from reelforge.runtime.sampling import LoopingEngine
from tests.runtime.fake_bundle import CHANNELS
from tests.runtime.fake_cuda import FakeCuda, installed
from tests.runtime.fake_tensorrt import FakeTensorRt, add_plans
from tests.runtime.loops import run_loop
from tests.runtime.test_engine import dit_inputs

STEPS = 5


class Rig:
    """A session on fakes, and a bundle."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cuda = FakeCuda()
        self.library = FakeTensorRt(self.cuda)
        self.cpu = Bundle.open(folder)
        self.bundle = add_plans(self.cpu, self.library)
        with installed(monkeypatch, {"cuda.bindings.runtime": self.cuda, "tensorrt_rtx": self.library}):
            self.session: DeviceSession = open_session(Backend.RTX, 0)

    def engine(self, stage: str = "dit", cuda_graph: bool = True) -> TensorRtEngine:
        return engine_from_plans(self.session, self.bundle, stage, EngineOptions(cuda_graph=cuda_graph))

    def altered(self, stage: str, change: Callable[[StageEntry], StageEntry]) -> Bundle:
        manifest = self.bundle.manifest
        stages = tuple(change(entry) if entry.name == stage else entry for entry in manifest.stages)
        return Bundle(self.bundle.path, replace(manifest, stages=stages))


@pytest.fixture
def rig(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = Rig(bundle_copy, monkeypatch)
    yield made
    made.session.close()
    gc.collect()
    assert made.cuda.leaks() == {}
    assert set(made.library.alive.values()) == {0}
    assert made.library.misuse == []


def loop_inputs(frames: int = 2) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    inputs = dit_inputs(frames)
    latents, fixed = inputs.pop("latents"), {name: inputs.pop(name) for name in ("rope_cos", "rope_sin")}
    random = np.random.default_rng(1)
    rows = {name: random.standard_normal((STEPS, *array.shape)).astype(np.float32) for name, array in inputs.items()}
    return latents, fixed, rows


def on_the_cpu(rig: Rig, frames: int = 2) -> np.ndarray:
    engine = engine_from_onnx(rig.cpu.graph("dit"), rig.cpu.stage("dit"), EngineOptions(1, False))
    return run_loop(engine, *loop_inputs(frames))


def test_outputs_equal_onnxruntimes(rig: Rig) -> None:
    cpu = engine_from_onnx(rig.cpu.graph("dit"), rig.cpu.stage("dit"), EngineOptions(1, False))
    engine = rig.engine()
    for frames in (1, 3, 2):
        inputs = dit_inputs(frames)
        outputs, expected = engine.run(inputs), cpu.run(inputs)
        assert set(outputs) == set(expected)
        for name in expected:
            np.testing.assert_array_equal(outputs[name], expected[name])
    doubled = np.zeros((1, CHANNELS, 2, 4, 12), np.float32)
    doubled[..., ::2] = inputs["latents"]
    target = np.full_like(inputs["latents"], np.nan)
    outputs = engine.run({**inputs, "latents": doubled[..., ::2]}, {"next_latents": target})
    assert list(outputs) == ["next_latents"]
    assert outputs["next_latents"] is target
    np.testing.assert_array_equal(target, expected["next_latents"])
    engine.close()


def test_integers_and_outputs_of_unknown_shape(rig: Rig) -> None:
    ids = {"input_ids": np.array([[3, 7]], np.int64)}
    tile = {"latent_tile": np.random.default_rng(0).standard_normal((1, CHANNELS, 2, 3, 5)).astype(np.float32)}
    for stage, inputs in (("llm", ids), ("vae_decoder", tile)):
        cpu = engine_from_onnx(rig.cpu.graph(stage), rig.cpu.stage(stage), EngineOptions(1, False))
        engine = rig.engine(stage)
        for name, expected in cpu.run(inputs).items():
            np.testing.assert_array_equal(engine.run(inputs)[name], expected)
        engine.close()
    engine = rig.engine("vae_decoder")
    with pytest.raises(EngineError, match=r"the buffer for output 'frame_tile' .* another shape"):
        engine.run(tile, {"frame_tile": np.zeros((1, 3, 5, 24, 48), np.float32)})


def test_wrong_tensors_are_refused_before_anything_is_copied(rig: Rig) -> None:
    engine, inputs = rig.engine(), dit_inputs()
    rig.cuda.log.clear()
    for change, message in (
        ({"latents": np.zeros((1, 5, 2, 4, 6), np.float32)}, "tensor 'latents' .* another type or shape"),
        ({"rope_sin": np.zeros((11, 4), np.float32)}, "disagree about 'image_tokens'"),
        ({"other": np.zeros(1, np.float32)}, "other inputs than it takes"),
    ):
        with pytest.raises(EngineError, match=message):
            engine.run({**inputs, **change})
    with pytest.raises(EngineError, match="overlaps an input"):
        engine.run(inputs, {"velocity": inputs["latents"]})
    with pytest.raises(EngineError, match="has no output 'image'"):
        engine.run(inputs, {"image": None})
    latents, fixed, rows = loop_inputs()
    with pytest.raises(EngineError, match="disagree about 'image_tokens'"):
        engine.loop(latents, {**fixed, "rope_sin": fixed["rope_sin"][1:]}, rows)
    assert [call for call in rig.cuda.log if not call.startswith("cudaSetDevice")] == []
    engine.run(inputs)  # none of that has harmed it


def test_buffers_are_kept_while_they_are_large_enough(rig: Rig) -> None:
    engine = rig.engine()
    engine.run(dit_inputs(3))
    rig.cuda.log.clear()
    engine.run(dit_inputs(2))
    engine.run(dit_inputs(3))
    assert not [call for call in rig.cuda.log if call.startswith(("cudaMalloc", "cudaFree"))]
    synchronised = [call for call in rig.cuda.log if call == "cudaStreamSynchronize"]
    assert len(synchronised) == 2


def test_closing_releases_in_order_and_twice(rig: Rig) -> None:
    engine = rig.engine()
    engine.run(dit_inputs())
    rig.cuda.log.clear()
    engine.close()
    engine.close()
    kinds = [call.split()[0] for call in rig.cuda.log]
    assert kinds[:3] == ["cudaSetDevice", "~context", "~engine"]
    assert set(kinds[3:]) == {"cudaFree"}
    with pytest.raises(EngineError, match="stage 'dit' was run after its engine was closed"):
        engine.run(dit_inputs())
    with pytest.raises(EngineError, match="after its engine was closed"):
        engine.loop(*loop_inputs())


def test_the_session_closes_what_is_still_open(rig: Rig) -> None:
    engine, other = rig.engine(), rig.engine("llm")
    loop = engine.loop(*loop_inputs())
    loop.advance(0)
    loop.advance(1)
    rig.session.close()
    kinds = list(dict.fromkeys(call.split()[0] for call in rig.cuda.log if call.startswith(("~", "cudaStreamD"))))
    assert kinds == ["~context", "~engine", "~runtime", "cudaStreamDestroy"]
    for call in (lambda: loop.advance(2), lambda: engine.run(dit_inputs()), lambda: other.run({})):
        with pytest.raises(EngineError, match="after its"):
            call()
    with pytest.raises(EngineError, match="after its session was closed"), rig.session.work():
        pass


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_a_loop_equals_the_cpus(rig: Rig, cuda_graph: bool) -> None:
    engine = rig.engine(cuda_graph=cuda_graph)
    assert isinstance(engine, LoopingEngine)
    latents, fixed, rows = loop_inputs()
    before = latents.copy()
    np.testing.assert_array_equal(run_loop(engine, latents, fixed, rows), on_the_cpu(rig))
    np.testing.assert_array_equal(latents, before)
    assert len(rig.library.executions) == STEPS
    assert len([call for call in rig.cuda.log if call.startswith("cudaGraphLaunch")]) == (STEPS - 1) * cuda_graph
    assert len([call for call in rig.cuda.log if call.startswith("cudaGraphInstantiate")]) == cuda_graph


def test_a_step_uploads_one_block_and_waits_once(rig: Rig) -> None:
    engine = rig.engine()
    loop = engine.loop(*loop_inputs())
    loop.advance(0)
    loop.advance(1)
    rig.cuda.log.clear()
    loop.advance(2)
    assert [call.split()[0] for call in rig.cuda.log] == ["cudaSetDevice", "cudaGraphLaunch", "cudaStreamSynchronize"]
    with pytest.raises(EngineError, match="stage 'dit' was run while a sampling loop uses it"):
        engine.run(dit_inputs())
    with pytest.raises(EngineError, match="while a sampling loop uses it"):
        engine.loop(*loop_inputs())
    loop.close()
    loop.close()
    with pytest.raises(EngineError, match="continued after its end"):
        loop.advance(3)
    engine.run(dit_inputs())


def test_the_latents_can_be_seen_between_steps(rig: Rig) -> None:
    engine = rig.engine()
    latents, fixed, rows = loop_inputs()
    loop = engine.loop(latents, fixed, rows)
    np.testing.assert_array_equal(loop.latents(), latents)
    for step in range(STEPS):
        loop.advance(step)
        assert loop.latents().shape == latents.shape
    np.testing.assert_array_equal(loop.latents(), on_the_cpu(rig))


def test_a_loop_survives_an_arena_that_moves(rig: Rig) -> None:
    engine, vae = rig.engine(), rig.engine("vae_decoder")
    loop = engine.loop(*loop_inputs())
    tile = {"latent_tile": np.zeros((1, CHANNELS, 2, 3, 5), np.float32)}
    for step in range(STEPS):
        loop.advance(step)
        if step == 2:
            generation = rig.session.arena.generation
            vae.run(tile)
            assert rig.session.arena.generation == generation + 1
    np.testing.assert_array_equal(loop.latents(), on_the_cpu(rig))
    assert len([call for call in rig.cuda.log if call.startswith("cudaGraphInstantiate")]) == 2


@pytest.mark.parametrize(
    ("change", "refusal"),
    [("capturable", "TensorRT-RTX says that the plan cannot be captured"), ("fails_in_capture", "cannot be captured")],
)
def test_a_plan_that_cannot_be_captured_runs_step_by_step(rig: Rig, change: str, refusal: str) -> None:
    setattr(rig.library, change, change != "capturable")
    engine = rig.engine()
    loop = engine.loop(*loop_inputs())
    for step in range(STEPS):
        loop.advance(step)
    assert refusal in loop.graph_refusal
    np.testing.assert_array_equal(loop.latents(), on_the_cpu(rig))
    assert not rig.cuda.executables


def test_a_loop_without_memory_leaves_the_engine_usable(rig: Rig) -> None:
    engine = rig.engine()
    engine.run(dit_inputs())
    rig.cuda.total_bytes = rig.cuda.used_bytes() + 256
    with pytest.raises(EngineError, match="too little memory for a step's inputs of stage 'dit'"):
        engine.loop(*loop_inputs())
    rig.cuda.total_bytes = 1 << 30
    np.testing.assert_array_equal(run_loop(engine, *loop_inputs()), on_the_cpu(rig))


def test_an_execution_that_returns_false(rig: Rig) -> None:
    engine = rig.engine()
    rig.library.failing_executions = ["no kernel for this shape"]
    with pytest.raises(EngineError, match="stage 'dit' failed in TensorRT-RTX") as caught:
        engine.run(dit_inputs())
    assert "received: no kernel for this shape" in str(caught.value)
    rig.library.failing_executions = [""]
    loop = engine.loop(*loop_inputs())
    with pytest.raises(EngineError, match="stage 'dit' failed in TensorRT-RTX"):
        loop.advance(0)
    loop.close()
    engine.run(dit_inputs())


def profile(name: str, activation_bytes: int = 0, **dimensions: tuple[int, int, int]) -> ProfileEntry:
    return ProfileEntry(name, dimensions, activation_bytes)


def test_the_tightest_profile_is_chosen(rig: Rig) -> None:
    plan = rig.bundle.stage("dit").plans[0]
    large, small = profile("large", a=(1, 32, 64), b=(1, 4, 8)), profile("small", a=(8, 16, 16), b=(1, 4, 8))
    plan = replace(plan, profiles=(large, small))
    assert choose_profile("dit", plan, {"a": 16, "b": 1}) == 1
    assert choose_profile("dit", plan, {"a": 7, "b": 1}) == 0
    assert choose_profile("dit", plan, {"a": 64, "other": 1000}) == 0
    with pytest.raises(EngineError, match="stage 'dit' has no profile for these sizes") as caught:
        choose_profile("dit", plan, {"a": 16, "b": 9})
    assert "received: a 16, b 9   expected: large: a 1..64, b 1..8; or small: a 8..16, b 1..8" in str(caught.value)


def test_profiles_change_with_the_sizes(rig: Rig) -> None:
    entry = rig.bundle.stage("dit")
    names = entry.plans[0].profiles[0].dimensions
    small = replace(entry.plans[0].profiles[0], name="small", activation_bytes=300)
    small.dimensions["latent_frames"] = (1, 1, 2)
    large = profile("large", 9000, **{**names, "latent_frames": (3, 3, 4)})
    plan = replace(entry.plans[0], profiles=(small, large))
    rig.library.plans[plan.path] = (plan, *rig.library.plans[plan.path][1:])
    rig.bundle = rig.altered("dit", lambda stage: replace(stage, plans=(plan,)))
    engine = rig.engine()
    sizes = []
    for frames in (1, 3, 2, 4):
        engine.run(dit_inputs(frames))
        sizes.append(rig.session.arena.size_bytes)
    assert sizes == [512, 9216, 9216, 9216]
    with pytest.raises(EngineError, match="no profile for these sizes") as caught:
        engine.run(dit_inputs(5))
    assert "latent_frames 5" in str(caught.value)
    assert "small: batch 1..64" in str(caught.value)
    np.testing.assert_array_equal(run_loop(engine, *loop_inputs(3)), on_the_cpu(rig, 3))


def test_the_plans_of_a_gpu_are_whole(rig: Rig) -> None:
    entry, device = rig.bundle.stage("dit"), rig.session.cuda.device
    plan = entry.plans[0]
    first, second = replace(plan, parts=2), replace(plan, part=1, parts=2)
    assert choose_plans(replace(entry, plans=(second, first)), device) == (first, second)
    for plans in ((first,), (first, first), (second,), (first, replace(second, parts=3))):
        with pytest.raises(EngineError, match="the plans of stage 'dit' for sm89 are not one whole"):
            choose_plans(replace(entry, plans=plans), device)
    with pytest.raises(EngineError, match="has no plan for GPU 0") as caught:
        choose_plans(replace(entry, plans=()), device)
    assert "expected: a bundle with plans" in str(caught.value)


def _without_input(plan: PlanEntry) -> PlanEntry:
    return replace(plan, inputs=plan.inputs[1:])


@pytest.mark.parametrize(
    ("change", "received"),
    [
        (lambda p: replace(p, inputs=(*p.inputs, replace(p.inputs[0], name="new"))), "new float32 is taken before"),
        (lambda p: replace(p, inputs=(replace(p.inputs[0], dtype="float16"), *p.inputs[1:])), "latents float16"),
        (_without_input, "latents: not in any part"),
        (lambda p: replace(p, outputs=p.outputs[:1]), "next_latents: not in any part"),
    ],
)
def test_parts_that_do_not_fit_together(rig: Rig, change: Callable[[PlanEntry], PlanEntry], received: str) -> None:
    bundle = rig.altered("dit", lambda stage: replace(stage, plans=(change(stage.plans[0]),)))
    with pytest.raises(EngineError, match="the plans of stage 'dit' do not fit together") as caught:
        engine_from_plans(rig.session, bundle, "dit")
    assert received in str(caught.value)


def loading_fails(rig: Rig, message: str, parts: Sequence[str] = ()) -> None:
    with pytest.raises(ReelforgeError, match=message) as caught:
        rig.engine()
    for part in parts:
        assert part in str(caught.value)
    # Although the error is still there, and with it the variables of all calls that it came through.
    assert rig.library.alive == {"runtime": 1, "engine": 0, "context": 0}


def test_a_plan_that_the_library_refuses(rig: Rig) -> None:
    rig.library.refused = ["magic tag failed"]
    loading_fails(rig, "TensorRT-RTX refuses the plan 'dit.sm89.sm120.plan'", ["received: magic tag failed"])
    rig.library.refused = [""]
    loading_fails(rig, "TensorRT-RTX refuses the plan")
    rig.library.no_context = True
    loading_fails(rig, "refuses the plan", ["out of memory for a context", f"of {1 << 30} bytes"])


def test_the_parts_before_a_refused_one_are_released(rig: Rig) -> None:
    plan = replace(rig.bundle.stage("dit").plans[0], parts=2)
    second = replace(plan, part=1, path="plans/none.plan")
    rig.bundle = rig.altered("dit", lambda stage: replace(stage, plans=(plan, second)))
    loading_fails(rig, r"none.plan cannot be read")


def test_a_plan_with_other_tensors_than_stated(rig: Rig) -> None:
    path = rig.bundle.stage("dit").plans[0].path
    plan, graph, folder = rig.library.plans[path]
    rig.library.on_host = {"sigma_step"}
    loading_fails(rig, "has other tensors or profiles", ["'sigma_step': 'INPUT FLOAT on the host'"])
    rig.library.on_host = set()
    rig.library.plans[path] = (replace(plan, profiles=plan.profiles * 2), graph, folder)
    loading_fails(rig, "has other tensors or profiles", ["received: 2 profiles", "expected: 1 profiles"])


def test_a_plan_file_that_is_gone_or_empty(rig: Rig) -> None:
    path = rig.bundle.path / rig.bundle.stage("dit").plans[0].path
    path.write_bytes(b"")
    loading_fails(rig, "plan")
    path.unlink()
    loading_fails(rig, "plan")


def test_weights_that_do_not_fit(rig: Rig) -> None:
    rig.cuda.total_bytes = 4000
    loading_fails(rig, "the weights of 'dit.sm89.sm120.plan' do not fit", ["4000 of 4000 bytes free", "4096 bytes"])


def test_shapes_that_the_library_refuses(rig: Rig) -> None:
    engine = rig.engine()
    part = engine.parts[0]
    assert part._context is not None
    part._context.infer_shapes = lambda: ["text"]  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="stage 'dit' cannot infer its shapes without text"):
        engine.run(dit_inputs())

    def fail() -> list[str]:
        raise RuntimeError("broken graph")

    part._context.infer_shapes = fail  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="stage 'dit' cannot infer its shapes") as caught:
        engine.run(dit_inputs())
    assert "broken graph" in str(caught.value)
