"""``reelforge recipes``, and the planner's figures in the files of the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from reelforge.export.planner.gpus import find_gpu
from reelforge.runtime.errors import BuildError, RequestError
from reelforge.runtime.step_cache.settings import Method, StepCache
from reelforge.tools import recipe_figures
from reelforge.tools.main import cli
from reelforge.tools.recipe_file import RecipeFile, find_recipe, recipe_names

ASKED_FOR = {"rtx-4090-720p", "rtx-5090-720p", "h100-720p", "rtx-4060ti-16g-480p"}
TEN_MINUTES = 600


def run(*arguments: str) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["recipes", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_table() -> None:
    shown = run()
    for name in recipe_names():
        assert name in shown
    assert "none was measured" in shown


def test_the_recipes_that_people_have_hardware_for() -> None:
    assert {*ASKED_FOR, "rtx-3090-480p", "l40s-720p", "a100-80g-720p", "b200-720p", "cpu-demo"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_details(name: str) -> None:
    shown, recipe = run(name), find_recipe(name).content
    assert recipe.figures is not None
    for part in (
        recipe.description,
        str(recipe.target),
        *recipe.remarks,
        *(video.shape for video in recipe.figures.videos),
    ):
        assert " ".join(part.split()) in " ".join(shown.split())


def test_json_of_all_and_of_one_are_recipes_again(tmp_path: Path) -> None:
    every = json.loads(run("--json"))
    assert set(every) == set(recipe_names())
    for name in recipe_names():
        text = run(name, "--json")
        assert json.loads(text) == every[name]
        (tmp_path / "mine.json").write_text(text)
        assert find_recipe(str(tmp_path / "mine.json")).content == find_recipe(name).content


def test_a_name_that_does_not_exist() -> None:
    result = CliRunner().invoke(cli, ["recipes", "rtx-4090-720"])
    assert isinstance(result.exception, RequestError)
    assert "fix: use rtx-4090-720p, or check the path" in str(result.exception)


@pytest.mark.parametrize("name", recipe_names())
def test_figures_are_what_the_planner_says_now(name: str) -> None:
    """If this fails: look at the new figures, then store them with python -m reelforge.tools.recipe_figures --write."""
    recipe = find_recipe(name).content
    plan, refusals = recipe_figures.planned(recipe)
    assert recipe.figures == recipe_figures.figures(plan)
    assert not refusals
    if recipe.gpu is not None:
        assert all(video.peak_bytes <= find_gpu(recipe.gpu).memory_bytes for video in recipe.figures.videos)


@pytest.mark.parametrize("name", recipe_names())
def test_long_videos_are_cached_by_default_and_short_ones_are_not(name: str) -> None:
    recipe = find_recipe(name).content
    assert recipe.figures is not None
    seconds = recipe.figures.videos[0].seconds_per_video
    assert seconds is None or (recipe.step_cache is not None) == (seconds > TEN_MINUTES)
    if recipe.step_cache is not None:
        cache = StepCache.parse(recipe.step_cache)
        assert cache.method is Method.EASYCACHE
        assert not cache.problems()


def test_the_check_says_what_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(plan: object) -> None:
        return None

    result = CliRunner().invoke(recipe_figures.command, [])
    assert result.output == "nothing has moved\n"
    monkeypatch.setattr(recipe_figures, "figures", other)
    failed = CliRunner().invoke(recipe_figures.command, [])
    assert isinstance(failed.exception, BuildError)
    assert "received: a100-80g-720p, b200-720p" in str(failed.exception)


def test_recipes_that_cannot_be_planned() -> None:
    for recipe in (RecipeFile({}), RecipeFile({}, target="cpu"), RecipeFile({}, target="cpu", model="other")):
        with pytest.raises(RequestError) as caught:
            recipe_figures.planned(recipe)
        assert "a target, and a model among hunyuan-video, demo" in str(caught.value)


@pytest.mark.slow
def test_a_checkpoint_of_that_size_is_planned_alike(tmp_path: Path) -> None:
    """The figures are computed without a checkpoint; with one, from its headers, only its template differs."""
    checkpoint = tmp_path / "full"
    made = CliRunner().invoke(cli, ["synthesize", str(checkpoint), "--size", "full"])
    assert made.exit_code == 0, made.output
    for name in (name for name in recipe_names() if name != "cpu-demo"):
        result = CliRunner().invoke(cli, ["plan", str(checkpoint), "--recipe", name, "--memory", "64", "--json"])
        assert result.exit_code == 0, result.output
        value, figures = json.loads(result.stdout), find_recipe(name).content.figures
        assert figures is not None
        assert value["export_bytes"] >= figures.export_bytes / 2
        assert value["bundle_bytes"] == figures.bundle_bytes
        assert value["builder_bytes"] == figures.builder_bytes
        assert {stage: one["parts"] for stage, one in value["stages"].items() if one["parts"] > 1} == figures.parts
        for bucket, video in zip(value["buckets"], figures.videos, strict=True):
            assert bucket["shape"] == video.shape
            assert max(bucket["memory_bytes"].values()) == pytest.approx(video.peak_bytes, rel=0.01)
            assert bucket["seconds_per_video"] == pytest.approx(video.seconds_per_video, rel=0.01, abs=0.1)
