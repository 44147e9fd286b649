"""The commands of ``Dockerfile.cpu``, run in a clean folder instead of a container.

Everything is taken from the Dockerfile: what is copied, what is run, the environment, the command, the health check.
Adapted are only the folders (``/opt/reelforge`` lies in the clean folder), the port, and that no user is made.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.deploy.dockerfile import Instruction, Stage, stages_of

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = re.compile(r"(?<![\w.])/(?:opt/reelforge|src|data|bundle)\b")
NEEDS_ROOT = ("groupadd", "install -d -o")
FROM_OUTSIDE = re.compile(r"HOME|LANG|(PIP|SSL|REQUESTS)_\w+|\w*_proxy|\w*_PROXY")
"""How the machine reaches its package index."""


@dataclass
class CleanFolder:
    """A folder in the place of an image's file system."""

    path: Path
    environment: dict[str, str] = field(default_factory=dict)
    work: Path = field(init=False)

    def __post_init__(self) -> None:
        programs = self.path / "usr" / "local" / "bin"
        programs.mkdir(parents=True)
        base = Path(getattr(sys, "_base_executable", sys.executable))
        (programs / "python").symlink_to(base)
        outside = {name: value for name, value in os.environ.items() if FROM_OUTSIDE.fullmatch(name)}
        self.environment = {**outside, "PATH": f"{programs}:/usr/bin:/bin"}
        self.work = self.path

    def adapt(self, text: str) -> str:
        """Put the image's folders below the clean one."""
        return FOLDERS.sub(lambda found: f"{self.path}{found[0]}", text)

    def follow(self, stage: Stage) -> None:
        """Carry out the instructions of a stage that make files or settings."""
        for one in stage.instructions:
            if one.word == "WORKDIR":
                self.work = Path(self.adapt(one.rest))
                self.work.mkdir(parents=True, exist_ok=True)
            elif one.word == "ENV":
                known = self.environment
                self.environment |= {
                    name: self.adapt(value).replace("$PATH", known["PATH"]) for name, value in one.settings().items()
                }
            elif one.word == "COPY":
                self._copy(one)
            elif one.word == "RUN" and not one.rest.startswith(NEEDS_ROOT):
                self.run(["/bin/sh", "-ec", self.adapt(one.rest)])

    def run(self, command: list[str]) -> str:
        """Run a command to its end and return what it printed."""
        result = subprocess.run(
            command, cwd=self.work, env=self.environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        return result.stdout

    def _copy(self, one: Instruction) -> None:
        if one.rest.startswith("--from="):
            _, source, target = one.rest.split()
            assert source == target, "a virtual environment cannot be moved"
            return
        *sources, target = one.rest.split()
        for source in sources:
            tracked = subprocess.run(
                ["git", "ls-files", "--", source], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.splitlines()
            for name in filter(lambda name: (ROOT / name).is_file(), tracked):
                inside = Path(name).relative_to(source) if source.endswith("/") else Path(Path(name).name)
                path = self.work / target / inside
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, path)


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
    from reelforge.tools.main import COMMANDS

    if "serve" not in COMMANDS:
        pytest.skip("there is no service yet")
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
