"""The one seam between jobs and what computes them.

A backend knows bundles and devices; it knows neither HTTP nor the jobs' store. ``pool_backend`` is the one of this
machine; a backend that hands jobs to other processes implements the same five methods and ``capacity``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from reelforge.runtime.errors import EngineError, RequestError
from reelforge.runtime.events import Notice, Progress
from reelforge.runtime.manifest import Manifest
from reelforge.runtime.request import (
    MAX_FRAMES,
    MAX_SIDE,
    Request,
    ResolvedRequest,
    default_shape,
    resolve_request,
)

Told = Progress | Notice
"""What a job says besides its frames, which go into the file."""

OnEvent = Callable[[Told], None]


class BackendLostError(EngineError):
    """Nothing can be computed any longer. The job is not to blame, and goes back to the queue."""


@dataclass(frozen=True)
class Facts:
    """What the bundle offers, for ``GET /v1/limits``.

    Attributes:
        model: The bundle's name, for people.
        digest: The bundle's content digest: the same digest computes the same videos.
        sizes: Width and height of each shape, if the bundle has only these.
        smallest: Width and height.
        largest: Width and height.
        multiple: Of width and height.
        frames: Least, most, and ``multiple k + offset``.
        width: The default.
        height: The default.
        default_frames: The default.
        steps: The default.
        guidance: Whether the model takes an embedded guidance scale.
        cfg: Whether ``cfg_scale`` and a negative prompt are supported.
        step_cache: Whether the bundle has the stages for step caching.
        frames_per_second: Of the videos.
    """

    model: str
    digest: str
    sizes: tuple[tuple[int, int], ...] | None
    smallest: tuple[int, int]
    largest: tuple[int, int]
    multiple: int
    frames: tuple[int, int]
    frames_multiple: int
    frames_offset: int
    width: int
    height: int
    default_frames: int
    steps: int
    guidance: bool
    cfg: bool
    step_cache: bool
    frames_per_second: int


class Backend(Protocol):
    """Computes jobs. Every method may be called from any thread."""

    @property
    def capacity(self) -> int:
        """How many calls of :meth:`run` are useful at once; it may change."""
        ...

    def open(self) -> None:
        """Load what is needed; slow, called once, and before everything else.

        Raises:
            ReelforgeError: If it cannot work at all.
        """
        ...

    def close(self, drain_s: float) -> None:
        """Give everything back; calls of :meth:`run` that go on after ``drain_s`` seconds are ended."""
        ...

    def describe(self) -> Facts:
        """Return what the bundle offers."""
        ...

    def check(self, request: Request) -> ResolvedRequest:
        """Check a request whole; quick.

        Raises:
            RequestError: Listing everything that the bundle does not support.
        """
        ...

    def run(
        self, job_id: str, request: Request, on_event: OnEvent, cancelled: threading.Event, output: Path, kept: Path
    ) -> None:
        """Compute a job and write the finished mp4 to ``output``; returns when that is done.

        Args:
            job_id: For messages.
            request: What :meth:`check` accepted.
            on_event: Told about progress and notices, in order, from one thread at a time. The first call means that
                work has begun. What it raises ends the job.
            cancelled: Ends the job before its next unit of work; what was computed so far is kept in ``kept``.
            output: A name of its own that ends in ``.mp4``; nothing else is left there.
            kept: A folder of the job's own, which may not exist yet, for latents that a later call for the same job
                goes on with. Whoever calls removes it in the end.

        Raises:
            CancelledError: If ``cancelled`` was set.
            BackendLostError: If this backend will not compute anything again.
            ReelforgeError: Why there is no video.
        """
        ...


def facts_of(manifest: Manifest, name: str) -> Facts:
    """Return what a bundle offers."""
    spec, shapes = manifest.spec, manifest.recipe.shapes
    multiple, offset, temporal = spec.pixel_multiple, 1, spec.vae.temporal_compression
    default = default_shape(manifest)
    side = MAX_SIDE // multiple * multiple
    most = (MAX_FRAMES - offset) // temporal * temporal + offset
    single = manifest.target.backend.has_plans and bool(shapes)
    return Facts(
        model=name,
        digest=manifest.content_digest,
        sizes=tuple(dict.fromkeys((shape.width, shape.height) for shape in shapes)) if single else None,
        smallest=(
            min((shape.width for shape in shapes), default=multiple),
            min((shape.height for shape in shapes), default=multiple),
        ),
        largest=(
            max((shape.width for shape in shapes), default=side),
            max((shape.height for shape in shapes), default=side),
        ),
        multiple=multiple,
        frames=(1, max((shape.frames for shape in shapes), default=most)),
        frames_multiple=temporal,
        frames_offset=offset,
        width=default.width,
        height=default.height,
        default_frames=default.frames,
        steps=spec.defaults.steps,
        guidance=spec.dit.guidance_embedding,
        cfg=manifest.stage("guidance") is not None,
        step_cache=manifest.stage("step_reuse") is not None,
        frames_per_second=spec.defaults.frames_per_second,
    )


def check_on(manifest: Manifest, name: str, request: Request) -> ResolvedRequest:
    """Check a request against a bundle's manifest, and that its video fits into an mp4 file.

    Raises:
        RequestError: Listing everything that is not supported.
    """
    resolved = resolve_request(request, manifest, name)
    if resolved.shape.width % 2 or resolved.shape.height % 2:
        raise RequestError(
            "H.264 in an mp4 file needs an even height and width.",
            received=f"{resolved.shape.width}x{resolved.shape.height}",
            expected="even numbers",
        )
    return resolved


def work_of(request: ResolvedRequest) -> float:
    """Return the work that a request is, in steps times pixels: what callers' shares are counted in."""
    evaluations = request.steps * (1 if request.negative_prompt is None else 2)
    return float(evaluations * request.shape.frames * request.shape.height * request.shape.width)
