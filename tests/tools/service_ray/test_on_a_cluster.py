"""The service on Ray Serve: one cluster on this machine, two processors, replicas that come, go and are lost."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest

from reelforge.runtime import Pipeline, Request
from reelforge.runtime.video import VideoWriter
from reelforge.tools.service.settings import Limits, Settings
from tests.runtime.fake_bundle import write_fake_bundle

pytestmark = pytest.mark.slow

SHORT = {"prompt": "a ball", "size": "48x32", "frames": 13, "steps": 5, "seed": 3}
LONG = {"prompt": "a long ball", "size": "96x64", "frames": 13, "steps": 30_000}
ENDED = ("completed", "failed", "cancelled")


@dataclass
class Client:
    url: str

    def call(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=30) as response:
            content = response.read()
        return content if response.headers["Content-Type"] == "video/mp4" else json.loads(content)

    def post(self, body: dict[str, object]) -> str:
        return str(self.call("POST", "/v1/videos", body)["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.call("GET", f"/v1/videos/{job_id}")
        return found


def until(true: Callable[[], object], what: str, limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while True:
        try:
            if true():
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass  # a front that was lost comes back
        assert time.monotonic() < end, what
        time.sleep(0.1)


def replicas(deployment: str) -> list[psutil.Process]:
    """The processes of a deployment's replicas."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if f"ServeReplica:reelforge:{deployment}" in line:
            found.append(process)
    return found


def frames_of(content: bytes, path: Path) -> np.ndarray[Any, Any]:
    path.write_bytes(content)
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "fake.bundle"
    write_fake_bundle(path)
    return path


@pytest.fixture(scope="module")
def client(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    from reelforge.tools.service_ray.cluster import Scale, connect, deploy, end

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    data = tmp_path_factory.mktemp("service") / "data"
    limits = Limits(steps=100_000)
    settings = Settings(bundle, data, port=port, limits=limits, threads=1, previews=False, least_free_bytes=0)
    connect(None, num_cpus=2, num_gpus=0, object_store_memory=100 << 20, include_dashboard=False)
    try:
        deploy(settings, Scale(least=1, most=2, grow_s=0.5, shrink_s=4.0, finish_s=60.0))
        made = Client(f"http://127.0.0.1:{port}")
        until(lambda: made.call("GET", "/readyz"), "the service is ready")
        yield made
    finally:
        end()


def test_the_same_video_as_without_ray(client: Client, bundle: Path, tmp_path: Path) -> None:
    job = client.post(SHORT)
    until(lambda: client.job(job)["status"] in ENDED, "it ends")
    assert client.job(job)["status"] == "completed", client.job(job)
    request = Request("a ball", height=32, width=48, frames=13, steps=5, seed=3)
    with Pipeline.open(bundle, threads=1) as pipeline:
        pixels = pipeline.generate(request)
    with VideoWriter(tmp_path / "expected.mp4", 32, 48, 13, 24) as video:
        video.write(pixels)
    expected = (tmp_path / "expected.mp4").read_bytes()
    found = client.call("GET", f"/v1/videos/{job}/content")
    np.testing.assert_array_equal(frames_of(found, tmp_path / "a.mp4"), frames_of(expected, tmp_path / "b.mp4"))
    assert client.call("GET", "/v1/limits")["model"] == "fake.bundle"


def test_one_to_two_to_one_and_losses(client: Client) -> None:
    """Two jobs make two replicas; one is lost with a job in it: both jobs are done, once each."""
    assert len(replicas("Pipelines")) == 1
    jobs: list[str] = []

    def two_at_once() -> bool:
        found = [client.job(job) for job in jobs]
        for _ in range(2 - sum(one["status"] not in ENDED for one in found)):  # one may end before a replica has begun
            jobs.append(client.post(LONG | {"seed": len(jobs)}))
        return sum(one["status"] == "running" and one["progress"]["phase"] == "sampling" for one in found) == 2

    until(two_at_once, "two are computed at once")
    assert len(replicas("Pipelines")) == 2
    before = {process.pid for process in replicas("Pipelines")}
    replicas("Pipelines")[0].kill()
    until(lambda: len({process.pid for process in replicas("Pipelines")} - before) == 1, "there is another replica")
    assert {client.job(job)["status"] for job in jobs} <= {"running", "completed"}
    until(lambda: all(client.job(job)["status"] in ENDED for job in jobs), "all end")
    for job in jobs:
        assert client.job(job)["status"] == "completed", client.job(job)
        assert client.job(job)["attempts"] == 1
        assert client.call("GET", f"/v1/videos/{job}/content")[4:8] == b"ftyp"
    until(lambda: len(replicas("Pipelines")) == 1, "one replica is enough again")


def test_a_front_that_is_lost(client: Client) -> None:
    job = client.post(LONG)
    until(lambda: client.job(job)["progress"]["phase"] == "sampling", "it is computed")
    (front,) = replicas("Front")
    front.kill()
    until(lambda: client.job(job)["status"] in ENDED, "it ends")
    assert client.job(job)["status"] == "completed", client.job(job)


def test_cancelling_frees_the_replica(client: Client) -> None:
    job = client.post(LONG | {"steps": 90_000})
    until(lambda: client.job(job)["progress"]["phase"] == "sampling", "it is computed")
    client.call("DELETE", f"/v1/videos/{job}")
    until(lambda: client.job(job)["status"] == "cancelled", "it is cancelled")
    after = client.post(SHORT)
    until(lambda: client.job(after)["status"] == "completed", "the replica is free", 20.0)
