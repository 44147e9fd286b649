"""Other faults around a real service, one drill each: a part of the service's benchmark."""

from __future__ import annotations

import contextlib
import shutil
import socket
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from reelforge.tools.bench import report
from tests.tools.service.process import ServiceProcess

BODY = {"prompt": "a red circle moving right", "size": "64x64", "frames": 9, "steps": 20, "seed": 1}
ENDED = ("completed", "failed", "cancelled")
DISK_MIB, LEFT_KIB = 16, 300
_WAIT_S = 120.0

Found = tuple[str, str, bool | None]
"""What was done, what was seen, and whether that is right; None if it could not be tried."""

Drill = Callable[[Path, Path], Found]
"""A bundle and a folder to what was found."""


def section(bundle: Path, work: Path) -> list[str]:
    """Carry out all drills, and return the section's lines."""
    rows = []
    for drill in (disk_full, damaged_before, damaged_meanwhile, clients_gone, clock_jumps, locked):
        rows.append(row(*drill(bundle, work / drill.__name__)))
    return report.table(("fault", "seen", ""), rows)


def row(done: str, seen: str, right: bool | None) -> tuple[str, str, str]:
    """Return a drill's row of the table."""
    return done, seen, "**not tried**" if right is None else "met" if right else "**missed**"


def disk_full(bundle: Path, folder: Path) -> Found:
    """Serve from a file system that is filled up meanwhile, and make room again."""
    done = f"the disk is full, to the last {LEFT_KIB} KiB and then to the last byte; then there is room"
    with _tiny_disk(folder) as mounted:
        if not mounted:
            return done, "this user may not mount a file system", None
        with _serving(bundle, folder / "data") as (process, client):
            ballast = process.data / "ballast"
            ballast.write_bytes(bytes((shutil.disk_usage(process.data).free // 1024 - LEFT_KIB) * 1024))
            answers = Counter[str]()
            ids: list[str] = []
            end = time.monotonic() + 12
            while time.monotonic() < end:
                answer = client.post("/v1/videos", json={**BODY, "seed": len(ids)})
                answers[str(answer.status_code)] += 1
                ids += [answer.json()["id"]] if answer.status_code == 202 else []
                time.sleep(0.2)
            ballast.unlink()
            states = Counter(_state(_ended(client, job)) for job in ids)
            whole = sum(client.get(f"/v1/videos/{job}/content").content[4:8] == b"ftyp" for job in ids)
            half = [path for path in (process.data / "work").rglob("*") if path.is_file()]
            again = _state(_ended(client, _post(client)))
    right = not half and states["completed"] == whole and again == "completed" and "503" in answers
    right = right and set(answers) <= {"202", "503"} and set(states) <= {"completed", "storage_full"}
    seen = f"answers {_counted(answers)}; jobs {_counted(states)}; {len(half)} half-written files; after that {again}"
    return done, seen, right


def damaged_before(bundle: Path, folder: Path) -> Found:
    """Serve a bundle with a wrong byte."""
    copy = Path(shutil.copytree(bundle, folder / "copy.bundle"))
    _damage(copy / "dit.onnx")
    process = ServiceProcess(copy, folder / "data", threads=None)
    process.start(ready=False)
    code = process.wait()
    return "a bundle with a wrong byte is to be served", f"exit code {code}", code == 4


def damaged_meanwhile(bundle: Path, folder: Path) -> Found:
    """Damage a bundle while it is served: what waits is kept for when the bundle is whole again."""
    copy = Path(shutil.copytree(bundle, folder / "copy.bundle"))
    whole = (copy / "dit.onnx").read_bytes()
    with _serving(copy, folder / "data", "--memory-budget", "least") as (process, client):
        _ended(client, _post(client))
        _damage(copy / "dit.onnx")
        job = _ended(client, _post(client, seed=2))
        (copy / "dit.onnx").write_bytes(whole)
        process.kill()
        process.start()
        with process.client() as again:
            after = _state(_ended(again, _post(again, seed=3)))
    seen = f"the job: {_state(job)}; with the whole bundle: {after}"
    return "the bundle is altered while it is served", seen, (_state(job), after) == ("bundle", "completed")


def clients_gone(bundle: Path, folder: Path) -> Found:
    """Leave 64 streams of events in the midst of it, without a word."""
    with _serving(bundle, folder / "data") as (process, client):
        _ended(client, _post(client))  # libraries open files of their own with the first
        before = _descriptors(process)
        job = _post(client, steps=100, frames=17)
        address = urlsplit(process.url)
        for _ in range(64):
            with socket.create_connection((address.hostname, address.port)) as one:
                one.sendall(f"GET /v1/videos/{job}/events HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                one.recv(100)
        state = _state(_ended(client, job))
        left = _until(lambda: _listeners(client) == 0.0) and _until(lambda: _descriptors(process) <= before + 1)
    return "64 readers of events leave", f"job: {state}; streams left open: {'none' if left else 'some'}", left


def clock_jumps(bundle: Path, folder: Path) -> Found:
    """Set the process's clock 30 years ahead, then back, while jobs have deadlines and videos a time to live."""
    tamper = (
        "import time\n"
        "real, began = time.time, time.monotonic()\n"
        "time.time = lambda: real() + (1e9, -1e9)[int((time.monotonic() - began) / 3) % 2]\n"
    )
    with _serving(bundle, folder / "data", "--retention", "1h", before=tamper) as (_, client):
        end = time.monotonic() + 8
        jobs: list[dict[str, Any]] = []
        while time.monotonic() < end:
            job = _post(client, seed=len(jobs), deadline_s=600.0)
            jobs.append(_ended(client, job))
        states = Counter(_state(job) for job in jobs)
        whole = sum(client.get(f"/v1/videos/{job['id']}/content").status_code == 200 for job in jobs)
        times = [job["created_at"] for job in jobs]
    right = set(states) == {"completed"} and whole == len(jobs) and times == sorted(times)
    return "the clock jumps by 30 years every 3 s", f"jobs {_counted(states)}; {whole} videos kept", right


def locked(bundle: Path, folder: Path) -> Found:
    """Lock the database for ten seconds while jobs run and others are asked for."""
    with _serving(bundle, folder / "data") as (process, client):
        before = [_post(client, seed=seed) for seed in range(4)]
        other = sqlite3.connect(process.data / "jobs.sqlite3", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        end, answers = time.monotonic() + 10, Counter[str]()
        while time.monotonic() < end:
            answer = client.post("/v1/videos", json=BODY)
            answers[f"{answer.status_code}{' + Retry-After' if 'retry-after' in answer.headers else ''}"] += 1
        other.execute("ROLLBACK")
        other.close()
        states = Counter(_state(_ended(client, job)) for job in [*before, _post(client)])
    right = set(answers) == {"503 + Retry-After"} and states == {"completed": 5}
    return "the database is locked for 10 s", f"answers {_counted(answers)}; then jobs {_counted(states)}", right


@contextlib.contextmanager
def _serving(
    bundle: Path, data: Path, *options: str, before: str = ""
) -> Iterator[tuple[ServiceProcess, httpx.Client]]:
    data.parent.mkdir(parents=True, exist_ok=True)
    process = ServiceProcess(bundle, data, options, threads=None, before=before)
    try:
        process.start()
        with process.client() as client:
            yield process, client
    finally:
        process.stop()


@contextlib.contextmanager
def _tiny_disk(folder: Path) -> Iterator[bool]:
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data"
    data.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(data)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(data)], check=True)


def _post(client: httpx.Client, **more: Any) -> str:
    answer = client.post("/v1/videos", json={**BODY, **more})
    answer.raise_for_status()
    return str(answer.json()["id"])


def _ended(client: httpx.Client, job_id: str) -> dict[str, Any]:
    end = time.monotonic() + _WAIT_S
    while (job := client.get(f"/v1/videos/{job_id}").json())["status"] not in ENDED:
        if time.monotonic() > end:
            raise TimeoutError(f"{job_id} does not end")
        time.sleep(0.05)
    return dict(job)


def _state(job: dict[str, Any]) -> str:
    return str(job["error"]["code"] if job["error"] else job["status"])


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counter.items()))


def _damage(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def _listeners(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("reelforge_event_listeners ")).split()[1])


def _descriptors(process: ServiceProcess) -> int:
    assert process.process is not None
    return len(list(Path(f"/proc/{process.process.pid}/fd").iterdir()))


def _until(condition: Callable[[], bool], limit_s: float = 20.0) -> bool:
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
