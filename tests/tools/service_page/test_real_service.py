"""The page and the real service, over a bundle of tiny graphs: nothing between prompt and picture is a stand-in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import av
import pytest
from playwright.sync_api import Browser, Page, expect

from reelforge.tools.service.application import create_application
from reelforge.tools.service.resuming import ResumingPipeline
from reelforge.tools.service.settings import ApiKey, Settings
from tests.runtime.fake_bundle import write_fake_bundle
from tests.tools.service_page.acts import ask, expect_playing, open_page, slowed
from tests.tools.service_page.conftest import Watch
from tests.tools.service_page.stand_in import served

KEY = "a-key-for-the-page-of-the-test"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "tiny.bundle"
    write_fake_bundle(path)
    return path


@contextmanager
def service_over(settings: Settings) -> Iterator[str]:
    """Serve the real application; when it is done, none of its threads is left."""
    before = set(threading.enumerate())
    with served(create_application(settings)) as url:
        yield url
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive(), thread.name


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle is so small that nothing could be watched."""
    monkeypatch.setattr(ResumingPipeline, "stream", slowed(0.05))


@pytest.fixture
def settings(bundle: Path, tmp_path: Path) -> Settings:
    return Settings(bundle, tmp_path / "data", threads=1, least_free_bytes=0, drain_s=0.0)


def test_from_prompt_to_playing_video(page: Page, settings: Settings) -> None:
    with service_over(settings) as url:
        open_page(page, url)
        page.get_by_label("Size").select_option("custom")
        page.get_by_label("Width").fill("64")
        page.get_by_label("Height").fill("48")
        page.get_by_label("Length").fill("13")
        expect(page.locator("#frames-text")).to_have_text("0.5 s, 13 frames")
        page.get_by_label("Steps").fill("30")
        page.get_by_label("Seed").fill("3")
        ask(page, "a ball <b>rolls</b>")
        found = expect_playing(page)
        assert (found["width"], found["height"]) == (64, 48)
        assert found["duration"] == pytest.approx(13 / 24, abs=0.05)
        expect(page.locator("#stage .prompt")).to_have_text("a ball <b>rolls</b>")
        expect(page.locator("#stage .facts")).to_contain_text("seed 3")
        with page.expect_download() as download:
            page.get_by_role("link", name="Download").click()
        with av.open(str(download.value.path())) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
            assert sum(1 for _ in container.decode(stream)) == 13
        expect(page.locator(".thumb img").first).to_be_visible()
        page.reload()
        expect_playing(page)
        page.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(page.locator("#cards li")).to_have_count(0)
        page.reload()
        expect(page.locator("#history-empty")).to_be_visible()


def test_live_progress_preview_reload_and_cancel(page: Page, settings: Settings, slow_steps: None) -> None:
    """A job long enough to be watched, left, and stopped."""
    with service_over(settings) as url:
        open_page(page, url)
        page.get_by_label("Size").select_option("custom")
        page.get_by_label("Width").fill("128")
        page.get_by_label("Height").fill("96")
        page.get_by_label("Steps").fill("100")
        ask(page, "something long")
        page.locator("#stage img.preview").wait_for()
        assert page.locator("#stage img.preview").evaluate("picture => picture.naturalWidth") == 16
        expect(page.locator("#stage .detail")).to_contain_text("step")
        page.reload()
        expect(page.locator("#stage .prompt")).to_have_text("something long")
        page.locator("#stage img.preview").wait_for()
        before = page.locator("#stage .detail").inner_text()
        expect(page.locator("#stage .detail")).not_to_have_text(before)
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#stage-title")).to_have_text("Cancelled")


def test_what_the_service_refuses(page: Page, settings: Settings) -> None:
    with service_over(settings) as url:
        open_page(page, url)
        page.get_by_label("Size").select_option("custom")
        page.get_by_label("Width").fill("640")
        page.get_by_label("Height").fill("480")
        page.get_by_label("Steps").fill("100000")
        ask(page, "not like this")
        box = page.locator("#form-error")
        expect(box.locator("li")).to_have_count(2)
        expect(box).to_contain_text("size: 307200 pixels are more than 12288")
        expect(box).to_contain_text("steps: 100000 are more than 100")
        expect(page.get_by_label("Size")).to_be_focused()
        page.get_by_label("Size").select_option("64x48")
        page.get_by_label("Steps").fill("")
        page.get_by_role("button", name="Generate").click()
        expect_playing(page)


def test_with_a_key(browser: Browser, watched: Watch, settings: Settings) -> None:
    with service_over(replace(settings, keys=(ApiKey.of("ann", KEY),))) as url:
        context = browser.new_context()
        page = watched(context)
        open_page(page, url)
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        ask(page, "mine")
        assert str(expect_playing(page)["source"]).startswith("blob:")
        context.close()


def test_a_restart_in_the_midst_of_a_job_is_survived(page: Page, settings: Settings, slow_steps: None) -> None:
    """The service ends and comes back on the same port; the page, left alone, shows the video in the end."""
    with served(create_application(settings)) as url:
        port = int(url.rsplit(":", 1)[1])
        open_page(page, url)
        page.get_by_label("Steps").fill("100")
        ask(page, "twice begun")
        page.locator("#stage img.preview").wait_for()
    expect(page.locator("#stage .detail")).to_contain_text("connection lost")
    with served(create_application(settings), port):
        expect_playing(page)
        expect(page.locator("#cards li")).to_have_count(1)
