"""Scale files: equal bytes, readable by the safetensors library, and refused unless whole and for this checkpoint."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reelforge.calibration import scale_file
from reelforge.calibration.errors import CalibrationError
from reelforge.calibration.scale_file import (
    Provenance,
    ScaleKind,
    _encode,
    format_text,
    read_scale_file,
    tensor_name,
    write_scale_file,
)

PROVENANCE = Provenance("sha256:abc", "00ff", 7, "mse", "int8", {"numpy": "2.4.6", "onnxruntime": "1.31.0"})
TENSORS = {
    "dit.double.0.image.q.activation": np.array(0.125, np.float32),
    "dit.double.0.image.q.range": np.array([-0.25, 0], np.float32),
    "dit.double.0.image.q.weight": np.array([0.5, 0.25, 1e-38], np.float32),
    "dit.double.0.image.q.smoothing": np.linspace(0.5, 2, 5, dtype=np.float32),
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "scales.safetensors"
    write_scale_file(path, PROVENANCE, TENSORS)
    return path


def test_comes_back_as_written(written: Path) -> None:
    scales = read_scale_file(written, "sha256:abc", TENSORS)
    assert scales.provenance == PROVENANCE
    assert set(scales.tensors) == set(TENSORS)
    for name, array in TENSORS.items():
        assert scales.tensors[name].dtype == np.float32
        assert scales.tensors[name].shape == array.shape
        np.testing.assert_array_equal(scales.tensors[name], array)
    np.testing.assert_array_equal(
        scales.get("dit", "double.0.image.q", ScaleKind.WEIGHT), TENSORS["dit.double.0.image.q.weight"]
    )


def test_the_safetensors_library_reads_it(written: Path) -> None:
    loaded = safetensors.numpy.load_file(written)
    assert {name: array.tolist() for name, array in loaded.items()} == {
        name: array.tolist() for name, array in TENSORS.items()
    }
    with safetensors.safe_open(written, "numpy") as file:
        provenance = json.loads(file.metadata()["reelforge.calibration"])
    assert provenance["checkpoint"] == "sha256:abc"
    assert provenance["schema_version"] == 3
    header_length = int.from_bytes(written.read_bytes()[:8], "little")
    assert (8 + header_length) % 64 == 0


def test_equal_scales_give_equal_bytes(written: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    versions = dict(reversed(PROVENANCE.versions.items()))
    reordered = {name: np.asarray(TENSORS[name], np.float64) for name in reversed(TENSORS)}
    write_scale_file(other, replace(PROVENANCE, versions=versions), reordered)
    assert other.read_bytes() == written.read_bytes()
    write_scale_file(other, replace(PROVENANCE, seed=8), TENSORS)
    assert other.read_bytes() != written.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.safetensors", "scales.safetensors"]


@given(st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_cut_is_refused(written: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = written.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(CalibrationError, match=r"is cut short|is not a scale file") as caught:
        read_scale_file(path)
    assert str(path) in str(caught.value)
    assert "restore the file, or calibrate again" in str(caught.value)


@given(st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_altered_byte_goes_unnoticed(written: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(written.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "altered.safetensors"
    path.write_bytes(content)
    with pytest.raises(CalibrationError):
        read_scale_file(path)


def test_another_space_after_the_header_is_refused(written: Path) -> None:
    content = written.read_bytes()
    assert b"}} " in content
    written.write_bytes(content.replace(b"}} ", b"}}\n"))
    with pytest.raises(CalibrationError, match="other bytes for the same scales"):
        read_scale_file(written)


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"sha256:abc", b"sha256:abd"), (b"image.q.weight", b"image.k.weight"), (b'"shape":[5]', b'"shape":[1]')],
)
def test_an_altered_header_is_refused(written: Path, old: bytes, new: bytes) -> None:
    content = written.read_bytes()
    assert old in content
    written.write_bytes(content.replace(old, new))
    with pytest.raises(CalibrationError, match="was altered after it was written") as caught:
        read_scale_file(written)
    assert "received: sha256" in str(caught.value)


def test_altered_data_is_refused(written: Path) -> None:
    content = bytearray(written.read_bytes())
    content[-1] ^= 1
    written.write_bytes(content)
    with pytest.raises(CalibrationError, match="was altered after it was written"):
        read_scale_file(written)
    written.write_bytes(bytes(content) + b"more")
    with pytest.raises(CalibrationError, match="was altered after it was written"):
        read_scale_file(written)


def test_another_checkpoint_is_refused(written: Path) -> None:
    with pytest.raises(CalibrationError, match="was made for another checkpoint") as caught:
        read_scale_file(written, "sha256:other")
    assert "received: sha256:abc   expected: sha256:other" in str(caught.value)
    assert caught.value.exit_code == 5
    assert read_scale_file(written).provenance.checkpoint == "sha256:abc"


def test_other_number_formats_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scales.safetensors"
    formats = {"llm": ["int8", "int8"], "dit": ["int8", "float8_e4m3fn"], "dit.attention": ["float8_e4m3fn"]}
    text = "dit=float8_e4m3fn+int8,dit.attention=float8_e4m3fn,llm=int8"
    assert format_text(formats) == text
    write_scale_file(path, replace(PROVENANCE, format=text), TENSORS)
    for wanted in ({}, formats, {"llm": ["int8"]}, {"dit": ["float8_e4m3fn", "int8"]}):
        assert read_scale_file(path, formats=wanted).provenance.format == text
    for wanted in ({"llm": ["float8_e4m3fn"]}, {"dit": ["int8"]}, {"vae_decoder": ["int8"]}):
        with pytest.raises(CalibrationError, match="was made for other number formats") as caught:
            read_scale_file(path, formats=wanted)
        assert f"received: {text}   expected: {format_text(wanted)}" in str(caught.value)
        assert "calibrate again with the precision that will be built" in str(caught.value)


def test_a_missing_layer_is_named(written: Path) -> None:
    name = tensor_name("dit", "single.3.v", ScaleKind.ACTIVATION)
    assert name == "dit.single.3.v.activation"
    with pytest.raises(CalibrationError, match=r"lacks 1 scales, first 'dit\.single\.3\.v\.activation'"):
        read_scale_file(written, required=[*TENSORS, name])
    with pytest.raises(CalibrationError, match=r"no activation scale for layer 'single\.3\.v' of stage 'dit'"):
        read_scale_file(written).get("dit", "single.3.v", ScaleKind.ACTIVATION)


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scales.safetensors"
    write_scale_file(path, replace(PROVENANCE, schema_version=1), TENSORS)
    with pytest.raises(CalibrationError, match="is of another version") as caught:
        read_scale_file(path)
    assert "received: schema version 1   expected: schema version 3" in str(caught.value)
    assert "fix: calibrate again with this version" in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    with pytest.raises(CalibrationError, match="cannot be read: No such file"):
        read_scale_file(path)
    safetensors.numpy.save_file({"x": np.ones(3, np.float32)}, path)
    with pytest.raises(CalibrationError, match="is not a scale file"):
        read_scale_file(path)
    path.write_bytes(b"\x10\0\0\0\0\0\0\0" + b"{" * 16)
    with pytest.raises(CalibrationError, match="is not a scale file"):
        read_scale_file(path)
    path.write_bytes(_encode(replace(PROVENANCE, seed="7"), {}))  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match=r"\$\.seed: expected int"):
        read_scale_file(path)
    path.write_bytes(_encode(PROVENANCE, {"dit.x.activation": np.array(-1, np.float32)}))
    with pytest.raises(CalibrationError, match="a scale that is not positive finite numbers"):
        read_scale_file(path)
    path.write_bytes(_encode(PROVENANCE, {"dit.x.range": np.array([1, 2], np.float32)}))
    with pytest.raises(CalibrationError, match="a range that is not two finite numbers with zero between them"):
        read_scale_file(path)
    path.write_bytes(_encode(PROVENANCE, {"dit.x.activation": np.array(1, np.float64)}))  # type: ignore[dict-item]
    with pytest.raises(CalibrationError, match=r"type F32 and shape \[\] in 8 bytes"):
        read_scale_file(path)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_useless_scales_are_not_written(tmp_path: Path, value: float) -> None:
    path = tmp_path / "scales.safetensors"
    with pytest.raises(CalibrationError, match=r"'dit\.x\.activation' holds scales that cannot be used"):
        write_scale_file(path, PROVENANCE, {"dit.x.activation": np.array(value)})
    assert not path.exists()


@pytest.mark.parametrize("value", [[1.0, 2.0], [-2.0, -1.0], [0.0, np.inf], [np.nan, 0.0], [0.0], 1.0])
def test_useless_ranges_are_not_written(tmp_path: Path, value: object) -> None:
    path = tmp_path / "scales.safetensors"
    with pytest.raises(CalibrationError, match=r"'dit\.x\.range' holds ranges that cannot be used") as caught:
        write_scale_file(path, PROVENANCE, {"dit.x.range": np.array(value)})
    assert "expected: two finite numbers with zero between them" in str(caught.value)
    assert not path.exists()


def test_a_full_disk_leaves_the_old_file_and_nothing_else(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(scale_file.os, "fsync", full)
    with pytest.raises(CalibrationError, match="cannot be written: No space left on device"):
        write_scale_file(written, replace(PROVENANCE, seed=8), TENSORS)
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be written: No such file or directory"):
        write_scale_file(tmp_path / "none" / "scales.safetensors", PROVENANCE, TENSORS)
