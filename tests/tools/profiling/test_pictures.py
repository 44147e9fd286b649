"""Pictures of a report: which sections, which colours, and what a browser is asked for. No browser is needed."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from reelforge.runtime.errors import OutputError, RequestError
from reelforge.tools.profiling.pictures import PICTURES, Picture, find_browser, page_of, take
from reelforge.tools.profiling.report_html import report
from tests.tools.profiling.profiles import profile

# Says a height when asked for the document, and writes its window's size where the picture should be.
BROWSER = """#!{python}
import sys
options = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[1:])
if "dump-dom" in options: print('<html data-height="4321">')
else: open(options["screenshot"], "w").write(options["window-size"])
"""


def titles(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_a_picture_has_its_sections_and_colours(picture: Picture) -> None:
    page = page_of(report(profile()), picture)
    assert len(titles(page)) == len(picture.sections)
    assert all(title.startswith(picture.sections) for title in titles(page))
    assert "<h1>my.bundle</h1>" in page
    assert "prefers-color-scheme:dark" not in page
    assert ("@media all" in page) == picture.dark
    assert f"color-scheme:{'dark' if picture.dark else 'light'};" in page


def test_all_sections_if_none_is_named() -> None:
    whole = report(profile())
    assert titles(page_of(whole, Picture("x.png", dark=False, width=500))) == titles(whole)


def test_a_report_without_a_section_is_refused() -> None:
    with pytest.raises(RequestError, match="no section 'Blocks'") as caught:
        page_of(report(replace(profile(), layers=None)), PICTURES[1])
    assert "fix: measure again" in str(caught.value)


def test_a_picture_is_as_high_as_its_page(tmp_path: Path) -> None:
    browser = tmp_path / "browser"
    browser.write_text(BROWSER.format(python=sys.executable))
    browser.chmod(0o755)
    made = take(str(browser), report(profile()), PICTURES[0], tmp_path)
    assert made == tmp_path / "profile_light.png"
    assert made.read_text() == "1000,4321"


def test_a_browser_that_makes_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="made no picture") as caught:
        take("true", report(profile()), PICTURES[0], tmp_path)
    assert "fix: give another one with --browser" in str(caught.value)


def test_no_browser_is_told() -> None:
    with pytest.raises(RequestError, match="no browser") as caught:
        find_browser("no-such-browser")
    assert "fix: apt-get install chromium" in str(caught.value)
