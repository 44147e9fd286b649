"""``reelforge calibrate`` as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from reelforge.calibration.fingerprint import bundle_fingerprint
from reelforge.calibration.prompts import prompts_sha256
from reelforge.calibration.scale_file import read_scale_file
from reelforge.runtime.bundle.open import Bundle
from reelforge.tools import console
from reelforge.tools.main import cli
from tests.bundles import TraceMemory, build
from tests.calibrations import damaged

LINES = ["a cat", "# not this", "two dogs", "", "a red ball"]
SMALL = ("--calibration-steps", "2", "--calibration-shape", "32x32x5", "--threads", "1")


def run(*arguments: str | Path) -> int:
    """Run ``reelforge calibrate`` in this process and return its exit code."""
    with pytest.raises(SystemExit) as caught:
        console.run(cli, ["calibrate", *(os.fspath(argument) for argument in arguments)])
    code = caught.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(LINES))
    return path


def test_a_scale_file_is_written(
    tiny_bundle: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scales"
    arguments = (tiny_bundle, "-o", output, "--precision", "dit=int8,llm=fp8", "--attention", "fp8",
                 "--calibration-prompts", prompts, "--smoothing", "0.5", "--state", tmp_path / "s", *SMALL)  # fmt: skip
    assert run(*arguments) == 0
    text = capsys.readouterr().err
    assert "dit=int8,dit.attention=float8_e4m3fn,llm=float8_e4m3fn, max + smoothing 0.5" in text
    scales = read_scale_file(
        output,
        bundle_fingerprint(Bundle.open(tiny_bundle)),
        ["dit.double.0.image.q.activation", "dit.single.0.attention.value", "llm.layers.0.mlp.up_proj.smoothing"],
        {"dit": ["int8"], "llm": ["float8_e4m3fn"]},
    )
    assert scales.provenance.prompts_sha256 == prompts_sha256(["a cat", "two dogs"])  # the last is kept back
    assert scales.provenance.sampling == "2 prompts, 2 steps of 32x32x5"
    before = output.read_bytes()
    assert run(*arguments, "--json") == 0  # from the finished state
    result = json.loads(capsys.readouterr().out)
    assert result["scales"] == len(scales.tensors)
    assert result["checkpoint"] == scales.provenance.checkpoint
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--precision", "fp16"), 2, "--precision fp16 has nothing to calibrate"),
        (("--precision", "int9"), 2, "the precision 'int9' cannot be read"),
        (("--precision", "clip=int8"), 2, "the stage 'clip' cannot be computed in 8 bits"),
        (("--precision", "int8", "--calibration-shape", "30x32x5"), 2, "height=30"),
        (("--precision", "int8", "-o", "/none/scales"), 7, "the scale file cannot be written to '/none/scales'"),
        (("--precision", "int8", "--calibration-prompts", "/none.txt"), 5, "'/none.txt' cannot be read"),
    ],
)
def test_what_is_refused_before_any_work(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int,
    message: str,
) -> None:  # fmt: skip
    assert run(tiny_bundle, "-o", tmp_path / "scales", *arguments) == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("content", "message"), [(b"\n# x\n", "are empty"), (b"a\nB\xe4r", "not UTF-8 in line 2")])
def test_prompts_that_cannot_be_used(
    tiny_bundle: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    prompts.write_bytes(content)
    command = (tiny_bundle, "-o", tmp_path / "scales", "--precision", "int8", "--calibration-prompts", prompts)
    assert run(*command) == 5
    assert message in capsys.readouterr().err


def test_an_unfinished_bundle(
    tiny_checkpoint: Path, trace_memory: TraceMemory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with trace_memory.used():
        build(tiny_checkpoint, tmp_path / "b", "clip")
    assert run(tmp_path / "b", "-o", tmp_path / "scales", "--precision", "dit=int8") == 4
    assert "has no stage 'dit'" in capsys.readouterr().err


def test_what_is_not_finite_is_named(
    tiny_bundle: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "nan.bundle")
    damaged(copy, "single.0.fc1.weight", "dit", np.inf)
    monkeypatch.setattr(Bundle, "_check_digests", lambda *_: None)  # an intact bundle whose checkpoint is broken
    command = (copy, "-o", tmp_path / "scales", "--precision", "int8", "--calibration-prompts", prompts, *SMALL)
    assert run(*command) == 5
    message = capsys.readouterr().err
    assert "the input of layer 'single.0.proj_mlp' of stage 'dit' at step 0 holds values that are not finite" in message
    assert not (tmp_path / "scales").exists()
