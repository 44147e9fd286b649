"""The stream of events: order, pictures, coming back, going away."""

from __future__ import annotations

import base64
import io
import json
import threading
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reelforge.tools.service import feeds
from tests.tools.service.conftest import Serve
from tests.tools.service.fake_backend import WAIT_S, FakeBackend
from tests.tools.service.process import ServiceProcess
from tests.tools.service.waiting import SMALL, ended, submit, wait_until


def parsed(text: str) -> list[dict[str, Any]]:
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            events.append({**fields, "data": json.loads(fields["data"])})
    return events


def test_a_job_from_beginning_to_end(serve: Serve, backend: FakeBackend) -> None:
    client = serve()
    hold = backend.hold("held")
    job_id = submit(client, "held", steps=5)
    assert hold.entered.wait(WAIT_S)
    listening = threading.Event()
    backend.on_step = lambda _, step: listening.wait(WAIT_S) if step == 1 else None  # type: ignore[assignment,func-returns-value]
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(client.get(f"/v1/videos/{job_id}/events").text))
    reader.start()
    wait_until(lambda: "reelforge_event_listeners 1.0" in client.get("/metrics").text)
    hold.released.set()
    listening.set()
    reader.join(WAIT_S)
    events = parsed(found[0])
    assert events[-1]["event"] == "completed"
    assert events[-1]["data"]["id"] == job_id
    steps = [event["data"]["step"] for event in events if event["event"] == "progress"]
    assert next(event["data"]["phase"] for event in events if event["event"] == "progress") == "text"
    assert steps[1:6] == [1, 2, 3, 4, 5]
    pictures = [event["data"]["image"] for event in events if event["event"] == "preview"]
    assert pictures
    picture = base64.b64decode(pictures[-1].removeprefix("data:image/png;base64,"))
    assert picture.startswith(b"\x89PNG")
    assert "reelforge_event_listeners 0.0" in client.get("/metrics").text


def test_somebody_new_sees_the_newest_picture_at_once(serve: Serve, backend: FakeBackend) -> None:
    client = serve()
    reached, released = threading.Event(), threading.Event()

    def pause(_: str, step: int) -> None:
        if step == 3:
            reached.set()
            assert released.wait(WAIT_S)

    backend.on_step = pause
    job_id = submit(client, steps=5)
    assert reached.wait(WAIT_S)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(client.get(f"/v1/videos/{job_id}/events").text))
    reader.start()
    wait_until(lambda: "reelforge_event_listeners 1.0" in client.get("/metrics").text)
    released.set()
    reader.join(WAIT_S)
    first, second, *_ = events = parsed(found[0])
    assert (first["event"], first["data"]["step"]) == ("preview", 3)
    picture = base64.b64decode(first["data"]["image"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(picture)).getpixel((0, 0)) == (80, 80, 80), "of step 3"
    assert (second["event"], second["data"]["phase"], second["data"]["step"]) == ("progress", "sampling", 3)
    numbers = [int(event["id"].rpartition("-")[2]) for event in events[1:-1]]
    assert numbers == sorted(set(numbers)), "nothing is said twice"


def test_pictures_that_nobody_looks_at_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(feeds, "png", lambda pixels: bytes(made.append(1) or 1))  # type: ignore[func-returns-value]
    feed = feeds.Feed({"phase": "queued"})
    for step in range(40):
        feed.tell_preview(step, np.zeros((3, 6, 8, 3), np.uint8))
    assert not made
    newest, number = feed.newest()
    assert [said.data["step"] for said in newest if said.name == "preview"] == [39]
    assert ([said.number for said in feed.after(0)], number) == ([40], 40)
    assert made == [1], "once for all who look"


def test_an_ended_job_says_how(serve: Serve, backend: FakeBackend) -> None:
    client = serve()
    done = submit(client)
    ended(client, done)
    answer = client.get(f"/v1/videos/{done}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    (event,) = parsed(answer.text)
    assert (event["event"], event["data"]["status"]) == ("completed", "completed")


def test_cancelling_ends_the_stream(serve: Serve, backend: FakeBackend) -> None:
    client = serve()
    hold = backend.hold("held")
    submit(client, "held")
    assert hold.entered.wait(WAIT_S)
    waits = submit(client)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(client.get(f"/v1/videos/{waits}/events").text))
    reader.start()
    wait_until(lambda: "reelforge_event_listeners 1.0" in client.get("/metrics").text)
    client.delete(f"/v1/videos/{waits}")
    reader.join(WAIT_S)
    events = parsed(found[0])
    assert [event["event"] for event in events] == ["progress", "cancelled"]
    assert events[0]["data"]["phase"] == "queued"


def test_coming_back_and_going_away(process: ServiceProcess) -> None:
    process.options = ("--max-steps", "100000")
    process.start()
    with process.client() as client:
        answer = client.post("/v1/videos", json={**SMALL, "size": "64x48", "steps": 20_000})
        path = f"/v1/videos/{answer.json()['id']}"
        seen = []
        with client.stream("GET", f"{path}/events") as events:  # left in the midst of it
            for line in events.iter_lines():
                seen += [line.removeprefix("id: ")] if line.startswith("id: ") else []
                if len(seen) == 20:
                    break
        name, _, number = seen[-1].partition("-")
        with client.stream("GET", f"{path}/events", headers={"Last-Event-ID": seen[-1]}) as events:
            back = next(line for line in events.iter_lines() if line.startswith("id: ")).removeprefix("id: ")
        assert back.partition("-")[0] == name
        assert int(back.partition("-")[2]) > int(number)
        for nonsense in ("x", "-", f"{name}-x", "0-1", f"{name}-" + "9" * 50):
            with client.stream("GET", f"{path}/events", headers={"Last-Event-ID": nonsense}) as events:
                assert next(iter(events.iter_lines())).startswith("id: ")
        wait_until(lambda: "reelforge_event_listeners 0.0" in client.get("/metrics").text)
        assert client.get(path).json()["status"] == "running", "that nobody listens does not end a job"
        client.delete(path)


def test_silence_is_kept_alive(serve: Serve, backend: FakeBackend) -> None:
    client = serve(keep_alive_s=0.05)
    hold = backend.hold("held")
    job_id = submit(client, "held")
    assert hold.entered.wait(WAIT_S)
    threading.Timer(0.3, hold.released.set).start()
    assert client.get(f"/v1/videos/{job_id}/events").text.count(": keep-alive\n\n") >= 2
