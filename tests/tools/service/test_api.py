"""The HTTP interface over a backend that computes nothing."""

from __future__ import annotations

from tests.tools.service.conftest import Serve
from tests.tools.service.waiting import SMALL, ended, submit


def test_from_prompt_to_video(serve: Serve) -> None:
    client = serve()
    answer = client.post("/v1/videos", json=SMALL)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["location"] == f"/v1/videos/{job['id']}"
    assert job["status"] == "queued"
    assert ended(client, job["id"])["status"] == "completed"
    content = client.get(f"/v1/videos/{job['id']}/content")
    assert content.status_code == 200
    assert content.headers["content-type"] == "video/mp4"
    assert content.content[4:8] == b"ftyp"
    assert submit(client) != job["id"]
