"""The report as a file: self-contained, well-formed, escaped, readable in both colour schemes; and the trace."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from reelforge.runtime.codec import from_json, to_json
from reelforge.tools.profiling.report_charts import Axis, milliseconds, nice_ticks
from reelforge.tools.profiling.report_html import report
from reelforge.tools.profiling.report_steps import counted_runs, median_run
from reelforge.tools.profiling.report_style import PALETTE, TEXT_ON
from reelforge.tools.profiling.schema import Advice, Profile
from reelforge.tools.profiling.schema_work import Machine, Ratio
from reelforge.tools.profiling.terminal import show
from reelforge.tools.profiling.trace import trace_of
from reelforge.tools.profiling.work import machine_words
from tests.tools.profiling.profiles import WORK, layer, profile, run

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


def test_a_round_that_was_not_finished_does_not_count() -> None:
    made = profile()
    late = run(step_ms=99.0)
    interrupted = replace(made, runs=(*made.runs, late), complete=False, missing=("warm run 3 of 3",))
    assert late not in counted_runs(interrupted)
    assert len(counted_runs(interrupted)) == 2


def test_a_machine_in_words() -> None:
    machine = Machine("a processor", 4, 8_000_000_000, "Linux x86_64", None, {})
    assert machine_words(machine, WORK) == "a processor, 4 cores, 8.0 GB"
    assert machine_words(machine, replace(WORK, threads=4)) == "a processor, 4 cores, 8.0 GB"
    assert machine_words(machine, replace(WORK, threads=1)) == "a processor, 4 cores (1 used), 8.0 GB"
    on_gpu = replace(machine, gpu="a GPU", cores=1, memory_bytes=0)
    assert machine_words(on_gpu, WORK) == "a GPU; a processor, 1 core"


def test_long_words_break_on_a_phone() -> None:
    digest = "0123456789abcdef" * 4  # of a bundle, without a space
    page = report(profile(work=replace(WORK, content_digest=digest)))
    assert digest in page
    assert re.search(r"body\{[^}]*overflow-wrap:break-word", page)


def test_the_terminal_says_what_would_help_once(capsys: pytest.CaptureFixture[str]) -> None:
    name = "my[bold].bundle"  # rich would take a name in brackets for a mark
    advice = (
        Advice("dit: a", "do this", "it is slow", 12.0), Advice("dit: b", "do this", "it is slow", 3.0),
        Advice("loading", "do [that]", "it is slow", None),
    )  # fmt: skip
    made = profile(work=replace(WORK, bundle=name), advice=advice)
    assert made.comparison is not None
    other = replace(made.comparison, other=replace(WORK, bundle="other[red].bundle"))
    show(replace(made, comparison=other), Console(width=200))
    shown = capsys.readouterr().out
    assert "my[bold].bundle on cpu" in shown
    assert "other[red].bundle beside my[bold].bundle" in shown
    assert "· do this (2 of the largest layers; saves at most 15 ms)" in shown
    assert "· do [that] (loading)" in shown


def test_a_comparison_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    made = profile()
    assert made.comparison is not None
    ratios = (Ratio("video", 0.94, 0.87, 1.01, 399.1, 361.4), Ratio("vae_decoder", 0.73, 0.05, 10.52, 3.8, 1.3))
    show(replace(made, comparison=replace(made.comparison, ratios=ratios)), Console(width=80))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "no difference shown" in line]
    assert lines == [
        ["video", "399.1", "361.4", "0.94", "0.87-1.01", "no", "difference", "shown"],
        ["vae_decoder", "3.8", "1.3", "0.73", "0.05-10.52", "no", "difference", "shown"],
    ]


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
