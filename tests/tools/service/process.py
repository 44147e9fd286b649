"""A real service in a process of its own, to be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

_START = "from reelforge.tools.main import main; main()"
WAIT_S = 60.0


@dataclass
class ServiceProcess:
    """``reelforge serve`` on a bundle and a folder; each start is a new process on the same folder."""

    bundle: Path
    data: Path
    options: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    threads: int | None = 1
    before: str = ""  # run in the process, for example to tamper with its clock
    process: subprocess.Popen[bytes] | None = None
    url: str = ""

    @property
    def log(self) -> Path:
        return self.data.with_suffix(".log")

    def start(self, ready: bool = True) -> None:
        before = self.log.stat().st_size if self.log.exists() else 0
        start = self.before + _START
        command = [sys.executable, "-c", start, "serve", str(self.bundle), "--data", str(self.data), "--port", "0"]
        threads = [] if self.threads is None else ["--threads", str(self.threads)]
        command += [*threads, "--min-free", "0", *self.options]
        environment = {**os.environ, **self.environment}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log, env=environment)
        end = time.monotonic() + WAIT_S
        while b" at http://" not in (told := self.log.read_bytes()[before:]):
            assert self.process.poll() is None, told.decode()
            assert time.monotonic() < end, told.decode()
            time.sleep(0.02)
        self.url = "http://" + told.split(b" at http://")[1].split()[0].decode()
        while ready and not self._is_ready():
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)

    def client(self, **more: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30.0, **more)  # type: ignore[arg-type]

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(WAIT_S)

    def terminate(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(WAIT_S)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz").status_code == 200
        except httpx.TransportError:
            return False
