"""Builds that cannot succeed: what the user is told, and that nothing half-written is left wherever it stops."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from reelforge.export import build_source, stage_compiler
from reelforge.runtime.bundle.write import BundleWriter
from reelforge.runtime.errors import BuildError, CheckpointError, ReelforgeError, RequestError
from tests.bundles import build

pytestmark = pytest.mark.usefixtures("remembered_traces")


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "in" / "checkpoint"))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "b"


def require_refused(
    error: type[ReelforgeError], parts: list[str], output: Path, run: Callable[[], object]
) -> ReelforgeError:
    """``run`` fails with all ``parts`` in its message, and nothing is left next to ``output``."""
    with pytest.raises(error) as caught:
        run()
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert "  fix: " in str(caught.value)
    assert list(output.parent.iterdir()) == []
    return caught.value


def no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tracing fail the test: the fault must be found before it."""

    def trace(*_: object) -> None:
        raise AssertionError("the fault was not found before the work began")

    monkeypatch.setattr(stage_compiler, "capture_part", trace)


# The output.


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_the_output_exists(tiny_checkpoint: Path, output: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    no_tracing(monkeypatch)
    if kind == "folder":
        output.mkdir()
        (output / "keep").write_text("mine")
    elif kind == "file":
        output.write_text("mine")
    else:
        output.symlink_to("nowhere")
    with pytest.raises(BuildError, match=r"the output folder '.*' exists") as caught:
        build(tiny_checkpoint, output, "clip")
    assert caught.value.exit_code == 5
    assert "fix: remove it, or choose another destination with -o" in str(caught.value)
    assert [path.name for path in output.parent.iterdir()] == ["b"]
    assert kind != "folder" or (output / "keep").read_text() == "mine"


def test_the_output_exists_is_found_before_the_checkpoint_is_opened(tmp_path: Path, output: Path) -> None:
    output.mkdir()
    with pytest.raises(BuildError, match="exists"):
        build(tmp_path / "nothing", output, "clip")


def test_somebody_else_s_bundle_appears_meanwhile(
    tiny_checkpoint: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = BundleWriter.seal

    def late(writer: BundleWriter, manifest: object) -> object:
        output.mkdir()
        return seal(writer, manifest)  # type: ignore[arg-type]

    monkeypatch.setattr(BundleWriter, "seal", late)
    with pytest.raises(BuildError, match="exists"):
        build(tiny_checkpoint, output, "clip")
    assert [path.name for path in output.parent.iterdir()] == ["b"]
    assert list(output.iterdir()) == []


def test_a_folder_that_cannot_be_written(tiny_checkpoint: Path) -> None:
    """Not even by root."""
    with pytest.raises(BuildError, match=r"the bundle cannot be written to '/proc/b': ") as caught:
        build(tiny_checkpoint, Path("/proc/b"), "clip")
    assert "received: /proc   expected: a folder that this user may write" in str(caught.value)
    assert "fix: choose another destination with -o" in str(caught.value)


def test_a_parent_that_is_a_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="cannot be written") as caught:
        build(tiny_checkpoint, tmp_path / "file" / "b", "clip")
    assert "Not a directory" in str(caught.value) or "File exists" in str(caught.value)


# The disk.


def test_too_little_room_is_found_before_converting(
    tiny_checkpoint: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(output.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    error = require_refused(
        BuildError,
        ["the disk is full", "received: 100 bytes free", "expected: ", "bytes more"],
        output,
        lambda: build(tiny_checkpoint, output, "modulation"),
    )
    assert error.exit_code == 5


@pytest.mark.parametrize(
    ("function", "stage"),
    [("pwrite", "modulation"), ("ftruncate", "modulation"), ("link", "clip"), ("fsync", "clip")],
)
def test_the_disk_fills_up(
    tiny_checkpoint: Path, output: Path, monkeypatch: pytest.MonkeyPatch, function: str, stage: str
) -> None:
    """While a converted weight is written, is given its length, is linked, or at the very end."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    error = require_refused(BuildError, [], output, lambda: build(tiny_checkpoint, output, stage))
    assert "disk is full" in str(error) or "No space left on device" in str(error)
    assert error.exit_code == 5


def test_the_disk_is_full_for_a_graph(tiny_checkpoint: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real device without room: what is written to it fails as on a full disk."""
    add_bytes = BundleWriter.add_bytes

    def to_full_device(writer: BundleWriter, name: str, data: bytes) -> Path:
        if name.endswith(".onnx"):
            writer.path(name).symlink_to("/dev/full")
            with writer._disk_errors(len(data)), writer.path(name).open("r+b", buffering=0) as file:
                file.write(data)
        return add_bytes(writer, name, data)

    monkeypatch.setattr(BundleWriter, "add_bytes", to_full_device)
    require_refused(
        BuildError,
        ["the disk is full while writing the bundle"],
        output,
        lambda: build(tiny_checkpoint, output, "clip"),
    )


# The checkpoint.


def _missing_shard(path: Path) -> None:
    sorted((path / "transformer").glob("*.safetensors"))[1].unlink()


def _truncated(path: Path) -> None:
    file = path / "text_encoder" / "model.safetensors"
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 1000)


def _another_family(path: Path) -> None:
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))


def _missing_component(path: Path) -> None:
    shutil.rmtree(path / "text_encoder_2")


def _missing_tensor(path: Path) -> None:
    file = path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.conv_in.conv.bias"]
    save_file(tensors, file, {"format": "pt"})


def _missing_tokenizer(path: Path) -> None:
    shutil.rmtree(path / "tokenizer")


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (_missing_shard, ["diffusion_pytorch_model-00002-of-0000"]),
        (_truncated, ["text_encoder/model.safetensors"]),
        (_another_family, ["FLUX", "HunyuanVideo"]),
        (_missing_component, ["text_encoder_2"]),
        (_missing_tensor, ["vae", "decoder.conv_in.conv.bias"]),
        (_missing_tokenizer, ["tokenizer"]),
    ],
)
def test_checkpoints_that_cannot_be_built(
    checkpoint: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    parts: list[str],
) -> None:
    """Whichever stages are asked for: a checkpoint is matched whole, and before any work."""
    no_tracing(monkeypatch)
    damage(checkpoint)
    error = require_refused(CheckpointError, parts, output, lambda: build(checkpoint, output, "clip"))
    assert error.exit_code == 3


def test_no_checkpoint(tmp_path: Path, output: Path) -> None:
    require_refused(
        CheckpointError,
        [f"{tmp_path / 'nothing'} is not a checkpoint folder", "received: nothing", "fix: check the path"],
        output,
        lambda: build(tmp_path / "nothing", output),
    )


def test_a_file_that_becomes_shorter_during_the_build(
    checkpoint: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its header was read when it was whole."""
    resolve = build_source.resolve_stages
    file = checkpoint / "text_encoder" / "model.safetensors"

    def resolve_then_cut(*arguments: object) -> object:
        resolved = resolve(*arguments)  # type: ignore[arg-type]
        os.truncate(file, file.stat().st_size // 2)
        return resolved

    monkeypatch.setattr(build_source, "resolve_stages", resolve_then_cut)
    require_refused(CheckpointError, ["model.safetensors"], output, lambda: build(checkpoint, output, "llm"))


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"caf\xe9 {}", ["is not UTF-8 text", "0xe9", "offset 3", "save the file as UTF-8"]),
        (b"no slot", ["exactly one place for the prompt", "received: 0 times {}"]),
        (None, ["cannot be read", "No such file"]),
    ],
)
def test_templates_that_cannot_be_used(
    tiny_checkpoint: Path,
    output: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    parts: list[str],
) -> None:
    no_tracing(monkeypatch)
    path = tmp_path / "template.txt"
    if content is not None:
        path.write_bytes(content)
    require_refused(
        CheckpointError, parts, output, lambda: build(tiny_checkpoint, output, "clip", prompt_template=path)
    )


def test_unknown_stages(tiny_checkpoint: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_tracing(monkeypatch)
    error = require_refused(
        RequestError,
        ["has no such stages", "received: vae, unet", "expected: llm, clip, refiner, modulation, dit, guidance"],
        output,
        lambda: build(tiny_checkpoint, output, "clip", "vae", "unet"),
    )
    assert error.exit_code == 2
