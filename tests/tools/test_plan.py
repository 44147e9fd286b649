"""``reelforge plan`` as a user runs it: what it prints, what it refuses, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from reelforge.export.planner.gpus import GPUS
from reelforge.runtime.errors import BuildError, RequestError
from reelforge.tools.main import cli
from reelforge.tools.plan import host_memory

SHAPES = ("--shapes", "48x64x9,32x32x5")


def run(checkpoint: Path, *options: str) -> Result:
    return CliRunner().invoke(cli, ["plan", str(checkpoint), "--numerics", "diffusers", *options])


def planned(checkpoint: Path, *options: str) -> dict[str, Any]:
    result = run(checkpoint, *options, "--json")
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value


def test_the_tables_hold_stages_phases_and_every_bucket(tiny_checkpoint: Path) -> None:
    result = run(tiny_checkpoint, "--target", "rtx:sm89", "--precision", "fp16", "--gpu", "rtx 4090", *SHAPES)
    assert result.exit_code == 0, result.output
    for words in ("modulation", "conditioning", "48x64x9", "48x64x1", "32x32x1", "builder", "RTX 4090: 25.8 GB"):
        assert words in result.output
    assert "assumed as fast as FlashAttention-2" in result.output  # what the times rest on is said


def test_json_says_everything_in_numbers(tiny_checkpoint: Path) -> None:
    value = planned(tiny_checkpoint, "--target", "rtx:sm89", "--precision", "fp16,dit=fp8", "--gpu", "4090", *SHAPES)
    assert value["fits"] is True
    assert value["refusals"] == []
    assert value["gpu"]["name"] == "RTX 4090"
    assert [bucket["shape"] for bucket in value["buckets"]] == ["48x64x9", "32x32x5", "48x64x1", "32x32x1"]
    assert [bucket["image"] for bucket in value["buckets"]] == [False, False, True, True]
    assert set(value["stages"]) == {"llm", "clip", "refiner", "modulation", "dit", "vae_decoder"} | {
        "guidance",
        "step_change",
        "step_reuse",
    }
    bucket = value["buckets"][0]
    assert set(bucket["memory_bytes"]) == {"text", "conditioning", "loop", "decode"}
    dit = bucket["stages"]["dit"]
    assert dit["calls"] == bucket["steps"]
    assert sum(dit["seconds"].values()) / bucket["steps"] == pytest.approx(bucket["seconds_per_step"])
    assert value["bundle_bytes"] == sum(stage["plan_bytes"] for stage in value["stages"].values())


def test_the_cpu_has_no_builder_and_no_times(tiny_checkpoint: Path) -> None:
    value = planned(tiny_checkpoint, *SHAPES)
    assert value["gpu"] is None
    assert value["builder_bytes"] == 0
    assert value["buckets"][0]["seconds_per_video"] is None
    shown = run(tiny_checkpoint, *SHAPES)
    assert shown.exit_code == 0
    assert "Build for cpu" in shown.output


def test_some_stages_can_be_planned_alone(tiny_checkpoint: Path) -> None:
    value = planned(tiny_checkpoint, "--stages", "vae_decoder,clip", *SHAPES)
    assert set(value["stages"]) == {"clip", "vae_decoder"}
    assert value["buckets"][0]["seconds_per_step"] is None


def test_steps_are_taken(tiny_checkpoint: Path) -> None:
    assert planned(tiny_checkpoint, "--steps", "7", *SHAPES)["buckets"][0]["steps"] == 7


def test_the_usual_precision_is_the_targets(tiny_checkpoint: Path) -> None:
    assert set(planned(tiny_checkpoint, *SHAPES)["precision"].values()) == {"fp32"}
    precision = planned(tiny_checkpoint, "--target", "rtx:sm89", *SHAPES)["precision"]
    assert precision.pop("vae_decoder") == "fp16"
    assert set(precision.values()) == {"bf16"}


def test_memory_for_the_compiler_decides_how_stages_are_cut(tiny_checkpoint: Path) -> None:
    options = ("--target", "rtx:sm89", *SHAPES)
    parts = [
        planned(tiny_checkpoint, *options, *more)["stages"]["dit"]["parts"]
        for more in ((), ("--builder-memory", "0.301"))
    ]
    assert parts[0] == 1
    assert parts[1] > 1


def test_calibration_counts_unless_scales_are_given(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ("--precision", "int8", *SHAPES)
    assert planned(tiny_checkpoint, *options)["export_bytes"] > 10e9
    assert planned(tiny_checkpoint, *options, "--scales", str(tmp_path / "any"))["export_bytes"] < 1e9


def test_what_does_not_fit_is_shown_and_then_refused(tiny_checkpoint: Path) -> None:
    result = run(tiny_checkpoint, "--target", "rtx:sm89", "--precision", "fp16", "--memory", "0.001", *SHAPES)
    assert isinstance(result.exception, BuildError)
    assert result.exception.exit_code == 5
    assert "does not fit this machine" in str(result.exception)
    assert "Build for rtx:sm89" in result.output


def test_json_of_what_does_not_fit_holds_the_advice(tiny_checkpoint: Path) -> None:
    options = ("--target", "rtx:sm89", "--precision", "fp16", "--memory", "0.001", *SHAPES, "--json")
    value = json.loads(run(tiny_checkpoint, *options).stdout)
    assert value["fits"] is False
    assert value["refusals"][0]["fixes"]


def test_a_gpu_that_the_target_does_not_serve_is_refused(tiny_checkpoint: Path) -> None:
    result = run(tiny_checkpoint, "--target", "rtx:sm89", "--precision", "fp16", "--gpu", "h100", *SHAPES)
    assert isinstance(result.exception, RequestError)
    assert "use --target trt:sm90" in str(result.exception)


def test_a_precision_that_the_gpu_lacks_is_refused(tiny_checkpoint: Path) -> None:
    result = run(tiny_checkpoint, "--target", "cuda", "--precision", "fp16,dit=fp8", "--gpu", "a100", *SHAPES)
    assert isinstance(result.exception, RequestError)
    assert "A100 80GB (sm80) does not compute in fp8" in str(result.exception)


def test_a_recipe_says_what_the_command_line_does_not(tiny_checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"precision": {"*": "fp16"}, "kept": {}}), encoding="utf-8")
    assert planned(tiny_checkpoint, "--recipe", str(recipe), *SHAPES)["precision"]["dit"] == "fp16"
    given = ("--recipe", str(recipe), "--precision", "fp32")
    assert set(planned(tiny_checkpoint, *given, *SHAPES)["precision"].values()) == {"fp32"}
    result = run(tiny_checkpoint, *given, *SHAPES)
    assert "command line, instead of fp16" in result.stderr


def test_a_recipe_by_name(tiny_checkpoint: Path) -> None:
    """Its GPU, target and shapes are planned for; another GPU on the command line has to fit the target."""
    value = planned(tiny_checkpoint, "--recipe", "rtx-4090-720p")
    assert (value["target"], value["gpu"]["name"], value["precision"]["dit"]) == ("rtx:sm89", "RTX 4090", "fp8")
    assert [bucket["shape"] for bucket in value["buckets"]][:2] == ["720x1280x129", "544x960x129"]
    assert planned(tiny_checkpoint, "--recipe", "rtx-4090-720p", "--gpu", "l40s")["gpu"]["name"] == "L40S"


def test_this_machine_has_memory() -> None:
    memory = host_memory()
    assert memory is None or memory > max(gpu.memory_bytes for gpu in GPUS) / 1000
