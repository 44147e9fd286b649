"""Options about quantisation: their text as data."""

from __future__ import annotations

import json

import click
import pytest
from click.testing import CliRunner

from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import Precision
from reelforge.tools.quantisation_options import (
    attention_of,
    calibration_options,
    parse_kept,
    parsed_precisions,
    precision_of,
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


def test_precision_words() -> None:
    assert precision_of(None) is None
    assert precision_of("fp8") is Precision.FP8
    assert parsed_precisions(None) == {}
    assert parsed_precisions("fp16,dit=fp8") == {"*": Precision.FP16, "dit": Precision.FP8}
    assert [attention_of(word) for word in (None, "high", "fp8")] == [None, None, Precision.FP8]


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
