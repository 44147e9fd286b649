"""Memory of the output path does not grow with the video's length, and engines that wait hold little but weights."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import tracemalloc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reelforge.runtime import Frames, Stop, VideoWriter
from reelforge.runtime.decode import decoding
from tests.runtime.fake_bundle import CHANNELS, SPEC


class NumpyDecoder:
    """Repeats pixels and frames; it allocates its result and nothing else that is large."""

    def run(self, inputs: dict[str, np.ndarray], outputs: object = None) -> dict[str, np.ndarray]:
        _, _, frames, height, width = inputs["latent_tile"].shape
        return {"frame_tile": np.full((1, 3, (frames - 1) * 4 + 1, height * 8, width * 8), 0.5, np.float32)}


def peak_bytes(latent_frames: int, path: Path | None) -> tuple[int, int]:
    """Return the peak of a decode into a file, or to nowhere, and how many frames there were."""
    latents = np.zeros((1, CHANNELS, latent_frames, 9, 12), np.float32)
    engine: Any = NumpyDecoder()
    count = 4 * (latent_frames - 1) + 1
    seen = 0
    gc.collect()
    tracemalloc.start()
    try:
        with nullcontext() if path is None else VideoWriter(path, 72, 96, count, 24) as video:
            for event in decoding(latents, lambda: nullcontext(engine), SPEC, Stop(), lambda: False):
                if isinstance(event, Frames):
                    seen += len(event.values)
                    if video is not None:
                        video.write(event.pixels)
        assert seen == count
        return tracemalloc.get_traced_memory()[1], seen
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", [None, "a.mp4"])
def test_the_output_path_is_as_large_for_long_videos(tmp_path: Path, name: str | None) -> None:
    path = None if name is None else tmp_path / name
    peak_bytes(3, path)  # imports and caches
    peaks = [peak_bytes(count, path)[0] for count in (6, 17, 33, 65)]
    assert max(peaks) < 1.02 * min(peaks), peaks
    frame = 72 * 96 * 3 * 4
    window = (SPEC.tiling.frame_window * 4 + 1) * frame
    assert max(peaks) < 3 * window, "a window, what fades into the next, and the tiles beside it"
    assert 257 * frame > 10 * max(peaks), "else the longest video would prove nothing"


HELD = """
    import gc, sys
    import numpy as np
    from reelforge.runtime import Pipeline
    from reelforge.runtime.host_memory import anonymous_bytes, return_freed
    pipeline = Pipeline.open(sys.argv[1], threads=1, memory_budget="10GB")
    small, large = (np.zeros((1, 4, 2, side, side), np.float32) for side in (4, 128))
    kept = []
    with pipeline.engine("vae_decoder") as engine:
        kept.append(engine.run({"latent_tile": small})["frame_tile"])
        before = anonymous_bytes()
        for _ in range(3):  # 5 x 1024 x 1024 pixels: 63 MB per tensor
            kept[:] = [engine.run({"latent_tile": large})["frame_tile"]]
        gc.collect()
        print(anonymous_bytes() - before - kept[0].nbytes)
    kept.clear()
    pipeline.close()
    print(anonymous_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_engine_that_waits_holds_nothing_but_what_it_gave(fake_bundle: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(HELD), str(fake_bundle)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    waiting, closed = map(int, result.stdout.split())
    assert waiting < 20e6
    assert closed < 5e6
