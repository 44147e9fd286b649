"""The commands of ``Dockerfile.cpu``, run in a clean folder instead of a container.

Besides what ``clean_folder`` adapts, the port is another one.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.deploy.clean_folder import ROOT, CleanFolder
from tests.deploy.dockerfile import Stage, stages_of


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    assert isinstance(port, int)
    return port


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[CleanFolder, Stage]:
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True, check=False).returncode != 0:
        pytest.skip("not a git checkout, which says what is copied")
    folder = CleanFolder(tmp_path_factory.mktemp("image"))
    build, _, final = stages_of(ROOT / "deploy" / "Dockerfile.cpu")
    folder.follow(build)
    shutil.rmtree(folder.path / "src")  # as the final image does not have it
    (folder.path / "data").mkdir()
    folder.follow(final)
    return folder, final


@pytest.mark.slow
def test_the_runtime_is_installed_without_the_compiler(image: tuple[CleanFolder, Stage]) -> None:
    folder, _ = image
    listed = folder.run(["reelforge", "recipes"])
    assert "cpu-demo" in listed, "the recipes are in the wheel"
    assert "serve" in folder.run(["reelforge", "--help"])
    python = str(folder.path / "opt" / "reelforge" / "bin" / "python")
    found = folder.run([python, "-c", "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('onnx'))"])
    assert found.split() == ["None", "None"]
    assert str(folder.path) in folder.run([python, "-c", "import reelforge.tools; print(reelforge.tools.__file__)"])


@pytest.mark.slow
def test_the_command_serves_until_it_is_stopped(image: tuple[CleanFolder, Stage], tiny_bundle: Path) -> None:
    folder, final = image
    shutil.copytree(tiny_bundle, folder.path / "bundle")
    port = str(free_port())
    command = [*final.one("ENTRYPOINT").exec_form(), *map(folder.adapt, final.one("CMD").exec_form())]
    command[command.index("8000")] = port
    check = [one.replace(":8000/", f":{port}/") for one in final.one("HEALTHCHECK").exec_form()]
    log = folder.path / "log"
    with log.open("wb") as output:
        service = subprocess.Popen(command, cwd=folder.work, env=folder.environment, stdout=output, stderr=output)
    try:
        until = time.monotonic() + 60
        while subprocess.run(check, env=folder.environment, capture_output=True, check=False).returncode != 0:
            assert service.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        service.send_signal(signal.SIGTERM)
        assert service.wait(timeout=60) == 0, log.read_text()
    finally:
        if service.poll() is None:
            service.kill()
            service.wait()
    assert any((folder.path / "data").iterdir()), "jobs are kept under /data"
    assert subprocess.run(check, env=folder.environment, capture_output=True, check=False).returncode != 0
