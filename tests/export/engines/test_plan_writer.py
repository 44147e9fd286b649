"""Plans on a disk that fails."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelforge.export.engines import plan_writer
from reelforge.export.engines.plan_writer import PlanWriter, partial_path
from reelforge.runtime.errors import BuildError


@given(st.lists(st.binary(max_size=50)))
def test_bytes_and_digest(tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("plan") / "toy.plan"
    writer = PlanWriter(path)
    for chunk in chunks:
        writer.write(memoryview(chunk))
    assert not path.exists()
    writer.finish()
    data = b"".join(chunks)
    assert path.read_bytes() == data
    assert writer.bytes == len(data)
    assert writer.sha256 == hashlib.sha256(data).hexdigest()
    writer.discard()
    assert [file.name for file in path.parent.iterdir()] == ["toy.plan"]


def test_a_chunk_larger_than_a_block_and_writes_that_are_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_writer, "_BLOCK", 7)
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    writer = PlanWriter(tmp_path / "toy.plan")
    writer.write(memoryview(bytes(range(50))))
    writer.finish()
    assert (tmp_path / "toy.plan").read_bytes() == bytes(range(50))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "toy.plan"
    partial_path(path).symlink_to("/dev/full")
    writer = PlanWriter(path)
    writer.write(memoryview(b"plan"))
    writer.write(memoryview(b"more"))
    assert writer.bytes == 0
    with pytest.raises(BuildError, match=r"toy\.plan cannot be written") as caught:
        writer.finish()
    assert "No space left on device" in str(caught.value)
    assert "fix: free space" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["fsync", "close"])
def test_failures_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "toy.plan"
    writer = PlanWriter(path)
    writer.write(memoryview(b"plan"))
    real = getattr(os, call)

    def fail(descriptor: int) -> None:
        if call == "close":
            real(descriptor)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(BuildError, match="Input/output error"):
        writer.finish()
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot be written"):
        PlanWriter(tmp_path / "absent" / "toy.plan")
