"""What goes wrong around the service: disks, locks, clocks, bundles, sudden ends."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from reelforge.runtime.errors import CancelledError, OutputError
from reelforge.tools.service.application import create_application
from reelforge.tools.service.backend import BackendLostError
from reelforge.tools.service.pool_backend import PoolBackend
from reelforge.tools.service.settings import Settings
from reelforge.tools.service.store import Record, Store
from reelforge.tools.service.videos import Videos
from tests.tools.service.conftest import Serve
from tests.tools.service.fake_backend import WAIT_S, FakeBackend
from tests.tools.service.waiting import SMALL, ended, submit, wait_until


def files(settings: Settings) -> list[str]:
    return sorted(path.name for path in settings.data.rglob("*") if path.is_file() and "jobs" not in path.name)


def test_a_disk_that_fills_up(serve: Serve, backend: FakeBackend, settings: Settings) -> None:
    def fill(output: Path) -> None:
        output.write_bytes(b"half")
        raise OutputError("the video cannot be written.") from OSError(errno.ENOSPC, "No space left on device")

    client = serve()
    backend.before_output = fill
    job = ended(client, submit(client))
    assert (job["status"], job["error"]["code"]) == ("failed", "storage_full")
    assert files(settings) == ["lock"], "nothing half-written is left"
    backend.before_output = None
    assert ended(client, submit(client))["status"] == "completed"


def test_publishing_on_a_full_disk(serve: Serve, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve()

    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    with monkeypatch.context() as patch:
        patch.setattr("reelforge.tools.service.videos.Path.replace", full)
        job = ended(client, submit(client))
    assert (job["status"], job["error"]["code"]) == ("failed", "storage_full")
    assert str(settings.data) not in job["error"]["message"]
    assert files(settings) == ["lock"]


def test_jobs_wait_for_room(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    room = [10]
    monkeypatch.setattr(Videos, "free_bytes", lambda _: room[0])
    client = serve(least_free_bytes=100)
    job_id = submit(client)
    wait_until(lambda: "room" in client.get("/readyz").json()["detail"])
    assert client.get(f"/v1/videos/{job_id}").json()["status"] == "queued"
    room[0] = 1000
    assert ended(client, job_id)["status"] == "completed"


def test_a_locked_database(serve: Serve, backend: FakeBackend, settings: Settings) -> None:
    client = serve(busy_s=0.1)
    hold = backend.hold("held")
    job_id = submit(client, "held")
    assert hold.entered.wait(WAIT_S)
    wait_until(lambda: client.get(f"/v1/videos/{job_id}").json()["status"] == "running")
    other = sqlite3.connect(settings.data / "jobs.sqlite3", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    answer = client.post("/v1/videos", json=SMALL)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "busy")
    assert int(answer.headers["retry-after"]) >= 1
    assert client.get(f"/v1/videos/{job_id}").status_code == 200, "reading goes on"
    hold.released.set()
    time.sleep(0.5)
    assert client.get(f"/v1/videos/{job_id}").json()["status"] == "running"
    other.execute("ROLLBACK")
    other.close()
    assert ended(client, job_id)["status"] == "completed", "its end was written when that was possible"


def test_a_locked_database_does_not_silence_the_service(serve: Serve, settings: Settings) -> None:
    client = serve(busy_s=3.0)
    other = sqlite3.connect(settings.data / "jobs.sqlite3", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    answers: list[int] = []
    ask = lambda: answers.append(client.post("/v1/videos", json=SMALL).status_code)  # noqa: E731
    callers = [threading.Thread(target=ask) for _ in range(48)]  # more than there are threads for requests
    for caller in callers:
        caller.start()
    time.sleep(0.5)
    began = time.monotonic()
    for path in ("/healthz", "/readyz", "/v1/limits"):
        assert client.get(path).status_code == 200
    assert time.monotonic() - began < 1.5, "whoever asks whether the process is alive would end it"
    assert not answers
    other.execute("ROLLBACK")
    other.close()
    for caller in callers:
        caller.join(WAIT_S)
    assert set(answers) <= {202, 429, 503}


def test_a_folder_that_cannot_be_asked_for_room(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    client = serve(least_free_bytes=1)
    with monkeypatch.context() as patch:
        patch.setattr("reelforge.tools.service.videos.shutil.disk_usage", fails)
        job_id = submit(client)
        wait_until(lambda: "room" in client.get("/readyz").json()["detail"])
        assert "reelforge_store_free_bytes 0.0" in client.get("/metrics").text
    assert ended(client, job_id)["status"] == "completed"


@pytest.mark.parametrize("where", ["complete", "capacity"])
def test_a_bug_below_a_thread_ends_the_service(
    serve: Serve, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def damaged(*_: object) -> bool:
        raise sqlite3.DatabaseError("database disk image is malformed")

    client = serve()
    told: list[str] = []
    service = client.app.state.service  # type: ignore[attr-defined]
    service.on_failure = lambda error: told.append(str(error))
    if where == "complete":
        monkeypatch.setattr(Store, "complete", damaged)
        submit(client)
    else:
        monkeypatch.setattr(FakeBackend, "capacity", property(damaged))
        submit(client)
    wait_until(lambda: told)
    assert "could not go on: DatabaseError" in told[0]
    wait_until(lambda: client.get("/readyz").json()["status"] == "failed")
    assert client.post("/v1/videos", json=SMALL).status_code == 503


def test_a_video_is_on_the_disk_before_it_is_published(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    videos, said, real = Videos(settings.data), [], os.fsync
    job_id = "video_" + "a" * 32

    def flush(handle: int) -> None:
        said.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        real(handle)

    monkeypatch.setattr(os, "fsync", flush)
    output = videos.unfinished(job_id, 1)
    output.write_bytes(b"whole")
    videos.publish(job_id, output)
    assert said == ["1.mp4", "videos"], "the file before it has its name, the folder afterwards"
    videos.close()


def test_a_job_past_its_deadline_is_not_asked_again_and_again(serve: Serve, backend: FakeBackend) -> None:
    client = serve()
    reached, released = threading.Event(), threading.Event()

    def stuck(_: str, step: int) -> None:  # a unit of work that goes on for long after the deadline
        reached.set()
        assert released.wait(WAIT_S)

    backend.on_step = stuck
    job_id = submit(client, deadline_s=0.1)
    assert reached.wait(WAIT_S)
    dispatcher = client.app.state.service._dispatcher  # type: ignore[attr-defined]
    time.sleep(0.3)
    with dispatcher._changed:
        assert dispatcher._until_next_s() == 1.0
    released.set()
    assert ended(client, job_id)["error"]["code"] == "deadline"


def test_a_short_lock_is_waited_for(serve: Serve, settings: Settings) -> None:
    client = serve(busy_s=5.0)
    other = sqlite3.connect(settings.data / "jobs.sqlite3", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(0.3, lambda: other.execute("ROLLBACK")).start()
    assert ended(client, submit(client))["status"] == "completed"
    other.close()


def test_a_clock_that_jumps(serve: Serve, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve(retention_s=1000.0)
    done = submit(client)
    first = ended(client, done)
    hold = backend.hold("held")
    held = submit(client, "held", deadline_s=1000.0)
    assert hold.entered.wait(WAIT_S)
    real = time.time
    for jump_s in (1e9, -1e9):
        monkeypatch.setattr(time, "time", lambda jump_s=jump_s: real() + jump_s)
        client.app.state.service._sweeper.sweep()  # type: ignore[attr-defined]
        assert client.get(f"/v1/videos/{done}/content").status_code == 200
        assert client.get(f"/v1/videos/{held}").json()["status"] == "running"
        new = client.get(f"/v1/videos/{submit(client)}").json()
        assert 0 <= new["created_at"] - first["created_at"] < 60
    hold.released.set()
    assert ended(client, held)["status"] == "completed"


def test_a_clock_that_was_set_back_while_the_service_was_down(
    settings: Settings, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TestClient(create_application(settings, backend)) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        before = ended(client, submit(client))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 1e8)
    with TestClient(create_application(settings, backend)) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert ended(client, submit(client))["created_at"] >= before["finished_at"]


def test_retention(serve: Serve, settings: Settings) -> None:
    client = serve(retention_s=0.3, record_s=1.0)
    job_id = submit(client)
    job = ended(client, job_id)
    assert job["expires_at"] == pytest.approx(job["finished_at"] + 0.3)
    wait_until(lambda: client.get(f"/v1/videos/{job_id}/content").status_code == 410)
    assert not (settings.data / "videos" / f"{job_id}.mp4").exists()
    wait_until(lambda: client.get(f"/v1/videos/{job_id}").status_code == 404)


def test_a_backend_that_is_lost_keeps_its_jobs(serve: Serve, settings: Settings, backend: FakeBackend) -> None:
    client = serve()
    backend.failures["bad"] = BackendLostError("all pipelines of this pool were retired.")
    hold = backend.hold("bad")
    job_id = submit(client, "bad")
    assert hold.entered.wait(WAIT_S)
    waits = submit(client)
    hold.released.set()
    wait_until(lambda: client.get("/readyz").json()["status"] == "failed")
    for one in (job_id, waits):
        wait_until(lambda one=one: client.get(f"/v1/videos/{one}").json()["status"] == "queued")
    client.__exit__(None, None, None)
    backend.failures.clear()
    with TestClient(create_application(settings, backend)) as again:
        assert {ended(again, one)["status"] for one in (job_id, waits)} == {"completed"}


@pytest.fixture
def left(settings: Settings) -> tuple[Settings, Store, str]:
    """A folder as a process leaves it that is killed while a job runs."""
    videos = Videos(settings.data)
    store = Store(videos.database)
    said = {
        "prompt": "a ball", "negative_prompt": None, "size": "32x16", "frames": 5, "steps": 3, "seed": 1,
        "guidance": None, "cfg_scale": None, "step_cache": None, "priority": 0, "deadline_s": None,
    }  # fmt: skip
    record = Record(0, "video_" + "a" * 32, "anyone", "queued", said, 1.0, 0, None, time.time())
    assert isinstance(store.add(record, 9, 9), Record)
    assert store.begin(record.id, time.time()) == 1
    videos.unfinished(record.id, 1).write_bytes(b"half of a video")
    videos.close()
    return settings, store, record.id


def test_a_job_whose_process_was_killed_is_run_again(left: tuple[Settings, Store, str], backend: FakeBackend) -> None:
    settings, store, job_id = left
    store.close()
    with TestClient(create_application(settings, backend)) as client:
        job = ended(client, job_id)
        assert (job["status"], job["attempts"]) == ("completed", 2)
    assert backend.ran == ["a ball"]
    assert files(settings) == ["lock", f"{job_id}.mp4"]


def test_a_video_that_was_renamed_before_the_end_is_not_made_twice(
    left: tuple[Settings, Store, str], backend: FakeBackend
) -> None:
    settings, store, job_id = left
    store.close()
    (settings.data / "videos" / f"{job_id}.mp4").write_bytes(b"whole")
    (settings.data / "videos" / f"video_{'b' * 32}.mp4").write_bytes(b"of nobody")
    with TestClient(create_application(settings, backend)) as client:
        assert ended(client, job_id)["status"] == "completed"
        assert client.get(f"/v1/videos/{job_id}/content").content == b"whole"
    assert backend.ran == []
    assert files(settings) == ["lock", f"{job_id}.mp4"]


def test_a_job_that_ends_the_process_each_time_is_given_up(
    left: tuple[Settings, Store, str], backend: FakeBackend
) -> None:
    settings, store, job_id = left
    store.close()
    with TestClient(create_application(replace(settings, most_crashes=1), backend)) as client:
        job = ended(client, job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "gave_up")
    assert backend.ran == []


def test_a_late_end_of_an_earlier_attempt_changes_nothing(left: tuple[Settings, Store, str]) -> None:
    _, store, job_id = left
    assert store.crashed(job_id)
    assert store.begin(job_id, 5.0) == 2
    assert not store.complete(job_id, 1, 6.0, 7.0, 3)
    assert store.complete(job_id, 2, 6.0, 7.0, 3)
    for late in (store.complete(job_id, 2, 8.0, 9.0, 3), store.cancel(job_id, 8.0), store.fail(job_id, 8.0, "x", "y"),
                 store.put_back(job_id), store.crashed(job_id)):  # fmt: skip
        assert not late
    record = store.get(job_id)
    assert record is not None
    assert (record.status, record.finished_at) == ("completed", 6.0)
    store.close()


def test_a_database_of_another_version(settings: Settings, backend: FakeBackend) -> None:
    settings.data.mkdir()
    for content in (b"this is no database, but some text that is long enough" * 40, None):
        (settings.data / "jobs.sqlite3").unlink(missing_ok=True)
        if content is None:
            with sqlite3.connect(settings.data / "jobs.sqlite3") as database:
                database.execute("PRAGMA user_version = 99")
        else:
            (settings.data / "jobs.sqlite3").write_bytes(content)
        with pytest.raises(OutputError, match="the jobs cannot be kept"):
            create_application(settings, backend).state.service.start()


def test_a_bundle_that_is_damaged_while_it_is_served(
    serve: Serve, fake_bundle: Path, tmp_path: Path, settings: Settings
) -> None:
    bundle = Path(shutil.copytree(fake_bundle, tmp_path / "copy.bundle"))
    changed = replace(settings, bundle=bundle, memory_budget="least", threads=1)
    client = serve(PoolBackend(changed), bundle=bundle)
    assert ended(client, submit(client))["status"] == "completed"
    graph = bundle / "dit.onnx"
    graph.write_bytes(bytes([graph.read_bytes()[0] ^ 1]) + graph.read_bytes()[1:])
    job = ended(client, submit(client, seed=8))
    assert (job["status"], job["error"]["code"]) == ("failed", "bundle")
    assert str(tmp_path) not in job["error"]["message"]


def test_a_job_on_the_real_backend_is_cancelled_and_goes_on_elsewhere(
    fake_bundle: Path, settings: Settings, tmp_path: Path
) -> None:
    from reelforge.runtime import Request
    from reelforge.runtime.events import Progress

    backend = PoolBackend(replace(settings, bundle=fake_bundle, threads=1))
    backend.open()
    request = Request("a ball", 48, 64, 13, 2000, 3)
    cancelled, kept = threading.Event(), tmp_path / "kept"
    steps: list[int] = []

    def listen(event: object) -> None:
        if isinstance(event, Progress) and event.phase == "sampling":
            steps.append(event.step)
            if event.step == 10:
                cancelled.set()

    with pytest.raises(CancelledError):
        backend.run("x", request, listen, cancelled, tmp_path / "x.mp4", kept)
    assert not list(tmp_path.glob("*.mp4"))
    (latents,) = kept.iterdir()
    first = int(latents.stem.rpartition("-")[2])
    steps.clear()
    backend.run("x", request, lambda event: listen(event), threading.Event(), tmp_path / "x.mp4", kept)
    assert steps[0] == first + 1
    latents.write_bytes(b"damaged")
    (kept / latents.name.replace(f".step-{first}", "")).write_bytes(b"damaged too")
    steps.clear()
    small = replace(request, steps=4)
    backend.run("x", small, listen, threading.Event(), tmp_path / "y.mp4", kept)
    assert steps[0] == 1, "damaged latents cost the work and not the job"
    backend.close(0.0)
