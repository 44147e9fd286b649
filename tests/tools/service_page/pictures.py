"""Pictures of the page for the documentation: the real service over a real bundle, in a real browser.

    python -m tests.tools.service_page.pictures out/demo.bundle

Not a test; the browser is the tests' one. Written are ``docs/images/service_{desktop,phone}_{light,dark}.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from unittest.mock import patch

from playwright.sync_api import Browser, Page, sync_playwright

from reelforge.tools.service.application import create_application
from reelforge.tools.service.resuming import ResumingPipeline
from reelforge.tools.service.settings import Settings
from tests.tools.service_page.acts import ask, expect_playing, open_page, slowed
from tests.tools.service_page.conftest import browser_command
from tests.tools.service_page.stand_in import served

FOLDER = Path(__file__).resolve().parents[3] / "docs" / "images"
EARLIER = (
    "a blue square growing on a white background",
    "an orange triangle moving up on a gray background",
    "a magenta ring standing still on a white background",
    "a green circle moving left on a gray background",
    "white background, a red triangle moving down",
)
PROMPT = "a red circle moving right on a black background"
VIEWS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "phone": {
        "viewport": {"width": 390, "height": 844}, "device_scale_factor": 1.5, "is_mobile": True, "has_touch": True,
    },
}  # fmt: skip


def call(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def wait_until_ready(url: str) -> None:
    while True:
        try:
            call(f"{url}/readyz")
        except urllib.error.HTTPError:
            time.sleep(0.2)
        else:
            return


def fill_history(url: str) -> None:
    """Make the videos of earlier, which the history shows."""
    wait_until_ready(url)
    jobs = [call(f"{url}/v1/videos", {"prompt": prompt, "seed": 7})["id"] for prompt in reversed(EARLIER)]
    while any(call(f"{url}/v1/videos/{job}")["status"] in ("queued", "running") for job in jobs):
        time.sleep(0.5)


def show_history(page: Page) -> None:
    page.wait_for_function(
        "count => document.querySelectorAll('.thumb img:not([hidden])').length >= count", arg=len(EARLIER)
    )


def take(browser: Browser, url: str, view: str, scheme: str, running: bool) -> None:
    context = browser.new_context(**VIEWS[view], color_scheme=scheme)
    page = context.new_page()
    open_page(page, url)
    page.locator("#cards").scroll_into_view_if_needed()  # pictures are only taken of what is seen
    page.mouse.wheel(0, 2000)
    show_history(page)
    if running:
        page.get_by_label("Seed").fill("7")
        with patch.object(ResumingPipeline, "stream", slowed(0.5)):
            ask(page, PROMPT)
            page.wait_for_function("() => /step 1[4-6]/.test(document.querySelector('#stage .detail').textContent)")
    else:
        page.evaluate("window.scrollTo(0, 0)")  # what is not seen does not begin to play by itself
        expect_playing(page)
        page.mouse.move(0, 0)
        page.wait_for_timeout(3500)  # the player's controls go away
    page.evaluate("window.scrollTo(0, 0)")
    page.mouse.move(0, 0)
    page.screenshot(path=FOLDER / f"service_{view}_{scheme}.png", full_page=True)
    if running:
        page.get_by_role("button", name="Cancel").click()
        page.get_by_role("button", name="Delete", exact=True).click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        page.wait_for_timeout(500)
    context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    bundle = parser.parse_args().bundle
    with tempfile.TemporaryDirectory() as data, sync_playwright() as playwright:
        settings = Settings(bundle, Path(data), least_free_bytes=0, drain_s=0.0)
        with served(create_application(settings)) as url:
            fill_history(url)
            options = ["--no-sandbox"] if os.geteuid() == 0 else []
            browser = playwright.chromium.launch(executable_path=browser_command(), args=options)
            take(browser, url, "desktop", "light", running=False)
            take(browser, url, "desktop", "dark", running=True)
            take(browser, url, "phone", "light", running=True)
            take(browser, url, "phone", "dark", running=False)
            browser.close()


if __name__ == "__main__":
    main()
