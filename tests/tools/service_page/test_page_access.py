"""The page for everybody: by keyboard alone, on a phone, light and dark, and what axe-core finds (WCAG 2.2 AA)."""

from __future__ import annotations

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.tools.service_page.acts import ask, expect_playing, hold_at_step, open_page, scrolls_sideways
from tests.tools.service_page.conftest import Watch
from tests.tools.service_page.stand_in import StandIn

RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
PHONE = {"width": 390, "height": 844}


NEEDED = frozenset({"color-contrast", "label", "button-name", "target-size"})


def assert_accessible(page: Page, needed: frozenset[str] = NEEDED) -> None:
    results = Axe().run(page, options=RULES)
    assert not results.response["violations"], results.generate_report()
    checked = {rule["id"] for rule in results.response["passes"]}
    assert needed <= checked


def fill_history(service: StandIn) -> None:
    service.add(prompt="Waves break against a lighthouse", age_s=4000)
    service.add("failed", prompt="One that failed", age_s=5000)
    service.add("cancelled", prompt="Onewordwithoutanyplacetobreakthelineat" * 5, age_s=6000)


@pytest.mark.parametrize("viewport", [{"width": 1280, "height": 900}, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_state_passes_axe(
    browser: Browser, watched: Watch, service: StandIn, scheme: str, viewport: dict[str, int]
) -> None:
    context = browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
    page = watched(context)
    page.goto(service.url)
    open_page(page, service.url)
    assert_accessible(page)  # empty
    fill_history(service)
    service.script.refuse = [(422, "invalid_request", "the request cannot be carried out", ["steps: too many"], {})]
    open_page(page, service.url)
    expect(page.locator("#cards li")).to_have_count(3)
    ask(page, "wrong")
    expect(page.locator("#form-error")).to_be_visible()
    assert_accessible(page)  # errors, and a finished video
    hold_at_step(page, service)
    assert_accessible(page)  # progress
    page.get_by_role("button", name="One that failed").click()
    expect(page.locator("#stage .error")).to_be_visible()
    page.get_by_role("button", name="Delete").click()
    assert_accessible(page, NEEDED - {"label"})  # the question; the rest is inert behind it
    page.keyboard.press("Escape")
    assert_accessible(page)  # a failed job
    context.close()


def test_axe_finds_what_is_wrong(page: Page, service: StandIn) -> None:
    open_page(page, service.url)
    page.evaluate("document.querySelector('label[for=prompt]').style.color = '#bbb'")
    with pytest.raises(AssertionError, match="color-contrast"):
        assert_accessible(page)


@pytest.mark.parametrize("width", [320, 390, 768])
def test_nothing_is_wider_than_the_screen(browser: Browser, watched: Watch, service: StandIn, width: int) -> None:
    fill_history(service)
    service.add(prompt="portrait", size="48x64", age_s=10)
    context = browser.new_context(viewport={"width": width, "height": 700}, has_touch=True, is_mobile=True)
    page = watched(context)
    open_page(page, service.url)
    assert not scrolls_sideways(page)
    for name in ("portrait", "Waves", "Oneword", "One that"):
        page.locator(".card", has_text=name).tap()
        assert not scrolls_sideways(page)
    service.script.refuse = [(422, "invalid_request", "x" * 300, ["steps: " + "y" * 300], {})]
    ask(page, "z" * 300)
    expect(page.locator("#form-error")).to_be_visible()
    assert not scrolls_sideways(page)
    hold_at_step(page, service, "w" * 300)
    assert not scrolls_sideways(page)
    box = page.locator("#stage .screen").bounding_box()
    assert box
    assert 0 <= box["y"] < 350  # what was asked for is what one looks at
    context.close()


def test_targets_are_large_enough_for_a_thumb(browser: Browser, watched: Watch, service: StandIn) -> None:
    service.add()
    context = browser.new_context(viewport=PHONE, has_touch=True, is_mobile=True)  # type: ignore[arg-type]
    page = watched(context)
    open_page(page, service.url)
    expect(page.get_by_role("link", name="Download")).to_be_visible()
    for control in page.locator(
        "main button:visible, main a:visible, select, textarea, input[type=number]:visible"
    ).all():
        box = control.bounding_box()
        assert box
        assert box["height"] >= 44, control.inner_text()
    context.close()


def test_by_keyboard_alone(page: Page, service: StandIn) -> None:
    open_page(page, service.url)
    press = page.keyboard.press
    press("Tab")
    expect(page.get_by_role("link", name="Skip to the prompt")).to_be_focused()
    press("Enter")
    expect(page.get_by_label("Prompt")).to_be_focused()
    page.keyboard.type("without a mouse")
    press("Tab")
    expect(page.get_by_label("Size")).to_be_focused()
    press("ArrowDown")
    expect(page.get_by_label("Size")).to_have_value("48x64")
    press("Tab")
    expect(page.get_by_label("Length")).to_be_focused()
    press("ArrowLeft")
    expect(page.get_by_label("Length")).to_have_value("21")
    press("Tab")
    page.keyboard.type("11")
    press("Tab")
    press("Tab")
    expect(page.get_by_role("button", name="Generate")).to_be_focused()
    press("Enter")
    expect_playing(page)
    assert service.bodies == [{"prompt": "without a mouse", "size": "48x64", "frames": 21, "steps": 6, "seed": 11}]
    expect(page.get_by_role("button", name="Generate")).to_be_focused()

    press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "VIDEO"
    page.get_by_role("button", name="Delete").focus()
    press("Enter")
    expect(page.get_by_role("button", name="Keep it")).to_be_focused()
    press("Escape")
    expect(page.get_by_role("button", name="Delete")).to_be_focused()
    press("Enter")
    press("Tab")
    press("Enter")
    expect(page.locator("#cards li")).to_have_count(0)
    expect(page.locator("#history-title")).to_be_focused()

    page.get_by_label("Prompt").focus()
    press("Control+Enter")
    expect_playing(page)
    assert len(service.bodies) == 2


def test_focus_can_be_seen(page: Page, service: StandIn) -> None:
    open_page(page, service.url)
    for _ in range(7):
        page.keyboard.press("Tab")
        style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert style == "solid", page.evaluate("document.activeElement.outerHTML")


def test_progress_is_announced_by_phase_and_not_by_step(page: Page, service: StandIn) -> None:
    open_page(page, service.url)
    page.evaluate(
        "() => { window.said = []; new MutationObserver(() => window.said.push(announcer.textContent))"
        ".observe(announcer, {childList: true}); }"
    )
    service.script.steps = 30
    ask(page, "listen")
    expect_playing(page)
    said = page.evaluate("window.said")
    assert said[-1] == "Ready"
    assert "Sampling" in said
    assert len(said) <= 8


def test_text_can_be_enlarged(browser: Browser, watched: Watch, service: StandIn) -> None:
    """WCAG 1.4.10: at 400 % of 1280 pixels nothing needs scrolling in two directions."""
    fill_history(service)
    context = browser.new_context(viewport={"width": 320, "height": 256})
    page = watched(context)
    open_page(page, service.url)
    assert not scrolls_sideways(page)
    context.close()
