"""Deselects tests that need a GPU where there is none, and says so in the summary; fixtures shared by all folders."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.bundles import TraceMemory

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


# Shared by all workers of a session and therefore not to be altered. Imports are local: a run that needs none of these
# fixtures does not load torch.


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in diffusers' layout, fp32."""
    from tests.bundles import once, session_folder
    from tests.checkpoints import make_diffusers_checkpoint

    return once(session_folder(tmp_path_factory) / "diffusers", lambda path: make_diffusers_checkpoint(path, seed=1))


@pytest.fixture(scope="session")
def tiny_tencent_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """The same weights as ``tiny_checkpoint`` in Tencent's layout."""
    from tests.bundles import once, session_folder
    from tests.checkpoints import make_tencent_checkpoint

    folder = session_folder(tmp_path_factory) / "tencent"
    return once(folder, lambda path: make_tencent_checkpoint(path, tiny_checkpoint))


@pytest.fixture(scope="session")
def trace_memory(tmp_path_factory: pytest.TempPathFactory) -> TraceMemory:
    """Traces by part, each made once per session."""
    from tests.bundles import TraceMemory, session_folder

    folder = session_folder(tmp_path_factory) / "traces"
    folder.mkdir(exist_ok=True)
    return TraceMemory(folder)


@pytest.fixture
def remembered_traces(trace_memory: TraceMemory) -> Iterator[None]:
    """Builds in this test trace nothing that was traced before."""
    with trace_memory.used():
        yield


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, trace_memory: TraceMemory) -> Path:
    """``tiny_checkpoint`` built for the CPU in fp32 with diffusers' numerics, all stages."""
    from tests.bundles import build, once, session_folder

    def make(path: Path) -> None:
        with trace_memory.used():
            build(tiny_checkpoint, path)

    return once(session_folder(tmp_path_factory) / "tiny.bundle", make)
