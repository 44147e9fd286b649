"""A real browser and the stand-in service. Where there is no browser these tests fail: skipped, nobody would notice."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, sync_playwright

from tests.tools.service_page.stand_in import StandIn, application, served, write_video

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE_MS = 20_000  # on a machine that does something else as well


def browser_command() -> str:
    """The system's browser: with its codecs, and updated with the system."""
    for name in NAMES:
        if command := shutil.which(name):
            return command
    pytest.fail("the page is tested in a real browser, and there is none: apt-get install chromium", pytrace=False)


# Of a module and no longer: while playwright is open its event loop runs in this thread, and asyncio.run refuses.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Chromium's sandbox does not work for root. Pages that are tested here are our own.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_command(), args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def stand_in_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    video = tmp_path_factory.mktemp("page") / "video.mp4"
    write_video(video)
    state = StandIn(video)
    with served(application(state)) as url:
        state.url = url
        yield state
        state.reset()  # ends the streams, so that the server can go


@pytest.fixture
def service(stand_in_service: StandIn) -> StandIn:
    stand_in_service.reset()
    return stand_in_service


Watch = Callable[[BrowserContext], Page]


@pytest.fixture
def watched() -> Iterator[Watch]:
    """Makes pages whose every complaint and every request elsewhere fails the test."""
    wrong: list[str] = []

    def message(text: ConsoleMessage) -> None:
        # A refused request is also reported by the browser itself; the page shows it, and tests look for that.
        if text.type in ("error", "warning") and "Failed to load resource" not in text.text:
            wrong.append(f"console: {text.text}")

    def request(made: Request) -> None:
        if not made.url.startswith(("http://127.0.0.1:", "blob:http://127.0.0.1:", "data:image/")):
            wrong.append(f"request: {made.url}")

    def make(context: BrowserContext) -> Page:
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("console", message)
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("request", request)
        return page

    yield make
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def page(browser: Browser, watched: Watch) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield watched(context)
    context.close()
