"""``reelforge cache``: what it lists, what it removes, and what it refuses."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from reelforge.export.cache import PlanCache, PlanKey
from reelforge.export.cache_store import file_lock
from reelforge.export.engines.request import Expected, PlanRequest, Profile
from reelforge.runtime.errors import BuildError, RequestError
from reelforge.runtime.recipe import Target
from reelforge.tools.cache import _ago
from reelforge.tools.main import cli

REQUEST = PlanRequest(
    "dit", "g", (), (), Target.parse("rtx:sm89+sm120"), (Profile("default", {}),), Expected(), "p", "r", "s"
)
DIT = PlanKey(REQUEST, "0" * 64, "tensorrt_rtx 1.7.1.116")
DECODER = PlanKey(replace(REQUEST, stage="vae_decoder"), "0" * 64, "tensorrt_rtx 1.7.1.116")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache of two plans, of which that of ``dit`` was used three days ago."""
    folder = tmp_path / "cache"
    plans = PlanCache(folder)
    for key in (DIT, DECODER):
        (tmp_path / key.request.stage).mkdir()

        def build(plan: Path, receipt: Path) -> None:
            plan.write_bytes(b"1" * 10_000)
            receipt.write_text("{}")

        plans.fetch_or_build(key, build, tmp_path / key.request.stage / "p", tmp_path / key.request.stage / "r")
    then = time.time() - 3 * 86400
    os.utime(folder / "plans" / DIT.sha256 / "entry.json", (then, then))
    return folder


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["cache", *map(str, arguments)], env={"COLUMNS": "100"})


def test_what_is_in_it(folder: Path) -> None:
    result = run("--cache-dir", folder)
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert lines[0].startswith(f"{folder}: 2 plans, 2")
    assert [line.split() for line in lines if "sm89" in line] == [
        ["dit", "sm89+sm120", "tensorrt_rtx", "1.7.1.116", *size(folder, DIT), "3", "days", "ago", DIT.sha256[:12]],
        ["vae_decoder", "sm89+sm120", "tensorrt_rtx", "1.7.1.116", *size(folder, DECODER), "just", "now",
         DECODER.sha256[:12]],
    ]  # fmt: skip
    assert max(map(len, result.output.splitlines()[1:])) <= 100


def size(folder: Path, key: PlanKey) -> list[str]:
    total = sum(path.stat().st_size for path in (folder / "plans" / key.sha256).iterdir())
    return [f"{total / 1000:.1f}", "kB"]


def test_for_machines(folder: Path) -> None:
    value = json.loads(run("--cache-dir", folder, "--json").output)
    assert value["folder"] == str(folder)
    assert [entry["key"] for entry in value["entries"]] == [DIT.sha256, DECODER.sha256]
    assert value["entries"][0]["content"] == json.loads(json.dumps(DIT.content()))


def test_making_room(folder: Path, tmp_path: Path) -> None:
    result = run("--cache-dir", folder, "--trim", "15kB")
    assert "1 plan, " in result.output
    assert "vae_decoder" in result.output
    assert "dit " not in result.output
    assert run("--cache-dir", folder, "--trim", "0").output == f"{folder}: no plans\n"
    assert (tmp_path / "dit" / "p").stat().st_size == 10_000  # a bundle's


def test_a_plan_in_use_stays(folder: Path) -> None:
    with file_lock(folder / "locks" / f"{DIT.sha256}.lock"):
        result = run("--cache-dir", folder, "--trim", "0")
    assert "1 plan, " in result.output
    assert "notice: plans that a build is taking right now were not removed." in result.output


def test_a_damaged_entry_is_listed(folder: Path) -> None:
    (folder / "plans" / DIT.sha256 / "entry.json").write_text("{")
    (folder / "plans" / DECODER.sha256 / "entry.json").unlink()
    lines = [line.split() for line in run("--cache-dir", folder).output.splitlines()]
    assert [line[0] for line in lines if line and line[-1] in (DIT.sha256[:12], DECODER.sha256[:12])] == ["unknown"] * 2


def test_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run().output == f"{tmp_path / 'reelforge'}: no plans\n"


def test_refusals(folder: Path) -> None:
    error = run("--cache-dir", "/proc/cache").exception
    assert isinstance(error, BuildError)
    assert "the cache folder '/proc/cache' cannot be used" in str(error)
    error = run("--cache-dir", folder, "--trim", "much").exception
    assert isinstance(error, RequestError)
    assert "the size 'much' cannot be read" in str(error)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "just now"), (90, "just now"), (150, "2 minutes ago"), (7200, "2 hours ago"), (400 * 86400, "400 days ago")],
)
def test_ago(seconds: float, text: str) -> None:
    assert _ago(seconds) == text
