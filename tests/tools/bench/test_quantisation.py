"""The benchmark's file is put together from fragments, goals say who meets them, and our quantiser's child works."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from reelforge.calibration.gate import measure_quality
from reelforge.calibration.scale_methods import ScaleMethod
from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.quality import QualityReport
from reelforge.runtime.recipe import Precision, VideoShape
from reelforge.tools.bench import our_quantiser, quantisation, sections
from reelforge.tools.bench import quantisation_against_peers as against
from reelforge.tools.bench import quantisation_methods as methods
from reelforge.tools.bench.memory import run_sampled
from reelforge.tools.bench.quantisation_peers import PeerRun
from reelforge.tools.bench.quantised_quality import Quality


def report_of(psnr: float, cosine: float) -> QualityReport:
    return QualityReport(("p",), 0, VideoShape(32, 32, 5), 2, {}, (1.0, cosine), (0.0, 0.1), (psnr,), (0.99,))


def test_only_some_sections_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantisation.Sections, "weights", lambda _self: ["measured now"])
    work, output = tmp_path / "work", tmp_path / "out.md"
    work.mkdir()
    old = sections.Fragment(["measured before"], "0123456789ab", "2026-01-01", 3.2, "3 repeats")
    (work / "methods.json").write_text(json.dumps(asdict(old)), encoding="utf-8")
    options = ["-o", str(output), "--work", str(work), "--checkpoint", str(tmp_path)]
    result = CliRunner().invoke(quantisation.main, [*options, "--only", "weights"], catch_exceptions=False)
    assert result.exit_code == 0
    text = output.read_text()
    assert "*Measured at commit 0123456789ab, 2026-01-01, 3 repeats, 3 minutes.*\n\nmeasured before" in text
    assert "measured now" in text
    assert "Not measured yet: `--only peers`." in text
    assert [path.name for path in sorted(work.iterdir())] == ["methods.json", "weights.json"]
    wrong = CliRunner().invoke(quantisation.main, [*options, "--only", "weights,nothing"])
    assert wrong.exit_code == 2
    assert "no section is called nothing; there are methods, peers, weights, steps" in wrong.output


def test_goals_of_methods_name_who_meets_them() -> None:
    good = [methods.Result(report_of(40.0, 0.9995)), methods.Result(report_of(35.0, 0.9991))]
    low = [methods.Result(report_of(40.0, 0.9995)), methods.Result(report_of(29.0, 0.9985))]
    results = {
        methods.Row(Precision.INT8, ScaleMethod.MAX, None): good,
        methods.Row(Precision.INT8, ScaleMethod.MSE, 0.5): low,
        methods.Row(Precision.FP8, ScaleMethod.MAX, None): low,
    }
    goals = methods._goals(results)[2:]
    assert goals == [
        "| int8: PSNR >= 30 dB | met by all | max; mse 0.5 | - |",
        "| int8: cosine >= 0.999 at every step, of every prompt, in all repeats | met by some | max | mse 0.5 |",
        "| fp8: PSNR >= 33 dB | met by all | max | - |",
        "| fp8: cosine >= 0.999 at every step, of every prompt, in all repeats | **missed** | - | max |",
    ]
    table = methods._table(results)
    assert table[3] == (
        "| int8 | mse | 0.5 | - | 34.50 (29.00-40.00) | 29.00 | 0.9900 (0.9900-0.9900) | 0.99950 (0.99925-0.99975) | "
        "0.99850 | 0.0% |"
    )


def quality(*psnr_db: float) -> Quality:
    return Quality(psnr_db, (1.0,), (1.0,))


def test_goals_against_peers_take_the_best_peer_of_the_same_format() -> None:
    ours = PeerRun("reelforge int8 max", (5.0,), (3.0,), (200_000_000,), "", quality(41.0, 40.0, 39.0))
    slow = replace(ours, peer="onnxruntime int8 A", seconds=(9.0,), quality=quality(31.0, 30.0, 29.0))
    small = replace(slow, peer="modelopt int8 B", peak_anonymous_bytes=(100_000_000,))
    other = replace(slow, peer="modelopt fp8 C", seconds=(0.1,), quality=quality(math.inf, 50.0, 50.0))
    failed = PeerRun("modelopt int8 D", failure="broken")
    lines = against._goals([ours], [slow, small, other], 0.5)
    goals = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert goals[2:] == [
        [
            "reelforge int8 max: PSNR not below any peer's",
            "40.00 dB, the best peer 30.00 dB (onnxruntime int8 A); by prompt +10.00 dB, 95% +10.00 to +10.00",
            "met",
        ],
        ["reelforge int8 max: faster than every peer", "5.0 s, the fastest peer 9.0 s (onnxruntime int8 A)", "met"],
        [
            "(beside it: reelforge int8 max: faster than every peer with its recording)",
            "5.0 s, the fastest peer 9.0 s + 0.5 s = 9.5 s",
            "met",
        ],
        [
            "reelforge int8 max: less memory than every peer",
            "200 MB, the smallest peer 100 MB (modelopt int8 B)",
            "**missed**",
        ],
    ]
    assert against._goals([ours], [failed], 0.5) == against.report.table(("goal", "measured, medians", ""), [])


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [((41.0, 39.0, 40.0), "met"), ((42.0, 41.0, 38.9), "**missed**"), ((43.0, 42.0, 41.0), "**missed**")],
)
def test_a_lower_psnr_is_missed_whatever_the_noise(theirs: tuple[float, ...], verdict: str) -> None:
    ours = PeerRun("reelforge int8 max", (5.0,), (3.0,), (200,), "", quality(41.0, 40.0, 39.0))
    peer = replace(ours, peer="onnxruntime int8 A", quality=quality(*theirs))
    assert against._goals([ours], [peer], 0.5)[2].endswith(f"| {verdict} |")


def test_only_the_verdict_with_recording_counts_the_recording() -> None:
    ours = PeerRun("reelforge int8 max", (3.0,), (2.0,), (200,), "")
    peer = replace(ours, peer="onnxruntime int8 A", seconds=(2.0,))
    goals = against._goals([ours], [peer], 2.9)[2:]
    assert goals[0].endswith("3.0 s, the fastest peer 2.0 s (onnxruntime int8 A) | **missed** |")
    assert goals[1].endswith("3.0 s, the fastest peer 2.0 s + 2.9 s = 4.9 s | met |")
    table = against.peer_lines([ours, peer], {peer.peer: 2.9})
    assert [line.split("|")[1:5] for line in (table[0], *table[2:])] == [
        [" peer ", " seconds ", " of these in its call ", " seconds with recording "],
        [" reelforge int8 max ", " 3.0 ", " 2.0 ", " 3.0 "],
        [" onnxruntime int8 A ", " 2.0 ", " 2.0 ", " 4.9 "],
    ]


@pytest.mark.parametrize(("precision", "least_db"), [("int8", 30), ("fp8", 25)])
def test_our_quantiser_writes_a_bundle_that_is_close_to_the_reference(
    tiny_bundle: Path, tmp_path: Path, precision: str, least_db: float
) -> None:
    output = tmp_path / "quantised.bundle"
    # Smoothing also changes the modulation, and the biases of layers in 8 bits.
    job = our_quantiser.Job(str(tiny_bundle), ["a red circle"], 1, precision, "max", 0.5, 2, str(output), "32x32x5")
    our_quantiser.quantise(job)
    bundle = Bundle.open(output, Check.FULL)
    layers = [weight for weight in bundle.stage("dit").weights if weight.dtype in ("I8", "F8_E4M3")]
    assert len(layers) == 2 * 12 + 2 * 6
    reference = Pipeline(Bundle.open(tiny_bundle, Check.SIZES))
    report = measure_quality(reference, Pipeline(bundle), ["a blue square"], 0, 2, VideoShape(32, 32, 5))
    assert least_db < report.psnr_median_db < 100
    assert set(report.stages) == {"dit"}


def test_our_quantisers_child_imports_nothing_that_only_builds_need() -> None:
    names = ("transformers", "onnxscript", "diffusers", "torch", "sympy.core", "skimage", "av")
    imports = "from reelforge.tools.deferred import defer; defer(); import reelforge.tools.bench.our_quantiser"
    program = f"import sys; {imports}; print(*set({names}) & set(sys.modules))"
    assert run_sampled([sys.executable, "-c", program]).output.strip() == ""


def test_a_command_that_takes_too_long_is_killed() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_sampled([sys.executable, "-c", "import time; time.sleep(60)"], limit_s=0.3)
