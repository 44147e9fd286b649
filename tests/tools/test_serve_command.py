"""The options of ``reelforge serve``: what is wrong is said before anything is opened."""

from __future__ import annotations

import socket
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from reelforge.runtime.errors import ReelforgeError
from reelforge.tools.serve import Duration, serve
from reelforge.tools.service.settings import KEYS_VARIABLE


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(serve, ["x.bundle", *arguments], env=environment)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90.0), ("90s", 90.0), ("1.5m", 90.0), ("12h", 43_200.0), ("7d", 604_800.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "x", "-1s", "1w", "1e9", "nan"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no duration"):
        Duration().convert(text, None, None)


def test_help_says_how_it_ends() -> None:
    text = CliRunner().invoke(serve, ["--help"]).output
    for part in ("--drain", "exit code", "SIGTERM", KEYS_VARIABLE, "reelforge-data"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--keys", "nowhere.txt"), "cannot be read"),
        (("--retention", "0s"), "retention_s is not usable"),
        (("--host", "256.0.0.1"), "cannot listen at 256.0.0.1"),
    ],
)
def test_settings_that_do_not_work(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, ReelforgeError)
    assert result.exception.exit_code == 2
    assert message in str(result.exception)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run("--port", port, "--data", str(tmp_path / "data"))
    assert f"cannot listen at 127.0.0.1 port {port}" in str(result.exception)


def test_keys_of_the_environment_are_read() -> None:
    result = run(**{KEYS_VARIABLE: "ann=short-secret"})
    assert isinstance(result.exception, ReelforgeError), result.output
    result = run(**{KEYS_VARIABLE: "ann"})
    assert f"entry 1 of {KEYS_VARIABLE} is no API key" in str(result.exception)
