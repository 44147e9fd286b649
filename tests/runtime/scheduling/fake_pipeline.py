"""Pipelines that do nothing, where and as long as a test wants it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from reelforge.runtime.control import Stop
from reelforge.runtime.errors import EngineError
from reelforge.runtime.events import Event, Frames, Progress
from reelforge.runtime.manifest import Manifest
from reelforge.runtime.request import Request, ResolvedRequest, resolve_request
from reelforge.runtime.scheduling.pool import PipelinePool

WAIT_S = 30.0

Open = Callable[..., PipelinePool]
"""The fixture ``opened``: a pool of so many devices with these limits, closed with the test."""


class Hold:
    """A place where a pipeline waits until the test lets it go on."""

    def __init__(self) -> None:
        self._entered = threading.Event()
        self._released = threading.Event()

    def here(self) -> None:
        self._entered.set()
        assert self._released.wait(WAIT_S), "nobody let the pipeline go on"

    def wait_until_reached(self) -> None:
        assert self._entered.wait(WAIT_S), "the pipeline never came here"

    @property
    def reached(self) -> bool:
        return self._entered.is_set()

    def release(self) -> None:
        self._released.set()


@dataclass
class World:
    """What fake pipelines do, by prompt, and what they did."""

    manifest: Manifest
    holds: dict[str, Hold] = field(default_factory=dict)
    failures: dict[str, BaseException] = field(default_factory=dict)
    broken: dict[str, BaseException] = field(default_factory=dict)  # by device: every job fails
    unopenable: dict[str, BaseException] = field(default_factory=dict)  # by device
    ran: list[str] = field(default_factory=list)
    opened: Counter[str] = field(default_factory=Counter)
    closed: Counter[str] = field(default_factory=Counter)
    inside: Counter[FakePipeline] = field(default_factory=Counter)
    on_step: Callable[[str, int], None] | None = None

    def hold(self, prompt: str) -> Hold:
        self.holds[prompt] = Hold()
        return self.holds[prompt]

    def open(self, device: str) -> FakePipeline:
        if device in self.unopenable:
            raise self.unopenable[device]
        self.opened[device] += 1
        return FakePipeline(self, device)


class FakePipeline:
    def __init__(self, world: World, device: str) -> None:
        self.world, self.device, self.is_closed = world, device, False

    def resolve(self, request: Request) -> ResolvedRequest:
        return resolve_request(request, self.world.manifest, "fake")

    def check_noise(self, request: ResolvedRequest, latents: np.ndarray) -> None:
        raise AssertionError("nobody passes noise to this one")

    def stream(
        self,
        request: Request,
        *,
        latents: np.ndarray | None = None,
        save_latents: str | Path | None = None,
        stop: Stop | None = None,
        previews: bool = False,
    ) -> Generator[Event, None, None]:
        world, resolved = self.world, self.resolve(request)
        assert stop is not None
        assert latents is None
        assert not self.is_closed
        world.inside[self] += 1
        try:
            assert world.inside[self] == 1, "two jobs in one pipeline"
            stop.check("its first stage")
            world.ran.append(request.prompt)
            if self.device in world.broken:
                raise world.broken[self.device]
            for step in range(resolved.steps):
                stop.check(f"step {step + 1} of {resolved.steps}")
                if world.on_step is not None:
                    world.on_step(self.device, step)
                if step == 0 and request.prompt in world.holds:
                    world.holds[request.prompt].here()
                if request.prompt in world.failures:
                    raise world.failures[request.prompt]
                yield Progress("sampling", step + 1, resolved.steps)
            for frame in range(resolved.shape.frames):
                stop.check(f"frame {frame}")
                value = np.float32((request.seed + frame) % 256 / 255)
                yield Frames(frame, np.full((1, resolved.shape.height, resolved.shape.width, 3), value))
        finally:
            world.inside[self] -= 1

    def close(self) -> None:
        self.is_closed = True
        self.world.closed[self.device] += 1


def small(prompt: str, seed: int = 0, steps: int = 2, frames: int = 5) -> Request:
    return Request(prompt, 16, 16, frames, steps, seed)


def expected_frames(request: Request) -> np.ndarray:
    assert request.frames is not None
    rows = [np.full((16, 16, 3), (request.seed + frame) % 256, np.uint8) for frame in range(request.frames)]
    return np.stack(rows)


def engine_error(text: str = "stage 'dit' failed.") -> EngineError:
    return EngineError(text)
