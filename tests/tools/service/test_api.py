"""The HTTP interface over a backend that computes nothing."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from reelforge.runtime.errors import CancelledError, EngineError, OutOfMemoryError
from reelforge.tools.service.settings import Settings
from tests.tools.service.conftest import Serve
from tests.tools.service.fake_backend import WAIT_S, FakeBackend
from tests.tools.service.waiting import SMALL, ended, submit, wait_until


def test_from_prompt_to_video(serve: Serve) -> None:
    client = serve()
    answer = client.post("/v1/videos", json=SMALL)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["location"] == f"/v1/videos/{job['id']}"
    assert job["status"] == "queued"
    done = ended(client, job["id"])
    assert (done["status"], done["attempts"], done["error"]) == ("completed", 1, None)
    assert done["created_at"] <= done["started_at"] <= done["finished_at"] < done["expires_at"]
    assert done["progress"] == {"phase": "completed", "step": 3, "steps": 3, "eta_s": 0.0}
    content = client.get(f"/v1/videos/{job['id']}/content")
    assert content.status_code == 200
    assert content.headers["content-type"] == "video/mp4"
    assert content.content[4:8] == b"ftyp"


def test_what_is_left_out_is_filled_in_and_shown(serve: Serve) -> None:
    client = serve()
    job = client.post("/v1/videos", json={"prompt": "a ball"}).json()
    assert job["request"] | {"seed": 0} == {
        "prompt": "a ball", "negative_prompt": None, "size": "64x48", "frames": 13, "steps": 4, "seed": 0,
        "guidance": 6.0, "cfg_scale": None, "step_cache": None, "priority": 0, "deadline_s": None,
    }  # fmt: skip
    others = {client.post("/v1/videos", json={"prompt": "a ball"}).json()["request"]["seed"] for _ in range(4)}
    assert len(others) == 4, "the service chooses seeds"


def test_ranges_of_the_video(serve: Serve) -> None:
    client = serve()
    job_id = submit(client)
    ended(client, job_id)
    whole = client.get(f"/v1/videos/{job_id}/content").content
    part = client.get(f"/v1/videos/{job_id}/content", headers={"Range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, whole[4:8])
    assert part.headers["content-range"] == f"bytes 4-7/{len(whole)}"
    assert client.get(f"/v1/videos/{job_id}/content", headers={"Range": "bytes=999999-"}).status_code == 416


def test_states_seen_from_outside(serve: Serve, backend: FakeBackend) -> None:
    client = serve()
    hold = backend.hold("held")
    held, waits = submit(client, "held"), submit(client, "waits")
    assert hold.entered.wait(WAIT_S)
    wait_until(lambda: client.get(f"/v1/videos/{held}").json()["status"] == "running")
    assert client.get(f"/v1/videos/{waits}").json()["progress"]["phase"] == "queued"
    early = client.get(f"/v1/videos/{held}/content")
    assert (early.status_code, early.json()["error"]["code"]) == (409, "not_completed")
    hold.released.set()
    assert ended(client, waits)["status"] == "completed"


def test_the_list_is_in_pages_newest_first(serve: Serve) -> None:
    client = serve()
    made = [submit(client) for _ in range(5)]
    first = client.get("/v1/videos", params={"limit": 3}).json()
    assert [job["id"] for job in first["data"]] == made[:1:-1]
    assert first["has_more"] is True
    rest = client.get("/v1/videos", params={"limit": 3, "after": first["data"][-1]["id"]}).json()
    assert ([job["id"] for job in rest["data"]], rest["has_more"]) == (made[1::-1], False)
    assert client.get("/v1/videos", params={"after": "video_" + "0" * 32}).status_code == 404


def test_cancelling(serve: Serve, backend: FakeBackend) -> None:
    client = serve()
    hold = backend.hold("held")
    held, waits = submit(client, "held"), submit(client, "waits")
    assert hold.entered.wait(WAIT_S)
    for job_id in (waits, held):
        assert client.delete(f"/v1/videos/{job_id}").json()["status"] == "cancelled"
    after = submit(client, "after")
    assert ended(client, after)["status"] == "completed"
    assert ended(client, held)["status"] == "cancelled", "the job that went on a little does not undo it"
    assert backend.ran == ["held", "after"]
    assert client.get(f"/v1/videos/{held}/content").status_code == 409


def test_deleting_a_finished_video(serve: Serve) -> None:
    client = serve()
    job_id = submit(client)
    ended(client, job_id)
    for _ in range(2):
        answer = client.delete(f"/v1/videos/{job_id}")
        assert (answer.status_code, answer.json()["status"]) == (200, "completed")
    gone = client.get(f"/v1/videos/{job_id}/content")
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "expired")
    assert client.get("/v1/videos").json()["data"] == []


def test_a_file_that_is_gone_before_its_record(serve: Serve, settings: Settings) -> None:
    client = serve()
    job_id = submit(client)
    ended(client, job_id)
    (settings.data / "videos" / f"{job_id}.mp4").unlink()  # retention's first half
    gone = client.get(f"/v1/videos/{job_id}/content")
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "expired")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineError("stage 'dit' failed."), "engine"),
        (OutOfMemoryError("too little memory."), "out_of_memory"),
        (CancelledError("the reader was too slow."), "cancelled"),
        (OSError(28, "No space left on device"), "storage_full"),
        (RuntimeError("a bug with a secret in its text"), "internal"),
        (MemoryError(), "out_of_memory"),
    ],
)
def test_failures_have_causes(serve: Serve, backend: FakeBackend, error: BaseException, code: str) -> None:
    client = serve()
    backend.failures["bad"] = error
    job = ended(client, submit(client, "bad"))
    assert (job["status"], job["error"]["code"]) == ("failed", code)
    assert "secret" not in json.dumps(job)
    assert ended(client, submit(client))["status"] == "completed"
    measured = client.get("/metrics").text
    assert f'reelforge_job_failures_total{{cause="{code}"}} 1.0' in measured


def test_idempotency(serve: Serve) -> None:
    client = serve()
    key = {"Idempotency-Key": "order-66"}
    first = submit(client, headers=key)
    assert submit(client, headers=key) == first
    assert submit(client, headers={"Idempotency-Key": "order-67"}) != first
    ended(client, first)
    again = client.post("/v1/videos", json=SMALL, headers=key)
    assert (again.status_code, again.json()["id"], again.json()["status"]) == (202, first, "completed")
    other = client.post("/v1/videos", json={**SMALL, "seed": 8}, headers=key)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert client.post("/v1/videos", json=SMALL, headers={"Idempotency-Key": "a b"}).status_code == 422


def test_idempotency_under_a_race(serve: Serve) -> None:
    client = serve()
    found: list[str] = []
    key = {"Idempotency-Key": "x"}
    threads = [threading.Thread(target=lambda: found.append(submit(client, headers=key))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len(client.get("/v1/videos").json()["data"]) == 1


def test_priorities_and_shares(serve: Serve, backend: FakeBackend) -> None:
    client = serve()
    hold = backend.hold("first")
    submit(client, "first")
    assert hold.entered.wait(WAIT_S)
    low = submit(client, "low", priority=-1)
    submit(client, "middle")
    submit(client, "high", priority=5)
    hold.released.set()
    ended(client, low)
    assert backend.ran == ["first", "high", "middle", "low"]


def test_deadlines(serve: Serve, backend: FakeBackend) -> None:
    client = serve()
    hold = backend.hold("held")
    held = submit(client, "held", deadline_s=0.3)
    assert hold.entered.wait(WAIT_S)
    waits = submit(client, "waits", deadline_s=0.1)
    for job_id in (waits, held):
        job = ended(client, job_id)
        assert (job["status"], job["error"]["code"]) == ("failed", "deadline")
    assert backend.ran == ["held"]


@pytest.mark.parametrize("value", ["x", None, 3, [], {}])
@pytest.mark.parametrize("name", ["size", "frames", "steps", "seed", "guidance", "deadline_s", "prompt", "unknown"])
def test_what_has_another_form_is_refused(serve: Serve, name: str, value: Any) -> None:
    client = serve()
    answer = client.post("/v1/videos", json={**SMALL, name: value})
    fine = value is None and name not in ("prompt", "unknown")
    fine = (
        fine or (value == 3 and name in ("steps", "seed", "guidance", "deadline_s")) or (name, value) == ("prompt", "x")
    )
    assert answer.status_code == (202 if fine else 422)
    if not fine:
        error = answer.json()["error"]
        assert error["code"] == "invalid_request"
        assert any(name in problem for problem in error["problems"])


def test_all_problems_with_the_bundle_are_said(serve: Serve) -> None:
    answer = serve().post("/v1/videos", json={**SMALL, "size": "30x16", "frames": 6})
    (problem,) = answer.json()["error"]["problems"]
    assert answer.status_code == 422
    assert "width=30" in problem
    assert "frames=6" in problem


def test_bodies_that_are_no_requests(serve: Serve) -> None:
    client = serve()
    for body in (b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"prompt": "\\ud800"}', b"[" * 30_000, b"1" * 5_000):
        answer = client.post("/v1/videos", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422, body[:20]
        assert answer.json()["error"]["message"]


def test_the_service_says_what_it_offers(serve: Serve) -> None:
    limits = serve().get("/v1/limits").json()
    assert limits["size_multiple"] == 16
    assert limits["frames"] == {"min": 1, "max": 25, "multiple": 4, "offset": 1}
    assert limits["defaults"] == {"width": 64, "height": 48, "frames": 13, "steps": 4}
    assert limits["needs_key"] is False


def test_unknown_paths_and_methods(serve: Serve) -> None:
    client = serve()
    assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
    answer = client.put("/v1/videos")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert client.get("/docs").status_code == 404, "the framework's page loads scripts from elsewhere"


def test_the_state_while_loading(serve: Serve, backend: FakeBackend) -> None:
    backend.opens = threading.Event()
    client = serve(ready=False)
    assert client.get("/healthz").json() == {"status": "alive", "detail": ""}
    assert client.get("/readyz").status_code == 503
    for answer in (client.post("/v1/videos", json=SMALL), client.get("/v1/limits")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
        assert int(answer.headers["retry-after"]) >= 1
    assert client.get("/v1/videos").json()["data"] == []
    backend.opens.set()
    wait_until(lambda: client.get("/readyz").status_code == 200)
    assert ended(client, submit(client))["status"] == "completed"


def test_a_backend_that_cannot_be_opened(serve: Serve, backend: FakeBackend) -> None:
    backend.unopenable = EngineError("no device.")
    client = serve(ready=False)
    wait_until(lambda: client.get("/readyz").json()["status"] == "failed")
    answer = client.post("/v1/videos", json=SMALL)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")


def test_bugs_are_counted_too(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve()

    def bug(*_: object) -> None:
        raise RuntimeError("a bug with a secret in its text")

    monkeypatch.setattr("reelforge.tools.service.service.Service.page", bug)
    answer = client.get("/v1/videos")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
    assert 'reelforge_http_seconds_count{method="GET",status="500"} 1.0' in client.get("/metrics").text


def test_measurements(serve: Serve) -> None:
    client = serve()
    for _ in range(2):
        ended(client, submit(client))
    measured = client.get("/metrics")
    assert measured.headers["content-type"].startswith("text/plain")
    values = dict(line.rsplit(" ", 1) for line in measured.text.splitlines() if not line.startswith("#"))
    assert values["reelforge_jobs_accepted_total"] == "2.0"
    assert values['reelforge_jobs_ended_total{status="completed"}'] == "2.0"
    assert values["reelforge_queue_depth"] == "0.0"
    assert values["reelforge_sampling_steps_total"] == "6.0"
    assert values["reelforge_step_seconds_count"] == "4.0", "the first step of a job includes conditioning"
    assert float(values['reelforge_memory_bytes{kind="anonymous"}']) > 1e6
    assert values["reelforge_sampling_steps_skipped_total"] == "0.0"
    assert "a ball" not in measured.text
