"""Stages in segments: the same bits as the engine, one segment in memory at a time, nothing written into the bundle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from reelforge.export.segments import SegmentedStage
from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.engines.engine import Array, Engine, EngineOptions
from reelforge.runtime.engines.onnxruntime_engine import engine_from_bytes
from reelforge.runtime.manifest import StageEntry
from reelforge.runtime.pipeline import Pipeline
from tests.calibrations import PROMPTS

ONE_THREAD = EngineOptions(threads=1)
SMALL = 1 << 13


class Counted:
    """Loads segments and counts those that are loaded."""

    def __init__(self) -> None:
        self.loads = self.most = 0
        self.open: set[int] = set()

    def __call__(self, graph: bytes, folder: Path, entry: StageEntry, options: EngineOptions) -> Engine:
        engine = engine_from_bytes(graph, folder, entry, options)
        own = self.loads
        self.loads += 1
        self.open.add(own)
        self.most = max(self.most, len(self.open))
        close = engine.close

        def closed() -> None:
            self.open.discard(own)
            close()

        engine.close = closed  # type: ignore[method-assign]
        return engine


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, Check.SIZES)


@pytest.fixture
def counted() -> Counted:
    return Counted()


def feeds(bundle: Bundle) -> list[dict[str, Array]]:
    pipeline = Pipeline(bundle)
    return [pipeline.inputs.text(prompt).llm for prompt in PROMPTS]


def expected(bundle: Bundle) -> Iterator[np.ndarray]:
    with Pipeline(bundle, ONE_THREAD).engine("llm") as engine:
        for feed in feeds(bundle):
            yield engine.run(feed)["prompt_states"]


def stage(
    bundle: Bundle, memory: int, counted: Counted, observed: tuple[str, ...] = (), size: int = 0
) -> SegmentedStage:
    def bytes_of(value: ir.Value) -> int:
        return size if value.name in observed else 0

    return SegmentedStage(
        bundle, "llm", ("prompt_states",), observed, memory, bytes_of, options=ONE_THREAD, load=counted
    )


def test_everything_fits(bundle: Bundle, counted: Counted) -> None:
    llm = stage(bundle, 1 << 30, counted)
    assert llm.parts == 1
    assert llm.resident
    for _ in range(2):
        for made, states in zip(llm.run(feeds(bundle)), expected(bundle), strict=True):
            assert list(made) == ["prompt_states"]
            np.testing.assert_array_equal(made["prompt_states"], states)
    assert counted.loads == 1
    llm.close()
    assert not counted.open


def test_one_segment_at_a_time_gives_the_same_bits(bundle: Bundle, counted: Counted) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle.path.rglob("*")}
    llm = stage(bundle, SMALL, counted)
    assert llm.parts > 4
    assert not llm.resident
    for _ in range(2):
        for made, states in zip(llm.run(feeds(bundle)), expected(bundle), strict=True):
            np.testing.assert_array_equal(made["prompt_states"], states)
    assert counted.most == 1
    assert counted.loads == 2 * llm.parts  # each once per run, whatever the number of prompts
    assert not counted.open
    assert {path: path.stat().st_mtime_ns for path in bundle.path.rglob("*")} == before


def test_observed_values_limit_a_segment_too(bundle: Bundle, counted: Counted) -> None:
    """All weights fit, but not what would be observed at once: cut, and everything stays loaded."""
    names = tuple(f"layers.0.mlp.{name}_proj.Reshape" for name in ("gate", "down"))
    memory = 1 << 30
    llm = stage(bundle, memory, counted, names, size=memory // 4)
    assert llm.resident
    assert llm.parts == 2
    seen: list[tuple[str, tuple[int, ...]]] = []
    results = list(llm.run(feeds(bundle), lambda name, array: seen.append((name, array.shape))))
    for made, states in zip(results, expected(bundle), strict=True):
        assert list(made) == ["prompt_states"]
        np.testing.assert_array_equal(made["prompt_states"], states)
    assert [name for name, _ in seen] == [*names, *names]
    tokens = [feed["input_ids"].shape[1] for feed in feeds(bundle)]
    assert [shape[0] for _, shape in seen] == [tokens[0]] * 2 + [tokens[1]] * 2
    assert counted.loads == counted.most == 2
    llm.close()
    assert not counted.open


@pytest.mark.parametrize("memory", [SMALL, 1 << 30])
def test_what_does_not_lead_to_a_wanted_value_is_not_run(bundle: Bundle, counted: Counted, memory: int) -> None:
    name = "layers.0.self_attn.q_proj.Reshape"
    llm = SegmentedStage(bundle, "llm", (), (name,), memory, options=ONE_THREAD, load=counted)
    whole = stage(bundle, memory, counted, (name,))
    parts, seen = [0], {False: [], True: []}  # type: ignore[var-annotated]

    def part() -> None:
        parts[0] += 1

    for short, own in ((True, llm), (False, whole)):
        made = list(own.run(feeds(bundle), lambda _, array, short=short: seen[short].append(array), part))  # type: ignore[misc]
        assert [list(each) for each in made] == [[] if short else ["prompt_states"]] * 2
    assert parts[0] == 2 * (llm.parts + whole.parts)
    assert llm.parts < whole.parts or memory > SMALL
    for one, other in zip(seen[True], seen[False], strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_closed_stage_loads_again_and_a_failure_leaves_nothing_loaded(bundle: Bundle, counted: Counted) -> None:
    llm = stage(bundle, SMALL, counted)

    class Stop(Exception): ...

    def stop() -> None:
        if counted.loads == 3:
            raise Stop

    with pytest.raises(Stop):
        list(llm.run(feeds(bundle), on_part=stop))
    assert not counted.open
    assert len(list(llm.run(feeds(bundle)))) == 2
