"""Recipes: what a file may say, what is refused, and that everything it says reaches the build."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from reelforge.export.build_request import BuildRequest
from reelforge.runtime.codec import to_json
from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import Precision, QuantisationRecipe
from reelforge.tools.build_engine import build_engine
from reelforge.tools.recipe_file import (
    RecipeCalibration,
    RecipeFile,
    build_options,
    find_recipe,
    plan_options,
    recipe_names,
)

LAYERS = {"dit": ("single.1.proj_mlp", "double.0.image.fc2"), "llm": ("*.o_proj",)}
FULL = RecipeFile(
    precision={"*": Precision.FP16, "dit": Precision.INT8},
    kept=LAYERS,
    high_precision=Precision.FP16,
    attention=Precision.FP8,
    target="rtx:sm89",
    shapes=("48x64x9", "32x32x5"),
    partition="head,body,tail",
    batch=2,
    numerics="diffusers",
    builder_memory_gb=3.5,
    step_cache="easycache:0.05,warmup=3",
    calibration=RecipeCalibration("percentile", 99.5, 0.25, 7, "32x48x1", 1.5),
    gpu="L4",
)


class Stopped(Exception):
    """Raised in the place of a build."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run ``build-engine`` up to the build, and return what would be built and what was printed."""
    seen: list[BuildRequest] = []

    def stop(request: BuildRequest, events: object) -> None:
        seen.append(request)
        raise Stopped

    monkeypatch.setattr("reelforge.export.build.build_bundle", stop)

    def run(*options: str) -> tuple[BuildRequest, Result]:
        result = CliRunner(env={"COLUMNS": "120"}).invoke(
            build_engine, [str(tmp_path), "-o", str(tmp_path / "out"), *options]
        )
        assert isinstance(result.exception, Stopped), result.output
        return seen.pop(), result

    return run


def written(folder: Path, recipe: RecipeFile) -> str:
    path = folder / "recipe.json"
    path.write_text(json.dumps(to_json(recipe)), encoding="utf-8")
    return str(path)


def test_everything_that_a_recipe_says_is_asked_for(asked: Any, tmp_path: Path) -> None:
    request, result = asked("--recipe", written(tmp_path, FULL))
    assert request.precision == FULL.precision
    assert request.kept == LAYERS
    assert (request.high_precision, request.attention) == (Precision.FP16, Precision.FP8)
    assert str(request.target) == "rtx:sm89"
    assert [str(shape) for shape in request.shapes] == ["48x64x9", "32x32x5"]
    assert (request.batch, request.numerics.value, request.parted) == (2, "diffusers", True)
    assert request.step_cache == "easycache:0.05,warmup=3"
    assert request.compilation.memory_bytes == 3_500_000_000
    calibration = request.calibration
    assert (calibration.method.value, calibration.percentile, calibration.smoothing) == ("percentile", 99.5, 0.25)
    assert (calibration.steps, str(calibration.shape), calibration.memory_bytes) == (7, "32x48x1", 3 * 2**29)
    for part in ("--calibration-memory", "easycache:0.05,warmup=3", "rtx:sm89", "dit=double.0.image.fc2"):
        assert part in result.stderr.replace("\n", "")


def test_no_field_is_left_out_of_the_test_above() -> None:
    """A field that is added is an option, or is for people only."""
    told = {"description", "model", "gpu", "remarks", "figures"}
    assert all(getattr(FULL, one.name) != one.default for one in fields(FULL) if one.name not in told)
    assert None not in [getattr(FULL.calibration, one.name) for one in fields(FULL.calibration)]
    said = len(fields(FULL)) - len(told) - 2 + len(fields(FULL.calibration))  # kept and calibration are one and several
    assert len(build_options(FULL)) == said + 1
    assert plan_options(FULL)["gpu"] == "L4"
    assert plan_options(FULL)["calibration_memory"] == 1.5
    assert plan_options(FULL)["partition"] == "head,body,tail"


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_of_the_package_reach_the_build(name: str, asked: Any) -> None:
    content = find_recipe(name).content
    request, _ = asked("--recipe", name)
    assert str(request.target) == content.target
    assert (request.precision, request.attention) == (content.precision, content.attention)
    assert tuple(map(str, request.shapes)) == content.shapes
    assert request.step_cache == content.step_cache
    assert content.description
    assert content.remarks


def test_the_command_line_wins_option_by_option(asked: Any, tmp_path: Path) -> None:
    given = (
        "--precision",
        "bf16",
        "--attention",
        "high",
        "--shapes",
        "16x16x5",
        "--step-cache",
        "off",
        "--keep",
        "dit=a",
    )
    request, result = asked("--recipe", written(tmp_path, FULL), *given, "--target", "trt:sm90")
    assert request.precision == {"*": Precision.BF16}
    assert (request.attention, str(request.target), request.step_cache) == (None, "trt:sm90", "off")
    assert request.kept == {"dit": ("a",)}
    assert [str(shape) for shape in request.shapes] == ["16x16x5"]
    assert request.batch == 2
    printed = " ".join(result.stderr.split())
    for part in (
        "--precision bf16 command line, instead of fp16,dit=int8",
        "--target trt:sm90 command line, instead of rtx:sm89",
        "--step-cache off command line, instead of easycache:0.05,warmup=3",
        "--batch 2 recipe",
    ):
        assert part in printed


def test_an_option_after_the_recipe_or_before_it(asked: Any, tmp_path: Path) -> None:
    recipe = written(tmp_path, FULL)
    for options in (("--batch", "3", "--recipe", recipe), ("--recipe", recipe, "--batch", "3")):
        assert asked(*options)[0].batch == 3


def test_a_recipe_that_says_little_changes_little(asked: Any, tmp_path: Path) -> None:
    plain, _ = asked()
    same, _ = asked("--recipe", written(tmp_path, RecipeFile({})))
    assert same == plain


@pytest.mark.parametrize("extra", [{}, {"quality": {"psnr": 31.5, "note": "as measured"}}])
def test_files_of_a_sensitivity_analysis_are_read(tmp_path: Path, extra: dict[str, object]) -> None:
    """What was measured is for the reader; a build measures again."""
    file = tmp_path / "recipe.json"
    recipe = QuantisationRecipe({"*": Precision.FP16, "dit": Precision.INT8}, LAYERS)
    file.write_text(json.dumps({**to_json(recipe), **extra}))
    assert find_recipe(str(file)).content == RecipeFile(recipe.precision, recipe.kept)


def test_recipes_that_are_not_there(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "gone.json", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(RequestError) as caught:
            find_recipe(str(path))
        for part in (
            f"the recipe {str(path)!r} cannot be read: {reason}.",
            "expected: a file, or one of a100-80g-720p, ",
            "fix: check the path, or see reelforge recipes",
        ):
            assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "received"),
    [
        (b"", "Expecting value"),
        (b'{"precision": {"dit": "int8"}, "kept"', "Expecting ':'"),
        (b"\xff\xfe", "can't decode byte 0xff"),
        (b"[]", "$: expected an object, received []"),
        (b'"int8"', "$: expected an object, received 'int8'"),
        (b"null", "$: expected an object, received None"),
        (b"{}", "missing fields"),
        (b'{"kept": {}}', "missing fields"),
        (b'{"precision": {}, "shape": ["16x16x1"]}', "unknown fields ['shape']"),
        (b'{"precision": {"dit": "int4"}, "kept": {}}', "$.precision.dit: expected one of 'fp32', 'bf16'"),
        (b'{"precision": {"dit": "int8"}, "kept": {"dit": "single.*"}}', "$.kept.dit: expected a list"),
        (b'{"precision": {}, "kept": ["dit"]}', "$.kept: expected an object"),
        (b'{"precision": {}, "calibration": {"step": 2}}', "unknown fields ['step']"),
        (b'{"precision": {}, "calibration": 3}', "$.calibration: expected an object"),
        (b'{"precision": {}, "batch": "2"}', "$.batch: expected int or NoneType"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, content: bytes, received: str) -> None:
    file = tmp_path / "recipe.json"
    file.write_bytes(content)
    with pytest.raises(RequestError) as caught:
        find_recipe(str(file))
    for part in (
        f"the recipe {str(file)!r} is not a recipe",
        received,
        'expected: {"precision": {stage: precision}}',
        "fix: write it with reelforge sensitivity --recipe, or begin with one",
    ):
        assert part in str(caught.value)


def test_values_are_checked_as_options_are(tmp_path: Path) -> None:
    recipe = written(tmp_path, RecipeFile({}, numerics="theirs"))
    result = CliRunner().invoke(build_engine, [str(tmp_path), "-o", str(tmp_path / "out"), "--recipe", recipe])
    assert result.exit_code == 2
    assert "'theirs' is not one of 'tencent', 'diffusers'" in result.output
