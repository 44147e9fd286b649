"""``reelforge verify`` as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.tools import console
from reelforge.tools.main import cli
from tests.bundles import ALL_STAGES, TraceMemory, build


def run(*arguments: str | Path) -> int:
    """Run ``reelforge verify`` in this process and return its exit code."""
    with pytest.raises(SystemExit) as caught:
        console.run(cli, ["verify", *(os.fspath(argument) for argument in arguments)])
    code = caught.value.code
    assert isinstance(code, int)
    return code


def test_the_right_checkpoint(
    tiny_bundle: Path, tiny_tencent_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In either layout: here the one that the bundle was not built from."""
    assert run(tiny_bundle, "--checkpoint", tiny_tencent_checkpoint, "--json") == 0
    out, errors = capsys.readouterr()
    assert errors == ""
    value = json.loads(out)
    manifest = Bundle.open(tiny_bundle, Check.SIZES).manifest
    assert value["weights_compared"] == sum(len(stage.weights) for stage in manifest.stages)
    assert list(value["stages"]) == list(ALL_STAGES)
    for name, stage in value["stages"].items():
        entry = manifest.stage(name)
        assert entry is not None
        assert stage["within"] is True
        assert 0 <= stage["difference"] <= stage["tolerance"] == 2e-5
        assert stage["difference"] > 0 or not entry.weights, "a few sums may be equal, a network is not"


def test_a_table_for_people(
    tiny_checkpoint: Path, tmp_path: Path, trace_memory: TraceMemory, capsys: pytest.CaptureFixture[str]
) -> None:
    with trace_memory.used():
        manifest = build(tiny_checkpoint, tmp_path / "b", "clip")
    assert run(tmp_path / "b", "--checkpoint", tiny_checkpoint) == 0
    out = capsys.readouterr().out
    for part in (f"{len(manifest.stages[0].weights)} weights equal the checkpoint's", "clip", "within", "2e-05"):
        assert part in out


def test_another_checkpoint(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    file = path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_out.conv.bias"][0] *= 1.001
    save_file(tensors, file, {"format": "pt"})
    assert run(tiny_bundle, "--checkpoint", path) == 6
    errors = capsys.readouterr().err
    assert "VerificationError: 1 of " in errors
    assert "vae_decoder.decoder.conv_out.conv.bias" in errors


def test_a_damaged_bundle(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    (copy / "clip.onnx").write_bytes((copy / "clip.onnx").read_bytes()[:-1])
    assert run(copy, "--checkpoint", tiny_checkpoint) == 4
    assert "file 'clip.onnx' of bundle 'b' is truncated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["{t}/none", "--checkpoint", "{c}"], 4, "is not a bundle"),
        (["{b}", "--checkpoint", "{t}/none"], 3, "is not a checkpoint folder"),
        (["{b}", "--checkpoint", "{c}/vae"], 3, "holds no checkpoint that is known"),
        (["{b}"], 2, "Missing option '--checkpoint'"),
    ],
)
def test_refusals(
    tiny_bundle: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    part: str,
) -> None:
    places = {"b": tiny_bundle, "c": tiny_checkpoint, "t": tmp_path}
    assert run(*(argument.format(**places) for argument in arguments)) == code
    assert part in capsys.readouterr().err
