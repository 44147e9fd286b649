"""The backend over replicas that say what a test wants; no Ray is needed."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from reelforge.runtime import errors
from reelforge.runtime.errors import (
    BundleError,
    CancelledError,
    EngineError,
    OutOfMemoryError,
    OutputError,
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
    began = Began("here", 1)
    replicas = FakeReplicas([began, Piece(b"xyz"), LostError()], [LostError()], [began, Piece(b"a"), Finished(1)])
    run(settings, tmp_path, replicas)
    assert (tmp_path / "out.mp4").read_bytes() == b"a"
    with pytest.raises(EngineError, match=f"{MOST_LOSSES} replicas were lost while they computed this video"):
        run(settings, tmp_path, FakeReplicas(*[[began, PROGRESS, LostError("gone")] for _ in range(MOST_LOSSES)]))
    assert not (tmp_path / "out.mp4").exists()


def test_no_replica_takes_it(settings: Settings, tmp_path: Path) -> None:
    """A cluster without replicas for a while costs no job: it waits, and is not held to be the reason."""
    away: list[list[Message | Exception]] = [[LostError()] for _ in range(4 * MOST_LOSSES)]
    run(settings, tmp_path, FakeReplicas(*away, [Began("here", 1), Piece(b"a"), Finished(1)]))
    assert (tmp_path / "out.mp4").read_bytes() == b"a"


def test_cancelling_while_no_replica_takes_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAUSE_S", 60.0)
    cancelled = threading.Event()
    threading.Timer(0.1, cancelled.set).start()
    with pytest.raises(CancelledError):
        run(settings, tmp_path, FakeReplicas([LostError()]), cancelled)


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


def test_a_call_that_ends_when_it_is_cancelled(settings: Settings, tmp_path: Path) -> None:
    """Whether Ray raises something or says no more: who cancelled it hears that it was."""
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(CancelledError):
        run(settings, tmp_path, FakeReplicas([Began("here", 1)]), cancelled)


@pytest.mark.parametrize("folder", [False, True])
def test_a_disk_without_room(settings: Settings, tmp_path: Path, folder: bool) -> None:
    if folder:
        (tmp_path / "out.mp4").mkdir()
    else:
        (tmp_path / "out.mp4").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="the video cannot be written: "):
        run(settings, tmp_path, FakeReplicas([Began("here", 1), Piece(b"abc"), Finished(3)]))


def test_what_a_call_raises_is_no_error_of_the_disk(settings: Settings, tmp_path: Path) -> None:
    """Ray's timeouts are OSErrors."""
    with pytest.raises(TimeoutError, match="nobody answered"):
        run(settings, tmp_path, FakeReplicas([Began("here", 1), TimeoutError("nobody answered")]))
    assert not (tmp_path / "out.mp4").exists()


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


class FakeCluster(ModuleType):
    """What ``serve_ray`` needs of ``cluster``; deploying takes as long as nobody interrupts it."""

    def __init__(self, deploying: Callable[[], None]) -> None:
        super().__init__("cluster")
        self.done: list[str] = []
        self.deploying = deploying

    def Scale(self, *_: object) -> None:
        pass

    def connect(self, _: str | None) -> None:
        self.done.append("connect")

    def deploy(self, _settings: Settings, _scale: None, _notice: object) -> None:
        self.deploying()
        self.done.append("deploy")

    def end(self) -> None:
        self.done.append("end")


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def served(settings: Settings, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(sys.modules, "reelforge.tools.service_ray.cluster", cluster)
    with pytest.raises(SystemExit) as caught:
        console.run(serve_ray, [str(settings.bundle), "--data", str(settings.data)])
    return int(str(caught.value.code))


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_can_be_ended_while_it_waits_for_replicas(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """A cluster without a GPU has none later either; a service that is up is ended without a word of interruption."""

    def never() -> None:
        signal.raise_signal(number)
        time.sleep(30)

    waiting = FakeCluster(never)
    assert served(settings, waiting, monkeypatch) == console.INTERRUPTED
    assert waiting.done == ["connect", "end"]
    up = FakeCluster(lambda: threading.Timer(0.3, signal.raise_signal, [number]).start())
    assert served(settings, up, monkeypatch) == 0
    assert up.done == ["connect", "deploy", "end"]


@pytest.mark.usefixtures("handlers")
def test_errors_that_say_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def silent() -> None:
        raise RuntimeError

    assert served(settings, FakeCluster(silent), monkeypatch) == EngineError.exit_code
    assert "received: RuntimeError" in capsys.readouterr().err
