"""Holds an engine up where a test wants it: no sleeping, no guessing what a thread is doing."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

from reelforge.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine

WAIT_S = 20.0


class Gate:
    """Counts loads and runs of engines; a run of the ``held`` stage waits until the gate is opened."""

    def __init__(self) -> None:
        self.runs: Counter[str] = Counter()
        self.loads: Counter[str] = Counter()
        self.held: str | None = None
        self.entered = threading.Event()
        self.opened = threading.Event()

    def hold(self, stage: str) -> None:
        self.entered.clear()
        self.opened.clear()
        self.held = stage

    def open(self) -> None:
        self.held = None
        self.opened.set()

    def pass_through(self, stage: str) -> None:
        self.runs[stage] += 1
        if stage == self.held:
            self.entered.set()
            assert self.opened.wait(WAIT_S), "the gate was never opened"


@contextmanager
def gate_on_engines(patch: pytest.MonkeyPatch) -> Iterator[Gate]:
    from reelforge.runtime.engines import onnxruntime_engine as module

    gate = Gate()
    launch, create = OnnxRuntimeEngine.launch, module.OnnxRuntimeEngine.__init__

    def counted_launch(
        engine: OnnxRuntimeEngine, binding: object, shapes: Mapping[str, tuple[int, ...]], keep_arena: bool = False
    ) -> None:
        gate.pass_through(engine.name)
        launch(engine, binding, shapes, keep_arena)

    def counted_load(engine: OnnxRuntimeEngine, name: str, *arguments: object) -> None:
        gate.loads[name] += 1
        create(engine, name, *arguments)  # type: ignore[arg-type]

    patch.setattr(module.OnnxRuntimeEngine, "launch", counted_launch)  # by calls and by the sampling loop
    patch.setattr(module.OnnxRuntimeEngine, "__init__", counted_load)
    yield gate
    gate.open()
