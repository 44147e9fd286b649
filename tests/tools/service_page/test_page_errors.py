"""What the page says when something is wrong: in the API's words, beside the field that it is about."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.tools.service_page.acts import ask, expect_playing, open_page
from tests.tools.service_page.stand_in import Refusal, StandIn


def test_every_problem_is_shown(page: Page, service: StandIn) -> None:
    problems = ["steps: 1000 is more than 100", "seed: below 0"]
    service.script.refuse = [(422, "invalid_request", "the request cannot be carried out", problems, {})]
    open_page(page, service.url)
    ask(page, "too much")
    box = page.locator("#form-error")
    expect(box).to_contain_text("The request cannot be carried out.")
    assert box.locator("li").all_inner_texts() == problems
    expect(page.get_by_label("Steps")).to_be_focused()
    expect(page.get_by_label("Steps")).to_have_attribute("aria-invalid", "true")
    assert "form-error" in (page.get_by_label("Steps").get_attribute("aria-describedby") or "")
    page.get_by_role("button", name="Generate").click()
    expect_playing(page)
    expect(box).to_be_hidden()
    assert page.locator("[aria-invalid]").count() == 0


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ((429, "queue_full", "the queue is full", [], {"Retry-After": "30"}), "Try again in 30 s."),
        ((503, "draining", "the service is about to stop", [], {"Retry-After": "600"}), "Try again in 10 min."),
        ((413, "too_large", "the body is too large", [], {}), "The body is too large."),
    ],
)
def test_refusals(page: Page, service: StandIn, answer: Refusal, shown: str) -> None:
    service.script.refuse = [answer]
    open_page(page, service.url)
    ask(page, "not now")
    expect(page.locator("#form-error")).to_contain_text(shown)
    expect(page.get_by_label("Prompt")).to_have_value("not now")


def test_an_answer_in_another_language(page: Page, service: StandIn) -> None:
    open_page(page, service.url)
    service.script.down = True
    ask(page, "through a proxy")
    expect(page.locator("#form-error")).to_have_text("The service answered 502.")


@pytest.mark.parametrize(
    ("label", "text", "shown"),
    [("Prompt", "  ", "Describe the video first."), ("Seed", "1.5", "The seed is not a whole number."),
     ("Seed", "99999999999999999999", "The seed is not a whole number."),
     ("Steps", "1e", "The steps is not a whole number.")],
)  # fmt: skip
def test_what_cannot_be_sent(page: Page, service: StandIn, label: str, text: str, shown: str) -> None:
    open_page(page, service.url)
    page.get_by_label("Prompt").fill("a ball")
    page.get_by_label(label).fill("")
    page.get_by_label(label).press_sequentially(text)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#form-error")).to_have_text(shown)
    expect(page.get_by_label(label)).to_be_focused()
    assert not service.bodies


def test_a_job_that_fails(page: Page, service: StandIn) -> None:
    service.script.fails = "The engine of stage 'dit' failed at step 2."
    open_page(page, service.url)
    ask(page, "bad luck")
    expect(page.locator("#stage-title")).to_have_text("Failed")
    expect(page.locator("#stage .error")).to_have_text("The engine of stage 'dit' failed at step 2.")
    page.get_by_role("button", name="Use again").click()
    expect(page.get_by_label("Prompt")).to_have_value("bad luck")


def test_a_video_that_is_no_longer_kept(page: Page, service: StandIn) -> None:
    service.add(prompt="long ago")
    open_page(page, service.url)
    expect(page.locator("#stage .error")).to_have_text("The video was removed after its time.")
    expect(page.get_by_role("link", name="Download")).to_be_hidden()


def test_an_address_of_a_job_that_is_gone(page: Page, service: StandIn) -> None:
    service.add(prompt="still here")
    open_page(page, f"{service.url}/#video_{'f' * 32}")
    expect(page.locator("#history-error")).to_have_text("There is no such video job.")
    expect(page.locator("#stage .prompt")).to_have_text("still here")


def test_sizes_where_the_bundle_has_no_fixed_ones(page: Page, service: StandIn) -> None:
    service.script.sizes = None
    open_page(page, service.url)
    offered = page.locator("#size option").evaluate_all("all => all.map(one => one.value)")
    assert offered[0] == "64x48"
    assert offered[-1] == "custom"
    for width, height in (map(int, size.split("x")) for size in offered[:-1]):
        assert width % 16 == height % 16 == 0
        assert width * height <= 64 * 64
    page.get_by_label("Size").select_option("custom")
    page.get_by_label("Width").fill("32")
    page.get_by_label("Height").fill("80")
    ask(page, "tall")
    expect_playing(page)
    assert service.bodies[0]["size"] == "32x80"


def test_a_draft_survives_a_reload(page: Page, service: StandIn) -> None:
    open_page(page, service.url)
    page.get_by_label("Prompt").fill("a long text")
    page.get_by_label("Size").select_option("64x64")
    page.get_by_label("Length").fill("13")
    page.reload()
    expect(page.get_by_label("Prompt")).to_have_value("a long text")
    expect(page.get_by_label("Size")).to_have_value("64x64")
    expect(page.get_by_label("Length")).to_have_value("13")
