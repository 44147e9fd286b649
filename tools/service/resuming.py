"""A pipeline that goes on where an earlier attempt at the same job ended, if that has left latents.

The names are the runtime's: ``x.npy`` has final latents, to be decoded; ``x.step-7.npy`` those before step 7, counted
from 0. With step caching, whose history is not kept, a loop begins anew. The module knows no jobs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Generator, Sequence
from pathlib import Path

from reelforge.runtime.control import Stop
from reelforge.runtime.errors import RequestError
from reelforge.runtime.events import Event, FloatArray
from reelforge.runtime.latents_file import read_latents
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.request import Request, ResolvedRequest

_log = logging.getLogger(__name__)


class ResumingPipeline:
    """What a pool needs of a pipeline, with a memory for interrupted jobs.

    Args:
        pipeline: Computes; closed with this.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def resolve(self, request: Request) -> ResolvedRequest:
        """Check a request."""
        return self._pipeline.resolve(request)

    def check_noise(self, request: ResolvedRequest, latents: FloatArray) -> None:
        """Refuse noise that does not fit."""
        self._pipeline.check_noise(request, latents)

    def prepare(self, prompts: Sequence[str], stop: Stop | None = None) -> None:
        """Encode prompts of requests to come."""
        self._pipeline.prepare(prompts, stop)

    def close(self) -> None:
        """Give back engines and GPU."""
        self._pipeline.close()

    def stream(
        self,
        request: Request,
        *,
        latents: FloatArray | None = None,
        save_latents: str | Path | None = None,
        stop: Stop | None = None,
        previews: bool = False,
    ) -> Generator[Event, None, None]:
        """Generate, or go on with what an attempt left, which began with the same noise."""
        resolved = self.resolve(request)
        final = None if save_latents is None else Path(save_latents)
        kept, step = (None, 0) if final is None else self._kept(final, resolved)
        if kept is not None and step == resolved.steps:
            _log.info("a video is decoded from kept latents")
            return self._pipeline.stream_decode(kept, stop)
        if kept is not None:
            _log.info("sampling goes on at step %d of %d", step + 1, resolved.steps)
            latents = kept
        return self._pipeline.stream(request, latents, save_latents, stop, previews, step)

    def _kept(self, final: Path, request: ResolvedRequest) -> tuple[FloatArray | None, int]:
        """Return what an earlier attempt has left: latents, and how many steps they have behind them."""
        latents = self._read(final, request)
        if latents is not None:
            return latents, request.steps
        if request.step_cache is not None:
            return None, 0
        for step, path in sorted(_steps(final), reverse=True):
            latents = self._read(path, request) if 0 < step < request.steps else None
            if latents is not None:
                return latents, step
        return None, 0

    def _read(self, path: Path, request: ResolvedRequest) -> FloatArray | None:
        """Return latents that fit; a file that is damaged costs the work, not the job."""
        if not path.exists():
            return None
        shape = request.shape
        try:
            latents = read_latents(path)
        except RequestError as error:
            _log.warning("kept latents cannot be read, and are computed again: %s", error.where)
            return None
        expected = (1, *self._pipeline.spec.latent_shape(shape.height, shape.width, shape.frames))
        if latents.shape != expected:
            _log.warning("kept latents are not of this video, and are computed again")
            return None
        return latents


def _steps(final: Path) -> list[tuple[int, Path]]:
    pattern = re.compile(re.escape(final.stem) + r"\.step-([0-9]{1,9})" + re.escape(final.suffix))
    found = [(pattern.fullmatch(path.name), path) for path in final.parent.iterdir()]
    return [(int(match[1]), path) for match, path in found if match is not None]
