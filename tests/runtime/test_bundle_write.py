"""Bundles appear whole or not at all, with the same bytes every time."""

# ruff: noqa: PT012 - what ends a with block is the subject of these tests

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from reelforge.runtime.bundle import write as write_module
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.bundle.write import BundleWriter, Placement
from reelforge.runtime.errors import BuildError
from reelforge.runtime.manifest import Manifest
from tests.runtime.fake_bundle import write_fake_bundle


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_same_inputs_give_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_fake_bundle(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert leftovers(tmp_path) == ["a", "b"]


def test_the_manifest_lists_files_and_leaves_weights_to_their_ranges(fake_bundle: Path) -> None:
    manifest = Bundle.open(fake_bundle).manifest
    digests = {entry.path: entry.sha256 for entry in manifest.files}
    assert digests["weights/llm.safetensors"] is None
    assert all(digest for path, digest in digests.items() if not path.startswith("weights/"))
    assert "manifest.json" not in digests


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
def test_an_existing_destination_is_found_before_any_work(tmp_path: Path, kind: str) -> None:
    destination = tmp_path / "my.bundle"
    if kind == "file":
        destination.write_text("mine")
    elif kind == "dangling link":
        destination.symlink_to(tmp_path / "nowhere")
    else:
        destination.mkdir()
        if kind == "folder":
            (destination / "mine").write_text("mine")
    with pytest.raises(BuildError, match=r"output folder .* exists") as caught, BundleWriter(destination):
        pytest.fail("work began")
    assert caught.value.exit_code == 5
    assert leftovers(tmp_path) == ["my.bundle"]


def test_a_destination_that_appears_meanwhile_is_kept(tmp_path: Path, fake_bundle: Path) -> None:
    manifest = Bundle.open(fake_bundle).manifest
    with pytest.raises(BuildError, match="exists"), BundleWriter(tmp_path / "x") as writer:
        (tmp_path / "x").mkdir()
        writer.seal(manifest)
    assert leftovers(tmp_path) == ["x"]
    assert not list((tmp_path / "x").iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_any_exception_removes_the_partial_folder(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), BundleWriter(tmp_path / "deep" / "x") as writer:
        writer.add_bytes("a.onnx", b"1")
        assert leftovers(tmp_path / "deep") == [f"x.partial-{os.getpid()}"]
        raise error
    assert leftovers(tmp_path / "deep") == []


def test_leaving_without_seal_is_a_bug_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="without seal"), BundleWriter(tmp_path / "x") as writer:
        writer.add_bytes("a.onnx", b"1")
    assert leftovers(tmp_path) == []


def test_an_unwritable_parent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="cannot be written to") as caught, BundleWriter(tmp_path / "file" / "x"):
        pytest.fail("work began")
    assert "-o" in caught.value.fix


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "manifest.json", "."])
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is not the name"), BundleWriter(tmp_path / "x") as writer:
        writer.path(name)


def test_weights_are_linked(tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    source.write_bytes(b"weights")
    (tmp_path / "cache").symlink_to(source)  # as download caches do
    with pytest.raises(KeyboardInterrupt), BundleWriter(tmp_path / "x") as writer:
        assert writer.link_weight_file(tmp_path / "cache", "weights/w.safetensors") is Placement.LINKED
        assert writer.path("weights/w.safetensors").samefile(source)
        assert not writer.path("weights/w.safetensors").is_symlink()
        with pytest.raises(ValueError, match="not below weights/"):
            writer.link_weight_file(source, "w.safetensors")
        raise KeyboardInterrupt
    assert source.read_bytes() == b"weights"


def test_weights_are_copied_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source.safetensors"
    source.write_bytes(b"weights")

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(KeyboardInterrupt), BundleWriter(tmp_path / "x") as writer:
        assert writer.link_weight_file(source, "weights/w.safetensors") is Placement.COPIED
        assert writer.path("weights/w.safetensors").read_bytes() == b"weights"
        assert not writer.path("weights/w.safetensors").samefile(source)
        raise KeyboardInterrupt


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no second file system")
def test_weights_are_copied_across_real_file_systems(tmp_path: Path) -> None:
    if Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    source = Path("/dev/shm") / f"reelforge-test-{os.getpid()}"
    # A hole in the middle, as synthetic and preallocated checkpoints have: the copy must not fill it.
    with source.open("wb") as file:
        file.write(b"begin")
        file.seek(40 << 20)
        file.write(b"end")
    try:
        with pytest.raises(KeyboardInterrupt), BundleWriter(tmp_path / "x") as writer:
            assert writer.link_weight_file(source, "weights/w") is Placement.COPIED
            copy = writer.path("weights/w")
            assert copy.read_bytes() == source.read_bytes()
            assert copy.stat().st_blocks * 512 < 10 << 20
            raise KeyboardInterrupt
    finally:
        source.unlink()


class TestDiskFull:
    @pytest.fixture(autouse=True)
    def _check_nothing_is_left(self, tmp_path: Path):
        yield
        assert leftovers(tmp_path) == []

    def test_in_add_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_bundle: Path) -> None:
        def fail(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(shutil, "copyfile", fail)
        size = (fake_bundle / "dit.onnx").stat().st_size
        with pytest.raises(BuildError, match="the disk is full") as caught, BundleWriter(tmp_path / "x") as writer:
            writer.add_file(fake_bundle / "dit.onnx", "dit.onnx")
        assert f"{size:,} bytes more" in str(caught.value)
        assert "bytes free" in str(caught.value)

    def test_in_the_callers_own_writes(self, tmp_path: Path) -> None:
        with pytest.raises(BuildError, match="the disk is full"), BundleWriter(tmp_path / "x") as writer:
            writer.add_bytes("a.onnx", b"1")
            raise OSError(errno.ENOSPC, "No space left on device")

    def test_while_sealing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_bundle: Path) -> None:
        def fail(_: Path) -> None:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

        monkeypatch.setattr(write_module, "_fsync", fail)
        manifest = Bundle.open(fake_bundle).manifest
        with pytest.raises(BuildError, match="the disk is full"), BundleWriter(tmp_path / "x") as writer:
            writer.add_bytes("a.onnx", b"1")
            writer.seal(manifest)

    def test_foreseen(self, tmp_path: Path) -> None:
        with pytest.raises(BuildError, match="the disk is full") as caught, BundleWriter(tmp_path / "x") as writer:
            writer.require_space(0)
            writer.require_space(10**18)
        assert "1,000,000,000,000,000,000 bytes more" in str(caught.value)


BUILD = """
    import sys, time
    from pathlib import Path
    from reelforge.runtime.bundle.write import BundleWriter
    with BundleWriter(Path(sys.argv[1])) as writer:
        writer.add_bytes("a.onnx", b"1" * 1000)
        print("writing", flush=True)
        time.sleep(60)
"""


def start_build(destination: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(BUILD), str(destination)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_kill_leaves_no_destination_and_the_next_build_cleans_up(tmp_path: Path) -> None:
    process = start_build(tmp_path / "x")
    process.kill()
    process.wait()
    assert leftovers(tmp_path) == [f"x.partial-{process.pid}"]
    (tmp_path / "x.partial-notes").mkdir()  # not ours
    write_fake_bundle(tmp_path / "x")
    assert leftovers(tmp_path) == ["x", "x.partial-notes"]


def test_ctrl_c_removes_the_partial_folder(tmp_path: Path) -> None:
    process = start_build(tmp_path / "x")
    process.send_signal(signal.SIGINT)
    process.wait()
    assert leftovers(tmp_path) == []


def test_a_live_build_to_the_same_destination_is_left_alone(tmp_path: Path) -> None:
    process = start_build(tmp_path / "x")
    try:
        write_fake_bundle(tmp_path / "x")
        assert leftovers(tmp_path) == ["x", f"x.partial-{process.pid}"]
    finally:
        process.kill()
        process.wait()


def test_a_stale_folder_with_our_own_number_is_replaced(tmp_path: Path) -> None:
    # In a container every build may have the same process number.
    stale = tmp_path / f"x.partial-{os.getpid()}"
    stale.mkdir()
    (stale / "old").write_text("old")
    manifest = write_fake_bundle(tmp_path / "x")
    assert isinstance(manifest, Manifest)
    assert leftovers(tmp_path) == ["x"]
    assert all(entry.path != "old" for entry in manifest.files)
