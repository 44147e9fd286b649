"""What tests of the page do and look at in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from playwright.sync_api import Page, expect

from reelforge.runtime.events import Event
from reelforge.runtime.request import Request
from reelforge.tools.service.resuming import ResumingPipeline
from tests.tools.service_page.stand_in import StandIn

PATIENCE_MS = 20_000
expect.set_options(timeout=PATIENCE_MS)


def open_page(page: Page, url: str) -> None:
    page.goto(url)
    expect(page.locator("#size option").first).to_be_attached()


def ask(page: Page, prompt: str) -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Generate").click()


def expect_playing(page: Page) -> dict[str, float | str]:
    """Wait until the video has been decoded and its time goes on; return its size, duration and address."""
    page.locator("#stage video").wait_for()
    page.wait_for_function(
        "() => { const v = document.querySelector('#stage video');"
        " return v && v.readyState >= 2 && !v.paused && v.currentTime > 0.05 && v.videoWidth > 0; }"
    )
    found: dict[str, float | str] = page.evaluate(
        "() => { const v = document.querySelector('#stage video');"
        " return {width: v.videoWidth, height: v.videoHeight, duration: v.duration, source: v.src}; }"
    )
    return found


def scrolls_sideways(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))


def hold_at_step(page: Page, service: StandIn, prompt: str = "a job that takes its time") -> str:
    """Begin a job that stops after some steps; return its id."""
    service.script.steps, service.script.step_s = 200, 0.02
    ask(page, prompt)
    expect(page.locator("#stage .detail")).to_contain_text("step")
    page.locator("#stage img.preview").wait_for()
    service.script.hold.clear()
    return max(service.jobs)


def slowed(seconds: float) -> Callable[..., Iterator[Event]]:
    """Return a slower ``ResumingPipeline.stream``: small bundles are done before anything can be watched."""
    stream = ResumingPipeline.stream

    def slow(pipeline: ResumingPipeline, request: Request, **options: Any) -> Iterator[Event]:
        for event in stream(pipeline, request, **options):
            yield event
            time.sleep(seconds)

    return slow
