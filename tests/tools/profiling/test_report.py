"""The report as a file: self-contained, well-formed, escaped, readable in both colour schemes; and the trace."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from reelforge.runtime.codec import from_json, to_json
from reelforge.tools.profiling.report_charts import Axis, milliseconds, nice_ticks
from reelforge.tools.profiling.report_html import report
from reelforge.tools.profiling.report_steps import counted_runs, median_run
from reelforge.tools.profiling.report_style import PALETTE, TEXT_ON
from reelforge.tools.profiling.schema import Profile
from reelforge.tools.profiling.trace import trace_of
from tests.tools.profiling.profiles import WORK, layer, profile

VOID = {"meta", "br"}


class Checker(HTMLParser):
    """Collects text, and refuses tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def test_the_page_is_well_formed_and_has_every_section() -> None:
    text = " ".join(checked(report(profile())).words)
    for words in ("Timeline", "Where the time goes", "Stages", "Steps", "Blocks", "The largest layers", "Roofline",
                  "Memory", "How far to trust it", "Beside other.bundle", "double block 0, image MLP up-projection",
                  "Saves at most 12 ms"):  # fmt: skip
        assert words in text, words


def test_the_page_needs_nothing_else() -> None:
    page = report(profile())
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(|<script|<link|<img|src=", page)
    assert 'name="viewport"' in page
    assert "prefers-color-scheme:dark" in page


def test_names_are_escaped() -> None:
    evil = '<script>alert("1")</script>&'
    work = replace(WORK, bundle=evil, family=evil, target=evil, prompt=evil)
    layers = replace(profile().layers, layers=(layer(evil, evil, "gemm", 1.0, 100),))  # type: ignore[type-var]
    page = report(profile(work=work, layers=layers, noise=(evil,), missing=(evil,), complete=False))
    assert "<script" not in page
    assert evil in "".join(checked(page).words)


def test_an_incomplete_profile_says_so_first() -> None:
    page = report(profile(complete=False))
    words = [word.strip() for word in checked(page).words if word.strip()]
    place = next(index for index, word in enumerate(words) if word.startswith("This profile is incomplete"))
    assert "warm run 2 of 2, the layers" in words[place]
    assert place < words.index("Timeline")
    assert "incomplete" not in report(profile())


@pytest.mark.parametrize(
    "missing", ["cold", "warm", "layers", "peak", "comparison", "all"], ids=lambda name: f"without {name}"
)
def test_what_is_missing_is_left_out(missing: str) -> None:
    names = ["cold", "warm", "layers", "peak", "comparison"] if missing == "all" else [missing]
    made = profile(**dict.fromkeys(names), **({"runs": (), "advice": (), "noise": ()} if missing == "all" else {}))
    checked(report(made))


def contrast(first: str, second: str) -> float:
    """WCAG 2.1, relative luminance."""

    def luminance(colour: str) -> float:
        channels = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
        linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read(scheme: int) -> None:
    low = {pair: contrast(*(PALETTE[name][scheme] for name in pair)) for pair in TEXT_ON}
    assert {pair: value for pair, value in low.items() if value < 4.5} == {}


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_bars_stand_out_from_their_ground(scheme: int) -> None:
    bars = [name for _, name in TEXT_ON if name not in ("page", "card")]
    low = {name: contrast(PALETTE[name][scheme], PALETTE["page"][scheme]) for name in bars}
    assert {name: value for name, value in low.items() if value < 3} == {}


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert nice_ticks(3, 3) == [3]
    for low, high in ((0, 0.037), (12, 97), (1, 50)):
        ticks = nice_ticks(low, high)
        assert low <= ticks[0]
        assert ticks[-1] <= high * (1 + 1e-9)
        assert 2 <= len(ticks) <= 8
    assert Axis(1, 1000, "", logarithmic=True).ticks() == [1, 10, 100, 1000]
    assert Axis(1, 100, "", logarithmic=True).place(10) == pytest.approx(0.5)


def test_times_in_the_unit_that_suits_them() -> None:
    shown = [milliseconds(value) for value in (0, 0.0123, 4.5678, 1234, 65_000, 600_000)]
    assert shown == ["0 ms", "0.012 ms", "4.57 ms", "1.23 s", "1.1 min", "10.0 min"]


def test_the_median_run_is_one_that_counts() -> None:
    made = profile()
    assert len(counted_runs(made)) == 2
    assert median_run(made) in counted_runs(made)


def test_the_trace_is_one_that_perfetto_takes() -> None:
    made = profile()
    trace = json.loads(json.dumps(trace_of(made)))
    events = trace["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert all({"name", "ts", "dur", "pid", "tid"} <= set(event) for event in spans)
    assert {event["ph"] for event in events} == {"X", "M", "C"}
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {
        "cold my.bundle 1", "warm my.bundle 1", "warm my.bundle 2", "warm my.bundle 3", "warm other.bundle 1",
        "layers of one call, by cost",
    }  # fmt: skip
    step = next(event for event in spans if event["name"] == "step 2" and event["pid"] == 2)
    assert (step["ts"], step["dur"]) == (17_000, 11_000)
    assert "double block 0, attention" in {event["name"] for event in spans}
    assert trace["otherData"]["complete"] is True


def test_a_profile_survives_its_json() -> None:
    made = profile()
    assert from_json(Profile, json.loads(json.dumps(to_json(made)))) == made
