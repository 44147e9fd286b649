"""A stand-in for the service: the API's answers from memory, on a script, so that each state of the page can be had.

Nothing is computed; the video is a moving square. The page meets the real service in ``test_real_service.py``.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from PIL import Image

from reelforge.runtime.video import VideoWriter
from reelforge.tools.service.page_routes import page_router

SIZES = [[64, 48], [48, 64], [64, 64]]
FINAL = ("completed", "failed", "cancelled")
Job = dict[str, Any]
Refusal = tuple[int, str, str, list[str], dict[str, str]]
"""Status, code, message, problems and headers of an answer."""


@dataclass
class Script:
    """What the stand-in does.

    Attributes:
        steps: Of sampling; each takes ``step_s``.
        hold: Cleared, running jobs stop before their next event until it is set.
        refuse: Answers to the next POSTs.
        breaks: Event numbers after which the stream is cut, once each.
        key: What callers must send; none is needed if empty.
        fails: What the job's error says, if it is to fail.
        down: Every request of the API is answered with a plain 502.
    """

    steps: int = 6
    step_s: float = 0.03
    hold: threading.Event = field(default_factory=threading.Event)
    refuse: list[Refusal] = field(default_factory=list)
    breaks: set[int] = field(default_factory=set)
    key: str = ""
    fails: str = ""
    down: bool = False
    sizes: list[list[int]] | None = field(default_factory=lambda: [list(size) for size in SIZES])


class StandIn:
    """Jobs in memory, and what requests were made."""

    def __init__(self, video: Path) -> None:
        self.video = video
        self.reset()
        self.url = ""

    def reset(self) -> None:
        self.script = Script()
        self.script.hold.set()
        self.jobs: dict[str, Job] = {}
        self.logs: dict[str, list[tuple[str, Any]]] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.bodies: list[Any] = []
        self.by_key: dict[str, str] = {}

    def add(self, status: str = "completed", prompt: str = "a blue square", age_s: float = 60, **request: Any) -> Job:
        """Put a job there, as if it had been made earlier."""
        asked = {"prompt": prompt, "size": "64x48", "frames": 25, "steps": self.script.steps, "seed": 7} | request
        now = time.time() - age_s
        job: Job = {
            "id": f"video_{len(self.jobs) + 1:032x}", "object": "video", "status": status, "created_at": now,
            "started_at": None, "finished_at": None, "error": None, "expires_at": None, "attempts": 1,
            "progress": {"phase": "queued", "step": 0, "steps": 0, "eta_s": None}, "request": asked,
        }  # fmt: skip
        if status in FINAL:
            job |= {"started_at": now + 1, "finished_at": now + 12}
        if status == "failed":
            job["error"] = {"code": "engine_failed", "message": "The engine of stage 'dit' failed."}
        self.jobs[job["id"]] = job
        self.logs[job["id"]] = [(status, job)] if status in FINAL else []
        return job

    def tell(self, job: Job, kind: str, data: Any) -> None:
        if kind == "progress":
            job["progress"] = data
        self.logs[job["id"]].append((kind, json.loads(json.dumps(data))))

    async def make(self, job: Job) -> None:
        """Run a job on the script."""
        script = self.script

        async def turn() -> bool:
            await asyncio.sleep(script.step_s)
            while self.script is script and not script.hold.is_set():
                await asyncio.sleep(0.01)
            return self.script is not script or job["status"] in FINAL  # the next test has begun, or it was cancelled

        if await turn():
            return
        job |= {"status": "running", "started_at": time.time()}
        self.tell(job, "progress", {"phase": "text", "step": 0, "steps": 1, "eta_s": None})
        for step in range(1, script.steps + 1):
            if await turn():
                return
            left = (script.steps - step) * script.step_s
            self.tell(job, "progress", {"phase": "sampling", "step": step, "steps": script.steps, "eta_s": left})
            self.tell(job, "preview", {"step": step, "image": preview(step / script.steps)})
            if script.fails and step == 2:
                job |= {"status": "failed", "error": {"code": "engine_failed", "message": script.fails}}
                self.tell(job, "failed", job)
                return
        if await turn():
            return
        self.tell(job, "progress", {"phase": "decoding", "step": 1, "steps": 2, "eta_s": 0.2})
        if await turn():
            return
        job |= {"status": "completed", "finished_at": time.time()}
        self.tell(job, "completed", job)

    async def stream(self, job: Job, first: int) -> AsyncIterator[str]:
        """Yield a job's events from number ``first``; each one's id is its number."""
        number, script = first, self.script
        while self.script is script:
            for kind, data in self.logs[job["id"]][number:]:
                number += 1
                yield f"id: {number}\nevent: {kind}\ndata: {json.dumps(data)}\n\n"
                if number in script.breaks:
                    script.breaks.remove(number)
                    return
                if kind in FINAL:
                    return
            yield ": still here\n\n"
            await asyncio.sleep(0.01)


def problem(status: int, code: str, message: str, problems: list[str], headers: dict[str, str]) -> JSONResponse:
    error = {"code": code, "message": message, "problems": problems}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


def application(state: StandIn) -> FastAPI:
    app = FastAPI()
    app.include_router(page_router())
    running: set[asyncio.Task[None]] = set()

    @app.middleware("http")
    async def gate(request: Request, proceed: Any) -> Response:
        path = request.url.path
        state.requests.append((request.method, str(request.url), dict(request.headers)))
        if not path.startswith("/v1/"):
            return await proceed(request)  # type: ignore[no-any-return]
        if state.script.down:
            return Response("<h1>Bad Gateway</h1>", 502, media_type="text/html")
        key = state.script.key
        if key and path != "/v1/limits" and request.headers.get("authorization") != f"Bearer {key}":
            message = "the API key is missing or wrong"
            return problem(401, "unauthorized", message, [], {"WWW-Authenticate": "Bearer"})
        return await proceed(request)  # type: ignore[no-any-return]

    @app.get("/v1/limits")
    async def limits() -> dict[str, Any]:
        return {
            "sizes": state.script.sizes, "min_size": [16, 16], "max_pixels": 64 * 64, "size_multiple": 16,
            "frames": {"min": 1, "max": 49, "multiple": 4, "offset": 1}, "max_prompt_characters": 400,
            "defaults": {"width": 64, "height": 48, "frames": 25, "steps": state.script.steps},
            "needs_key": bool(state.script.key), "model": "stand-in", "frames_per_second": 24,
        }  # fmt: skip

    @app.post("/v1/videos")
    async def create(request: Request) -> Response:
        body = await request.json()
        state.bodies.append(body)
        if state.script.refuse:
            return problem(*state.script.refuse.pop(0))
        name = request.headers["idempotency-key"]
        if name not in state.by_key:
            job = state.add("queued", age_s=0, **{"seed": 1234, **body})
            state.by_key[name] = job["id"]
            task = asyncio.create_task(state.make(job))
            running.add(task)
            task.add_done_callback(running.discard)
        job = state.jobs[state.by_key[name]]
        return JSONResponse(job, status_code=202, headers={"Location": f"/v1/videos/{job['id']}"})

    @app.get("/v1/videos")
    async def videos(limit: int = 20, after: str = "") -> dict[str, Any]:
        jobs = sorted(state.jobs.values(), key=lambda job: -job["created_at"])
        start = 1 + [job["id"] for job in jobs].index(after) if after else 0
        page = jobs[start : start + limit]
        return {"object": "list", "data": page, "has_more": start + limit < len(jobs)}

    def missing() -> JSONResponse:
        return problem(404, "not_found", "there is no such video job", [], {})

    @app.get("/v1/videos/{name}")
    async def video(name: str) -> Response:
        return JSONResponse(state.jobs[name]) if name in state.jobs else missing()

    @app.delete("/v1/videos/{name}")
    async def delete(name: str) -> Response:
        job = state.jobs.get(name)
        if job is None:
            return missing()
        if job["status"] in FINAL:
            del state.jobs[name]
        else:
            job |= {"status": "cancelled", "finished_at": time.time()}
            state.tell(job, "cancelled", job)
        return JSONResponse(job)

    @app.get("/v1/videos/{name}/content")
    async def content(name: str) -> Response:
        if name not in state.jobs:
            return missing()
        if state.jobs[name]["request"]["prompt"] == "long ago":
            return problem(410, "gone", "the video was removed after its time", [], {})
        return FileResponse(state.video, media_type="video/mp4")

    @app.get("/v1/videos/{name}/events")
    async def events(name: str, request: Request) -> Response:
        if name not in state.jobs:
            return missing()
        first = int(request.headers.get("last-event-id", "0"))
        return StreamingResponse(state.stream(state.jobs[name], first), media_type="text/event-stream")

    return app


def frame(position: float, height: int, width: int) -> np.ndarray:
    """A square on its way from left to right over a gradient."""
    rows, columns = np.mgrid[0:height, 0:width]
    picture = np.stack([40 + 60 * rows / height, 30 + 40 * columns / width, 90 + 60 * rows / height], axis=-1)
    side = height // 3
    left = int(position * (width - side))
    picture[side : 2 * side, left : left + side] = (250, 190, 60)
    return picture.astype(np.uint8)


def preview(position: float) -> str:
    file = io.BytesIO()
    Image.fromarray(frame(position, 12, 16)).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def write_video(path: Path, frames: int = 25, height: int = 48, width: int = 64) -> None:
    with VideoWriter(path, height, width, frames, 24) as writer:
        writer.write(np.stack([frame(index / (frames - 1), height, width) for index in range(frames)]))


@contextmanager
def served(app: Any, port: int = 0) -> Iterator[str]:
    """Serve an application in a thread, on a free port unless one is given; yields its address."""
    settings = uvicorn.Config(
        app, host="127.0.0.1", port=port, log_level="critical", lifespan="on", timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline, "the server is still not there"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
