"""Every table has one command, every command is listed, and files say where and with what they were measured."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from reelforge.tools.bench import report
from reelforge.tools.bench.registry import BENCHMARKS, PACKAGE, PARTS, find

ROOT = Path(__file__).resolve().parents[3]
TABLES = sorted((ROOT / "benchmarks").glob("*.md"))
PEERS = sorted((ROOT / "tools/bench").glob("requirements-*.txt"))
COMMAND = re.compile(r"^Made by `python -m reelforge\.tools\.bench\.(\w+)[^`\n]*`\.$", re.MULTILINE)


def test_names_and_outputs_are_unique() -> None:
    assert not [name for name, count in Counter(one.name for one in BENCHMARKS).items() if count > 1]
    outputs = Counter(one.output for one in BENCHMARKS if one.output)
    assert not [name for name, count in outputs.items() if count > 1]
    assert len({one.module for one in BENCHMARKS}) == len(BENCHMARKS)
    assert [one.name for one in BENCHMARKS] == sorted(one.name for one in BENCHMARKS)


def test_every_module_with_a_command_line_is_a_benchmark_or_part_of_one() -> None:
    folder = ROOT / "tools/bench"
    commands = {path.stem for path in folder.glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert {one.module for one in BENCHMARKS} | PARTS.keys() == commands


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_every_table_is_made_by_exactly_one_command_and_says_so(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    makers = [one.module for one in BENCHMARKS if one.output == path.name]
    assert COMMAND.findall(text) == makers
    assert len(makers) == 1


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_every_table_says_on_what_it_was_measured(path: Path) -> None:
    head = path.read_text(encoding="utf-8")[:1500]
    assert re.search(r"^- machine: .+, \d+ cores, \d+ GB memory", head, re.MULTILINE)
    assert re.search(r"^- versions: Python 3\.\d+\.\d+, \w+ \d", head, re.MULTILINE)
    assert re.search(r"^- commit [0-9a-f]{12}(-dirty)?, 20\d\d-\d\d-\d\d$", head, re.MULTILINE)


def test_a_gpu_that_is_there_is_not_denied(tmp_path: Path) -> None:
    assert report._gpu(tmp_path / "version") == "no GPU"
    (tmp_path / "version").write_text("NVRM version")
    assert report._gpu(tmp_path / "version") == "a GPU that took no part"


def test_other_files_of_numbers_are_of_a_benchmark_too() -> None:
    files = {path.name for path in (ROOT / "benchmarks").glob("*.json")}
    assert files <= {one.output for one in BENCHMARKS}


def test_the_page_lists_every_benchmark() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert not [one.name for one in BENCHMARKS if f"| `{one.name}` |" not in page]


def test_peers_are_pinned_and_no_extra_pulls_them() -> None:
    assert PEERS
    pinned = set()
    for path in PEERS:
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert all(re.fullmatch(r"[\w.-]+(\[\w+\])?==\d[\w.]*", line) for line in lines), path.name
        pinned |= {re.split(r"[\[=]", line)[0] for line in lines}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    peers = {"nvidia-modelopt", "openvino"}
    assert peers <= pinned
    asked = {extra: {re.split(r"[\[<>=]", item)[0] for item in items} for extra, items in extras.items()}
    assert not [extra for extra, names in asked.items() if names & peers]
    assert [extra for extra, names in asked.items() if "diffusers" in names] == ["dev"]


def test_a_benchmark_is_found_by_its_name() -> None:
    parity = find("parity")
    assert parity is not None
    assert f"{PACKAGE}.{parity.module}" == "reelforge.tools.bench.parity"
    assert find("nothing") is None
