"""The page's reader of server-sent events, run in the browser, against the HTML standard's own examples."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Page

from tests.tools.service_page.acts import open_page
from tests.tools.service_page.stand_in import StandIn

READ = """async ([text, size]) => {
  const { eventsOf } = await import("/page/api.js");
  const bytes = new TextEncoder().encode(text);
  const stream = new ReadableStream({
    start(controller) {
      for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
      controller.close();
    },
  });
  const found = [];
  for await (const { type, data, id } of eventsOf(stream)) found.push([type, data, id ?? null]);
  return found;
}"""

CASES: list[tuple[str, list[list[Any]]]] = [
    ("data: YHOO\ndata: +2\ndata: 10\n\n", [["message", "YHOO\n+2\n10", None]]),
    (
        ": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
        [["message", "first event", "1"], ["message", "second event", ""], ["message", " third event", ""]],
    ),
    ("data\n\ndata\ndata\n\ndata:", [["message", "", None], ["message", "\n", None]]),
    ("data:test\n\ndata: test\n\n", [["message", "test", None], ["message", "test", None]]),
    (
        "event: progress\r\ndata: a\r\n\r\nid: 7\rdata: b: c\r\r\n\n",
        [["progress", "a", None], ["message", "b: c", "7"]],
    ),
    ("\ufeffdata: with a mark\n\n", [["message", "with a mark", None]]),
    ("event: nothing\nid: 9\n\ndata: ü🙂\nunknown: x\n\n", [["message", "ü🙂", "9"]]),
    ("data: cut off in the midst", []),
]


@pytest.mark.parametrize(("text", "events"), CASES)
def test_events_are_read_however_they_arrive(page: Page, service: StandIn, text: str, events: list[Any]) -> None:
    open_page(page, service.url)
    for size in (1, 2, 3, 5, 1000):
        assert page.evaluate(READ, [text, size]) == events, size
