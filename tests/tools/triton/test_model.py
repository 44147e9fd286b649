"""The pipeline's model in a fake server: what it answers is what ``Pipeline`` makes of the bundle itself."""

from __future__ import annotations

import io
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from reelforge.runtime import Pipeline, Request
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.errors import BundleError
from reelforge.runtime.step_cache.settings import StepCache
from reelforge.tools.triton.repository import ExportRequest, export_repository
from tests.tools.triton.fake_triton import ClientRequest, Code, FakeServer, Response, TritonError

REQUEST = Request("a ball", height=32, width=48, frames=13, steps=5, seed=3)
Open = Callable[[Path], tuple[FakeServer, Any]]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Open:
    def make(root: Path) -> tuple[FakeServer, Any]:
        server = FakeServer(root)
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server.module)
        # As the Python backend does it: the file is run, and the class is taken from its names.
        model = runpy.run_path(str(root / "reelforge" / "1" / "model.py"))["TritonPythonModel"]()
        model.initialize(server.arguments("reelforge"))
        return server, model

    return make


def tensors(request: Request) -> dict[str, np.ndarray[Any, Any]]:
    """Return a request as a client sends it."""
    result: dict[str, np.ndarray[Any, Any]] = {}
    for name, value in asdict(request).items():
        if isinstance(value, str):
            result[name] = np.array([value.encode()], dtype=np.object_)
        elif isinstance(value, int | float):
            result[name] = np.array([value], dtype=np.int64 if isinstance(value, int) else np.float64)
    return result


def ask(model: Any, request: ClientRequest) -> Response:
    (response,) = model.execute([request])
    assert isinstance(response, Response)
    return response


@pytest.mark.parametrize("inside", [(), ("dit",), ("all",)])
def test_frames_are_the_pipelines(whole_bundle: Path, tmp_path: Path, opened: Open, inside: tuple[str, ...]) -> None:
    export_repository(Bundle.open(whole_bundle), ExportRequest(tmp_path / "models", inside=inside))
    server, model = opened(tmp_path / "models")
    response = ask(model, ClientRequest(tensors(REQUEST)))
    assert response.failure is None
    with Pipeline.open(whole_bundle, threads=1) as pipeline:
        np.testing.assert_array_equal(response.get("pixels"), pipeline.generate(REQUEST))
    asked = {name.removeprefix("reelforge_") for name in server.calls}
    everything = {"llm", "clip", "refiner", "modulation", "dit", "vae_decoder"}
    assert asked == (set() if inside == ("all",) else everything - set(inside))
    assert server.calls.count("reelforge_dit") == (0 if inside else 5)
    model.finalize()


def test_guidance_and_step_caching(whole_bundle: Path, repository: Path, opened: Open) -> None:
    """Stages with scalars on both sides, and registers over models."""
    plain = Request("a ball", height=32, width=48, frames=5, steps=8, cfg_scale=4.0, negative_prompt="blue", shift=5.0)
    server, model = opened(repository)
    sent = tensors(plain) | {"step_cache": np.array([b"easycache:0.5"], dtype=np.object_)}
    response = ask(model, ClientRequest(sent))
    assert response.failure is None, response.failure.message()
    cached = Request(**(asdict(plain) | {"step_cache": StepCache.parse("easycache:0.5")}))
    with Pipeline.open(whole_bundle, threads=1) as pipeline:
        np.testing.assert_array_equal(response.get("pixels"), pipeline.generate(cached))
    assert {"reelforge_guidance", "reelforge_step_change"} <= set(server.calls)


def test_only_what_is_wanted_is_made(repository: Path, opened: Open) -> None:
    _, model = opened(repository)
    long = Request("word " * 40, height=32, width=48, frames=5, steps=2)
    response = ask(model, ClientRequest(tensors(long), ("video", "notices")))
    assert [tensor.name() for tensor in response.output_tensors] == ["video", "notices"]
    with av.open(io.BytesIO(response.get("video")[0])) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert np.stack(frames).shape == (5, 32, 48, 3)
    assert all(b"token" in text for text in response.get("notices"))
    assert response.get("notices").size > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"height": np.array([30])}, "height=30 is not supported"),
        ({"height": np.array([32, 32])}, "'height' does not hold one value"),
        ({"prompt": np.array([b"\xff"], dtype=np.object_)}, "'prompt' is not UTF-8"),
        ({"guidance": np.array([np.nan])}, "'guidance' is not a finite number"),
        ({"step_cache": np.array([b"never"], dtype=np.object_)}, "never"),
    ],
)
def test_requests_that_cannot_be(
    repository: Path, opened: Open, changed: dict[str, np.ndarray[Any, Any]], message: str
) -> None:
    """The other request of the same call gets its video."""
    _, model = opened(repository)
    good, bad = ClientRequest(tensors(REQUEST)), ClientRequest(tensors(REQUEST) | changed)
    refused, answered = model.execute([bad, good])
    assert message in refused.failure.message()
    assert refused.failure.code is Code.INVALID_ARG
    assert answered.get("pixels").shape == (13, 32, 48, 3)


def test_cancelling_and_deadlines(repository: Path, opened: Open) -> None:
    server, model = opened(repository)
    response = ask(model, ClientRequest(tensors(REQUEST), cancel_after=5))
    assert response.failure.code is Code.CANCELLED
    assert "the client cancelled it" in response.failure.message()
    assert "reelforge_vae_decoder" not in server.calls
    late = ask(model, ClientRequest(tensors(REQUEST), timeout_us=1))
    assert late.failure.code is Code.CANCELLED
    assert "deadline" in late.failure.message()


def test_a_model_that_fails(repository: Path, opened: Open) -> None:
    server, model = opened(repository)
    server.fail = lambda name: TritonError("the device is lost") if name == "reelforge_dit" else None
    response = ask(model, ClientRequest(tensors(REQUEST)))
    assert response.failure.code is Code.INTERNAL
    assert "step 1 of 5 of stage 'dit' failed: stage 'dit' failed in Triton's model 'reelforge_dit'" in str(
        response.failure.message()
    )
    assert "the device is lost" in response.failure.message()
    server.fail = lambda name: TritonError("CUDA error: out of memory") if name == "reelforge_llm" else None
    assert ask(model, ClientRequest(tensors(Request("another", steps=1)))).failure.code is Code.UNAVAILABLE
    server.fail = lambda name: None
    assert ask(model, ClientRequest(tensors(REQUEST))).failure is None


@pytest.mark.parametrize("change", ["tokenizer", "manifest", "missing", "schema"])
def test_a_repository_that_was_altered(repository: Path, tmp_path: Path, opened: Open, change: str) -> None:
    root = Path(shutil.copytree(repository, tmp_path / "models"))
    folder = root / "reelforge" / "1" / "bundle"
    manifest, tokenizer = folder / "manifest.json", folder / "tokenizers" / "llm.json"
    if change == "tokenizer":
        tokenizer.write_text(tokenizer.read_text() + " ")
        message = "llm.json is not the file that the bundle had"
    elif change == "missing":
        tokenizer.unlink()
        message = "llm.json cannot be read"
    elif change == "schema":
        manifest.write_text("{}")
        message = "manifest.json cannot be read by this reelforge"
    else:
        manifest.write_text(manifest.read_text().replace('"steps": 4', '"steps": 5'))
        message = "manifest.json was altered"
    with pytest.raises(BundleError, match=message):
        opened(root)
