"""Contenders compute the same video, times and memory are of what they say, and a goal that is missed is marked."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from reelforge.runtime.events import Notice, Progress
from reelforge.tools.bench import (
    runtime,
    runtime_decoder,
    runtime_memory,
    runtime_memory_chart,
    runtime_start,
    sections,
)
from reelforge.tools.bench import runtime_against_diffusers as against
from reelforge.tools.bench import runtime_overhead as overhead
from reelforge.tools.bench.runtime_bundles import Models, task
from reelforge.tools.bench.runtime_child import Answer, Job, Mark
from reelforge.tools.bench.runtime_processes import Contender, Sample, Trace

SMALL = (32, 48, 5)


def test_contenders_generate_the_same_video(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(against, "PAUSE_S", 0.0)
    jobs = {
        against.FP32: Job("reelforge", str(tiny_bundle)),
        against.EAGER: Job("diffusers", str(tiny_checkpoint)),
    }
    prompts = ("a red circle", "a red square")
    tasks = [task(tiny_bundle, prompt, 3, SMALL, seed) for seed, prompt in enumerate(prompts)]
    ours, theirs = against.measure(jobs, tasks, tmp_path)
    assert ours.psnr_db > 50
    assert theirs.psnr_db == float("inf")
    for run in (ours, theirs):
        assert len(run.seconds) == len(run.steps) == len(run.decoding) == 1
        assert run.seconds[0] > 2 * run.steps[0] + run.decoding[0]
        assert run.file_bytes > 0
    # The interpreter with numpy alone is larger than nothing, and torch is larger than that.
    assert 10e6 < ours.anonymous_bytes < theirs.anonymous_bytes


def test_rounds_have_prompts_of_one_length(tiny_bundle: Path, tmp_path: Path) -> None:
    tasks = [task(tiny_bundle, prompt, 1, SMALL) for prompt in ("a", "a much longer prompt than the other one")]
    with pytest.raises(AssertionError, match="prompts of different lengths"):
        against.measure({}, tasks, tmp_path)


def test_a_process_of_ours_stops_after_the_first_step_and_loads_no_torch(tiny_bundle: Path) -> None:
    one = replace(task(tiny_bundle, "a red circle", 5, SMALL), only_first_step=True)
    start = runtime_start.measure_start("ours", Job("reelforge", str(tiny_bundle)), (one, one), 1)
    assert 0 < start.imported[0] < start.opened[0] < start.first_step[0]
    assert start.second_request[0] > 0
    assert start.forbidden == ()


def test_a_process_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match="the process of 'ours' ended with status 1"):
        Contender("ours", Job("reelforge", str(tmp_path / "nothing.bundle")))


def test_imports_are_timed_in_fresh_processes() -> None:
    empty = runtime_start.measure_import("nothing", "pass", 2)
    ours = runtime_start.measure_import("ours", "from reelforge.runtime import Pipeline, Request", 1)
    assert len(empty.seconds) == 2
    assert max(empty.seconds) < ours.seconds[0]
    assert empty.forbidden == ours.forbidden == ()
    assert ours.modules > empty.modules


@pytest.mark.parametrize("dit", [overhead.SILENT_ENGINE, overhead.SILENT_SESSION, "real"])
def test_overhead_leaves_the_session_out(tiny_bundle: Path, dit: str) -> None:
    row = overhead.measure(tiny_bundle, dit, dit, SMALL, steps=6, videos=2)
    assert row.shape == "32x48x5"
    assert len(row.outside) == len(row.inside) == 2 * (6 - overhead.FIRST_STEPS)
    assert min(row.outside) > 0
    if dit == overhead.SILENT_ENGINE:
        assert not any(row.inside)
    else:
        # What does nothing takes less than what computes; a real step of the tiny model takes a fifth of a millisecond.
        assert (np.median(row.inside) > 1e-4) == (dit == "real")


def test_only_sampling_steps_are_timed_and_the_stream_is_closed() -> None:
    closed = []

    def stream():  # type: ignore[no-untyped-def]
        try:
            yield Notice("cut")
            yield Progress("text", 1, 1)
            yield Progress("sampling", 1, 2)
            yield Progress("sampling", 2, 2)
            raise AssertionError("decoding was not asked for")
        finally:
            closed.append(True)

    assert len(overhead.step_seconds(stream)) == 2
    assert closed == [True]


def answer(*steps: float, finished: float) -> Answer:
    return Answer(0.0, [Mark("text", 1, 0.1), *(Mark("sampling", 1, clock) for clock in steps)], finished, [])


def test_steps_are_timed_without_the_first() -> None:
    assert against.step_and_decoding(answer(5.0, 6.0, 8.0, finished=9.0)) == (1.5, 1.0)


def run_of(name: str, *seconds: float, megabytes: int = 100) -> against.Run:
    return against.Run(name, seconds, seconds, seconds, 1.0, 40.0, megabytes * 10**6, 10**6)


def test_goals_are_ratios_of_the_same_round_and_misses_are_marked() -> None:
    eager, bf16 = run_of(against.EAGER, 4.0, 8.0), run_of("diffusers bf16", 3.0, 6.0, megabytes=80)
    runs = [run_of(against.FP32, 2.0, 8.0, megabytes=90), run_of(against.INT8, 1.0, 4.0, megabytes=50), eager, bf16]
    whole = run_of(against.INT8_DECODER, 2.0, 4.0, megabytes=95)
    assert against.best_peer(runs) is bf16
    assert against.ratios(eager, runs[0]) == [2.0, 1.0]
    assert against.goals(runs) == [
        ("fp32 faster than eager fp32", "1.50 times as fast", "met"),
        (
            "reelforge int8: at least 2 times as fast as the best of diffusers",
            "2.25 times as fast as diffusers bf16",
            "met",
        ),
        ("reelforge fp32: less peak memory than any", "90 MB, the smallest 80 (diffusers bf16)", "**missed**"),
        ("reelforge int8: less peak memory than any", "50 MB, the smallest 80 (diffusers bf16)", "met"),
    ]
    with_decoder = against.goals([*runs, whole])
    assert with_decoder[2] == (
        "reelforge int8, decoder too: at least 2 times as fast as the best of diffusers",
        "1.50 times as fast as diffusers bf16",
        "**missed**",
    )
    assert with_decoder[-1][0].startswith("reelforge int8, decoder too: less peak memory")
    slow = [replace(run, seconds=(5.0, 9.0)) if "reelforge" in run.name else run for run in runs]
    assert [verdict for _, _, verdict in against.goals(slow)][:2] == ["**missed**", "**missed**"]
    assert against.psnr_db(np.full(4, 10, np.uint8), np.full(4, 10, np.uint8)) == float("inf")
    assert against.psnr_db(np.full(4, 0, np.uint8), np.full(4, 255, np.uint8)) == 0.0


def test_the_decoder_in_8_bits_is_timed_in_turns(tiny_bundle: Path) -> None:
    case = runtime_decoder.Case("tiny", tiny_bundle, tiny_bundle, (2, 4, 6))
    times = runtime_decoder.measure(case, rounds=2)
    assert len(times.fp32) == len(times.int8) == 2
    assert min(*times.fp32, *times.int8) > 0
    made = runtime_decoder.Times((2.0, 3.0), (1.0, 3.0))
    lines = runtime_decoder.section([case], lambda _case: made)
    assert "| tiny | 2x4x6 | 2.500 (2.000-3.000) | 2.000 (1.000-3.000) | 1.50 (1.00-2.00) |" in lines


def test_peaks_of_memory_are_those_of_their_phase() -> None:
    sizes = {0.5: 10, 1.5: 90, 2.9: 40, 3.1: 20, 3.9: 25, 4.1: 30, 4.9: 20, 9.0: 500}
    trace = Trace([Sample(clock, size * 10**6, 0) for clock, size in sizes.items()])
    one = runtime_memory.length_of(9, 16, trace, replace(answer(2.0, 3.0, finished=5.0), began=1.0), 1234)
    assert (one.idle_bytes, one.sampling_bytes, one.decoding_bytes) == (10e6, 90e6, 30e6)
    assert one.halves == (25e6, 30e6)
    assert one.raw_bytes == 9 * 16 * 16 * 3 * 4
    assert one.curve == runtime_memory_chart.Curve(
        "9 frames", tuple((pytest.approx(clock - 1.0), sizes[clock] * 10**6) for clock in list(sizes)[1:-1]), 2.0, 4.0
    )


def length(frames: int, megabytes: int) -> runtime_memory.Length:
    curve = runtime_memory_chart.Curve(f"{frames} frames", ((0.0, 10**6), (1.0, megabytes * 10**6)), 0.5, 1.0)
    return runtime_memory.Length(
        frames, 128, 24 * 10**6, megabytes * 10**6, (0, megabytes * 10**6), 58 * 10**6, 3.0, 4000, curve
    )


def test_memory_is_flat_if_medians_of_longer_videos_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {9: [100, 100, 100], 65: [400, 390, 900], 129: [410, 500, 390], 257: [430, 430, 300]}
    rounds = {frames: iter(values) for frames, values in peaks.items()}
    asked: list[int] = []

    def measure(_bundle: Path, _size: int, frames: int) -> runtime_memory.Length:
        asked.append(frames)
        return length(frames, next(rounds[frames]))

    monkeypatch.setattr(runtime_memory, "measure", measure)
    case = runtime_memory.Case("Model", tmp_path, 128, tuple(peaks), rounds=3)
    text = "\n".join(runtime_memory.section([case], tmp_path / "picture.svg"))
    assert asked == [9, 65, 129, 257] * 3
    assert "### Model, 128x128, 3 rounds" in text
    assert (
        "| 65 | 12.8 | 24 (24-24) | 58 (58-58) | 400 (390-900) | 0 (0-0) | 400 (390-900) | 3.0 (3.0-3.0) | 4 |" in text
    )
    assert "(129 frames at most 1.05 times 65) | 1.02 times | met |" in text
    assert "(257 frames at most 1.05 times 65) | 1.07 times | **missed** |" in text
    assert "(9 frames" not in text
    assert "257 frames" in (tmp_path / "picture.svg").read_text(encoding="utf-8")


def test_a_video_is_written_while_memory_is_watched(tiny_bundle: Path) -> None:
    one = runtime_memory.measure(tiny_bundle, 32, 5)
    assert one.file_bytes > 100
    assert one.decoding_bytes > 10e6
    assert one.curve.begin < one.curve.end
    assert len(one.curve.points) > 2


def test_the_picture_of_equal_measurements_is_equal(tmp_path: Path) -> None:
    curve = runtime_memory_chart.Curve("9 frames", ((0.0, 10**6), (1.0, 2 * 10**6)), 0.5, 1.0)
    for name in ("a.svg", "b.svg"):
        runtime_memory_chart.draw([("Model", [curve, replace(curve, label="65 frames")])], tmp_path / name)
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert text == (tmp_path / "b.svg").read_text(encoding="utf-8")
    assert all(word in text for word in ("<svg", "65 frames", "Model (thick: decoding and encoding)"))


def test_only_some_sections_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.Sections, "imports", lambda _self: ["measured now"])
    work, output = tmp_path / "work", tmp_path / "out.md"
    work.mkdir()
    old = sections.Fragment(["measured before"], "0123456789ab", "2026-01-01", 3.2, "3 rounds")
    (work / "mid.json").write_text(json.dumps(asdict(old)), encoding="utf-8")
    options = ["-o", str(output), "--work", str(work), "--checkpoint", str(tmp_path)]
    result = CliRunner().invoke(runtime.main, [*options, "--only", "import"], catch_exceptions=False)
    assert result.exit_code == 0
    text = output.read_text()
    assert "*Measured at commit 0123456789ab, 2026-01-01, 3 rounds, 3 minutes.*\n\nmeasured before" in text
    assert "measured now" in text
    assert "Not measured yet: `--only memory`." in text
    wrong = CliRunner().invoke(runtime.main, [*options, "--only", "import,nothing"])
    assert wrong.exit_code == 2
    assert (
        "no section is called nothing; there are overhead, import, start, demo, mid, decoder, memory, soak"
        in wrong.output
    )


def test_growth_is_marked() -> None:
    trend = {"mean": 50e6, "slope": 500.0, "low": -2000.0, "high": 3000.0, "grows": False}
    result: dict[str, Any] = {
        "samples": [{"seconds": 61.2}],
        "trends": {
            "anonymous_bytes": trend,
            "descriptors": {**trend, "mean": 9.0, "low": 0.5, "high": 1.0, "grows": True},
        },
        "outcomes": {"finished": 190, "cancelled": 10},
        "loads": 12,
        "warm_up": 128,
        "passed": False,
    }
    text = "\n".join(runtime.soak_lines(result))
    assert "10 cancelled, 190 finished; 61 s, stages were loaded 12 times" in text
    assert "| anonymous, kB | 50000 | -2.0 to +3.0 | does not grow |" in text
    assert "| descriptors | 9.0 | +0.5000 to +1.0000 | **grows** |" in text
    assert "| no growth in memory or handles | see above | **missed** |" in text
    assert "a warm-up of 128 requests, which are not counted" in text
    level = {**result, "trends": {"anonymous_bytes": trend}, "passed": True}
    assert "| no growth in memory or handles | see above | met |" in "\n".join(runtime.soak_lines(level))


def test_bundles_that_are_there_are_not_built_again(tmp_path: Path) -> None:
    models = Models(tmp_path / "checkpoint", tmp_path / "models")
    there = tmp_path / "models" / "demo-int8-diffusers.bundle"
    there.mkdir(parents=True)
    assert models.demo("int8") == there
    with pytest.raises(click.ClickException, match=r"build_engine .* failed with status"):
        models.demo("fp32")
