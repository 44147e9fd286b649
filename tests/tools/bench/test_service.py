"""The service's benchmark: what it counts, and its quick drills on the fake bundle."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from reelforge.tools.bench import service_contract, service_faults, service_kills, service_load
from reelforge.tools.bench.service_clients import Timings
from reelforge.tools.bench.service_load import Cpu, Loop, Turn
from tests.runtime.fake_bundle import write_fake_bundle
from tests.tools.service.process import ServiceProcess


def test_requests_differ() -> None:
    bodies = service_load.requests(40)
    assert len({json.dumps(body) for body in bodies}) == 40
    assert {body["size"] for body in bodies} == {f"{width}x{height}" for width, height, _, _ in service_load.SIZES}


def test_the_load_in_words() -> None:
    fine = Timings([0.01, 0.02, 0.2], [0.1, 0.2, 0.3], ["a", "b", "c"], ["completed"] * 3, 0, 10.0, 0.03)
    lost = Timings([0.01, 0.02, 0.2], [0.1, 0.2, 0.3], ["a", "b", "c"], ["completed", "", "failed"], 0, 20.0, 0.3)
    turns = {"with previews": [Turn(fine, Cpu(21.0, 0.6))], "--no-previews": [Turn(lost, Cpu(24.0, 3.0))]}
    lines = "\n".join(service_load._lines([Loop(11.0, 18.0), Loop(9.0, 18.0), Loop(11.0, 19.8)], turns, 3))
    assert "| with previews | 20 | 200 | 200 | 300 | 0.30 | 1.000 |" in lines
    assert "| the loop | 6000.0 |  |  |  |" in lines
    assert "| with previews | 7010.0 | 6800.0 | 200.0 | 10.0 |" in lines
    assert "| at least 0.97x of a loop, with previews | 1.000x | met |" in lines
    assert "| at least 0.97x of a loop, --no-previews | 0.500x | **missed** |" in lines
    assert "| no accepted job is lost | 2 lost | **missed** |" in lines


def test_a_turn_is_compared_with_the_loops_around_it() -> None:
    loops = [Loop(seconds, 0.0) for seconds in (1.0, 3.0, 5.0, 7.0, 9.0)]
    turns = {name: [Turn(Timings(seconds=seconds), Cpu(0.0, 0.0)) for seconds in found]
             for name, found in (("a", (2.0, 12.0)), ("b", (2.0, 2.0)))}  # fmt: skip
    assert service_load._ratios(loops, turns) == {"a": [1.0, 0.5], "b": [2.0, 4.0]}


def test_clients_on_a_real_process(tmp_path: Path) -> None:
    write_fake_bundle(tmp_path / "fake.bundle")
    process = ServiceProcess(tmp_path / "fake.bundle", tmp_path / "data", ("--queue-per-key", "2"))
    process.start()
    try:
        body = {"prompt": "a ball", "size": "32x16", "frames": 5, "steps": 3}
        turn = service_load.drive(process, [{**body, "seed": seed} for seed in range(12)], 8)
        assert turn.told.ends == ["completed"] * 12
        assert len(set(turn.told.jobs)) == len(turn.told.accepted) == len(turn.told.first_event) == 12
        assert turn.told.refused > 0, "two may wait, and eight ask"
        assert 0 < turn.cpu.first_thread < turn.cpu.whole
        assert all(0 < one < turn.told.seconds for one in (*turn.told.accepted, *turn.told.first_event))
        with pytest.raises(subprocess.CalledProcessError):
            service_load.drive(process, [{"prompt": 1}], 1)
    finally:
        process.stop()


@pytest.mark.parametrize("trouble", ["", "lost", "twice", "half", "bytes"])
def test_kills_in_words(tmp_path: Path, trouble: str) -> None:
    for folder in ("videos", "work"):
        (tmp_path / folder).mkdir()
    for job, content in (("a", b"1"), ("b", b"1" if trouble != "bytes" else b"2")):
        (tmp_path / "videos" / f"{job}.mp4").write_bytes(content)
    rows = [("a", "completed", 2, 1), ("b", "completed" if trouble != "lost" else "failed", 1, 0)]
    rows += [("c", "queued", 0, 0)] if trouble == "twice" else []
    if trouble == "half":
        (tmp_path / "work" / "x.mp4").write_bytes(b"")
    feeder = service_kills.Feeder(({}, {}), 0.1, promised={"a": 0, "b": 0})
    told = "\n".join(service_kills._lines(tmp_path, feeder, rows, Counter(sampling=2), 0))
    goals = [line for line in told.splitlines() if line.endswith(("met |", "**missed** |"))]
    wrong = {"lost": "no accepted", "twice": "twice", "half": "half-written", "bytes": "same bytes"}.get(trouble)
    missed = [line for line in goals if "**missed**" in line]
    assert len(goals) == 4
    assert any(wrong in line for line in missed) if wrong else not missed


def test_verdicts_of_the_auditor() -> None:
    hole = {"dependencies": [{"name": "x", "version": "1", "vulns": [{"id": "CVE-1"}]}]}
    assert service_contract._verdict(json.dumps(hole)) == ("1 packages, 0 unknown: x CVE-1", "**missed**")
    hole["dependencies"][0]["vulns"] = []
    assert service_contract._verdict(json.dumps(hole)) == ("1 packages, 0 unknown: nothing", "met")
    unknown = {"dependencies": [{"name": "x", "skip_reason": "not found"}]}
    assert service_contract._verdict(json.dumps(unknown))[1] == "**not audited**"
    assert service_contract._verdict("a traceback")[1] == "**not audited**"
    assert {"starlette", "pydantic", "h11"} <= service_contract._closure(service_contract.SERVE)


@pytest.mark.parametrize(("right", "shown"), [(True, "met"), (False, "**missed**"), (None, "**not tried**")])
def test_a_drill_in_words(right: bool | None, shown: str) -> None:
    assert service_faults.row("done", "seen", right) == ("done", "seen", shown)


def test_a_drill_on_a_real_process(tmp_path: Path) -> None:
    write_fake_bundle(tmp_path / "fake.bundle")
    (tmp_path / "drill").mkdir()
    done, seen, right = service_faults.damaged_before(tmp_path / "fake.bundle", tmp_path / "drill")
    assert (seen, right) == ("exit code 4", True), done
