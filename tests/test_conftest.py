"""GPU tests are deselected where there is no GPU, and counted in a line that cannot be overlooked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("i", range(3))
def test_needs_one(i): raise AssertionError

def test_needs_none(): pass
"""


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
@pytest.mark.parametrize("gpus", [False, True])
def test_gpu_tests_are_counted(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, workers: list[str], gpus: bool
) -> None:
    program = "#!/bin/sh\n" + ("echo 'GPU 0: made up'\n" if gpus else "exit 9\n")
    path = Path(pytester.path) / "bin" / "nvidia-smi"
    path.parent.mkdir()
    path.write_text(program)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{Path(sys.executable).parent}:/usr/bin:/bin")
    pytester.makeini("[pytest]\nmarkers = gpu: needs a GPU\n")
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess(*workers)
    line = "3 gpu tests deselected: no NVIDIA GPU"
    if gpus:
        result.assert_outcomes(passed=1, failed=3)
        assert line not in result.outlines
    else:
        result.assert_outcomes(passed=1, deselected=0 if workers else 3)
        assert line in result.outlines
