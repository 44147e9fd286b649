"""Options about quantisation: their text as data, and recipe files that are none."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from reelforge.runtime.codec import to_json
from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import Precision, QuantisationRecipe
from reelforge.tools.quantisation_options import calibration_options, parse_kept, precision_of, read_recipe

RECIPE = QuantisationRecipe(
    {"*": Precision.FP16, "dit": Precision.INT8}, {"dit": ("single.1.proj_mlp", "double.0.image.fc2")}
)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], {}),
        (["dit=single.39.*"], {"dit": ("single.39.*",)}),
        (["dit=b", "llm=*.o_proj", "dit=a"], {"dit": ("b", "a"), "llm": ("*.o_proj",)}),
        ([" dit = single.* "], {"dit": ("single.*",)}),
        (["dit=a=b"], {"dit": ("a=b",)}),
    ],
)
def test_kept_layers_are_read(texts: list[str], expected: dict[str, tuple[str, ...]]) -> None:
    assert parse_kept(texts) == expected
    assert parse_kept(iter(texts)) == expected


@pytest.mark.parametrize("text", ["", "dit", "dit=", "=single.*", " = ", "single.*"])
def test_kept_layers_that_cannot_be_read(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_kept(["dit=fine", text])
    for part in (
        f"--keep {text!r} cannot be read",
        f"received: {text}   expected: STAGE=PATTERN",
        "fix: write for example --keep dit=single.39.*",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("extra", [{}, {"quality": {"psnr": 31.5, "note": "as measured"}}])
def test_recipe_files_are_read(tmp_path: Path, extra: dict[str, object]) -> None:
    """What was measured is for the reader; a build measures again."""
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({**to_json(RECIPE), **extra}))
    assert read_recipe(file) == RECIPE


def test_recipe_files_that_are_not_there(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "gone.json", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(RequestError) as caught:
            read_recipe(path)
        for part in (
            f"the recipe {str(path)!r} cannot be read: {reason}.",
            "expected: a file written by reelforge sensitivity",
            "fix: check the path",
        ):
            assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "received"),
    [
        (b"", "Expecting value"),
        (b'{"precision": {"dit": "int8"}, "kept"', "Expecting ':'"),
        (b"\xff\xfe", "can't decode byte 0xff"),
        (b"[]", "$: expected an object, received []"),
        (b"[1, 2]", "$: expected an object, received [1, 2]"),
        (b'"int8"', "$: expected an object, received 'int8'"),
        (b"null", "$: expected an object, received None"),
        (b"3", "$: expected an object, received 3"),
        (b"{}", "missing fields ['kept', 'precision']"),
        (b'{"precision": {"dit": "int8"}}', "missing fields ['kept']"),
        (b'{"precision": {}, "kept": {}, "batch": 2}', "unknown fields ['batch']"),
        (b'{"precision": {"dit": "int4"}, "kept": {}}', "$.precision.dit: expected one of 'fp32', 'bf16'"),
        (b'{"precision": {"dit": "int8"}, "kept": {"dit": "single.*"}}', "$.kept.dit: expected a list"),
        (b'{"precision": {"dit": "int8"}, "kept": ["dit"]}', "$.kept: expected an object"),
    ],
)
def test_recipe_files_that_are_no_recipes(tmp_path: Path, content: bytes, received: str) -> None:
    file = tmp_path / "recipe.json"
    file.write_bytes(content)
    with pytest.raises(RequestError) as caught:
        read_recipe(file)
    for part in (
        f"the recipe {str(file)!r} is not a recipe",
        "received: ",
        received,
        'expected: {"precision": {stage: precision}, "kept": {stage: [layers]}}',
        "fix: write it with reelforge sensitivity --recipe",
    ):
        assert part in str(caught.value)


def test_precision_words() -> None:
    assert precision_of(None) is None
    assert precision_of("fp8") is Precision.FP8


@click.command()
@calibration_options
def _command(**options: object) -> None:
    click.echo(json.dumps(options, default=str, sort_keys=True))


def test_calibration_options_have_defaults_and_limits() -> None:
    runner = CliRunner()
    defaults = json.loads(runner.invoke(_command, []).output)
    assert defaults == {
        "memory": 8.0,
        "method": "max",
        "percentile": 99.99,
        "prompts": None,
        "seed": 0,
        "shape": None,
        "smoothing": None,
        "steps": None,
    }
    for wrong in (
        ["--method", "mean"],
        ["--percentile", "0"],
        ["--percentile", "100.5"],
        ["--smoothing", "1.5"],
        ["--smoothing", "-0.1"],
        ["--calibration-steps", "0"],
        ["--calibration-memory", "0"],
    ):
        result = runner.invoke(_command, wrong)
        assert result.exit_code == 2
        assert wrong[0] in result.output
