"""Quantised builds that are refused or interrupted: what they say, and that nothing half-written is left."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reelforge.calibration.errors import CalibrationError
from reelforge.calibration.scale_file import read_scale_file, write_scale_file
from reelforge.export.build_request import BuildEvents, CalibrationRequest
from reelforge.runtime.errors import BuildError, RequestError, VerificationError
from reelforge.runtime.manifest import Manifest
from reelforge.runtime.recipe import Precision
from tests.bundles import build
from tests.export.quantised_builds import altered, refused

pytestmark = pytest.mark.usefixtures("remembered_traces")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "b"


# The gate.


def test_the_gate_names_the_worst_layers(tiny_checkpoint: Path, output: Path, request_: CalibrationRequest) -> None:
    strict = replace(request_, min_psnr_db=200.0, min_cosine=0.9999999)
    error = refused(
        VerificationError,
        ["PSNR", "at least 200 dB", "velocity cosine", "the worst layers are dit.", "reelforge sensitivity"],
        output,
        lambda: build(tiny_checkpoint, output, precision=Precision.INT8, calibration=strict),
    )
    assert error.exit_code == 6


def test_a_bad_scale_file_is_caught_and_its_layer_named(
    tiny_checkpoint: Path, output: Path, request_: CalibrationRequest, tmp_path: Path
) -> None:
    build(tiny_checkpoint, output, precision=Precision.INT8, calibration=request_)
    scales = read_scale_file(output / "scales.safetensors")
    names = [f"dit.single.0.fc1.{kind}" for kind in ("activation", "range")]
    path = tmp_path / "bad.safetensors"
    bad = {name: scales.tensors[name] * 100 for name in names}
    write_scale_file(path, scales.provenance, {**scales.tensors, **bad})
    shutil.rmtree(output)
    given = replace(request_, scales=path, min_cosine=0.999)
    refused(
        VerificationError,
        ["the worst layers are dit.single.0.fc1"],
        output,
        lambda: build(tiny_checkpoint, output, precision=Precision.INT8, calibration=given),
    )


# What cannot be built.


def test_prompts_that_cannot_be_used(
    tiny_checkpoint: Path, output: Path, tmp_path: Path, request_: CalibrationRequest
) -> None:
    for content, part in ((b"\n# nothing\n", "are empty"), (b"caf\xe9\n", "not UTF-8"), (None, "cannot be read")):
        path = tmp_path / "prompts.txt"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        given = replace(request_, prompts=path)
        refused(
            CalibrationError,
            [part, "fix: "],
            output,
            lambda given=given: build(tiny_checkpoint, output, precision=Precision.INT8, calibration=given),  # type: ignore[misc]
        )


def test_scale_files_that_do_not_belong(
    tiny_checkpoint: Path, output: Path, tmp_path: Path, request_: CalibrationRequest
) -> None:
    build(tiny_checkpoint, output, precision=Precision.INT8, calibration=request_)
    good = tmp_path / "good.safetensors"
    shutil.copy(output / "scales.safetensors", good)
    shutil.rmtree(output)

    def attempt(path: Path, checkpoint: Path = tiny_checkpoint, precision: Precision = Precision.INT8) -> Manifest:
        given = replace(request_, scales=path)
        return build(checkpoint, output, precision=precision, calibration=given)

    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-10])
    refused(CalibrationError, ["cut.safetensors"], output, lambda: attempt(cut))

    scales = read_scale_file(good)
    lacking = tmp_path / "lacking.safetensors"
    tensors = {name: value for name, value in scales.tensors.items() if name != "dit.single.0.fc1.activation"}
    write_scale_file(lacking, scales.provenance, tensors)
    refused(CalibrationError, ["'dit.single.0.fc1.activation'", "calibrate again"], output, lambda: attempt(lacking))

    other = altered(tiny_checkpoint, tmp_path / "other", lambda weight: weight.__imul__(1.01))
    refused(CalibrationError, ["another checkpoint"], output, lambda: attempt(good, other))

    refused(CalibrationError, ["format", "int8"], output, lambda: attempt(good, precision=Precision.FP8))


def test_activations_that_are_not_finite(
    tiny_checkpoint: Path, output: Path, tmp_path: Path, request_: CalibrationRequest
) -> None:
    broken = altered(tiny_checkpoint, tmp_path / "nan", lambda weight: weight.__setitem__((0, 0), np.nan))
    with pytest.raises(CalibrationError) as caught:
        build(broken, output, precision=Precision.INT8, calibration=request_)
    for part in ("stage 'dit'", "layer 'single.1.q'", "step 0", "not finite"):
        assert part in str(caught.value), str(caught.value)
    assert not output.exists()


def test_requests_that_mean_nothing(tiny_checkpoint: Path, output: Path, request_: CalibrationRequest) -> None:
    def attempt(*stages: str, **options: object) -> Manifest:
        return build(tiny_checkpoint, output, *stages, calibration=request_, **options)  # type: ignore[arg-type]

    refused(
        RequestError,
        ["'modulation' cannot be computed in 8 bits", "modulation=int8", "dit or llm or vae_decoder"],
        output,
        lambda: attempt(precision={"modulation": Precision.INT8}),
    )
    refused(
        RequestError,
        ["no layer of stage 'dit' fits", "single.99.*"],
        output,
        lambda: attempt(precision=Precision.INT8, kept={"dit": ("single.99.*",)}),
    )
    refused(
        RequestError,
        ["no such stages", "unet"],
        output,
        lambda: attempt(precision={"dit": Precision.INT8}, kept={"unet": ("*",)}),
    )
    refused(RequestError, ["unet"], output, lambda: attempt(precision={"unet": Precision.INT8}))
    refused(
        RequestError,
        ["only some stages", "--scales FILE and --no-gate"],
        output,
        lambda: attempt("dit", precision=Precision.INT8),
    )
    refused(RequestError, ["attention", "fp8"], output, lambda: attempt(attention=Precision.BF16))


# Interruptions.


def test_a_build_goes_on_where_its_calibration_was_interrupted(
    tiny_checkpoint: Path, output: Path, request_: CalibrationRequest
) -> None:
    whole = build(tiny_checkpoint, output, precision=Precision.INT8, calibration=request_)
    steps: list[tuple[str, int, int]] = []

    def interrupt(what: str, done: int, total: int) -> None:
        steps.append((what, done, total))
        if what == "observing dit" and done >= total // 2:
            raise KeyboardInterrupt

    later = output.with_name("later")
    with pytest.raises(KeyboardInterrupt):
        build(
            tiny_checkpoint, later, precision=Precision.INT8, calibration=request_, events=BuildEvents(work=interrupt)
        )
    assert sorted(path.name for path in output.parent.iterdir()) == ["b", "later.calibration"]
    resumed = build(tiny_checkpoint, later, precision=Precision.INT8, calibration=request_)
    assert resumed.content_digest == whole.content_digest
    assert sorted(path.name for path in output.parent.iterdir()) == ["b", "later"]


@pytest.mark.parametrize("part", ["dit.int8", "dit.scales", "scales.safetensors"])
def test_the_disk_is_full_midway(
    tiny_checkpoint: Path, output: Path, request_: CalibrationRequest, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    write, replace_file = os.pwrite, Path.replace

    def full(descriptor: int, *arguments: object) -> int:
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        if part in target.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, *arguments)  # type: ignore[arg-type]

    def full_at_rename(path: Path, target: Path) -> Path:
        if Path(target).name == part:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace_file(path, target)

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(Path, "replace", full_at_rename)
    with pytest.raises((BuildError, CalibrationError)) as caught:
        build(tiny_checkpoint, output, precision=Precision.INT8, calibration=request_)
    assert "No space left" in str(caught.value) or "disk is full" in str(caught.value)
    assert not output.exists()
    assert not list(output.parent.glob("*.partial-*"))
