"""Real plans on a real GPU: engines, loop and pipeline against ONNX Runtime on the CPU.

The plans are compiled here from the fake bundle's graphs with the library's own builder, so that this file needs no
compiler of ours.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reelforge.runtime import Pipeline, Request
from reelforge.runtime.architectures import ARCHITECTURES
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.cuda.driver import open_cuda
from reelforge.runtime.engines.device_session import open_session
from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.engines.tensorrt_engine import engine_from_plans
from reelforge.runtime.engines.tensorrt_library import MODULES, load_library
from reelforge.runtime.errors import EngineError
from reelforge.runtime.manifest import PlanEntry, ProfileEntry, StageEntry
from reelforge.runtime.recipe import Backend, Target
from tests.runtime.fake_tensorrt import SHAPES
from tests.runtime.test_engine import dit_inputs
from tests.runtime.test_tensorrt_engine import loop_inputs

pytestmark = pytest.mark.gpu

REQUEST = Request("a ball", height=32, width=48, frames=13, steps=5, seed=3)
RANGE = (1, 4, 64)


def compile_stage(module: Any, bundle: Bundle, entry: StageEntry, architecture: str) -> PlanEntry:
    """Compile a stage into the bundle's folder for one architecture, with one wide profile."""
    logger = module.Logger(module.Logger.ERROR)
    builder = module.Builder(logger)
    typed = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = module.OnnxParser(network, logger)
    assert parser.parse_from_file(str(bundle.path / entry.graph)), [
        parser.get_error(index).desc() for index in range(parser.num_errors)
    ]
    config = builder.create_builder_config()
    if module.__name__ == MODULES[Backend.RTX]:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(module.ComputeCapability, architecture.upper()), 0)
    if hasattr(module.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(module.BuilderFlag.REQUIRE_USER_ALLOCATION)
    names = {size for info in entry.inputs for size in info.shape if isinstance(size, str)}
    dimensions = dict.fromkeys(sorted(names), RANGE)
    made = builder.create_optimization_profile()
    for info in entry.inputs:
        if any(isinstance(size, str) for size in info.shape):
            shapes = [[size if isinstance(size, int) else RANGE[which] for size in info.shape] for which in range(3)]
            made.set_shape(info.name, *shapes)
    assert config.add_optimization_profile(made) >= 0
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    (bundle.path / "plans").mkdir(exist_ok=True)
    path = f"plans/{entry.name}.{architecture}.plan"
    (bundle.path / path).write_bytes(plan)
    return PlanEntry(
        path, f"receipts/{entry.name}.json", (architecture,), 0, 1, entry.inputs, entry.outputs,
        (ProfileEntry("default", dimensions, 0),), 0, f"{module.__name__} {module.__version__}",
    )  # fmt: skip


@pytest.fixture(params=[Backend.RTX, Backend.TRT], ids=["tensorrt_rtx", "tensorrt"])
def compiled(request: pytest.FixtureRequest, bundle_copy: Path) -> Bundle:
    backend = request.param
    try:
        module = load_library(backend).module
    except EngineError as error:
        pytest.skip(f"{MODULES[backend]} is not installed: {error.received}")
    device = open_cuda().device
    if device.architecture not in ARCHITECTURES or backend.value not in ARCHITECTURES[device.architecture].backends:
        pytest.skip(f"{MODULES[backend]} has no plans for {device.name} ({device.architecture})")
    bundle = Bundle.open(bundle_copy)
    stages = tuple(
        replace(entry, plans=(compile_stage(module, bundle, entry, device.architecture),))
        for entry in bundle.manifest.stages
    )
    recipe = replace(bundle.manifest.recipe, shapes=SHAPES)
    target = Target(backend, (device.architecture,))
    return Bundle(bundle.path, replace(bundle.manifest, target=target, stages=stages, recipe=recipe))


def test_a_generation(compiled: Bundle, fake_bundle: Path) -> None:
    with Pipeline(compiled) as pipeline:
        frames = pipeline.generate(REQUEST)
        np.testing.assert_array_equal(pipeline.generate(REQUEST), frames)
    with Pipeline(compiled, EngineOptions(cuda_graph=False)) as pipeline:
        np.testing.assert_array_equal(pipeline.generate(REQUEST), frames)
    expected = Pipeline.open(fake_bundle, threads=1).generate(REQUEST)
    assert np.abs(frames.astype(int) - expected).max() <= 2  # fp32 products may be TF32


def test_the_loop_is_replayed_from_a_graph(compiled: Bundle) -> None:
    session = open_session(compiled.manifest.target.backend, 0)
    engine = engine_from_plans(session, compiled, "dit")
    loop = engine.loop(*loop_inputs())
    for step in range(5):
        loop.advance(step)
    assert loop.graph_refusal == ""
    latents, fixed, rows = loop_inputs()
    final = loop.latents()
    loop.close()
    for step in range(5):
        row = {name: array[step, ...] for name, array in rows.items()}
        latents = engine.run({"latents": latents, **fixed, **row})["next_latents"]
    np.testing.assert_array_equal(final, latents)
    session.close()


def test_memory_is_given_back(compiled: Bundle) -> None:
    cuda = open_cuda()

    def use() -> None:
        session = open_session(compiled.manifest.target.backend, 0)
        engine_from_plans(session, compiled, "dit").run(dit_inputs())
        session.close()

    use()  # whatever the libraries keep for good is there now
    before, _ = cuda.memory()
    for _ in range(3):
        use()
    assert cuda.memory()[0] >= before - (1 << 20)
