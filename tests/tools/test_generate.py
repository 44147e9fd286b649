"""``reelforge generate`` as a user runs it: results, messages, exit codes, and nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from reelforge.runtime import Pipeline, Request, VideoWriter
from tests.runtime.fake_bundle import write_fake_bundle

SMALL = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "2"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "fake.bundle"
    write_fake_bundle(path)
    return path


def reelforge(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from reelforge.tools.main import main; main()", *map(os.fspath, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_video(bundle: Path, tmp_path: Path) -> None:
    result = reelforge("generate", bundle, "-p", "a ball", "-o", "out.mp4", *SMALL, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert "out.mp4: 5 frames of 48x32" in result.stderr
    assert names(tmp_path) == ["out.mp4"]


def test_json_and_latents(bundle: Path, tmp_path: Path) -> None:
    arguments = ["-o", "frames/%04d.png", *SMALL, "--seed", "7", "--guidance", "5", "--shift", "3", "--threads", "1"]
    result = reelforge(
        "generate", bundle, "-p", "a ball", *arguments, "--save-latents", "x.npy", "--json", folder=tmp_path
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    value = json.loads(result.stdout)
    request = Request("a ball", 32, 48, 5, 2, 7, 5.0, 3.0)
    pipeline = Pipeline.open(bundle, threads=1)
    assert {key: value[key] for key in ("height", "width", "frames", "steps", "seed", "guidance", "shift")} == {
        "height": 32, "width": 48, "frames": 5, "steps": 2, "seed": 7, "guidance": 5.0, "shift": 3.0,
    }  # fmt: skip
    assert value["bundle"] == pipeline.bundle.manifest.content_digest
    frames = pipeline.generate(request, save_latents=tmp_path / "same.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), np.load(tmp_path / "same.npy"))
    with VideoWriter(tmp_path / "same" / "%04d.png", 32, 48, 5, 24) as video:
        video.write(frames)
    for name in ("0001.png", "0005.png"):
        assert (tmp_path / "frames" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()


def test_prompt_file_and_long_prompt_notice(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("wörd " * 10_000, encoding="utf-8")
    result = reelforge("generate", bundle, "--prompt-file", "prompt.txt", "-o", "a.gif", *SMALL, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("notice: the prompt has") == 2
    empty = reelforge("generate", bundle, "-p", "", "-o", "b.gif", *SMALL, folder=tmp_path)
    assert empty.returncode == 0, empty.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["-p", "x", "-o", "a.mp4", "--height", "33", "--frames", "6"], 2, ["height=33", "frames=6", "use height=32"]),
        (["-p", "x", "-o", "a.mp4", "--steps", "0"], 2, ["steps=0"]),
        (["-p", "x", "-o", "a.mp4", "--seed", "-1"], 2, ["seed=-1"]),
        (["-p", "x", "-o", "nowhere/a.mp4"], 7, ["OutputError", "nowhere/a.mp4", "fix: choose another path with -o"]),
        (["-p", "x", "-o", "a.avi"], 7, ["names no known format", ".mp4"]),
        (["-p", "x", "-o", "a.mp4", "--save-latents", "nowhere/x.npy"], 7, ["latents cannot be written"]),
        (["-p", "x", "-o", "a.mp4", "--save-latents", "."], 7, ["latents cannot be written"]),
        (
            ["-p", "x", "-o", "a.mp4", "--memory-budget", "much"],
            2,
            ["not a number of bytes", "'much'", "use for example"],
        ),
        (["-p", "x", "-o", "a.mp4", "--memory-budget", "1KiB"], 2, ["memory budget is too small", "iB or more"]),
        (
            ["-p", "x", "-o", "a.mp4", "--resume", "x.npy"],
            2,
            ["which step goes on", "x.step-7.npy", "reelforge decode"],
        ),
        (["-p", "x", "-o", "a.mp4", "--resume", "x.step-1.npy"], 2, ["x.step-1.npy", "cannot be read"]),
        (["-p", "x", "-o", "a.mp4", "--steps", "two"], 2, ["--steps", "not a valid integer"]),
        (["-p", "x", "-o", ""], 7, ["names no known format"]),
        (["-p", "x"], 2, ["Missing option", "--output"]),
        (["-o", "a.mp4"], 2, ["there is no prompt"]),
        (["-o", "a.mp4", "-p", "x", "--prompt-file", "y"], 2, ["the prompt is given twice"]),
        (["-o", "a.mp4", "--prompt-file", "missing.txt"], 2, ["missing.txt", "cannot be read"]),
        (["-o", "a.mp4", "--prompt-file", "latin.txt"], 2, ["latin.txt", "not UTF-8 at byte 3", "0xe9"]),
        (["-p", b"caf\xe9".decode("utf-8", "surrogateescape"), "-o", "a.mp4"], 2, ["not valid Unicode text"]),
    ],
)
def test_refusals(bundle: Path, tmp_path: Path, arguments: list[str], code: int, parts: list[str]) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    result = reelforge("generate", bundle, *arguments, folder=tmp_path)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr
    assert result.stdout == ""
    assert names(tmp_path) == ["latin.txt"]


def test_an_unwritable_path_is_found_before_sampling(bundle: Path, tmp_path: Path) -> None:
    # With this many steps sampling would take minutes.
    started = time.monotonic()
    result = reelforge("generate", bundle, "-p", "x", "-o", "no/a.mp4", "--steps", "100000", folder=tmp_path)
    assert result.returncode == 7
    assert time.monotonic() - started < 20


def test_damaged_and_missing_bundles(bundle: Path, tmp_path: Path) -> None:
    result = reelforge("generate", tmp_path / "none.bundle", "-p", "x", "-o", "a.mp4", folder=tmp_path)
    assert (result.returncode, names(tmp_path)) == (4, [])
    assert "is not a bundle" in result.stderr
    part = tmp_path / "part.bundle"
    write_fake_bundle(part, stages=("llm", "dit"))
    result = reelforge("generate", part, "-p", "x", "-o", "a.mp4", folder=tmp_path)
    assert (result.returncode, names(tmp_path)) == (4, ["part.bundle"])
    assert "has no stage 'clip'" in result.stderr


def test_ctrl_c_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from reelforge.tools.main import main; main()", "generate", str(bundle)]
    process = subprocess.Popen(
        [*command, "-p", "x", "-o", "a.mp4", "--steps", "200000"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    while not names(tmp_path):  # the temporary video appears when sampling is about to begin
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (130, "interrupted; nothing was written.")
    assert names(tmp_path) == []


INTERRUPTED_AFTER_TWO_STEPS = """
import os, signal
from reelforge.runtime import Progress
from reelforge.tools.interruption import Unfinished
from reelforge.tools.main import main
watch = Unfinished.watch
def and_interrupt(self, events):
    for event in watch(self, events):
        if isinstance(event, Progress) and (event.phase, event.step) == ("sampling", 2):
            os.kill(os.getpid(), signal.SIGINT)
        yield event
Unfinished.watch = and_interrupt
main()
"""


def test_ctrl_c_keeps_latents_from_which_the_same_video_is_made(bundle: Path, tmp_path: Path) -> None:
    arguments = ["-p", "a ball", *SMALL[:6], "--steps", "4", "--seed", "3", "--threads", "1"]
    whole = reelforge("generate", bundle, *arguments, "-o", "whole.gif", folder=tmp_path)
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "-c", INTERRUPTED_AFTER_TWO_STEPS, "generate", str(bundle), *arguments, "-o", "rest.gif"]
    save = ["--save-latents", "x.npy"]
    stopped = subprocess.run([*command, *save], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert stopped.returncode == 130
    assert stopped.stderr.splitlines() == [
        "interrupted: the work under way is finished, to keep what was sampled; Ctrl-C again ends at once.",
        "interrupted; 2 of 4 steps are kept in 'x.step-2.npy': go on with the same command and --resume x.step-2.npy",
    ]
    assert names(tmp_path) == ["whole.gif", "x.step-2.npy"]
    resume = ["--resume", "x.step-2.npy", "--memory-budget", "1GB", "--json"]
    result = reelforge("generate", bundle, *arguments, "-o", "rest.gif", *resume, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["first_step"] == 2
    assert (tmp_path / "rest.gif").read_bytes() == (tmp_path / "whole.gif").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--steps", "4"], ["no such step to begin with", "first_step=7"]),
        (["--steps", "9", "--frames", "9"], ["latents do not fit the request", "[1, 4, 3, 4, 6]"]),
    ],
)
def test_latents_of_another_request(bundle: Path, tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    np.save(tmp_path / "x.step-7.npy", np.zeros((1, 4, 2, 4, 6), np.float32))
    common = ["-p", "x", "-o", "a.mp4", *SMALL[:6], "--resume", "x.step-7.npy"]
    result = reelforge("generate", bundle, *common, *arguments, folder=tmp_path)
    assert result.returncode == 2
    for part in parts:
        assert part in result.stderr
    assert names(tmp_path) == ["x.step-7.npy"]


def test_help_reads_like_a_manual(tmp_path: Path) -> None:
    group = reelforge("--help", folder=tmp_path)
    assert group.returncode == 0
    for word in ("generate", "inspect", "verify", "Examples:", "Exit codes:"):
        assert word in group.stdout
    page = reelforge("generate", "-h", folder=tmp_path).stdout
    for word in (
        "Examples:",
        "--prompt-file",
        "--memory-budget",
        "--resume",
        "[default: 0]",
        "130  interrupted",
        "4k+1",
        "frames/%04d.png",
    ):
        assert word in page
    assert "\b" not in page


def test_unknown_commands(tmp_path: Path) -> None:
    result = reelforge("generat", folder=tmp_path)
    assert result.returncode == 2
    assert "No such command 'generat'" in result.stderr
    assert reelforge("--version", folder=tmp_path).stdout.startswith("reelforge, version")
