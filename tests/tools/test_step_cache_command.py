"""``reelforge measure-ratios`` and ``reelforge generate --step-cache`` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from reelforge.runtime import Pipeline, Request
from reelforge.runtime.step_cache.ratios import MagnitudeRatios
from reelforge.runtime.step_cache.rescaling import Rescaling
from reelforge.runtime.step_cache.settings import StepCache
from tests.runtime.fake_bundle import CACHED, write_fake_bundle
from tests.tools.test_generate import names, reelforge

SMALL = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "14"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "cached.bundle"
    write_fake_bundle(path, stages=CACHED)
    return path


def test_measured_and_used(bundle: Path, tmp_path: Path) -> None:
    measured = reelforge("measure-ratios", bundle, "-o", "r.json", "-p", "a ball", "-p", "", *SMALL, folder=tmp_path)
    assert measured.returncode == 0, measured.stderr
    assert measured.stdout == ""
    assert "r.json: ratios" in measured.stderr
    assert "of 14 steps, from 2 generations" in measured.stderr
    ratios = MagnitudeRatios.read(tmp_path / "r.json")
    assert (len(ratios.ratios), ratios.generations) == (14, 2)

    text = "magcache:0.5,ratios=r.json,max-skips=2"
    arguments = ["-p", "a ball", "-o", "%02d.png", *SMALL, "--step-cache", text, "--save-latents", "x.npy"]
    result = reelforge("generate", bundle, *arguments, "--json", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["skipped_steps"] > 0
    cache = StepCache.parse(text.replace("r.json", str(tmp_path / "r.json")))
    with Pipeline.open(bundle, threads=1) as pipeline:
        request = Request("a ball", 32, 48, 5, 14, step_cache=cache)
        pipeline.generate(request, save_latents=tmp_path / "same.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), np.load(tmp_path / "same.npy"))


def test_coefficients_are_measured_and_used(bundle: Path, tmp_path: Path) -> None:
    measured = reelforge("measure-coefficients", bundle, "-o", "tea.json", *SMALL, folder=tmp_path)
    assert measured.returncode == 0, measured.stderr
    assert (measured.stdout, "tea.json: changes of" in measured.stderr) == ("", True)
    assert "from 4 generations" in measured.stderr, "the built-in prompts"
    rescaling = Rescaling.read(tmp_path / "tea.json")
    assert (len(rescaling.coefficients), rescaling.generations) == (5, 4)
    arguments = ["-p", "a ball", "-o", "a.gif", *SMALL, "--step-cache", "teacache:100,coefficients=tea.json", "--json"]
    result = reelforge("generate", bundle, *arguments, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["skipped_steps"] == 9, "of 14, the first two, the last, and every fourth between"


def test_the_summary_says_how_many_steps_were_skipped(bundle: Path, tmp_path: Path) -> None:
    arguments = ["-p", "a ball", "-o", "a.gif", *SMALL, "--step-cache", "easycache:100,max-skips=99"]
    result = reelforge("generate", bundle, *arguments, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "11 of 14 steps skipped" in result.stderr, "two first and the last are computed"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("easycache", "the step cache 'easycache' cannot be read"),
        ("easycache:-1", "step_cache threshold=-1.0"),
        ("magcache:0.1", "magcache without ratios"),
        ("teacache:0.1", "step_cache teacache without coefficients"),
        ("teacache:0.1,coefficients=none.json", "does not hold TeaCache's coefficients"),
        ("magcache:0.1,ratios=none.json", "does not hold magnitude ratios"),
    ],
)
def test_what_cannot_be_used_is_exit_code_2(bundle: Path, tmp_path: Path, text: str, said: str) -> None:
    result = reelforge(
        "generate", bundle, "-p", "a ball", "-o", "a.gif", *SMALL, "--step-cache", text, folder=tmp_path
    )  # fmt: skip
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert names(tmp_path) == []


def test_ratios_that_cannot_be_measured(bundle: Path, tmp_path: Path) -> None:
    one = reelforge("measure-ratios", bundle, "-o", "r.json", "--steps", "1", folder=tmp_path)
    assert (one.returncode, "--steps 2 or more" in one.stderr) == (2, True)
    few = reelforge("measure-coefficients", bundle, "-o", "r.json", "--steps", "2", folder=tmp_path)
    assert (few.returncode, "too few steps to fit" in few.stderr) == (2, True)
    nowhere = reelforge("measure-ratios", bundle, "-o", "no/r.json", folder=tmp_path)
    assert "the folder 'no' does not exist" in nowhere.stderr
    folder = reelforge("measure-ratios", bundle, "-o", ".", folder=tmp_path)
    assert (folder.returncode, "the file '.' cannot be written" in folder.stderr) == (7, True)
    assert "Traceback" not in folder.stderr
    assert names(tmp_path) == []
    shown = reelforge("measure-ratios", bundle, "-o", "r.json", *SMALL, "--json", folder=tmp_path)
    assert json.loads(shown.stdout) == json.loads((tmp_path / "r.json").read_text())
