"""A whole pipeline on the fakes of CUDA and TensorRT equals the CPU's, bit for bit, and gives everything back."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from reelforge.runtime import Pipeline, Request
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.engines.narrow_weights import Widening
from reelforge.runtime.engines.tensorrt_engine import TensorRtEngine
from reelforge.runtime.errors import EngineError
from reelforge.runtime.manifest import TensorInfo
from reelforge.runtime.recipe import Backend
from tests.runtime.fake_bundle import CHANNELS
from tests.runtime.fake_cuda import ILLEGAL_ADDRESS, FakeCuda, installed
from tests.runtime.fake_tensorrt import FakeTensorRt, Part, add_plans

REQUEST = Request("a ball", height=32, width=48, frames=13, steps=5, seed=3)
STAGES = ["llm", "clip", "refiner", "modulation", "dit", "vae_decoder"]


class Machine:
    """A GPU, a library and a bundle for them."""

    def __init__(self, bundle: Bundle, backend: Backend = Backend.RTX, **parts: list[Part]) -> None:
        architectures = {Backend.RTX: (("sm80", "sm86"), ("sm89", "sm120")), Backend.TRT: (("sm90",),)}[backend]
        self.cuda = FakeCuda(capability=(8, 9) if backend is Backend.RTX else (9, 0))
        self.library = FakeTensorRt(self.cuda, backend)
        self.bundle = add_plans(bundle, self.library, architectures, parts)

    def pipeline(self, options: EngineOptions | None = None) -> Pipeline:
        return Pipeline(self.bundle, options)

    def require_nothing_left(self) -> None:
        gc.collect()
        assert self.cuda.leaks() == {}
        assert set(self.library.alive.values()) == {0}
        assert self.library.misuse == []


@pytest.fixture
def machine(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Machine]]:
    with ExitStack() as stack:

        def make(backend: Backend = Backend.RTX, **parts: list[Part]) -> Machine:
            made = Machine(Bundle.open(bundle_copy), backend, **parts)
            modules = {"cuda.bindings.runtime": made.cuda, made.library.__name__: made.library}
            stack.enter_context(installed(monkeypatch, modules))
            return made

        yield make


@pytest.fixture(scope="module")
def expected(fake_bundle: Path) -> np.ndarray:
    return Pipeline.open(fake_bundle, threads=1).generate(REQUEST)


def dit_in_three_parts(folder: Path) -> list[Part]:
    """The graph cut twice: a tensor of no other use, and one that is an output of the stage too."""
    model = onnx.load(folder / "dit.onnx", load_external_data=False)
    latents = ("batch", CHANNELS, "latent_frames", "latent_height", "latent_width")
    infos = {
        value.name: TensorInfo(
            value.name, "float32", tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        )
        for value in model.graph.input
    }
    infos |= {name: TensorInfo(name, "float32", latents) for name in ("scaled", "velocity", "next_latents")}

    def part(inputs: list[str], outputs: list[str]) -> Part:
        names = {"float32": onnx.TensorProto.FLOAT}
        values = [
            [onnx.helper.make_tensor_value_info(n, names[infos[n].dtype], infos[n].shape) for n in group]
            for group in (inputs, outputs)
        ]
        needed = set(outputs)
        nodes = []
        for node in reversed(model.graph.node):
            if needed & set(node.output):
                nodes.insert(0, node)
                needed |= set(node.input) - set(inputs)
        constants = [item for item in model.graph.initializer if item.name in needed]
        graph = onnx.helper.make_graph(nodes, "part", *values, constants)
        made = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=9)
        return Part(made.SerializeToString(), tuple(infos[n] for n in inputs), tuple(infos[n] for n in outputs))

    text = ["text", "double_modulation", "single_modulation", "final_modulation", "rope_cos", "rope_sin"]
    return [
        part(["latents"], ["scaled"]),
        part(["scaled", *text], ["velocity"]),
        part(["latents", "velocity", "sigma_step"], ["next_latents"]),
    ]


@pytest.mark.parametrize("backend", [Backend.RTX, Backend.TRT])
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_a_generation_equals_the_cpus(
    machine: Callable[..., Machine], expected: np.ndarray, backend: Backend, cuda_graph: bool
) -> None:
    made = machine(backend)
    with made.pipeline(EngineOptions(cuda_graph=cuda_graph)) as pipeline:
        np.testing.assert_array_equal(pipeline.generate(REQUEST), expected)
        label = "sm89+sm120" if backend is Backend.RTX else "sm90"
        ran = [path.removeprefix("plans/").removesuffix(f".{label}.plan") for path in made.library.executions]
        assert ran == [*STAGES[:4], *["dit"] * 5, *["vae_decoder"] * (len(ran) - 9)]
        # The first step runs as it is, the second is recorded, and all that follow replay it.
        assert made.library.enqueued.count(f"plans/dit.{label}.plan") == (2 if cuda_graph else 5)
        np.testing.assert_array_equal(pipeline.generate(REQUEST), expected)
    made.require_nothing_left()


def test_tensors_between_parts_share_places(machine: Callable[..., Machine], expected: np.ndarray) -> None:
    first, second, third = dit_in_three_parts(machine().bundle.path)
    scaled = first.outputs[0]
    between = [replace(scaled, name=f"scaled{number}") for number in range(4)]

    def copy(source: TensorInfo, target: TensorInfo) -> Part:
        values = [onnx.helper.make_tensor_value_info(i.name, onnx.TensorProto.FLOAT, i.shape) for i in (source, target)]
        node = onnx.helper.make_node("Identity", [source.name], [target.name])
        model = onnx.helper.make_model(
            onnx.helper.make_graph([node], "copy", values[:1], values[1:]),
            opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9,
        )  # fmt: skip
        return Part(model.SerializeToString(), (source,), (target,))

    chain = [scaled, *between, replace(scaled, name="scaled_again")]
    copies = [copy(source, target) for source, target in itertools.pairwise(chain)]
    renamed = onnx.load_from_string(second.graph)
    renamed.graph.input[0].name = "scaled_again"
    for node in renamed.graph.node:
        node.input[:] = ["scaled_again" if name == "scaled" else name for name in node.input]
    last = Part(renamed.SerializeToString(), (chain[-1], *second.inputs[1:]), second.outputs)
    made = machine(dit=[first, *copies, last, third])
    with made.pipeline() as pipeline:
        np.testing.assert_array_equal(pipeline.generate(REQUEST), expected)
        with pipeline.engine("dit") as engine:
            assert isinstance(engine, TensorRtEngine)
            assert list(engine._places) == [info.name for info in chain]
            assert len(set(engine._places.values())) == 2
    made.require_nothing_left()


def test_parts_pass_their_tensors_on_the_device(machine: Callable[..., Machine], expected: np.ndarray) -> None:
    folder = machine().bundle.path
    made = machine(dit=dit_in_three_parts(folder))
    with made.pipeline() as pipeline:
        np.testing.assert_array_equal(pipeline.generate(REQUEST), expected)
    steps = [Path(path).name for path in made.library.executions if "dit" in path]
    assert steps == [f"dit.{part}.sm89+sm120.plan" for _ in range(5) for part in range(3)]
    made.require_nothing_left()


def test_nothing_is_on_the_device_between_calls(machine: Callable[..., Machine]) -> None:
    made = machine()
    with made.pipeline() as pipeline:
        pipeline.generate(REQUEST)
        assert pipeline._session is not None
        assert pipeline._session.arena.size_bytes == 0
        assert made.cuda.used_bytes() == 0
    assert pipeline._session is None


def test_a_video_may_be_left_halfway(machine: Callable[..., Machine]) -> None:
    made = machine()
    pipeline = made.pipeline()
    frames = pipeline.stream(REQUEST)
    next(frames)
    pipeline.close()
    pipeline.close()
    frames.close()
    made.require_nothing_left()
    closed, unused = pipeline.engine("llm"), made.pipeline()
    with closed as engine:  # opened again, since it is used again
        assert engine.name == "llm"
    pipeline.close()
    unused.close()
    made.require_nothing_left()


def test_the_gpu_is_opened_when_a_stage_is_loaded(machine: Callable[..., Machine]) -> None:
    made = machine()
    pipeline = made.pipeline()
    pipeline.resolve(REQUEST)
    pipeline.inputs.text("a ball")
    assert made.cuda.log == []
    pipeline.close()
    assert made.cuda.log == []


def test_a_fault_in_the_loop_shows_once_and_nothing_hides_it(machine: Callable[..., Machine]) -> None:
    made = machine()
    pipeline = made.pipeline()

    def after_two(progress: object) -> None:
        if getattr(progress, "phase", "") == "sampling" and getattr(progress, "step", 0) == 2:
            made.cuda.fault_at_synchronize = ILLEGAL_ADDRESS

    with pytest.raises(EngineError, match="cannot run what was enqueued") as caught:
        pipeline.generate(REQUEST, after_two)
    assert "cudaErrorIllegalAddress" in str(caught.value)
    pipeline.close()


def test_an_execution_that_fails_leaves_nothing_behind(machine: Callable[..., Machine], expected: np.ndarray) -> None:
    made = machine()
    with made.pipeline() as pipeline:
        made.library.failing_executions = ["kernel image is broken"]
        with pytest.raises(EngineError, match="stage 'llm' failed in TensorRT-RTX") as caught:
            pipeline.generate(REQUEST)
        assert "kernel image is broken" in str(caught.value)
        del caught
        gc.collect()
        assert made.cuda.used_bytes() == 0
        np.testing.assert_array_equal(pipeline.generate(REQUEST), expected)
    made.require_nothing_left()


def test_too_little_memory_is_an_error_and_the_next_request_works(
    machine: Callable[..., Machine], expected: np.ndarray
) -> None:
    made = machine()
    with made.pipeline() as pipeline:
        made.cuda.total_bytes = 6000
        with pytest.raises(EngineError, match="GPU 0 \\(Fake GPU\\) has too little memory for") as caught:
            pipeline.generate(REQUEST)
        assert "of 6000 bytes free" in str(caught.value)
        del caught
        gc.collect()
        made.cuda.total_bytes = 1 << 30
        np.testing.assert_array_equal(pipeline.generate(REQUEST), expected)
    made.require_nothing_left()


@pytest.mark.parametrize(
    "options",
    [EngineOptions(threads=2), EngineOptions(spinning=False), EngineOptions(graph_optimization="none"),
     EngineOptions(provider="cuda"), EngineOptions(widening=Widening.RUN)],
)  # fmt: skip
def test_settings_of_other_backends_are_refused(machine: Callable[..., Machine], options: EngineOptions) -> None:
    pipeline = machine().pipeline(options)
    with pytest.raises(EngineError, match="means nothing to TensorRT-RTX") as caught:
        pipeline.generate(REQUEST)
    assert "leave" in str(caught.value)


@pytest.mark.parametrize(
    "options", [EngineOptions(device=1), EngineOptions(cuda_graph=False), EngineOptions(provider="cuda")]
)
def test_the_cpu_refuses_the_gpus_settings(fake_bundle: Path, options: EngineOptions) -> None:
    with pytest.raises(EngineError, match="means nothing to ONNX Runtime on the CPU"):
        Pipeline(Bundle.open(fake_bundle), options).generate(REQUEST)


def test_a_gpu_without_plans_and_a_library_of_another_version(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = machine()
    made.cuda.capability = (9, 0)
    with pytest.raises(EngineError, match="stage 'llm' has no plan for GPU 0") as caught:
        made.pipeline().generate(REQUEST)
    assert "received: sm90   expected: sm80+sm86 or sm89+sm120" in str(caught.value)
    made.cuda.capability = (8, 0)
    made.library.__version__ = "1.8.0.1"
    with pytest.raises(EngineError, match="was compiled by another version") as caught:
        made.pipeline().generate(REQUEST)
    assert "tensorrt_rtx 1.8.0.1" in str(caught.value)
    assert "pip install tensorrt_rtx==1.7.1.116" in str(caught.value)
    with (
        installed(monkeypatch, {"cuda.bindings.runtime": made.cuda, "tensorrt_rtx": None}),
        pytest.raises(EngineError, match="TensorRT-RTX cannot be loaded") as caught,
    ):
        made.pipeline().generate(REQUEST)
    assert "pip install reelforge[rtx]" in str(caught.value)


def test_requests_of_other_sizes_move_the_engine_to_them(machine: Callable[..., Machine], fake_bundle: Path) -> None:
    made = machine()
    cpu = Pipeline.open(fake_bundle, threads=1)
    with made.pipeline() as pipeline:
        for frames, height in ((1, 32), (5, 48), (9, 32)):
            request = replace(REQUEST, frames=frames, height=height)
            np.testing.assert_array_equal(pipeline.generate(request), cpu.generate(request))
    made.require_nothing_left()
