"""What a measured section says of the machine's processors."""

from __future__ import annotations

from pathlib import Path

import pytest

from reelforge.tools.bench import sections

# user nice system idle iowait irq softirq steal guest guest_nice, after proc(5)
EARLY = "cpu  1000 50 200 5000 10 0 5 30 400 20\ncpu0 1 2 3\n"
LATE = "cpu  1600 60 300 5200 20 0 15 130 900 25\ncpu0 1 2 3\n"


def test_what_the_host_took(tmp_path: Path) -> None:
    for name, content in (("early", EARLY), ("late", LATE)):
        (tmp_path / name).write_text(content, encoding="utf-8")
    early, late = (sections.processor_times(tmp_path / name) for name in ("early", "late"))
    # 600 + 10 + 100 + 200 + 10 + 10 + 100 ticks passed; those of guests are in the first two already.
    assert sections.stolen_share(early, late) == pytest.approx(100 / 1030)


def test_nothing_is_said_where_it_is_not_known(tmp_path: Path) -> None:
    unknown = sections.processor_times(tmp_path / "none")
    assert unknown is None
    assert sections.stolen_share(unknown, [1] * 10) is None
    assert sections.stolen_share([1] * 10, [1] * 10) is None, "no time has passed"
    fragment = sections.Fragment(["a line"], "c0ffee", "2026-01-01", 1.0, "3 rounds")
    text = "\n".join(sections.document([], {"one": "One"}, {"one": fragment}))
    assert "*Measured at commit c0ffee, 2026-01-01, 3 rounds, 1 minutes.*" in text


def test_a_section_keeps_it(tmp_path: Path) -> None:
    fragment = sections.measure("one", lambda: ["a line"], "3 rounds", tmp_path)
    assert sections.read(tmp_path, {"one": "One"}) == {"one": fragment}
    if fragment.stolen is None:
        return
    text = "\n".join(sections.document([], {"one": "One"}, {"one": fragment}))
    assert f"{fragment.stolen * 100:.1f} % of the processors' time taken by the virtual machine's host" in text
