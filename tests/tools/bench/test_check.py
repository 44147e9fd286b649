"""The regression guard with invented measurements: what passes, what fails, and what a damaged baseline is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from reelforge.runtime.errors import BuildError, OutputError, ReelforgeError, RequestError, VerificationError
from reelforge.tools.bench import check
from reelforge.tools.bench.baseline import (
    LEAST_TOLERANCE,
    SCHEMA,
    UPDATE,
    Baseline,
    Entry,
    Judged,
    Verdict,
    read_baseline,
    spread_entry,
    updated,
    write_baseline,
)
from reelforge.tools.bench.check_measures import GROUPS, Group, Samples, Workbench

ROOT = Path(__file__).resolve().parents[3]
STEP, LOOP = "int8 / fp32", "loop / step"


def fake(name: str, *rounds: Samples, tolerance: float = 0.2) -> Group:
    """Measure one invented ratio; the last round is repeated for ever."""
    left = list(rounds)

    def measure(_bench: Workbench) -> dict[str, Samples]:
        return {name: left.pop(0) if len(left) > 1 else left[0]}

    return Group({name: tolerance}, measure, name.split()[0])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def invoke(groups: tuple[Group, ...], *options: str) -> Result:
        monkeypatch.setattr(check, "GROUPS", groups)
        return CliRunner().invoke(check.main, ["--baseline", "baseline.json", "--checkpoint", "checkpoint", *options])

    yield invoke
    assert not list((tmp_path / "build/bench").glob("*"))  # nothing is left behind


def store(**ratios: Any) -> None:
    Path("baseline.json").write_text(json.dumps({"schema": SCHEMA, "ratios": ratios}), encoding="utf-8")


def entry(ratio: float, tolerance: float = 0.2) -> dict[str, float]:
    return {"ratio": ratio, "tolerance": tolerance}


def test_ratios_within_their_tolerance_pass(run: Callable[..., Result]) -> None:
    store(**{STEP: entry(0.5), LOOP: entry(0.1)})
    result = run((fake(STEP, (0.55, 0.59, 9.0)), fake(LOOP, (0.1,))))
    assert result.exit_code == 0, result.output
    rows = {line.split("  ")[0].strip(): line for line in result.output.splitlines()}
    assert "0.500" in rows[STEP]
    assert "0.600" in rows[STEP]
    assert "0.590 (0.550-9.000)" in rows[STEP]
    assert rows[STEP].rstrip().endswith("same")
    assert "the baseline was measured on an unknown machine" in result.output


def test_a_ratio_that_got_worse_twice_fails_with_the_table(run: Callable[..., Result]) -> None:
    store(**{STEP: entry(0.5), LOOP: entry(0.1)})
    result = run((fake(STEP, (0.9,), (0.7,)), fake(LOOP, (0.1,), (9.0,))))
    assert isinstance(result.exception, VerificationError)
    assert result.exception.exit_code == 6
    assert str(result.exception) == (
        "VerificationError: 1 of 2 ratios got worse than baseline.json allows.\n"
        "  received: int8 / fp32 = 0.7   expected: at most 0.6\n"
        f"  fix: find what became slower; if it is meant to be, store it: {UPDATE}"
    )
    (row,) = (line for line in result.output.splitlines() if line.startswith(STEP))
    assert row.split()[-2:] == ["0.700", "worse"]
    assert "9.000" not in result.output  # only what got worse is measured again


def test_a_disturbed_measurement_is_taken_again(run: Callable[..., Result]) -> None:
    store(**{STEP: entry(0.5)})
    assert run((fake(STEP, (0.9,), (0.52,)),)).exit_code == 0


def test_what_is_far_better_is_said(run: Callable[..., Result]) -> None:
    store(**{STEP: entry(0.5)})
    result = run((fake(STEP, (0.3,)),))
    assert result.exit_code == 0
    assert f"better than the baseline allows for: {STEP}; to keep it: {UPDATE}" in result.output


@pytest.mark.parametrize(("ratio", "verdict"), [(1.2, "same"), (1.21, "worse"), (0.84, "same"), (0.83, "better")])
def test_tolerances_are_factors_in_both_directions(ratio: float, verdict: str) -> None:
    assert Judged("x", Entry(1.0, 0.2), (ratio,)).verdict is Verdict(verdict)


def test_an_update_keeps_tolerances_and_says_where_it_measured(run: Callable[..., Result]) -> None:
    store(**{STEP: entry(0.5, 0.7), "gone": entry(1.0)})
    result = run((fake(STEP, (0.8,)), fake(LOOP, (0.1,), tolerance=0.4)), "--update")
    assert result.exit_code == 0, result.output
    written = json.loads(Path("baseline.json").read_text())
    assert written["ratios"] == {
        STEP: {**entry(0.8, 0.7), "spread": 0.0, "runs": 1},
        LOOP: {**entry(0.1, 0.4), "spread": 0.0, "runs": 1},
    }
    assert "cores" in written["machine"]
    assert "onnxruntime" in written["versions"]
    assert written["date"] > "2026"
    assert run((fake(STEP, (0.8,)), fake(LOOP, (0.1,)))).exit_code == 0


def test_the_first_update_takes_the_tolerances_of_the_measurements() -> None:
    assert updated(None, {STEP: (0.1, 0.3, 0.2)}, {STEP: 0.25}) == {STEP: Entry(0.2, 0.25)}


def test_several_runs_give_the_tolerance(run: Callable[..., Result]) -> None:
    store(**{STEP: entry(0.5, 0.7), LOOP: entry(0.1, 0.4)})
    steps = fake(STEP, (0.5, 0.5), (0.55, 0.1, 0.9), (0.48,))
    result = run((steps, fake(LOOP, (0.2,))), "--update", "--runs", "3", "--only", "int8")
    assert result.exit_code == 0, result.output
    written = json.loads(Path("baseline.json").read_text())["ratios"]
    # The medians are 0.5, 0.55 and 0.48, so that a run is off by a tenth at most.
    assert written[STEP] == {"ratio": 0.5, "tolerance": 0.3, "spread": 0.1, "runs": 3}
    assert written[LOOP] == {**entry(0.1, 0.4), "spread": 0.0, "runs": 1}
    assert run((fake(STEP, (0.6,)), fake(LOOP, (0.1,)))).exit_code == 0
    after = run((fake(STEP, (0.6,)), fake(LOOP, (0.1,))), "--update")
    assert after.exit_code == 0
    kept = json.loads(Path("baseline.json").read_text())["ratios"][STEP]
    assert kept == {"ratio": 0.6, "tolerance": 0.3, "spread": 0.1, "runs": 3}


def test_a_baseline_is_of_one_machine(run: Callable[..., Result]) -> None:
    ratios = {STEP: entry(0.5), LOOP: entry(0.1)}
    Path("baseline.json").write_text(json.dumps({"schema": SCHEMA, "machine": "an abacus, 10 cores", "ratios": ratios}))
    groups = (fake(STEP, (0.8,)), fake(LOOP, (0.1,)))
    said = error_of(run(groups, "--update", "--only", "int8"))
    assert "would be of another machine than the rest" in said
    assert "expected: an abacus, 10 cores" in said
    assert json.loads(Path("baseline.json").read_text())["ratios"] == ratios
    assert run(groups, "--update").exit_code == 0


def test_runs_that_agree_leave_some_tolerance() -> None:
    assert spread_entry([1.0, 1.0, 1.01]) == Entry(1.0, LEAST_TOLERANCE, 0.01, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--runs", "3"], "--runs and --only are for storing a baseline"),
        (["--only", "int8"], "--runs and --only are for storing a baseline"),
        (["--update", "--only", "int8,nothing"], "there is no such group of ratios"),
    ],
)
def test_runs_and_groups_are_for_an_update(run: Callable[..., Result], options: list[str], words: str) -> None:
    store(**{STEP: entry(0.5)})
    said = error_of(run((fake(STEP, (0.5,)),), *options))
    assert words in said
    assert "fix:" in said


def error_of(result: Result) -> str:
    assert isinstance(result.exception, ReelforgeError)
    return str(result.exception)


def test_a_ratio_without_an_entry_is_refused_before_measuring(run: Callable[..., Result]) -> None:
    store(**{STEP: entry(0.5)})
    result = run((fake(STEP, ()), fake(LOOP, ())))
    assert isinstance(result.exception, RequestError)
    assert error_of(result) == (
        "RequestError: baseline baseline.json has no entry for 1 of the measured ratios.\n"
        f"  received: {STEP}   expected: also {LOOP}\n"
        f"  fix: measure and store them: {UPDATE}"
    )


def test_an_entry_that_nothing_measures_is_refused(run: Callable[..., Result]) -> None:
    store(**{STEP: entry(0.5), "gone": entry(1.0)})
    assert error_of(run((fake(STEP, ()),))) == (
        "RequestError: baseline baseline.json has entries that nothing measures.\n"
        f"  received: gone   expected: only {STEP}\n"
        f"  fix: if a measurement was removed on purpose, store the others anew: {UPDATE}"
    )


@pytest.mark.parametrize(
    ("text", "where", "received"),
    [
        ("{", "is not JSON", "Expecting property name"),
        ("\xff", "is not JSON", "Expecting value"),
        ("[]", "is of another schema", "received: list"),
        ('{"schema": 7}', "is of another schema", "received: 7   expected: schema 1"),
        ('{"schema": 1, "ratios": [1]}', "has no ratios", "received: [1]"),
        ('{"schema": 1, "ratios": {"x": 3}}', "has a damaged entry 'x'", "received: 3"),
        ('{"schema": 1, "ratios": {"x": {"ratio": 1}}}', "has a damaged entry 'x'", 'received: {"ratio": 1}'),
        ('{"schema": 1, "ratios": {"x": {"ratio": -1, "tolerance": 1}}}', "has a damaged entry 'x'", "-1"),
        ('{"schema": 1, "ratios": {"x": {"ratio": NaN, "tolerance": 1}}}', "has a damaged entry 'x'", "NaN"),
        ('{"schema": 1, "ratios": {"x": {"ratio": 1, "tolerance": 1, "runs": 0}}}', "has a damaged entry 'x'", "0}"),
        ('{"schema": 1, "ratios": {"x": {"ratio": true, "tolerance": 1}}}', "has a damaged entry 'x'", "true"),
    ],
)
def test_a_damaged_baseline_is_refused(run: Callable[..., Result], text: str, where: str, received: str) -> None:
    Path("baseline.json").write_text(text, encoding="utf-8")
    for options in ((), ("--update",)):  # an update keeps tolerances, so it must be able to read them
        said = error_of(run((fake(STEP, ()),), *options))
        assert said.startswith(f"RequestError: baseline baseline.json {where}.")
        assert received in said
        assert "fix: restore the file from version control" in said


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(RequestError, match=r"b\.json is not JSON"):
        read_baseline(tmp_path / "b.json")


def test_no_baseline_and_no_checkpoint(run: Callable[..., Result]) -> None:
    missing = error_of(run((fake(STEP, ()),)))
    assert "there is no baseline at baseline.json." in missing
    assert f"fix: store one: {UPDATE}" in missing
    store(**{STEP: entry(0.5)})
    nowhere = error_of(run((fake(STEP, ()),), "--checkpoint", "elsewhere"))
    assert "there is no checkpoint at elsewhere." in nowhere
    assert "fix: run this from a checkout's root" in nowhere


def test_a_baseline_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot be written") as caught:
        write_baseline(tmp_path / "no/such/folder.json", Baseline({}))
    assert "fix: give another file with --baseline" in str(caught.value)


def test_a_build_that_fails_says_what_was_run(tmp_path: Path) -> None:
    with pytest.raises(BuildError) as caught:
        _ = Workbench(tmp_path, tmp_path).fp32
    assert "the fp32 bundle" in str(caught.value)
    assert "received: exit code 3 of build-engine" in str(caught.value)
    assert "reelforge.tools.build_engine" in caught.value.fix


def test_the_shipped_baseline_has_the_ratios_that_are_measured() -> None:
    baseline = read_baseline(ROOT / "benchmarks/baseline.json", check.tolerances(GROUPS))
    assert all(0 < one.tolerance <= 0.6 for one in baseline.ratios.values())
    assert "bench-check:" in (ROOT / "Makefile").read_text()
