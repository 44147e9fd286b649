"""Plans that a library would call fine: truncated, altered, of another version, for another GPU."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reelforge.runtime.errors import BundleError, EngineError
from reelforge.runtime.plan_file import (
    HEADER_BYTES,
    architecture_mask,
    check_header,
    check_plan_file,
    plan_architectures,
    read_header,
)
from reelforge.runtime.recipe import Backend

VERSION = "1.7.1.116"


def make_plan(path: Path, architectures: tuple[str, ...] = ("sm89", "sm120"), body: bytes = bytes(range(200))) -> str:
    """Write a plan as TensorRT-RTX 1.7.1.116 begins one, and return its digest."""
    fields = [(0x74727476, 8), (2, 8), (HEADER_BYTES + len(body), 8), (0x74010701, 4), (0x74727476, 4)]
    header = b"".join(number.to_bytes(size, "little") for number, size in fields)
    data = header + architecture_mask(architectures).to_bytes(4, "little") + body
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def check(path: Path, digest: str) -> None:
    check_header(path, backend=Backend.RTX, version=VERSION, architecture="sm89")
    check_plan_file(path, sha256=digest)


quiet = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_a_whole_plan(tmp_path: Path) -> None:
    digest = make_plan(tmp_path / "dit.plan")
    check(tmp_path / "dit.plan", digest)
    check_plan_file(tmp_path / "dit.plan", sha256=digest, size_bytes=236)
    assert plan_architectures(read_header(tmp_path / "dit.plan")) == ("sm89", "sm120")


@quiet
@given(st.integers(0, 235))
def test_any_truncation_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "dit.plan"
    digest = make_plan(path)
    path.write_bytes(path.read_bytes()[:length])
    for check_one in (
        lambda: check_header(path, backend=Backend.RTX, version=VERSION, architecture="sm89"),
        lambda: check_header(path, backend=Backend.TRT, version="10.14.1", architecture="sm90"),
        lambda: check_plan_file(path, sha256=digest),
    ):
        with pytest.raises(BundleError, match=r"dit\.plan is truncated"):
            check_one()


@quiet
@given(st.integers(0, 235), st.integers(1, 255))
def test_any_altered_byte_is_refused(tmp_path: Path, position: int, change: int) -> None:
    path = tmp_path / "dit.plan"
    digest = make_plan(path)
    data = bytearray(path.read_bytes())
    data[position] ^= change
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"dit\.plan (was altered|is truncated|is not a plan|has another size)"):
        check_plan_file(path, sha256=digest)


def test_messages_of_size(tmp_path: Path) -> None:
    path = tmp_path / "dit.plan"
    digest = make_plan(path)
    with pytest.raises(BundleError, match="has another size") as caught:
        check_plan_file(path, sha256=digest, size_bytes=1000)
    assert "received: 236 bytes   expected: 1000 bytes" in str(caught.value)
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(BundleError, match="has another size") as caught:
        check_header(path, backend=Backend.RTX, version=VERSION, architecture="sm89")
    assert "received: 240 bytes   expected: 236 bytes" in str(caught.value)


def test_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "dit.plan"
    path.write_bytes(b"\x08\x0b" * 50)
    with pytest.raises(BundleError, match=r"dit\.plan is not a plan"):
        read_header(path)
    with pytest.raises(BundleError, match="cannot be read"):
        read_header(tmp_path / "absent.plan")


def test_another_version(tmp_path: Path) -> None:
    make_plan(tmp_path / "dit.plan")
    with pytest.raises(EngineError, match=r"dit\.plan was compiled by another version of TensorRT-RTX") as caught:
        check_header(tmp_path / "dit.plan", backend=Backend.RTX, version="1.8.0.20", architecture="sm89")
    assert "received: 1.7.1.116   expected: 1.8.0.20" in str(caught.value)
    assert "install tensorrt-rtx==1.7.1.116" in str(caught.value)


def test_another_architecture(tmp_path: Path) -> None:
    make_plan(tmp_path / "dit.plan")
    with pytest.raises(EngineError, match=r"dit\.plan was not compiled for this GPU") as caught:
        check_header(tmp_path / "dit.plan", backend=Backend.RTX, version=VERSION, architecture="sm86")
    assert "received: a plan for sm89, sm120   expected: sm86" in str(caught.value)
    assert "--target rtx:sm86+sm89+sm120" in str(caught.value)


def test_nothing_is_assumed_of_classic_plans_beyond_magic_and_size(tmp_path: Path) -> None:
    make_plan(tmp_path / "dit.plan", ())
    check_header(tmp_path / "dit.plan", backend=Backend.TRT, version="11.0.0", architecture="sm90")


@given(st.sets(st.sampled_from(["sm75", "sm80", "sm86", "sm89", "sm120", "sm121"])))
def test_masks(architectures: set[str]) -> None:
    mask = architecture_mask(sorted(architectures))
    assert set(plan_architectures(bytes(32) + mask.to_bytes(4, "little"))) == architectures
