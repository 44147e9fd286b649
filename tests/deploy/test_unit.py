"""The systemd unit: verified by systemd where it is installed, hardened, and in time with the drain."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).resolve().parents[2] / "deploy" / "reelforge.service"
EXPOSURE = 20
"""In tenths: systemd calls up to 2.0 fine, and an ordinary service has 9.6."""


def values(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = shutil.which("systemd-analyze")
    if command is None:
        pytest.skip("systemd is not installed")
    return subprocess.run([command, *arguments], capture_output=True, text=True, timeout=60, check=False)


def installed(folder: Path) -> str:
    """The unit as it would be where reelforge is installed: systemd looks whether the program is there."""
    program = folder / "reelforge"
    program.write_text("#!/bin/sh\n", encoding="utf-8")
    program.chmod(0o755)
    path = folder / UNIT.name
    text = UNIT.read_text(encoding="utf-8")
    path.write_text(text.replace("/opt/reelforge/bin/reelforge", str(program)), encoding="utf-8")
    return str(path)


def test_systemd_understands_it(tmp_path: Path) -> None:
    result = analyze("verify", installed(tmp_path))
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


def test_systemd_would_have_said_what_is_wrong(tmp_path: Path) -> None:
    path = Path(installed(tmp_path))
    path.write_text(path.read_text() + "\n[Service]\nTimeoutStopSecs=90\n")
    assert "Unknown key" in analyze("verify", str(path)).stderr


def test_it_is_closed(tmp_path: Path) -> None:
    result = analyze("security", "--offline=yes", f"--threshold={EXPOSURE}", installed(tmp_path))
    if "unrecognized option" in result.stderr:
        pytest.skip("this systemd cannot judge a file")
    assert result.returncode == 0, result.stdout[-200:] + result.stderr


def test_stopping_leaves_time_for_the_drain() -> None:
    (start,) = values("ExecStart")
    drain = re.search(r"--drain (\d+)s", start)
    assert drain is not None
    assert int(values("TimeoutStopSec")[0]) >= int(drain[1]) + 20
    assert values("KillSignal") == ["SIGTERM"]


def test_keys_are_a_credential_and_nothing_is_written_elsewhere() -> None:
    (start,) = values("ExecStart")
    assert "--keys ${CREDENTIALS_DIRECTORY}/keys" in start
    assert values("LoadCredential") == ["keys:/etc/reelforge/keys.txt"]
    assert "--host 127.0.0.1" in start
    state, cache = values("StateDirectory")[0], values("CacheDirectory")[0]
    assert f"--data /var/lib/{state}" in start
    assert f"XDG_CACHE_HOME=/var/cache/{cache}" in values("Environment")[0]


def test_what_it_starts_is_a_command_line_of_ours() -> None:
    from reelforge.tools.main import COMMANDS

    if "serve" not in COMMANDS:
        pytest.skip("there is no service yet")
    from reelforge.tools.serve import serve

    program, name, *arguments = values("ExecStart")[0].split()
    assert (program, name) == ("/opt/reelforge/bin/reelforge", "serve")
    serve.make_context("serve", arguments)
    prevented = {int(code) for code in values("RestartPreventExitStatus")[0].split()}
    from reelforge.runtime.errors import BundleError, RequestError

    assert prevented == {RequestError.exit_code, BundleError.exit_code}
