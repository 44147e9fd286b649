"""``reelforge plugins``: what it lists, compiles and shows, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from reelforge.plugins.schema import PLUGINS
from reelforge.runtime.errors import BuildError, RequestError
from reelforge.tools.main import cli


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["plugins", *map(str, arguments)], catch_exceptions=False)


def test_list() -> None:
    text = run("list").stdout
    assert all(name in text for name in PLUGINS)
    listed = json.loads(run("list", "--arch", "sm90", "--json").stdout)["plugins"]
    assert set(listed) == set(PLUGINS)
    assert listed["int8_fp8_attention"]["tactics"]["sm90"][0] == "64x64w4s2"
    assert listed["int8_fp16_attention"]["tactics"] == {}
    assert listed["value_quantise"]["attributes"] == {"value_range": 448.0}


def test_compile_then_inspect(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    arguments = ("--arch", "SM_90", "--plugin", "value_statistics", "-o", folder)
    (compiled,) = json.loads(run("compile", *arguments, "--json").stdout)["kernels"]
    assert compiled["stack_bytes"] == 0
    assert compiled["architecture"] == "sm90"
    assert json.loads(run("inspect", folder, "--json").stdout)["kernels"] == [compiled]
    table = run("compile", *arguments).stdout
    assert "value_statistics" in table
    assert str(compiled["registers"]) in table
    ptx = run("inspect", folder, "--ptx", compiled["name"]).stdout
    assert f".visible .entry {compiled['entry']}(" in ptx
    with pytest.raises(RequestError, match="there is no kernel 'other'"):
        run("inspect", folder, "--ptx", "other")
    (path,) = folder.glob("*.json")
    path.write_text(path.read_text().replace(".reqntid", ".maxntid"))
    with pytest.raises(BuildError, match="was altered"):
        run("inspect", folder)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there are no kernels for 'sm75'"):
        run("list", "--arch", "sm75")
    with pytest.raises(RequestError, match="there are no kernels for 'hopper'"):
        run("list", "--arch", "hopper")
    with pytest.raises(RequestError, match="there is no plugin 'flash'"):
        run("compile", "--plugin", "flash", "-o", tmp_path)
    with pytest.raises(RequestError, match="no kernels for heads of 96"):
        run("compile", "--head-dim", 96, "-o", tmp_path)
    with pytest.raises(RequestError, match="no compiled kernels in"):
        run("inspect", tmp_path)
