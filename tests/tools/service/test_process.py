"""The real service in a process: killed, drained, restarted; its jobs survive and are done once."""

from __future__ import annotations

import random
import shutil
import sqlite3
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from reelforge.runtime import Pipeline, Request
from reelforge.runtime.video import VideoWriter
from tests.tools.service.process import ServiceProcess
from tests.tools.service.waiting import ENDED, SMALL, wait_until

JOB = {**SMALL, "size": "64x48", "frames": 13, "steps": 6}


def post(client: httpx.Client, **more: object) -> str:
    answer = client.post("/v1/videos", json={**JOB, **more})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def wait_for(client: httpx.Client, job_id: str) -> dict[str, object]:
    def is_over() -> bool:
        return client.get(f"/v1/videos/{job_id}").json()["status"] in ENDED

    wait_until(is_over, 60)
    return dict(client.get(f"/v1/videos/{job_id}").json())


def test_the_video_is_the_one_of_the_pipeline(process: ServiceProcess, fake_bundle: Path, tmp_path: Path) -> None:
    process.start()
    with process.client() as client:
        job_id = post(client, seed=3)
        with client.stream("GET", f"/v1/videos/{job_id}/events") as events:
            told = "".join(events.iter_text())
        assert told.count("event: completed") == 1
        assert "event: progress" in told
        video = client.get(f"/v1/videos/{job_id}/content")
    with Pipeline.open(fake_bundle, threads=1) as pipeline:
        frames = pipeline.generate(Request(JOB["prompt"], 48, 64, 13, 6, 3))
    with VideoWriter(tmp_path / "expected.mp4", 48, 64, 13, 24) as writer:
        writer.write(frames)
    assert video.content == (tmp_path / "expected.mp4").read_bytes()


def test_kill_9_at_random_moments_loses_nothing(process: ServiceProcess) -> None:
    random.seed(9)
    process.start()
    accepted: list[str] = []
    for _ in range(3):
        with process.client() as client:
            accepted += [post(client, seed=len(accepted) + number) for number in range(6)]
            time.sleep(random.uniform(0.0, 0.6))
        process.kill()
        process.start()
    with process.client() as client:
        jobs = {job_id: wait_for(client, job_id) for job_id in accepted}
        assert {job["status"] for job in jobs.values()} == {"completed"}
        listed = [job["id"] for job in client.get("/v1/videos?limit=100").json()["data"]]
        assert sorted(listed) == sorted(accepted)
        for job_id in accepted:
            assert client.get(f"/v1/videos/{job_id}/content").content[4:8] == b"ftyp"
    files = sorted(path.stem for path in (process.data / "videos").iterdir())
    assert files == sorted(accepted)
    assert not list((process.data / "work").iterdir())


def test_a_signal_drains_and_unfinished_jobs_go_on_from_their_latents(process: ServiceProcess, tmp_path: Path) -> None:
    process.options = ("--drain", "0s", "--max-steps", "100000")
    process.start()
    with process.client() as client:
        long = post(client, steps=20_000)
        others = [post(client, seed=number) for number in range(3)]
        wait_until(lambda: client.get(f"/v1/videos/{long}").json()["progress"]["step"] > 20)
        process.terminate()
        assert process.wait() == 0, process.log.read_text()
    (kept,) = (process.data / "work" / long).glob("*.npy")
    step = int(kept.stem.rpartition("-")[2])
    assert 20 < step < 20_000
    assert np.isfinite(np.load(kept)).all()
    with sqlite3.connect(process.data / "jobs.sqlite3") as database:
        assert dict(database.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall()) == {"queued": 4}
    process.start()
    with process.client() as client:
        assert f"sampling goes on at step {step + 1} of 20000" in wait_for_log(process, "sampling goes on")
        assert client.get(f"/v1/videos/{long}").json()["attempts"] in (1, 2)
        client.delete(f"/v1/videos/{long}")
        assert all(wait_for(client, job_id)["status"] == "completed" for job_id in others)
    assert not list((process.data / "work").iterdir())


def wait_for_log(process: ServiceProcess, text: str) -> str:
    wait_until(lambda: text in process.log.read_text())
    return process.log.read_text()


def test_running_jobs_finish_within_the_limit(process: ServiceProcess) -> None:
    process.options = ("--drain", "60s", "--max-steps", "100000")
    process.start()
    with process.client() as client:
        job_id = post(client, steps=2_000)
        wait_until(lambda: client.get(f"/v1/videos/{job_id}").json()["status"] == "running")
        process.terminate()
        wait_until(lambda: client.get("/readyz").status_code == 503)
        answer = client.post("/v1/videos", json=JOB)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert answer.headers["retry-after"]
    assert process.wait() == 0
    assert (process.data / "videos" / f"{job_id}.mp4").exists()


def test_a_second_signal_ends_at_once(process: ServiceProcess) -> None:
    process.options = ("--max-steps", "100000")
    process.start()
    with process.client() as client:
        job_id = post(client, steps=50_000)
        wait_until(lambda: client.get(f"/v1/videos/{job_id}").json()["status"] == "running")
    process.terminate()
    wait_for_log(process, "draining")
    process.terminate()
    assert process.wait() == 9


def test_a_second_signal_does_not_wait_for_a_unit_of_work(process: ServiceProcess) -> None:
    process.before = (
        "import time\n"
        "from reelforge.runtime.events import Progress\n"
        "from reelforge.tools.service.resuming import ResumingPipeline\n"
        "def slow(self, request, **how):\n"
        "    yield Progress('sampling', 1, 3)\n"
        "    time.sleep(50)\n"
        "ResumingPipeline.stream = slow\n"
    )
    process.start()
    with process.client() as client:
        job_id = post(client)
        wait_until(lambda: client.get(f"/v1/videos/{job_id}").json()["status"] == "running")
    began = time.monotonic()
    process.terminate()
    wait_for_log(process, "draining")
    process.terminate()
    assert process.wait() == 9
    assert time.monotonic() - began < 20


def test_without_a_pipeline_the_process_ends_and_its_jobs_wait(
    process: ServiceProcess, fake_bundle: Path, tmp_path: Path
) -> None:
    whole = process.bundle
    process.bundle = Path(shutil.copytree(fake_bundle, tmp_path / "copy.bundle"))
    # A pipeline is given up after its first failed opening, not after minutes.
    process.before = (
        "from reelforge.runtime.scheduling.limits import FailurePolicy\n"
        "FailurePolicy.__init__.__defaults__ = (1, 0.01, 0.01)\n"
    )
    process.options = ("--memory-budget", "least")
    process.start()
    with process.client() as client:
        assert wait_for(client, post(client))["status"] == "completed"
        graph = process.bundle / "dit.onnx"
        graph.write_bytes(graph.read_bytes()[:-1])
        failed = wait_for(client, post(client, seed=8))
        assert failed["error"] == {"code": "bundle", "message": failed["error"]["message"]}  # type: ignore[index]
        left = post(client, seed=9)
    assert process.wait() == 8, process.log.read_text()
    with sqlite3.connect(process.data / "jobs.sqlite3") as database:
        assert dict(database.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall()) == {
            "completed": 1, "failed": 1, "queued": 1,
        }  # fmt: skip
    process.bundle = whole
    process.start()
    with process.client() as client:
        job = wait_for(client, left)
        assert (job["status"], job["attempts"]) == ("completed", 1)


def test_a_damaged_bundle_is_not_served(process: ServiceProcess, fake_bundle: Path, tmp_path: Path) -> None:
    process.bundle = Path(shutil.copytree(fake_bundle, tmp_path / "damaged.bundle"))
    graph = process.bundle / "dit.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    process.start(ready=False)
    assert process.wait() == 4
    assert "dit.onnx" in process.log.read_text()


def test_a_folder_serves_one_service(process: ServiceProcess) -> None:
    process.start()
    second = ServiceProcess(process.bundle, process.data)
    with pytest.raises(AssertionError, match="another service uses it"):
        second.start()
    assert second.wait() == 7
