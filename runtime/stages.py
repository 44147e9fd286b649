"""The stages of an open bundle: engines in memory within a budget, loaded from files that are still the same.

The module does not know how stages are chained.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reelforge.runtime.budget import (
    DEVICE_SHARE,
    StageBytes,
    default_host_budget,
    refuse_too_small,
    stage_bytes,
)
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.bundle.watch import Watch
from reelforge.runtime.control import Stop
from reelforge.runtime.engines.engine import Array, Engine, EngineOptions
from reelforge.runtime.engines.load import load_engine
from reelforge.runtime.errors import OutOfMemoryError
from reelforge.runtime.host_memory import return_freed
from reelforge.runtime.memo import Memos, key_of
from reelforge.runtime.recipe import Backend
from reelforge.runtime.residency import Residency
from reelforge.runtime.turns import refuse_fork

if TYPE_CHECKING:
    from reelforge.runtime.engines.device_session import DeviceSession

Lend = Callable[[str], AbstractContextManager[Engine]]
"""A stage to its engine, for the duration of a ``with`` block."""

STAGES = ("llm", "clip", "refiner", "modulation", "dit", "vae_decoder")


@dataclass(frozen=True)
class Statistics:
    """What a pipeline holds and has done since it was opened.

    Attributes:
        budget_bytes: For engines; None as long as it is not decided (see ``runtime.budget``).
        resident_bytes: Stage -> bytes of its weights, of those that are loaded.
        loads: How often a stage was loaded.
        evictions: How often one was closed to make room for another.
        memo_hits: How often what a stage would compute was known already.
        memo_misses: How often it was not.
        memo_bytes: What is remembered takes.
    """

    budget_bytes: int | None
    resident_bytes: dict[str, int]
    loads: int
    evictions: int
    memo_hits: int
    memo_misses: int
    memo_bytes: int


class Stages:
    """The engines of one bundle, and what they answered before.

    Args:
        bundle: The bundle; every stage of it is loaded when it is first asked for.
        options: How engines execute.
        device: Returns the GPU's session, which all stages share and which is opened with the first.
        budget: Bytes that engines may take together; 0 keeps none; None is decided when the first is loaded.
        memo: What is remembered, and shared with whoever has it too; or how many bytes of it.

    Raises:
        BundleError: If a stage is missing.
        RequestError: If the budget is too small for one of them.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: EngineOptions,
        device: Callable[[], DeviceSession],
        budget: int | None,
        memo: int | Memos,
    ) -> None:
        self.watch = Watch(bundle)
        self._shares_memo = isinstance(memo, Memos)
        self.memo = memo if isinstance(memo, Memos) else Memos(memo)
        self._bundle = bundle
        self._options = options
        self._device = device
        self._budget = budget
        self._limit = budget
        self._process = os.getpid()
        self._needs = {stage: self._need(stage, {}) for stage in STAGES}
        shared = bundle.manifest.target.backend.has_plans
        self.residency = Residency(self._load, self._need_of, self._decided_budget, STAGES, "dit", shared)
        refuse_too_small(self._needs, budget or 0, f"bundle {bundle.name!r}")

    @contextmanager
    def lease(self, stage: str) -> Iterator[Engine]:
        """Lend a stage's engine for the duration of a ``with`` block (see :class:`Residency`).

        Raises:
            BundleError: If the bundle lacks the stage, or a file of it was altered since the bundle was opened.
            EngineError: If it cannot be loaded, or this process is not the one that opened the pipeline.
        """
        refuse_fork(self._process)
        try:
            with self.residency.lease(stage) as engine:
                yield engine
        finally:
            if not self._bundle.manifest.target.backend.has_plans:
                return_freed()  # else what many shapes leave between blocks in use adds up, to several times the need

    def answer(self, lend: Lend, stage: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run a stage, unless it was asked the same before; nobody may alter what it answered.

        Args:
            lend: Lends engines: the pipeline's own method, which may wrap them or lend others.
            stage: The stage.
            inputs: What it is told.

        Raises:
            EngineError: If the engine cannot be loaded or fails.
        """
        memo = self.memo.of(stage)
        key = key_of(stage, inputs) if memo.limit_bytes else b""
        known = memo.get(key) if key else None
        if known is not None:
            return known
        try:
            answer = _run(lend, stage, inputs)
        except OutOfMemoryError:
            if not self.residency.make_room():
                raise
            answer = _run(lend, stage, inputs)
        if key:
            memo.put(key, answer)
        return answer

    def answer_ahead(self, lend: Lend, stage: str, wanted: Sequence[Mapping[str, Array]], stop: Stop) -> None:
        """Run a stage for several inputs that it was not asked before, loaded once, and remember the answers.

        One call each: what a stage says to one input must not depend on which others were there, and a product over
        more rows may be summed in another order.

        Raises:
            EngineError: If the engine cannot be loaded or fails.
            CancelledError: If ``stop`` ends it.
        """
        memo = self.memo.of(stage)
        unknown = {key: one for one in wanted if (key := key_of(stage, one)) not in memo}
        if not unknown or not memo.limit_bytes:
            return
        stop.check(f"stage {stage!r}")
        with lend(stage) as engine:
            for number, (key, one) in enumerate(unknown.items(), 1):
                stop.check(f"prompt {number} of {len(unknown)} of stage {stage!r}")
                memo.put(key, engine.run(one))

    @property
    def is_forked(self) -> bool:
        """Whether this process is not the one that opened the bundle."""
        return os.getpid() != self._process

    def check_budget(self, sizes: Mapping[str, int], what: str) -> None:
        """Refuse a video for which the budget does not suffice; a budget that nobody set refuses nothing.

        Args:
            sizes: Of named dimensions, as the video will have them.
            what: The video, for the message.

        Raises:
            RequestError: Saying which stage needs how much.
        """
        refuse_too_small({stage: self._need(stage, sizes) for stage in STAGES}, self._budget or 0, what)

    def expect(self, sizes: Mapping[str, int]) -> None:
        """Count with these sizes from now on."""
        self._needs = {stage: self._need(stage, sizes) for stage in STAGES}

    def statistics(self) -> Statistics:
        """Return what is held, and what was done."""
        return Statistics(
            self._limit,
            self.residency.resident,
            self.residency.loads,
            self.residency.evictions,
            self.memo.text.hits + self.memo.conditions.hits,
            self.memo.text.misses + self.memo.conditions.misses,
            self.memo.text.bytes + self.memo.conditions.bytes,
        )

    def close(self) -> None:
        """Close the engines and forget what they answered; a later use loads them again."""
        self.residency.close()
        if not self._shares_memo:
            self.memo.clear()

    def _load(self, stage: str) -> Engine:
        self.watch.check_stage(stage)
        return load_engine(self._bundle, stage, self._options, self._device)

    def _decided_budget(self) -> int:
        """Return the budget, and decide it before the first stage is loaded."""
        if self._limit is None:
            backend = self._bundle.manifest.target.backend
            if backend.has_plans:
                self._limit = int(self._device().cuda.memory()[0] * DEVICE_SHARE)
            else:  # of a GPU under ONNX Runtime nothing is known: one stage at a time
                self._limit = default_host_budget() if backend is Backend.CPU else 0
        return self._limit

    def _need(self, stage: str, sizes: Mapping[str, int]) -> StageBytes:
        return stage_bytes(self._bundle.manifest, self._bundle.stage(stage), sizes, self._options.widening)

    def _need_of(self, stage: str) -> StageBytes:
        return self._needs.get(stage) or self._need(stage, {})


def _run(lend: Lend, stage: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
    with lend(stage) as engine:
        return engine.run(inputs)
