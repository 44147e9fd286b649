"""Peers compute the same step, failures are rows and not the end, and fits are marked as such."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.errors import EngineError
from reelforge.tools.bench import dit_step_time, peers_cpu, peers_export, peers_processes
from reelforge.tools.bench.dit_step_time import random_inputs
from reelforge.tools.bench.memory import Usage
from reelforge.tools.bench.peers_child import load_error, replace_boolean_where
from reelforge.tools.bench.peers_export import Export
from reelforge.tools.bench.peers_processes import Contender, Result, take_turns

SERVER = """
import json, sys, numpy
job = json.loads(sys.argv[1])
print("a library says something")
if job.get("fails"): raise SystemExit(job["fails"])
numpy.save(job["output"], numpy.ones(3, numpy.float32))
print(json.dumps({"loaded_s": 0.5, "notes": {"threads": "2"}}), flush=True)
for turn, line in enumerate(sys.stdin):
    if turn == int(job.get("ends_in", -1)): raise SystemExit("ran out of memory")
    print(json.dumps({"seconds": float(job["seconds"])}), flush=True)
"""


def contender(name: str, folder: Path, **job: str) -> Contender:
    output = str(folder / f"{name}.npy")
    return Contender(name, (sys.executable, "-c", SERVER), {"output": output, "seconds": "0.5", **job})


def test_processes_take_turns_and_one_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_processes, "PAUSE_S", 0.0)
    pair = [contender("a", tmp_path), contender("b", tmp_path, fails="no kernel for Where(16)")]
    good, bad = take_turns(pair, 2, 30.0)
    assert good.seconds == (0.5, 0.5)
    assert (good.loaded_s, good.notes) == (0.5, "threads 2")
    assert good.peak_anonymous_bytes > 5e6
    assert good.velocity.tolist() == [1, 1, 1]
    assert bad == Result("b", failure="no kernel for Where(16)")


def test_one_that_ends_between_rounds_is_a_row_and_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_processes, "PAUSE_S", 0.0)
    # The first question is the one that tells how long a step takes; 2 is the second round.
    pair = [contender("a", tmp_path), contender("b", tmp_path, ends_in="2")]
    good, bad = take_turns(pair, 4, 30.0)
    assert good.seconds == (0.5,) * 4
    assert bad == Result("b", failure="ran out of memory in round 2")


def test_asking_a_process_that_has_ended_says_so(tmp_path: Path) -> None:
    with peers_processes.Process(contender("a", tmp_path), 30.0) as process:
        process.hear()
        process._process.kill()
        process._process.wait()
        for _ in range(2):
            with pytest.raises(peers_processes.PeerError, match="ended with status -9"):
                process.ask(10**6)


def test_a_process_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    slow = Contender("slow", (sys.executable, "-c", "import time; time.sleep(60)"), {"output": str(tmp_path / "x")})
    (result,) = take_turns([slow], 1, 0.3)
    assert result.failure == "ended with status -9"


def small_inputs(bundle: Bundle) -> dit_step_time.StepInputs:
    """A corner of the latents: the tiny model's default size is the published one, of 118,800 tokens."""
    inputs = random_inputs(bundle)
    return replace(inputs, latents=np.ascontiguousarray(inputs.latents[..., :3, :8, :12]))


@pytest.mark.slow
def test_ours_and_diffusers_compute_the_same_step(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers_processes, "SAMPLE_S", 0.0)
    monkeypatch.setattr(peers_processes, "PAUSE_S", 0.0)
    monkeypatch.setattr(dit_step_time, "random_inputs", small_inputs)
    case = peers_cpu.Case(tiny_checkpoint, tiny_bundle, tiny_bundle, tmp_path)
    assert "text tokens" in peers_cpu.write_inputs(case)
    chosen = [one for one in peers_cpu.contenders(case, None) if one.name in (peers_cpu.BASE, "diffusers fp32")]
    results = take_turns(chosen, 1, 500.0)
    assert not [one.failure for one in results if one.failure]
    row = next(line for line in peers_cpu.table(results) if "diffusers" in line)
    cells = [cell.strip() for cell in row.split("|")]
    assert float(cells[4]) < 2e-3
    assert float(cells[5]) > 0.9999
    assert float(cells[7]) > 0.1  # torch alone takes more


def test_openvino_is_compared_where_there_is_an_interpreter(tmp_path: Path) -> None:
    case = peers_cpu.Case(tmp_path, tmp_path / "fp32", tmp_path / "int8", tmp_path)
    names = [one.name for one in peers_cpu.contenders(case, "other/python")]
    assert len([name for name in names if "OpenVINO" in name]) == 3
    assert not [one.name for one in peers_cpu.contenders(case, None) if "OpenVINO" in one.name]
    outputs = [one.job["output"] for one in peers_cpu.contenders(case, "other/python")]
    assert len(set(outputs)) == len(outputs)


def test_a_contender_that_does_not_run_is_a_row() -> None:
    base = Result(peers_cpu.BASE, 1.0, (2.0, 4.0), 10**9, 10**8, np.array([1.0, 0.0]))
    other = replace(base, name="other", seconds=(1.0, 1.0), velocity=np.array([1.0, 0.5]), notes="precision f32")
    rows = peers_cpu.table([base, other, Result("broken", failure="no kernel")])[2:]
    assert rows[1].startswith("| other | 1000.0 (1000.0-1000.0) | 3.00 (2.00-4.00) | 5.0e-01 | 0.894427 | 1.0 | 1.00 |")
    assert rows[2] == "| broken | does not run: no kernel | - | - | - | - | - | - |"
    assert peers_cpu.notes([base, other]) == ["", "What OpenVINO reports: other: precision f32."]
    assert peers_cpu.notes([base]) == []
    with pytest.raises(EngineError, match="reelforge fp32 does not run") as caught:
        peers_cpu.table([Result(peers_cpu.BASE, failure="no memory"), other])
    assert "received: no memory" in str(caught.value)


def boolean_graph(path: Path) -> None:
    make, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto
    nodes = [
        onnx.helper.make_node("Where", ["mask", "false", "x"], ["kept"]),
        onnx.helper.make_node("Cast", ["kept"], ["y"], to=kind.FLOAT),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [make("mask", kind.BOOL, [2, 2]), make("x", kind.BOOL, [2, 2])],
        [make("y", kind.FLOAT, [2, 2])],
        [onnx.helper.make_tensor("false", kind.BOOL, [], [False])],
        value_info=[make("kept", kind.BOOL, [2, 2])],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)


def test_what_onnx_runtime_refuses_is_said_and_written_otherwise(tmp_path: Path) -> None:
    import onnxruntime

    path = tmp_path / "g.onnx"
    boolean_graph(path)
    assert "Where(16)" in load_error(path)
    assert replace_boolean_where(path) == 1
    assert load_error(path) == ""
    mask, x = np.array([[True, False], [True, False]]), np.array([[True, True], [False, False]])
    (y,) = onnxruntime.InferenceSession(path).run(None, {"mask": mask, "x": x})
    np.testing.assert_array_equal(y, np.where(mask, False, x))


def test_an_export_is_described_as_it_went() -> None:
    fine = {"seconds": 12.0, "refused": "", "replaced": 0, "refused_again": ""}
    assert peers_cpu.export_words(fine).endswith("ONNX Runtime loads the graph as it is.")
    refused = peers_cpu.export_words({**fine, "refused": "no Where(16)", "replaced": 1})
    assert "refuses the graph:** `no Where(16)`" in refused
    assert "1 boolean `Where" in refused
    assert "Neither" in peers_cpu.export_words({**fine, "refused": "no", "refused_again": "still no"})


@pytest.mark.slow
def test_an_export_ends_or_says_what_it_ran_out_of(tmp_path: Path) -> None:
    done = peers_export.export(1, 1, tmp_path / "a", 18 * 10**9, 200.0, 2, 128)
    assert done.failure == ""
    assert done.seconds is not None
    assert done.weight_bytes > 1e6
    assert done.peak_bytes > 1e8
    starved = peers_export.export(1, 1, tmp_path / "b", 300 * 10**6, 200.0, 24, 128)
    assert starved.failure == "out of memory before the module was made"
    late = peers_export.export(1, 1, tmp_path / "c", 18 * 10**9, 0.2, 2, 128)
    assert late.failure == "out of time before the module was made"
    assert not list(tmp_path.iterdir())


def test_the_series_ends_with_the_first_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(double: int, single: int, *_rest: object) -> Export:
        failed = double > 2
        return Export(double, single, double * 10**9, None if failed else 1.0, 10**9, "out of memory" if failed else "")

    monkeypatch.setattr(peers_export, "export", fake)
    assert [one.double for one in peers_export.grow(peers_export.DEPTHS, tmp_path, 1, 1.0)] == [1, 2, 4]


def test_a_fit_is_marked_and_needs_three_points() -> None:
    exports = [Export(n, n, n * 10**9, 10.0 + 5 * n, 10**9 * (1 + 3 * n)) for n in (1, 2, 4)]
    assert peers_export.fit(exports) == pytest.approx((3.0, 1e9, 5e-9, 10.0))
    failed = Export(8, 8, 8 * 10**9, None, 18 * 10**9, "out of memory during the export")
    text = "\n".join(peers_export.lines([*exports, failed], 18 * 10**9, 240.0))
    assert "| 8+8 | 8.0 | - | 18.00 | out of memory during the export |" in text
    assert "**A linear fit, not a measurement,** through the 3 exports" in text
    assert "78 GB and 138 s" in text
    assert peers_export.fit([*exports[:2], failed]) is None
    assert "linear fit" not in "\n".join(peers_export.lines([failed], 10**9, 1.0))


def test_ours_says_how_many_weights_were_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full.bundle").mkdir()  # of a run that was interrupted

    def build(checkpoint: Path, bundle: Path, *options: str) -> Usage:
        assert options[-1] == peers_export.STAGES
        bundle.mkdir()
        said = json.dumps({"stages": {"dit": {"weights_bytes": 7}, "refiner": {"weights_bytes": 5}}})
        return Usage(1.0, 2, 3, said)

    def synthesize(folder: Path, size: str) -> Path:
        folder.mkdir()
        return folder

    monkeypatch.setattr(peers_export, "synthesize", synthesize)
    monkeypatch.setattr(peers_export, "build", build)
    assert peers_export.ours(tmp_path)[1] == 12
    assert not list(tmp_path.iterdir())


def test_ours_says_what_was_timed() -> None:
    text = "\n".join(peers_export.our_lines(Usage(100.0, 520_000_000, 130_000_000, ""), 25_600_000_000))
    assert "reading, hashing and checking 25.6 GB" in " ".join(text.split())
    assert "| 25.6 | 100 | 0.52 |" in text
