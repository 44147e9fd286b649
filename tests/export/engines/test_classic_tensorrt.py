"""The builder against the interface of classic TensorRT, which needs a GPU to run: names only, from its type stubs.

``tensorrt-stubs`` cannot be in the extra ``dev``: it depends on TensorRT itself. ``make env`` installs it alone.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
from pathlib import Path

import pytest

from reelforge.export.engines import builder, module

OBJECTS = {
    "module": "",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "made": "IOptimizationProfile",
    "layer": "ILayer",
    "error": "ParserError",
}
"""Variables of the builder, and the library's classes that they hold."""

NEWER = {"IAttentionInputLayer", "attention"}
"""What the stubs of 10.13 lack; the builder says so where a module lacks it."""

OTHER = {
    "ComputeCapability",
    "num_compute_capabilities",
    "set_compute_capability",
}
"""TensorRT-RTX's alone; used for its targets only."""


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """Class -> names in it; the module's own names under the empty one. (The stubs are not quite valid Python.)"""
    try:
        files = importlib.metadata.files("tensorrt-stubs")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tensorrt-stubs is not installed: pip install --no-deps tensorrt-stubs")
    (path,) = (file for file in files or [] if file.name == "tensorrt.pyi" and "bindings" in str(file))
    found: dict[str, set[str]] = {"": set()}
    current = ""
    for line in Path(str(path.locate())).read_text(encoding="utf-8").splitlines():
        if match := re.match(r"class (\w+)", line):
            current = match[1]
            found[""].add(current)
            found[current] = set()
        elif match := re.match(r"    (?:def )?(\w+)(?:\(|:)", line):
            found[current].add(match[1])
    return found


def used() -> set[tuple[str, str]]:
    """Return (variable, attribute) of all that the two border modules read, call or set."""
    trees = [ast.parse(Path(str(source.__file__)).read_text(encoding="utf-8")) for source in (builder, module)]
    return {
        (node.value.id, node.attr)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in OBJECTS
    }


def test_every_name_exists(known: dict[str, set[str]]) -> None:
    names = {(variable, name) for variable, name in used() if not name.startswith("__")}
    assert {variable for variable, _ in names} >= {"module", "builder", "network", "parser", "config", "made", "layer"}
    missing = {name for variable, name in names if name not in known[OBJECTS[variable]]}
    assert missing - NEWER - OTHER == set()


def test_overridden_methods_exist(known: dict[str, set[str]]) -> None:
    assert "log" in known["ILogger"]
    assert "write" in known["IStreamWriter"]
    assert {"phase_start", "step_complete", "phase_finish"} <= known["IProgressMonitor"]
    assert "build_serialized_network_to_stream" in known["Builder"]
    assert {"STRONGLY_TYPED"} <= known["NetworkDefinitionCreationFlag"]
