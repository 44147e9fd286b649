"""The backend over replicas that say what a test wants; no Ray is needed."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from reelforge.runtime import errors
from reelforge.runtime.errors import (
    BundleError,
    CancelledError,
    EngineError,
    OutOfMemoryError,
    ReelforgeError,
    RequestError,
)
from reelforge.runtime.events import Progress
from reelforge.runtime.request import Request
from reelforge.runtime.sampling import SamplingError
from reelforge.tools import console
from reelforge.tools.serve_ray import replica_range, serve_ray
from reelforge.tools.service.backend import Told
from reelforge.tools.service.settings import Settings
from reelforge.tools.service_ray import ray_backend as module
from reelforge.tools.service_ray.messages import Began, Failed, Finished, Message, Piece
from reelforge.tools.service_ray.ray_backend import MOST_LOSSES, RayBackend
from reelforge.tools.service_ray.replica import PipelineReplica
from tests.runtime.fake_bundle import write_fake_bundle

REQUEST = Request("a ball", height=32, width=48, frames=5, steps=3)


class LostError(Exception):
    pass


class EndedError(Exception):
    pass


class FakeCall:
    def __init__(self, said: list[Message | Exception]) -> None:
        self.said = said
        self.ended = threading.Event()

    def __iter__(self) -> Iterator[list[Message]]:
        for one in self.said:
            if isinstance(one, Exception):
                raise one
            yield [one]
        if self.said and isinstance(self.said[-1], Progress):
            self.ended.wait(10)
            raise EndedError

    def cancel(self) -> None:
        self.ended.set()


class FakeReplicas:
    def __init__(self, *answers: list[Message | Exception]) -> None:
        self.answers = list(answers)
        self.calls: list[FakeCall] = []

    def open(self) -> None:
        pass

    def make(self, request: Request, digest: str, kept: str) -> FakeCall:
        assert Path(kept).is_dir()
        self.calls.append(FakeCall(self.answers.pop(0)))
        return self.calls[-1]

    def is_lost(self, error: Exception) -> bool:
        return isinstance(error, LostError)

    def is_cancelled(self, error: Exception) -> bool:
        return isinstance(error, EndedError)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    path = tmp_path_factory.mktemp("bundle") / "fake.bundle"
    write_fake_bundle(path)
    return Settings(path, path.parent / "data", threads=1, previews=False)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE_S", 0.0)


def run(
    settings: Settings, folder: Path, replicas: FakeReplicas, cancelled: threading.Event | None = None
) -> list[Told]:
    backend = RayBackend(settings, replicas, 2)
    backend.open()
    told: list[Told] = []
    arguments = (cancelled or threading.Event(), folder / "out.mp4", folder / "kept")
    backend.run("video_1", REQUEST, told.append, *arguments)
    return told


PROGRESS = Progress("sampling", 1, 3)


def test_a_video_in_pieces(settings: Settings, tmp_path: Path) -> None:
    replicas = FakeReplicas([Began("here", 1), PROGRESS, Piece(b"ab"), Piece(b"c"), Finished(3)])
    assert run(settings, tmp_path, replicas) == [PROGRESS]
    assert (tmp_path / "out.mp4").read_bytes() == b"abc"


def test_losses(settings: Settings, tmp_path: Path) -> None:
    """What a lost replica has left is not in the video; a job that replicas never survive ends."""
    replicas = FakeReplicas([Piece(b"xyz"), LostError()], [LostError()], [Piece(b"a"), Finished(1)])
    run(settings, tmp_path, replicas)
    assert (tmp_path / "out.mp4").read_bytes() == b"a"
    with pytest.raises(EngineError, match=f"{MOST_LOSSES} replicas were lost while they computed this video"):
        run(settings, tmp_path, FakeReplicas(*[[PROGRESS, LostError("gone")] for _ in range(MOST_LOSSES)]))
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([Piece(b"ab"), Finished(3)], "a video came incomplete from its replica"),
        ([Began("here", 1)], "a replica ended without a word about the job"),
        ([Failed("OutOfMemoryError", "too little.", None, "", "")], "too little"),
    ],
)
def test_no_video(settings: Settings, tmp_path: Path, said: list[Message | Exception], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        run(settings, tmp_path, FakeReplicas(said))
    assert not (tmp_path / "out.mp4").exists()


def test_cancelling(settings: Settings, tmp_path: Path) -> None:
    cancelled, replicas = threading.Event(), FakeReplicas([PROGRESS])
    threading.Timer(0.1, cancelled.set).start()
    with pytest.raises(CancelledError):
        run(settings, tmp_path, replicas, cancelled)
    assert replicas.calls[0].ended.is_set()


def test_a_disk_without_room(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "out.mp4").mkdir()
    with pytest.raises((ReelforgeError, OSError), match=r"cannot be written|directory"):
        run(settings, tmp_path, FakeReplicas([Finished(0)]))


def test_errors_survive_the_way() -> None:
    import numpy as np

    late = SamplingError("step 3 failed", 2, np.zeros(1), received=[1], expected="more", fix="less")
    again = Failed.of(late).error()
    assert (type(again), again.where, again.received) == (EngineError, "step 3 failed", "[1]")
    for kind in (RequestError, OutOfMemoryError, errors.DeadlineError):
        assert type(Failed.of(kind("x")).error()) is kind
    assert str(again).splitlines()[1:] == ["  received: [1]   expected: more", "  fix: less"]


def made(replica: PipelineReplica, digest: str, kept: Path, last: int | None = None) -> list[Message]:
    async def collect() -> list[Message]:
        found: list[Message] = []
        calls = replica.make(replace(REQUEST, steps=3 if last is None else 20_000), digest, str(kept))
        async for batch in calls:
            found += batch
            if last is not None and len(found) >= last:
                break
        await calls.aclose()
        return found

    return asyncio.run(collect())


def test_a_replica(settings: Settings, tmp_path: Path) -> None:
    """Another bundle is refused; who stops listening stops the work, and its latents are kept where they can be."""
    replica = PipelineReplica(settings)
    digest = replica._pipeline.bundle.manifest.content_digest
    said = made(replica, digest, tmp_path / "nowhere")
    assert isinstance(said[0], Began)
    finished = said[-1]
    assert isinstance(finished, Finished)
    assert sum(len(one.data) for one in said if isinstance(one, Piece)) == finished.size_bytes
    failed = made(replica, "another", tmp_path / "nowhere")[-1]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error(), BundleError)
    assert "is not the one that the service has" in failed.where
    (tmp_path / "kept").mkdir()
    made(replica, digest, tmp_path / "kept", last=8)
    assert list((tmp_path / "kept").glob("*.step-*.npy"))
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(("text", "expected"), [("1", (1, 1)), ("0..3", (0, 3)), ("2..16", (2, 16))])
def test_ranges(text: str, expected: tuple[int, int]) -> None:
    assert replica_range(text) == expected


@pytest.mark.parametrize("text", ["", "x", "0", "3..2", "-1..2", "1..x"])
def test_ranges_that_cannot_be(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        console.run(serve_ray, ["some.bundle", f"--replicas={text}"])
    assert caught.value.code == 2
    assert "--replicas cannot be read" in capsys.readouterr().err


def test_what_cannot_be_served(settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as nobody:  # bound, and not listening
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(SystemExit) as caught:
            console.run(serve_ray, [str(settings.bundle), "--data", str(tmp_path / "data"), "--address", address])
    assert caught.value.code == 2
    assert "there is no Ray cluster to connect to" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        console.run(serve_ray, [str(tmp_path / "no.bundle")])
    assert caught.value.code == 4
    assert "is not a bundle" in capsys.readouterr().err
