"""The pictures of ``docs/profiling.md``: a report in a headless browser, light and dark.

``python -m reelforge.tools.profiling.pictures REPORT -o FOLDER``, or ``make profile-pictures``. Needs Chromium. What is
photographed is the report itself with some sections left out; the module knows their titles and nothing of profiles.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click

from reelforge.runtime.errors import OutputError, RequestError
from reelforge.tools import console

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LIMIT_S = 60.0
_SECTION = re.compile(r"<section.*?</section>", re.DOTALL)
_TITLE = re.compile(r"<h2>(.*?)</h2>", re.DOTALL)
_MEASURE = "<script>document.documentElement.dataset.height=document.documentElement.scrollHeight</script>"
_HEIGHT = re.compile(r'data-height="(\d+)"')


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        name: Of the file.
        dark: Which of the report's two colour schemes.
        width: Of the window, in CSS pixels.
        sections: Beginnings of the titles of those that are shown; empty: all.
    """

    name: str
    dark: bool
    width: int
    sections: tuple[str, ...] = ()


PICTURES = (
    Picture(
        "profile_light.png",
        dark=False,
        width=1000,
        sections=("How far to trust it", "Timeline", "Where the time goes", "Stages", "Steps"),
    ),
    Picture(
        "profile_dark.png",
        dark=True,
        width=1000,
        sections=("Blocks", "The largest layers", "Roofline", "Memory"),
    ),
)


def page_of(report: str, picture: Picture) -> str:
    """Return the page of one picture: sections left out, and the colours fixed instead of the system's.

    Raises:
        RequestError: If the report lacks a section that is to be shown.
    """
    missing = [title for title in picture.sections if f"<h2>{title}" not in report]
    if missing:
        raise RequestError(
            f"the report has no section {missing[0]!r}, which {picture.name} shows.",
            expected="a complete report, with layers and with more than one step",
            fix="measure again, without --no-layers and --no-peak",
        )

    def kept(section: re.Match[str]) -> str:
        title = _TITLE.search(section[0])
        shown = title is not None and (not picture.sections or title[1].startswith(picture.sections))
        return section[0] if shown else ""

    page = _SECTION.sub(kept, report)
    chosen = "all" if picture.dark else "not all"
    page = page.replace("@media (prefers-color-scheme:dark)", f"@media {chosen}")
    return page.replace("color-scheme:light dark", f"color-scheme:{'dark' if picture.dark else 'light'}")


def take(browser: str, report: str, picture: Picture, folder: Path) -> Path:
    """Take one picture of a report.

    Args:
        browser: Path of a Chromium.
        report: The page.
        picture: What to show.
        folder: For the file, which is replaced.

    Raises:
        RequestError: As :func:`page_of`.
        OutputError: If the browser makes no picture.
    """
    page = page_of(report, picture)
    with tempfile.TemporaryDirectory(prefix="reelforge-pictures-") as name:
        work = Path(name)
        source, made = work / "page.html", work / "made.png"
        source.write_text(page.replace("</body>", f"{_MEASURE}</body>"), encoding="utf-8")
        # As high as a picture has to be at least; the document's height is never less than the window's.
        told = _run(browser, work, source, f"--window-size={picture.width},200", "--dump-dom")
        height = _HEIGHT.search(told)
        if height is not None:
            size = f"--window-size={picture.width},{height[1]}"
            _run(browser, work, source, size, f"--screenshot={made}", "--hide-scrollbars")
        if not made.exists():
            raise OutputError(
                f"the browser {browser!r} made no picture.",
                received=told[:200] or "nothing",
                expected="a Chromium that runs without a display",
                fix="give another one with --browser",
            )
        target = folder / picture.name
        shutil.copyfile(made, target)
    return target


def _run(browser: str, work: Path, page: Path, *options: str) -> str:
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={work / 'browser'}"]
    try:
        result = subprocess.run(
            [*command, *options, page.as_uri()], check=False, capture_output=True, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return ""
    return result.stdout


def find_browser(given: str | None) -> str:
    """Return the path of the browser.

    Raises:
        RequestError: If there is none.
    """
    found = next((path for name in ([given] if given else BROWSERS) if (path := shutil.which(name))), None)
    if found is None:
        raise RequestError(
            "there is no browser to take pictures with.",
            received=given or f"none of {', '.join(BROWSERS)} on PATH",
            expected="Chromium",
            fix="apt-get install chromium, or give --browser PATH",
        )
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("report", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--browser", help="Path or name of a Chromium.  [default: the first of the usual names on PATH]")
def main(report: Path, output: Path, browser: str | None) -> None:
    """Take the documentation's pictures of REPORT, a report.html of `reelforge profile`."""
    found, page = find_browser(browser), report.read_text(encoding="utf-8")
    for picture in PICTURES:
        click.echo(take(found, page, picture, output))


if __name__ == "__main__":
    console.run(main)
