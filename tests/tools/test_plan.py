"""``reelforge plan`` as a user runs it: what it prints, what it refuses, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from reelforge.export.planner.gpus import GPUS
from reelforge.runtime.errors import BuildError, RequestError
from reelforge.tools.build_engine import build_engine
from reelforge.tools.main import cli
from reelforge.tools.plan import host_memory, plan

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


# Options of ``build-engine`` that are no matter of a plan: what is written, how scales are found and judged, the cache.
NOT_PLANNED = {"output", "prompts", "method", "percentile", "smoothing", "seed", "steps", "shape", "min_psnr"} | {
    "min_cosine", "no_gate", "cache_dir", "cache_size", "no_cache", "only_plan", "verify"
}  # fmt: skip
OF_A_PLAN = {"gpu", "steps", "memory"}


def test_a_plan_takes_what_a_build_takes() -> None:
    """Each option of ``build-engine`` is here too, with the same values and default, or is no matter of a plan."""
    named = {"memory": "calibration_memory"}  # here --memory is the machine's
    ours = {one.name: one for one in plan.params if one.name not in OF_A_PLAN}
    theirs = {named.get(one.name or "", one.name): one for one in build_engine.params if one.name not in NOT_PLANNED}
    assert set(ours) == set(theirs)
    for name, option in theirs.items():
        mine = ours[name]
        assert mine.opts == option.opts
        assert mine.to_info_dict()["type"] == option.to_info_dict()["type"], name
        assert (mine.default, mine.multiple) == (option.default, option.multiple), name


def test_head_body_and_tail_are_plans_in_a_row(tiny_checkpoint: Path) -> None:
    """As ``build-engine`` compiles them: the same weights once, and each cut by itself where memory asks for it."""
    options = ("--target", "rtx:sm89", "--precision", "dit=fp8", "--scales", "any", *SHAPES)
    whole, parted = (planned(tiny_checkpoint, *options, *more) for more in ((), ("--partition", "head,body,tail")))
    one, three = whole["stages"]["dit"], parted["stages"]["dit"]
    assert (one["parts"], three["parts"]) == (1, 3)
    assert three["weight_bytes"] == one["weight_bytes"]
    assert three["plan_bytes"] > one["plan_bytes"]
    assert three["builder_bytes"] < one["builder_bytes"]
    assert whole["buckets"] == parted["buckets"]
    assert {name: stage for name, stage in whole["stages"].items() if name != "dit"} == {
        name: stage for name, stage in parted["stages"].items() if name != "dit"
    }
    cut = planned(tiny_checkpoint, *options, "--partition", "head,body,tail", "--builder-memory", "0.3001")
    assert cut["stages"]["dit"]["parts"] > 3
    assert any("fbcache and reuse=tokens keep" in said for said in parted["not_modelled"])
    assert whole["not_modelled"] == []


def test_parts_of_a_bundle_of_graphs_cost_nothing(tiny_checkpoint: Path) -> None:
    whole, parted = (planned(tiny_checkpoint, *SHAPES, *more) for more in ((), ("--partition", "head,body,tail")))
    assert parted["stages"] == whole["stages"]
    assert parted["buckets"] == whole["buckets"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--precision", "int8", "--attention", "int8"), "attention in int8 keeps logits of 128 queries at a time"),
        (("--sparse-attention", "lists", "--attention-blocks", "4x4"), "sparse attention is planned as dense"),
        (("--sparse-attention", "topk"), "sparse attention is planned as dense"),
        (("--step-cache", "easycache:0.1"), "what easycache:0.1 skips depends on the video"),
        (("--target", "cuda"), "activations on cuda are those of TensorRT-RTX's kernels"),
        (("--target", "trt:sm80"), "attention runs in plugins, which were never timed on a GPU like trt:sm80"),
    ],
)
def test_what_is_not_known_is_said(tiny_checkpoint: Path, options: tuple[str, ...], said: str) -> None:
    assert any(said in sentence for sentence in planned(tiny_checkpoint, *options, *SHAPES)["not_modelled"])
    result = run(tiny_checkpoint, *options, *SHAPES)
    assert said in " ".join(result.output.split())
    assert "not known: " in result.output


def test_sparse_attention_costs_what_dense_attention_does(tiny_checkpoint: Path) -> None:
    dense, sparse = (planned(tiny_checkpoint, *SHAPES, *more) for more in ((), ("--sparse-attention", "lists")))
    assert (dense["stages"], dense["buckets"]) == (sparse["stages"], sparse["buckets"])


def test_memory_on_a_cpu_has_no_driver_in_it(tiny_checkpoint: Path) -> None:
    for target, least in (("cpu", 0.0), ("cuda", 0.6e9)):
        sizes = planned(tiny_checkpoint, "--target", target, *SHAPES)["buckets"][0]["memory_bytes"].values()
        assert all(least < size < least + 0.1e9 for size in sizes)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--attention", "int8", "--target", "rtx:sm89"), ["no attention in int8"]),
        (("--partition", "head,body,tail", "--sparse-attention", "lists"), ["no head, body and tail"]),
        (("--step-cache", "fbcache:0.1"), ["needs the transformer in parts"]),
        (("--step-cache", "teacache:0.1"), ["no coefficients are published for this model"]),
        (("--attention-blocks", "4x4"), ["blocks are given for attention that leaves nothing out"]),
        (("--stages", "llm", "--precision", "fp8"), ["no stage that is built would have any"]),
        (
            ("--stages", "input_change"),
            ["no weights of their own", "received: --stages input_change", "fix: use --stages dit,input_change"],
        ),
    ],
)
def test_what_a_build_refuses_is_not_planned(tiny_checkpoint: Path, options: tuple[str, ...], parts: list[str]) -> None:
    error = run(tiny_checkpoint, *options, *SHAPES).exception
    assert isinstance(error, RequestError)
    for part in parts:
        assert part in str(error)


def test_a_recipe_s_memory_for_calibration_is_planned(tiny_checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"precision": {"dit": "int8"}, "calibration": {"memory_gib": 2}}')
    usual, less = (planned(tiny_checkpoint, *SHAPES, *more)["export_bytes"] for more in (
        ("--precision", "dit=int8"), ("--recipe", str(recipe))))  # fmt: skip
    assert usual - less == int(6 * 1.25 * 2**30)


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
