"""Waiting in tests, and the requests that they send."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fastapi.testclient import TestClient

WAIT_S = 30.0
SMALL: dict[str, Any] = {"prompt": "a ball", "size": "32x16", "frames": 5, "steps": 3, "seed": 7}
ENDED = ("completed", "failed", "cancelled")


def wait_until(condition: Callable[[], object], limit_s: float = WAIT_S) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


def submit(client: TestClient, prompt: str = "a ball", **more: Any) -> str:
    headers = more.pop("headers", None)
    answer = client.post("/v1/videos", json={**SMALL, "prompt": prompt, **more}, headers=headers)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def ended(client: TestClient, job_id: str, **more: Any) -> dict[str, Any]:
    """Wait for a job's end and return it."""
    found: dict[str, Any] = {}

    def is_over() -> bool:
        found.update(client.get(f"/v1/videos/{job_id}", **more).json())
        return found["status"] in ENDED

    wait_until(is_over)
    return found
