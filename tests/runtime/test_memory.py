"""A pipeline within its memory: what a second request does not do again, and what is refused before any work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reelforge.runtime import Check, Frames, Pipeline, Progress, Request
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.engines.engine import Array, Engine
from reelforge.runtime.errors import BundleError, OutOfMemoryError, RequestError
from tests.runtime.fake_bundle import write_fake_bundle

REQUEST = Request("a ball", height=32, width=48, frames=13, steps=4, seed=3)


@pytest.fixture(scope="module")
def expected(fake_bundle: Path) -> np.ndarray:
    """Of a pipeline that keeps and remembers nothing."""
    return Pipeline(Bundle.open(fake_bundle)).generate(REQUEST)


def test_a_second_request_loads_nothing(fake_bundle: Path, expected: np.ndarray) -> None:
    with Pipeline.open(fake_bundle, threads=1, memory_budget="1GB") as pipeline:
        assert pipeline.statistics().resident_bytes == {}
        for _ in range(3):
            np.testing.assert_array_equal(pipeline.generate(REQUEST), expected)
        counts = pipeline.statistics()
        assert (counts.loads, counts.evictions, len(counts.resident_bytes)) == (6, 0, 6)
        assert (counts.memo_hits, counts.memo_misses) == (8, 4)
        assert counts.budget_bytes == 10**9
        assert counts.memo_bytes > 0
    assert pipeline.statistics().resident_bytes == {}
    assert pipeline.statistics().memo_bytes == 0


def test_without_a_budget_some_of_the_machine_is_used(fake_bundle: Path) -> None:
    with Pipeline.open(fake_bundle, threads=1) as pipeline:
        assert pipeline.statistics().budget_bytes is None
        pipeline.generate(REQUEST)
        counts = pipeline.statistics()
        assert counts.budget_bytes is not None
        assert len(counts.resident_bytes) == (6 if counts.budget_bytes > 10**6 else 0)


def test_one_stage_at_a_time(fake_bundle: Path, expected: np.ndarray) -> None:
    with Pipeline.open(fake_bundle, threads=1, memory_budget="least", memo_bytes=0) as pipeline:
        for loads in (6, 12):
            np.testing.assert_array_equal(pipeline.generate(REQUEST), expected)
            assert (pipeline.statistics().loads, pipeline.statistics().resident_bytes) == (loads, {})


@pytest.mark.parametrize(
    ("change", "hits"),
    [
        ({}, 4),
        ({"seed": 9, "height": 48}, 4),  # neither is told to the stages before the loop
        ({"steps": 5}, 2),
        ({"shift": 3.0}, 2),
        ({"guidance": 4.0}, 3),
        ({"prompt": "a cube"}, 0),
    ],
)
def test_what_is_remembered_is_what_would_be_computed(fake_bundle: Path, change: dict[str, object], hits: int) -> None:
    changed = replace(REQUEST, **change)  # type: ignore[arg-type]
    with Pipeline.open(fake_bundle, threads=1) as pipeline:
        pipeline.generate(REQUEST)
        frames = pipeline.generate(changed)
        assert pipeline.statistics().memo_hits == hits
    np.testing.assert_array_equal(frames, Pipeline(Bundle.open(fake_bundle)).generate(changed))


def test_a_budget_that_no_stage_order_can_keep(tmp_path: Path, fake_bundle: Path) -> None:
    with pytest.raises(RequestError, match="the memory budget is too small for bundle") as caught:
        Pipeline.open(fake_bundle, memory_budget="2KB")
    assert "it does not fit llm 7.06KiB (weights 7.06KiB)" in str(caught.value)
    pipeline = Pipeline.open(fake_bundle, memory_budget="2MiB")
    pipeline.generate(REQUEST)
    with pytest.raises(RequestError, match="too small for a video of 480x640x13") as caught:
        pipeline.stream(replace(REQUEST, height=480, width=640))
    assert "it does not fit dit" in str(caught.value)
    assert "make a smaller or shorter video" in str(caught.value)
    with pytest.raises(RequestError, match="memory budget is not a number"):
        Pipeline.open(fake_bundle, memory_budget="much")


class CrowdedPipeline(Pipeline):
    """A pipeline whose stages run out of memory at their first call, if others wait in it."""

    asked: list[str]

    @contextmanager
    def engine(self, stage: str) -> Iterator[Engine]:
        with super().engine(stage) as engine:
            self.asked.append(stage)
            yield _Crowded(engine, self)


class _Crowded:
    def __init__(self, engine: Engine, pipeline: CrowdedPipeline) -> None:
        self.name, self.inputs, self.outputs = engine.name, engine.inputs, engine.outputs
        self._engine, self._pipeline = engine, pipeline

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None] | None = None) -> dict[str, Array]:
        if len(self._pipeline.statistics().resident_bytes) > 1:
            raise OutOfMemoryError("there is no room.")
        return self._engine.run(inputs, outputs)

    def close(self) -> None:
        self._engine.close()


def test_stages_that_wait_make_room_for_the_one_that_runs(fake_bundle: Path, expected: np.ndarray) -> None:
    pipeline = CrowdedPipeline(Bundle.open(fake_bundle), memory_budget="1GB")
    pipeline.asked = []
    for _ in range(2):
        np.testing.assert_array_equal(pipeline.generate(REQUEST), expected)
    # Each stage is asked for through the method that a subclass overrides; again where it failed, and with every stage
    # but the first of a pipeline that happens.
    assert pipeline.asked[:5] == ["llm", "clip", "clip", "refiner", "refiner"]
    assert pipeline.asked.count("dit") == 4
    assert pipeline.statistics().evictions == 11


def rewrite(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))


def replace_by_copy(path: Path) -> None:
    times = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("alter", "words"), [(rewrite, "altered"), (replace_by_copy, "altered"), (cut, "altered"), (os.unlink, "removed")]
)
@pytest.mark.parametrize("file", ["dit.onnx", "weights/vae_decoder.safetensors", "llm.onnx", "tokenizers/clip.json"])
def test_a_bundle_that_is_altered_while_open(
    bundle_copy: Path, file: str, alter: Callable[[Path], None], words: str
) -> None:
    pipeline = Pipeline.open(bundle_copy, threads=1, check=Check.SIZES)
    alter(bundle_copy / file)
    with pytest.raises(BundleError, match=f"file '{file}' of bundle 'copy.bundle' was {words} while") as caught:
        pipeline.generate(REQUEST)
    assert "fix: open the pipeline again" in str(caught.value)


def test_what_is_loaded_already_is_not_disturbed(bundle_copy: Path, expected: np.ndarray) -> None:
    with Pipeline.open(bundle_copy, threads=1, memory_budget="1GB") as pipeline:
        pipeline.generate(REQUEST)
        write_fake_bundle(bundle_copy.with_name("new.bundle"))
        for name in ("dit.onnx", "vae_decoder.onnx"):
            (bundle_copy.with_name("new.bundle") / name).replace(bundle_copy / name)
        np.testing.assert_array_equal(pipeline.generate(REQUEST), expected)


@pytest.mark.parametrize("phase", ["text", "conditioning", "sampling", "decoding"])
def test_a_stream_that_is_left_keeps_its_engines(fake_bundle: Path, expected: np.ndarray, phase: str) -> None:
    with Pipeline.open(fake_bundle, threads=1, memory_budget="1GB") as pipeline:
        events = pipeline.stream(REQUEST)
        next(event for event in events if isinstance(event, Progress) and event.phase == phase)
        events.close()
        frames = [event.pixels for event in pipeline.stream(REQUEST) if isinstance(event, Frames)]
        np.testing.assert_array_equal(np.concatenate(frames), expected)
        assert pipeline.statistics().loads == 6
