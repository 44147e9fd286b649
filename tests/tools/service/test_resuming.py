"""A pipeline that goes on with kept latents, given noise of the caller's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reelforge.runtime import Pipeline, Request
from reelforge.runtime.control import Stop
from reelforge.runtime.errors import CancelledError, RequestError
from reelforge.runtime.events import Frames, Progress
from reelforge.tools.service.resuming import ResumingPipeline

REQUEST = Request("a ball", 32, 48, 13, 6, 3)


@pytest.mark.parametrize("stopped_at", [None, 3])
def test_the_noise_is_that_of_the_first_attempt(fake_bundle: Path, tmp_path: Path, stopped_at: int | None) -> None:
    noise = np.random.default_rng(5).standard_normal((1, 4, 4, 4, 6), np.float32)
    pipeline = Pipeline.open(fake_bundle, threads=1)
    resuming, saved, stop = ResumingPipeline(pipeline), tmp_path / "x.npy", Stop()
    expected = pipeline.generate(REQUEST, latents=noise)
    if stopped_at is not None:
        with pytest.raises(CancelledError):  # noqa: PT012 - it is stopped on its way
            for event in resuming.stream(REQUEST, latents=noise, save_latents=saved, stop=stop):
                if event == Progress("sampling", stopped_at, 6, getattr(event, "eta_s", None)):
                    stop.set(keep=True)
        assert saved.with_name(f"x.step-{stopped_at}.npy").exists()
    events = list(resuming.stream(REQUEST, latents=noise, save_latents=saved))
    frames = np.concatenate([event.pixels for event in events if isinstance(event, Frames)])
    np.testing.assert_array_equal(frames, expected)
    steps = [event.step for event in events if isinstance(event, Progress) and event.phase == "sampling"]
    assert steps == list(range(1 + (stopped_at or 0), 7))
    with pytest.raises(RequestError, match="do not fit the request"):
        resuming.check_noise(pipeline.resolve(REQUEST), noise[:, :-1])
    resuming.close()
