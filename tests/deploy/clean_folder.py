"""A clean folder in the place of an image's file system, in which a Dockerfile's instructions are carried out.

Everything is taken from the Dockerfile: what is copied, what is run, the environment. Adapted are only the folders
(``/opt/reelforge`` lies in the clean folder), and that no user is made and no system package installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.deploy.dockerfile import Instruction, Stage

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = re.compile(r"(?<![\w.])/(?:opt/reelforge|src|data|bundle)\b")
NEEDS_ROOT = ("apt-get", "groupadd", "install -d -o")
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
        for name in ("python", "python3"):
            (programs / name).symlink_to(base)
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
            elif one.word == "ARG":
                name, _, default = one.rest.partition("=")
                self.environment.setdefault(name, default)
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
