"""The page in a real browser: from the prompt to the playing video, and what lies between."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.tools.service_page.acts import ask, expect_playing, hold_at_step, open_page
from tests.tools.service_page.conftest import Watch
from tests.tools.service_page.stand_in import StandIn

MARKUP = "<img src=x onerror='window.broken=1'><script>window.broken=1</script> &amp; \"quotes\" \U0001f642"


def test_from_prompt_to_playing_video(page: Page, service: StandIn) -> None:
    open_page(page, service.url)
    expect(page.locator("#model")).to_have_text("stand-in")
    page.get_by_label("Size").select_option("48x64")
    page.get_by_label("Length").fill("33")
    expect(page.locator("#frames-text")).to_have_text("1.4 s, 33 frames")
    page.get_by_label("Seed").fill("5")
    page.get_by_label("Steps").fill("8")
    service.script.steps = 8
    ask(page, "a yellow square moves to the right")

    expect(page.locator("#stage-title")).to_have_text("Sampling")
    image = page.locator("#stage img.preview")
    expect(image).to_have_attribute("src", re.compile("^data:image/png;base64,"))
    assert image.evaluate("picture => picture.naturalWidth") == 16
    found = expect_playing(page)
    assert (found["width"], found["height"]) == (64, 48)
    assert found["duration"] == pytest.approx(25 / 24, abs=0.05)
    expect(page.locator("#stage-title")).to_have_text("Ready")
    assert service.bodies == [
        {"prompt": "a yellow square moves to the right", "size": "48x64", "frames": 33, "steps": 8, "seed": 5}
    ]
    assert page.locator("#cards li").count() == 1
    assert page.evaluate("location.hash") == f"#{next(iter(service.jobs))}"


def test_a_random_seed_is_the_services_and_can_be_used_again(page: Page, service: StandIn) -> None:
    open_page(page, service.url)
    ask(page, "first")
    expect_playing(page)
    assert "seed" not in service.bodies[0]
    expect(page.locator(".facts")).to_contain_text("seed 1234")
    page.get_by_role("button", name="Use again").click()
    expect(page.get_by_label("Seed")).to_have_value("1234")
    expect(page.get_by_label("Prompt")).to_be_focused()


def test_a_reload_goes_on_with_the_job(page: Page, service: StandIn) -> None:
    service.add(prompt="older")
    open_page(page, service.url)
    name = hold_at_step(page, service)
    service.logs[name] = [
        said for said in service.logs[name] if said[0] != "preview"
    ]  # old pictures are not sent again
    page.reload()
    expect(page.locator("#stage .prompt")).to_have_text("a job that takes its time")
    expect(page.locator("#stage .detail")).to_contain_text("step")
    page.locator("#stage img.preview").wait_for()
    assert page.evaluate("location.hash") == f"#{name}"
    service.script.step_s = 0
    service.script.hold.set()
    expect_playing(page)
    assert len(service.bodies) == 1


def test_a_broken_stream_goes_on_where_it_was(page: Page, service: StandIn) -> None:
    service.script.breaks = {3, 6}
    open_page(page, service.url)
    ask(page, "three connections")
    expect_playing(page)
    streams = [headers for _, url, headers in service.requests if url.endswith("/events")]
    assert [headers.get("last-event-id") for headers in streams] == [None, "3", "6"]


def test_a_lost_connection_is_said_and_found_again(page: Page, service: StandIn) -> None:
    open_page(page, service.url)
    hold_at_step(page, service)
    service.script.down = True
    last = len(service.logs[max(service.jobs)])
    service.script.breaks = {last + 1}
    service.script.hold.set()
    expect(page.locator("#stage .detail")).to_contain_text("connection lost, trying again")
    expect(page.locator("#connection")).to_be_visible()  # the list of jobs cannot be had either
    service.script.step_s = 0
    service.script.down = False
    expect_playing(page)
    page.evaluate("window.dispatchEvent(new Event('online'))")
    expect(page.locator("#connection")).to_be_hidden()


def test_a_service_that_starts_later(page: Page, service: StandIn) -> None:
    service.script.down = True
    page.goto(service.url)
    expect(page.locator("#connection")).to_contain_text("Trying again")
    service.script.down = False
    page.evaluate("window.dispatchEvent(new Event('online'))")
    expect(page.locator("#size option").first).to_be_attached()
    expect(page.locator("#connection")).to_be_hidden()


def test_an_answer_that_is_lost_makes_no_second_job(page: Page, service: StandIn) -> None:
    open_page(page, service.url)
    lost = []

    def lose(route: object) -> None:
        if route.request.method == "POST" and not lost:  # type: ignore[attr-defined]
            lost.append(route.fetch())  # type: ignore[attr-defined]
            route.abort()  # type: ignore[attr-defined]
        else:
            route.continue_()  # type: ignore[attr-defined]

    page.route("**/v1/videos", lose)
    ask(page, "once")
    expect(page.get_by_role("alert").filter(has_text="cannot be reached")).to_be_visible()
    page.get_by_role("button", name="Generate").click()
    expect_playing(page)
    assert len(service.bodies) == 2
    assert len(service.jobs) == 1
    ask(page, "once")  # and once more, on purpose
    expect(page.locator("#cards li")).to_have_count(2)
    assert len(service.jobs) == 2


def test_cancel(page: Page, service: StandIn) -> None:
    open_page(page, service.url)
    name = hold_at_step(page, service)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#stage-title")).to_have_text("Cancelled")
    assert service.jobs[name]["status"] == "cancelled"
    expect(page.locator("#stage-title")).to_be_focused()  # the button is gone, and focus is not lost


def test_delete_asks_first(page: Page, service: StandIn) -> None:
    other, name = service.add(prompt="another", age_s=100), service.add(prompt="not kept")["id"]
    open_page(page, service.url)
    expect_playing(page)
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Keep it").click()
    assert name in service.jobs
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("#cards li")).to_have_count(1)
    assert list(service.jobs) == [other["id"]]
    expect(page.locator("#stage .prompt")).to_have_text("another")


def test_an_answer_that_is_told_late_is_not_the_next_question_s(page: Page, service: StandIn) -> None:
    """The browser tells that a dialog was closed after the event that closed it, and one can ask again before that."""
    service.add()
    open_page(page, service.url)
    page.get_by_role("button", name="Delete").click()
    button = page.get_by_role("button", name="Delete", exact=True, include_hidden=True).first
    button.evaluate("button => { document.getElementById('confirm').close(''); button.click(); }")
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("#cards li")).to_have_count(0)


def test_the_history_leads_to_each_job_and_back(page: Page, service: StandIn) -> None:
    for index in range(30):
        service.add(prompt=f"number {index}", age_s=1000 - index)
    open_page(page, service.url)
    cards = page.locator("#cards li")
    expect(cards).to_have_count(24)
    page.get_by_role("button", name="Show more").click()
    expect(cards).to_have_count(30)
    expect(page.locator("#more")).to_be_hidden()
    assert [text.split("\n")[0] for text in cards.all_inner_texts()] == [f"number {i}" for i in range(29, -1, -1)]
    page.get_by_role("button", name="number 12").click()
    expect(page.locator("#stage .prompt")).to_have_text("number 12")
    page.get_by_role("button", name="number 3 ").click()
    expect(page.locator("#stage .prompt")).to_have_text("number 3")
    page.go_back()
    expect(page.locator("#stage .prompt")).to_have_text("number 12")
    expect(page.locator(".thumb img").first).to_be_visible()  # a frame of the video


def test_jobs_of_other_windows_appear_and_disappear(page: Page, service: StandIn) -> None:
    service.add(prompt="mine")
    open_page(page, service.url)
    expect(page.locator("#cards li")).to_have_count(1)
    other = service.add(prompt="from elsewhere", age_s=70)
    page.evaluate("window.dispatchEvent(new Event('online'))")  # what else comes after 20 seconds
    expect(page.locator("#cards li")).to_have_count(2)
    del service.jobs[other["id"]]
    page.evaluate("window.dispatchEvent(new Event('online'))")
    expect(page.locator("#cards li")).to_have_count(1)


def test_markup_in_prompts_and_messages_is_text(page: Page, service: StandIn) -> None:
    service.script.fails = f"failed because of {MARKUP}"
    service.script.refuse = [(422, "invalid_request", f"refused {MARKUP}", [f"prompt {MARKUP}"], {})]
    open_page(page, service.url)
    ask(page, MARKUP)
    expect(page.locator("#form-error")).to_contain_text(f"prompt {MARKUP}")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#stage .error")).to_contain_text(MARKUP)
    expect(page.locator("#stage .prompt")).to_have_text(MARKUP)
    expect(page.locator(".card-prompt").first).to_have_text(MARKUP)
    assert page.evaluate("window.broken") is None
    assert page.locator("script:not([src]), #stage script, img[src='x']").count() == 0


def test_nothing_inline_is_run(browser: Browser, service: StandIn) -> None:
    """Were markup ever inserted, the policy would stop it."""
    context = browser.new_context()
    page = context.new_page()
    open_page(page, service.url)
    tries = {
        "html": "document.body.innerHTML = '<p>x'",
        "script": "document.body.append(Object.assign(document.createElement('script'), {textContent: 'x = 1'}))",
        "handler": "document.body.setAttribute('onclick', 'window.broken = 1')",
        "frame": "document.createElement('iframe').srcdoc = '<script>x = 1</script>'",
    }
    for code in tries.values():
        name = page.evaluate(f"() => {{ try {{ {code}; return 'ran' }} catch (error) {{ return error.name }} }}")
        assert name == "TypeError", code
    assert page.evaluate("window.broken") is None
    context.close()


def test_a_key_stays_in_the_tab(browser: Browser, watched: Watch, service: StandIn) -> None:
    service.script.key = secret = "a-key-that-is-long-enough"
    service.add(prompt="made before")
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = watched(context)
    open_page(page, service.url)
    expect(page.locator("#history-empty")).to_contain_text("once the API key is entered")
    ask(page, "without a key")
    expect(page.locator("#form-error")).to_contain_text("API key is missing or wrong")
    expect(page.get_by_label("API key")).to_be_focused()
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#form-error")).to_contain_text("API key is missing or wrong")
    page.get_by_label("API key").fill(secret)
    page.get_by_role("button", name="Use", exact=True).click()
    expect(page.locator("#cards li")).to_have_count(1)
    expect(page.locator("#form-error")).to_be_hidden()
    ask(page, "with a key")
    assert str(expect_playing(page)["source"]).startswith("blob:")
    page.reload()
    expect_playing(page)
    assert not [url for _, url, _ in service.requests if secret in url]
    state = json.dumps(context.storage_state())
    assert secret not in state  # neither in cookies nor in localStorage
    assert page.evaluate("Object.values(localStorage).length") == 0
    other = watched(context)
    open_page(other, service.url)
    expect(other.get_by_label("API key")).to_have_value("")
    context.close()


def test_those_who_want_less_motion_start_the_video_themselves(
    browser: Browser, watched: Watch, service: StandIn
) -> None:
    service.add()
    context = browser.new_context(reduced_motion="reduce")
    page = watched(context)
    open_page(page, service.url)
    page.wait_for_function("() => document.querySelector('#stage video')?.readyState >= 2")
    assert page.evaluate("document.querySelector('#stage video').paused")
    context.close()
