"""Deselects tests that need a GPU where there is none, and says so in the summary."""

from __future__ import annotations

import shutil
import subprocess

import pytest

DESELECTED = pytest.StashKey[int]()
WORKER_KEY = "reelforge_gpu_deselected"


def has_nvidia_gpu() -> bool:
    """Ask the driver and not torch, which may be a build without CUDA on a machine with a GPU."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    result = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=60, check=False)
    return result.returncode == 0 and "GPU" in result.stdout


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu or has_nvidia_gpu():
        return
    items[:] = [item for item in items if item not in gpu]
    config.hook.pytest_deselected(items=gpu)
    config.stash[DESELECTED] = len(gpu)
    worker_output = getattr(config, "workeroutput", None)
    if worker_output is not None:
        worker_output[WORKER_KEY] = len(gpu)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object | None) -> None:
    """Take the count from a worker of pytest-xdist; each collects all tests, so they agree."""
    count = getattr(node, "workeroutput", {}).get(WORKER_KEY, 0)
    config: pytest.Config = node.config  # type: ignore[attr-defined]
    config.stash[DESELECTED] = max(count, config.stash.get(DESELECTED, 0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    count = config.stash.get(DESELECTED, 0)
    if count:
        terminalreporter.write_line(f"{count} gpu tests deselected: no NVIDIA GPU")
