"""The ONNX Runtime engine: results, buffers, and one error for each wrong tensor."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.engines import onnxruntime_library
from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine, engine_from_bytes, engine_from_onnx
from reelforge.runtime.errors import EngineError
from reelforge.runtime.manifest import StageEntry
from reelforge.runtime.sampling import begin_loop
from tests.runtime.fake_bundle import CHANNELS, SPEC, WIDTH, constant
from tests.runtime.loops import run_loop


@pytest.fixture(scope="module")
def bundle(fake_bundle: Path) -> Bundle:
    return Bundle.open(fake_bundle)


@pytest.fixture
def dit(bundle: Bundle) -> Iterator[OnnxRuntimeEngine]:
    engine = engine_from_onnx(bundle.graph("dit"), bundle.stage("dit"), EngineOptions(threads=1))
    yield engine
    engine.close()


def dit_inputs(frames: int = 2, tokens: int = 3) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {
        "latents": (1, CHANNELS, frames, 4, 6),
        "text": (1, tokens, WIDTH),
        "double_modulation": (1, 2, 2, 6, WIDTH),
        "single_modulation": (1, 3, 3, WIDTH),
        "final_modulation": (1, 2, WIDTH),
        "rope_cos": (frames * 6, SPEC.dit.head_dim // 2),
        "rope_sin": (frames * 6, SPEC.dit.head_dim // 2),
        "sigma_step": (),
    }
    return {name: np.asarray(random.standard_normal(shape), np.float32) for name, shape in shapes.items()}


def expected_velocity(inputs: dict[str, np.ndarray]) -> np.ndarray:
    names = ("text", "double_modulation", "single_modulation", "final_modulation", "rope_cos", "rope_sin")
    return 0.5 * inputs["latents"] + sum(inputs[name].astype(np.float64).mean() for name in names)


@pytest.mark.parametrize("frames", [1, 3])
def test_all_outputs(dit: OnnxRuntimeEngine, frames: int) -> None:
    inputs = dit_inputs(frames)
    outputs = dit.run(inputs)
    velocity = expected_velocity(inputs)
    assert set(outputs) == {"velocity", "next_latents"}
    np.testing.assert_allclose(outputs["velocity"], velocity, atol=1e-6)
    np.testing.assert_allclose(outputs["next_latents"], inputs["latents"] + inputs["sigma_step"] * velocity, atol=1e-6)


def test_an_output_is_written_in_place(dit: OnnxRuntimeEngine) -> None:
    inputs = dit_inputs()
    target = np.full_like(inputs["latents"], np.nan)
    outputs = dit.run(inputs, {"next_latents": target})
    assert list(outputs) == ["next_latents"]
    assert outputs["next_latents"] is target
    np.testing.assert_allclose(
        target, inputs["latents"] + inputs["sigma_step"] * expected_velocity(inputs), atol=1e-6
    )  # fmt: skip


def test_strided_inputs_are_read_correctly(dit: OnnxRuntimeEngine) -> None:
    inputs = dit_inputs()
    doubled = np.zeros((1, CHANNELS, 2, 4, 12), np.float32)
    doubled[..., ::2] = inputs["latents"]
    strided = {**inputs, "latents": doubled[..., ::2]}
    assert not strided["latents"].flags.c_contiguous
    for _ in range(5):
        np.testing.assert_array_equal(dit.run(strided)["velocity"], dit.run(inputs)["velocity"])


def test_outputs_of_unknown_shape(bundle: Bundle) -> None:
    vae = engine_from_onnx(bundle.graph("vae_decoder"), bundle.stage("vae_decoder"))
    tile = np.random.default_rng(0).standard_normal((1, CHANNELS, 2, 3, 5)).astype(np.float32)
    frames = vae.run({"latent_tile": tile})["frame_tile"]
    assert frames.shape == (1, 3, 5, 24, 40)
    assert frames.flags.writeable
    mixed = np.tanh(np.einsum("oc,nctyx->notyx", constant("decoder", 3, CHANNELS, 1, 1, 1)[:, :, 0, 0, 0], tile))
    np.testing.assert_allclose(frames[:, :, [0, 1, 4], ::8, ::8], mixed[:, :, [0, 1, 1]], atol=1e-6)


def test_external_weights_and_integer_inputs(bundle: Bundle) -> None:
    llm = engine_from_onnx(bundle.graph("llm"), bundle.stage("llm"))
    states = llm.run({"input_ids": np.array([[3, 7]], np.int64)})["prompt_states"]
    np.testing.assert_array_equal(states[0], constant("llm", 300, 6)[[3, 7]])


def test_a_graph_in_memory_finds_its_weights_in_the_folder(bundle: Bundle, tmp_path: Path) -> None:
    graph, entry = bundle.graph("llm").read_bytes(), bundle.stage("llm")
    llm = engine_from_bytes(graph, bundle.path, entry)
    states = llm.run({"input_ids": np.array([[3, 7]], np.int64)})["prompt_states"]
    np.testing.assert_array_equal(states[0], constant("llm", 300, 6)[[3, 7]])
    with pytest.raises(EngineError, match="ONNX Runtime refuses a graph made from stage 'llm'") as caught:
        engine_from_bytes(graph, tmp_path, entry)
    assert "received:" in str(caught.value)
    with pytest.raises(EngineError, match="has other inputs than its manifest states"):
        engine_from_bytes(graph, bundle.path, replace(entry, inputs=()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": np.zeros((1, CHANNELS, 2, 4, 6), np.float64)}, "tensor 'latents' .* another type or shape"),
        ({"latents": np.zeros((CHANNELS, 2, 4, 6), np.float32)}, "tensor 'latents' .* another type or shape"),
        ({"latents": np.zeros((1, 5, 2, 4, 6), np.float32)}, "tensor 'latents' .* another type or shape"),
        ({"text": np.zeros((2, 3, WIDTH), np.float32)}, "'latents' and 'text' of stage 'dit' disagree about 'batch'"),
        ({"rope_sin": np.zeros((11, 4), np.float32)}, "'rope_cos' and 'rope_sin' .* disagree about 'image_tokens'"),
        ({"other": np.zeros((1,), np.float32)}, "other inputs than it takes"),
    ],
)
def test_wrong_inputs(dit: OnnxRuntimeEngine, change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        dit.run({**dit_inputs(), **change})
    assert "received:" in str(caught.value)
    assert "expected:" in str(caught.value)
    assert caught.value.exit_code == 8


def test_a_missing_input_is_named(dit: OnnxRuntimeEngine) -> None:
    inputs = dit_inputs()
    del inputs["sigma_step"]
    with pytest.raises(EngineError, match="other inputs") as caught:
        dit.run(inputs)
    assert "missing ['sigma_step']" in str(caught.value)


def test_wrong_output_buffers(dit: OnnxRuntimeEngine) -> None:
    inputs = dit_inputs()
    good = np.zeros_like(inputs["latents"])
    with pytest.raises(EngineError, match="has no output 'image'"):
        dit.run(inputs, {"image": good})
    with pytest.raises(EngineError, match="another type or shape"):
        dit.run(inputs, {"velocity": good.astype(np.float16)})
    with pytest.raises(EngineError, match=r"the buffer for output 'velocity' .* another shape"):
        dit.run(inputs, {"velocity": np.zeros((1, CHANNELS, 3, 4, 6), np.float32)})
    with pytest.raises(EngineError, match="not contiguous and writable"):
        dit.run(inputs, {"velocity": np.zeros((1, CHANNELS, 2, 4, 12), np.float32)[..., ::2]})
    with pytest.raises(EngineError, match="overlaps an input"):
        dit.run(inputs, {"velocity": inputs["latents"]})


class OnlyRuns:
    """An engine without a loop of its own."""

    def __init__(self, engine: OnnxRuntimeEngine) -> None:
        self.name, self.inputs, self.outputs, self.run = engine.name, engine.inputs, engine.outputs, engine.run


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_loop_computes_what_single_runs_do(dit: OnnxRuntimeEngine, steps: int) -> None:
    inputs = dit_inputs()
    latents = inputs.pop("latents")
    fixed = {name: inputs.pop(name) for name in ("rope_cos", "rope_sin")}
    fixed["rope_sin"] = np.asfortranarray(fixed["rope_sin"])  # is copied, not misread
    scale = np.arange(1, steps + 1, dtype=np.float32)
    per_step = {name: np.multiply.outer(scale, array) for name, array in inputs.items()}
    wide = np.repeat(per_step["text"], 2, axis=-1)
    per_step["text"] = wide[..., ::2]
    kept = latents.copy()
    expected = run_loop(OnlyRuns(dit), latents, fixed, per_step)  # type: ignore[arg-type]
    received = run_loop(dit, latents, fixed, per_step)
    np.testing.assert_array_equal(received, expected)
    np.testing.assert_array_equal(latents, kept)
    assert not np.array_equal(received, latents)


@pytest.mark.parametrize("steps", [(1, 2, 3), (2, 3), (0, 0, 2, 1, 3)])
def test_a_loop_may_begin_at_any_step(dit: OnnxRuntimeEngine, steps: tuple[int, ...]) -> None:
    inputs = dit_inputs()
    latents = inputs.pop("latents")
    per_step = {name: np.multiply.outer(np.arange(1, 5, dtype=np.float32), array) for name, array in inputs.items()}
    results = []
    for engine in (dit, OnlyRuns(dit)):
        with begin_loop(engine, latents, {}, per_step) as loop:  # type: ignore[arg-type]
            for step in steps:
                loop.advance(step)
            results.append(loop.latents().copy())
    np.testing.assert_array_equal(*results)


def test_a_loop_binds_nothing_between_its_steps(dit: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = dit_inputs()
    latents = inputs.pop("latents")
    loop = dit.loop(latents, {}, {name: np.stack([array] * 3) for name, array in inputs.items()})
    bound = []
    bind = onnxruntime.IOBinding.bind_ortvalue_input
    monkeypatch.setattr(
        onnxruntime.IOBinding,
        "bind_ortvalue_input",
        lambda binding, name, value: (bound.append(name), bind(binding, name, value)),
    )
    for step in range(3):
        loop.advance(step)
    assert bound == []
    loop.advance(0)  # out of turn, its latents are in the other buffer
    assert sorted(bound) == sorted(inputs)


def test_a_loop_checks_its_arrays_before_the_first_step(dit: OnnxRuntimeEngine) -> None:
    inputs = dit_inputs()
    latents = inputs.pop("latents")
    per_step = {name: array[None] for name, array in inputs.items()}
    with pytest.raises(EngineError, match="tensor 'sigma_step' of stage 'dit' has another type or shape"):
        dit.loop(latents, {}, {**per_step, "sigma_step": np.zeros((1, 2), np.float32)})
    with pytest.raises(EngineError, match="stage 'dit' was given other inputs than it takes"):
        dit.loop(latents, {}, {})


def test_a_loop_ends_with_its_engine(bundle: Bundle) -> None:
    engine = engine_from_onnx(bundle.graph("dit"), bundle.stage("dit"), EngineOptions(threads=1))
    inputs = dit_inputs()
    loop = engine.loop(inputs.pop("latents"), {}, {name: array[None] for name, array in inputs.items()})
    engine.close()
    with pytest.raises(EngineError, match="stage 'dit' was run after its engine was closed"):
        loop.advance(0)


def test_no_thread_spins_between_runs(bundle: Bundle) -> None:
    engine = engine_from_onnx(bundle.graph("dit"), bundle.stage("dit"), EngineOptions(threads=4, spinning=True))
    inputs = dit_inputs(frames=20_000)  # enough that its operators are split among threads
    spent = []
    for _ in range(3):
        engine.run(inputs)
        before = time.process_time()
        time.sleep(0.1)
        spent.append(time.process_time() - before)
    engine.close()
    assert min(spent) < 0.01


def test_run_after_close(dit: OnnxRuntimeEngine) -> None:
    dit.close()
    dit.close()
    with pytest.raises(EngineError, match="after its engine was closed"):
        dit.run(dit_inputs())


def test_a_failure_inside_of_onnxruntime(bundle: Bundle) -> None:
    llm = engine_from_onnx(bundle.graph("llm"), bundle.stage("llm"))
    with pytest.raises(EngineError, match="stage 'llm' failed in ONNX Runtime") as caught:
        llm.run({"input_ids": np.array([[10_000]], np.int64)})
    assert "input_ids [1, 1]" in str(caught.value)


def test_a_graph_that_onnxruntime_refuses(bundle_copy: Path, bundle: Bundle) -> None:
    (bundle_copy / "dit.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"refuses the graph 'dit.onnx' of stage 'dit'"):
        engine_from_onnx(bundle_copy / "dit.onnx", bundle.stage("dit"))
    with pytest.raises(EngineError, match="refuses the graph"):
        engine_from_onnx(bundle_copy / "none.onnx", bundle.stage("dit"))


def test_a_manifest_that_states_other_tensors(bundle: Bundle) -> None:
    entry: StageEntry = bundle.stage("dit")
    other = replace(entry, inputs=entry.inputs[1:])
    with pytest.raises(EngineError, match="other inputs than its manifest states"):
        engine_from_onnx(bundle.graph("dit"), other)


@pytest.mark.parametrize(
    ("options", "message"),
    [(EngineOptions(threads=0), "number of threads"), (EngineOptions(graph_optimization="some"), "optimisation level")],
)
def test_wrong_options(bundle: Bundle, options: EngineOptions, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        engine_from_onnx(bundle.graph("dit"), bundle.stage("dit"), options)


@pytest.mark.parametrize("level", ["all", "extended", "basic", "none"])
def test_options_do_not_change_results(bundle: Bundle, level: str) -> None:
    engine = engine_from_onnx(bundle.graph("dit"), bundle.stage("dit"), EngineOptions(2, False, level))
    inputs = dit_inputs()
    np.testing.assert_allclose(engine.run(inputs)["velocity"], expected_velocity(inputs), atol=1e-6)


def test_onnxruntime_that_is_not_installed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(onnxruntime_library.importlib, "import_module", missing)
    with pytest.raises(EngineError, match="onnxruntime is not installed") as caught:
        engine_from_onnx(bundle.graph("dit"), bundle.stage("dit"))
    assert "pip install reelforge[cpu]" in str(caught.value)


def test_onnxruntime_prints_nothing_of_its_own(fake_bundle: Path, bundle_copy: Path) -> None:
    (bundle_copy / "clip.onnx").write_bytes(b"not a graph")
    script = """
        import sys, numpy as np
        from pathlib import Path
        from reelforge.runtime.bundle.open import Bundle
        from reelforge.runtime.engines.onnxruntime_engine import engine_from_onnx
        from reelforge.runtime.errors import EngineError
        bundle = Bundle.open(sys.argv[1])
        for path, stage, inputs in (
            (bundle.graph("llm"), "llm", {"input_ids": np.array([[10_000]])}),
            (Path(sys.argv[2]) / "clip.onnx", "clip", {}),
        ):
            try:
                engine_from_onnx(path, bundle.stage(stage)).run(inputs)
            except EngineError:
                continue
            raise SystemExit("no error")
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(fake_bundle), str(bundle_copy)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
