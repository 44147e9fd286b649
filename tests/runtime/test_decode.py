"""Decoding where memory is short: what was sampled and decoded is kept, tiles shrink, and events say so."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from reelforge.runtime import Frames, Notice, Pipeline, Progress, Request, Stop, decode
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.decode import DecodingError
from reelforge.runtime.engines.engine import Array, Engine, EngineOptions
from reelforge.runtime.errors import CancelledError, EngineError, NotFiniteError, OutOfMemoryError, RequestError
from reelforge.runtime.scheduling.health import blames_pipeline
from reelforge.runtime.spec import VaeTiling
from reelforge.runtime.tiling import TiledDecoder, plan_tiles, smaller_tiles
from tests.runtime.fake_bundle import CHANNELS, SPEC

REQUEST = Request("a ball", height=64, width=48, frames=13, steps=3, seed=3)


class WeakEngine:
    """Runs out of memory at tiles of more than ``limit`` latents, and at the calls named."""

    def __init__(self, engine: Engine, limit: int, failing: set[int], error: type[Exception]) -> None:
        self.name, self.inputs, self.outputs = engine.name, engine.inputs, engine.outputs
        self._engine, self._limit, self._failing, self._error = engine, limit, failing, error
        self.tiles: list[tuple[int, ...]] = []

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None] | None = None) -> dict[str, Array]:
        tile = inputs["latent_tile"]
        self.tiles.append(tile.shape[2:])
        fails = tile[0, 0].size > self._limit or len(self.tiles) in self._failing
        if fails and self._error is not NotFiniteError:
            raise self._error("there is no room.")
        result = self._engine.run(inputs, outputs)
        if fails:
            result["frame_tile"][0, 0, 0, 0, 0] = np.nan
        return result

    def close(self) -> None:
        self._engine.close()


class WeakPipeline(Pipeline):
    """A pipeline whose decoder is a :class:`WeakEngine`."""

    limit = 10**9
    failing: frozenset[int] = frozenset()
    error: type[Exception] = OutOfMemoryError
    weak: WeakEngine | None = None

    @contextmanager
    def engine(self, stage: str) -> Iterator[Engine]:
        with super().engine(stage) as engine:
            if stage == "vae_decoder":
                engine = self.weak = WeakEngine(engine, self.limit, set(self.failing), self.error)
            yield engine


@pytest.fixture
def weak(fake_bundle: Path) -> WeakPipeline:
    return WeakPipeline(Bundle.open(fake_bundle), EngineOptions(threads=1))


@pytest.fixture(scope="module")
def expected(fake_bundle: Path) -> np.ndarray:
    return Pipeline.open(fake_bundle, threads=1).generate(REQUEST)


def split(events: Iterator[object]) -> tuple[np.ndarray, list[str], list[Progress]]:
    frames, notices, progress = [], [], []
    for event in events:
        if isinstance(event, Frames):
            assert event.start == sum(len(batch) for batch in frames)
            frames.append(event.values)
        elif isinstance(event, Notice):
            notices.append(event.text)
        elif isinstance(event, Progress):
            progress.append(event)
    return np.concatenate(frames), notices, [step for step in progress if step.phase == "decoding"]


@pytest.mark.parametrize("error", [OutOfMemoryError, MemoryError])
def test_smaller_tiles_from_the_window_that_failed(
    weak: WeakPipeline, expected: np.ndarray, error: type[Exception]
) -> None:
    tiles = plan_tiles((4, 8, 6), SPEC.tiling)
    per_window = tiles.tiles // len(tiles.windows)
    assert (len(tiles.windows), per_window) == (3, 6)
    weak.error, weak.failing = error, frozenset({per_window + 2})  # the second tile of the second window
    frames, notices, progress = split(weak.stream(REQUEST))
    assert notices == [
        "there is too little memory to decode tiles of 32x32 pixels: from frame 6 on they are of 16x16, and the "
        "pictures differ a little from those of larger tiles"
    ]
    # The fake decoder works on single pixels, so that other tiles make another rounding and no other picture.
    np.testing.assert_array_equal(np.rint(frames * 255)[:5], expected[:5])
    np.testing.assert_allclose(np.rint(frames * 255), expected, atol=1)
    assert [step.step for step in progress] == list(range(1, len(progress) + 1))
    assert progress[-1].step == progress[-1].total
    assert weak.weak is not None
    assert {tile[1:] for tile in weak.weak.tiles[:per_window]} >= {(4, 4)}
    assert max(max(tile[1:]) for tile in weak.weak.tiles[per_window + 2 :]) == 2


def test_nothing_of_the_sampling_is_lost(weak: WeakPipeline, expected: np.ndarray, tmp_path: Path) -> None:
    weak.limit = 2
    with pytest.raises(DecodingError, match="decoding failed after 0 frames: there is no room") as caught:
        weak.generate(REQUEST)
    assert "Pipeline.decode(error.latents)" in str(caught.value)
    assert isinstance(caught.value.__cause__, OutOfMemoryError)
    with pytest.raises(DecodingError) as saved:
        weak.generate(REQUEST, save_latents=tmp_path / "x.npy")
    assert f"reelforge decode BUNDLE {tmp_path / 'x.npy'} -o out.mp4" in str(saved.value)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), caught.value.latents)
    weak.limit = 10**9
    frames = np.concatenate(list(weak.decode(caught.value.latents)))
    np.testing.assert_array_equal(np.rint(frames * 255), expected)


def test_any_failure_of_the_decoder_keeps_the_latents(weak: WeakPipeline) -> None:
    weak.error, weak.failing = EngineError, frozenset({8})
    with pytest.raises(DecodingError, match="after 5 frames") as caught:
        weak.generate(REQUEST)
    assert caught.value.frames == 5
    assert caught.value.latents.shape == (1, CHANNELS, 4, 8, 6)


def test_frames_that_are_not_finite_are_no_picture(weak: WeakPipeline, expected: np.ndarray) -> None:
    weak.error, weak.failing = NotFiniteError, frozenset({8})
    with pytest.raises(DecodingError, match=r"after 5 frames: stage 'vae_decoder' gave frames that are not") as caught:
        weak.generate(REQUEST)
    assert "1 NaN or infinite of " in str(caught.value)
    assert not blames_pipeline(caught.value)
    weak.failing = frozenset()
    frames = np.concatenate(list(weak.decode(caught.value.latents)))
    np.testing.assert_array_equal(np.rint(frames * 255), expected)


def test_progress_comes_with_each_tile(weak: WeakPipeline, expected: np.ndarray) -> None:
    calls = []
    for event in weak.stream(REQUEST):
        if isinstance(event, Progress) and event.phase == "decoding":
            assert weak.weak is not None
            calls.append(len(weak.weak.tiles) - event.step)
    assert len(calls) == 18
    assert set(calls) == {0}


class TileClock:
    """A clock that only tiles move: a second per pixel of a latent tile's area."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        run = WeakEngine.run

        def timed(engine: WeakEngine, inputs: Mapping[str, Array], outputs: None = None) -> dict[str, Array]:
            rows, columns = inputs["latent_tile"].shape[3:]
            self.now_s += rows * columns
            return run(engine, inputs, outputs)

        monkeypatch.setattr(WeakEngine, "run", timed)
        monkeypatch.setattr(decode, "time", SimpleNamespace(monotonic=lambda: self.now_s))


def test_the_time_left_is_that_of_tiles_so_far(weak: WeakPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = TileClock(monkeypatch)
    _, _, progress = split(weak.stream(REQUEST))
    assert weak.weak is not None
    seconds = np.cumsum([tile[1] * tile[2] for tile in weak.weak.tiles])
    assert clock.now_s == seconds[-1]
    expected = [float(spent / (n + 1) * (18 - n - 1)) for n, spent in enumerate(seconds)]
    assert [step.eta_s for step in progress] == pytest.approx(expected)
    assert progress[-1].eta_s == 0


def test_the_time_left_after_a_change_of_tiles_is_that_of_the_new_ones(
    weak: WeakPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    TileClock(monkeypatch)
    weak.failing = frozenset({8})  # the second tile of the second window
    _, _, progress = split(weak.stream(REQUEST))
    assert weak.weak is not None
    new = [step for step in progress if step.total != 18]
    seconds = np.cumsum([tile[1] * tile[2] for tile in weak.weak.tiles[8:]])
    assert len(new) == len(seconds) > 18
    left = [step.total - step.step for step in new]
    expected = [float(spent / (n + 1) * left[n]) for n, spent in enumerate(seconds)]
    assert [step.eta_s for step in new] == pytest.approx(expected)


def test_latents_can_be_decoded_alone(weak: WeakPipeline, expected: np.ndarray, tmp_path: Path) -> None:
    weak.generate(REQUEST, save_latents=tmp_path / "x.npy")
    frames, notices, progress = split(weak.stream_decode(np.load(tmp_path / "x.npy")))
    np.testing.assert_array_equal(np.rint(frames * 255), expected)
    assert (notices, len(progress)) == ([], 18)
    stop = Stop()
    stop.set()
    with pytest.raises(CancelledError):
        next(weak.stream_decode(np.load(tmp_path / "x.npy"), stop))


@pytest.mark.parametrize(
    ("latents", "words"),
    [
        (np.zeros((1, CHANNELS, 1, 4, 4)), "float64"),
        (np.zeros((CHANNELS, 1, 4, 4), np.float32), "[4, 1, 4, 4]"),
        (np.zeros((1, CHANNELS + 1, 1, 4, 4), np.float32), f"float32 [1, {CHANNELS}, frames, height, width]"),
        (np.zeros((1, CHANNELS, 0, 4, 4), np.float32), "[1, 4, 0, 4, 4]"),
        (np.full((1, CHANNELS, 1, 4, 4), np.nan, np.float32), "64 of 64 values"),
        ([0.0], "list"),
    ],
)
def test_latents_that_cannot_be_decoded(weak: WeakPipeline, latents: np.ndarray, words: str) -> None:
    with pytest.raises(RequestError, match="the latents are not") as caught:
        list(weak.decode(latents))
    assert words in str(caught.value)


def test_a_window_can_be_decoded_again() -> None:
    """After a failure anywhere in a window, its second decoding and all that follow are the same, bit for bit."""

    def decode(tile: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OutOfMemoryError("there is no room.")
        frames = np.concatenate([tile[:, :3, :1], np.repeat(tile[:, :3, 1:], 4, axis=2)], axis=2) * tile.mean()
        return frames.repeat(8, axis=3).repeat(8, axis=4)

    latents = np.random.default_rng(0).standard_normal((1, 4, 5, 6, 5)).astype(np.float32)
    calls = failing = 0
    whole = TiledDecoder(latents, decode, SPEC.tiling, SPEC.vae)
    expected = [frame for _ in whole.windows for frame in whole.window(SPEC.tiling) if frame is not None]
    for failing in range(1, calls + 1):  # noqa: B007 - read by decode
        calls = 0
        decoder = TiledDecoder(latents, decode, SPEC.tiling, SPEC.vae)
        frames: list[np.ndarray] = []
        while decoder.finished < len(decoder.windows):
            try:
                frames += [picture for picture in decoder.window(SPEC.tiling) if picture is not None]
            except OutOfMemoryError:
                continue
        assert len(frames) == len(expected)
        for ours, theirs in zip(frames, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_tiles_are_halved_twice_at_most() -> None:
    tiling = VaeTiling(tile=32, stride=24, frame_window=16, frame_stride=12)
    half = smaller_tiles(tiling, tiling, (33, 90, 160))
    assert half == VaeTiling(16, 12, 16, 12)
    quarter = smaller_tiles(half, tiling, (33, 90, 160))
    assert quarter == VaeTiling(8, 6, 16, 12)
    assert smaller_tiles(quarter, tiling, (33, 90, 160)) is None
    assert smaller_tiles(tiling, tiling, (33, 20, 18)) == VaeTiling(10, 7, 16, 12), "smaller than the picture"
    assert smaller_tiles(tiling, tiling, (1, 8, 8)) is None


LIMITED = """
    import resource, sys
    import numpy as np
    from reelforge.runtime import Notice, Pipeline, Request, Frames
    from reelforge.runtime.decode import DecodingError
    pipeline = Pipeline.open(sys.argv[1], threads=1)
    latents = np.zeros((1, 4, 1, 512, 512), np.float32)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    object.__setattr__(pipeline.spec.tiling, "tile", int(sys.argv[2]))
    object.__setattr__(pipeline.spec.tiling, "stride", int(sys.argv[2]) * 3 // 4)
    with pipeline.engine("vae_decoder"):
        pass
    resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[3]) * 2**20, resource.RLIM_INFINITY))
    try:
        for event in pipeline.stream_decode(latents):
            if isinstance(event, Notice):
                print(event.text)
            if isinstance(event, Frames):
                print(event.values.shape)
    except DecodingError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on the address space")
def test_a_process_that_really_has_too_little_memory(fake_bundle: Path) -> None:
    """ONNX Runtime's own failure: 4096 x 4096 pixels are 200 MB per tensor, of which the fake decoder has three."""

    def run(tile: int, megabytes: int) -> str:
        command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(fake_bundle), str(tile), str(megabytes)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    words = run(512, 900)
    assert "there is too little memory to decode tiles of 4096x4096 pixels: from frame 1 on" in words
    assert words.endswith("(1, 4096, 4096, 3)\n")
    assert "DecodingError: decoding failed after 0 frames" in run(512, 100)
