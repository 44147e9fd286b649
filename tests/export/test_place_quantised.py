"""8-bit weights in a bundle: codes and scales beside what stays, folded smoothing, and nothing linked behind them.

Dequantised weights lie within half a step of the source with its smoothing folded in, computed in float64. Four
roundings of fp32 (factor, divisor, quotient, scale) are allowed on top.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reelforge.calibration.errors import CalibrationError
from reelforge.export.checkpoint.sources import Conversion
from reelforge.export.quantisation import StagePlan, applicable_groups, quantised_formats
from reelforge.export.weights import WeightPlacer
from reelforge.runtime.bundle.write import BundleWriter
from reelforge.runtime.errors import BuildError
from reelforge.runtime.manifest import WeightEntry
from reelforge.runtime.recipe import Precision, Recipe
from tests.checkpoints import make_diffusers_checkpoint
from tests.export.test_weights import unsealed
from tests.export.tiny_stages import FAMILY, TinyStages, changed, random_factors, scale_file

CODES: dict[str, Any] = {"I8": np.int8, "F8_E4M3": ml_dtypes.float8_e4m3fn}
FLOATS: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
LARGEST = {"I8": 127.0, "F8_E4M3": 448.0}
SAFETENSORS_NAMES = {Precision.INT8: "I8", Precision.FP8: "F8_E4M3"}
FILES = {Precision.INT8: "int8", Precision.FP8: "float8_e4m3fn"}


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> TinyStages:
    return TinyStages.open(tiny_checkpoint)


@pytest.fixture(scope="module")
def tiny_bf16(tmp_path_factory: pytest.TempPathFactory) -> TinyStages:
    """Stored as published checkpoints are; one double block and one single block."""
    path = tmp_path_factory.mktemp("bf16") / "checkpoint"
    make_diffusers_checkpoint(path, 2, double_blocks=1, single_blocks=1, dtype=torch.bfloat16)
    return TinyStages.open(path)


def plans_of(
    tiny: TinyStages,
    precision: Mapping[str, Precision],
    kept: Mapping[str, tuple[str, ...]] | None = None,
    smoothing: bool = True,
) -> dict[str, StagePlan]:
    """Return plans with random smoothing of every group."""
    every = dict.fromkeys(FAMILY.stage_names, Precision.FP32)
    formats = quantised_formats(Recipe({**every, **precision}, kept=dict(kept or {})), tiny.rules, tiny.stages)
    groups = applicable_groups(tiny.rules, formats)
    factors = random_factors(tiny, groups, np.random.default_rng(0)) if smoothing else {}
    return tiny.plans(formats, groups, scale_file(formats, factors))


class Placed:
    """Stages' weights in a folder that stays: a writer that does not seal removes its own."""

    def __init__(self, tiny: TinyStages, output: Path, plans: Mapping[str, StagePlan], *stages: str) -> None:
        self.folder = output.with_name(f"{output.name}.kept")
        self.progress = 0
        with unsealed(output) as writer:
            placer = WeightPlacer(writer)
            self.entries = {
                stage: placer.place(tiny.stages[stage], tiny.resolved[stage], plans.get(stage), self._count)
                for stage in stages
            }
            shutil.copytree(writer.folder, self.folder, copy_function=os.link)
        self.non_finite = placer.non_finite

    def _count(self, done: int) -> None:
        self.progress += done

    @property
    def files(self) -> set[str]:
        return {path.name for path in (self.folder / "weights").iterdir()}

    def values(self, stage: str, name: str) -> NDArray[Any]:
        """Return a weight as it is stored."""
        entry = self.entries[stage][name]
        data = (self.folder / entry.file).read_bytes()[entry.offset : entry.offset + entry.length]
        assert hashlib.sha256(data).hexdigest() == entry.sha256
        return np.frombuffer(data, {**CODES, **FLOATS}[entry.dtype]).reshape(entry.shape)


def half_steps(quotients: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """Return half the distance between neighbouring codes around each quotient."""
    if dtype == "I8":
        return np.full_like(quotients, 0.5)
    exponents = np.floor(np.log2(np.maximum(np.abs(quotients), 2.0**-6)))  # below 2**-6 FP8 is subnormal
    return np.exp2(exponents - 3) / 2


def require_half_a_step(placed: Placed, tiny: TinyStages, stage: str, plan: StagePlan) -> None:
    """Compare every 8-bit weight of the stage with its folded source."""
    folded = changed(tiny.parameters(stage), plan)
    assert plan.layers
    for layer in plan.layers:
        name = f"{layer}.weight"
        entry = placed.entries[stage][name]
        codes, scales = placed.values(stage, name), placed.values(stage, f"{name}.scale")
        expected = folded[name].astype(np.float64).reshape(len(codes), -1)
        columns = scales.astype(np.float64)[:, None]
        dequantised = codes.astype(np.float64).reshape(len(codes), -1) * columns
        allowed = half_steps(expected / columns, entry.dtype) * columns + 4 * 2.0**-23 * np.abs(expected)
        assert (np.abs(dequantised - expected) <= allowed).all(), name
        # The whole range is used: each output channel's largest value has the largest code.
        largest = np.abs(codes.astype(np.float64)).reshape(len(codes), -1).max(axis=1)
        np.testing.assert_array_equal(largest, LARGEST[entry.dtype])


@pytest.mark.parametrize("smoothing", [False, True])
@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8])
@pytest.mark.parametrize("stage", ["dit", "llm", "vae_decoder"])
def test_weights_are_within_half_a_step(
    tmp_path: Path, tiny: TinyStages, stage: str, precision: Precision, smoothing: bool
) -> None:
    """Matrices, convolutions and rows in another order than the checkpoint's."""
    plans = plans_of(tiny, {stage: precision}, smoothing=smoothing)
    placed = Placed(tiny, tmp_path / "b", plans, stage)
    require_half_a_step(placed, tiny, stage, plans[stage])


def test_entries_of_a_quantised_stage(tmp_path: Path, tiny: TinyStages) -> None:
    kept = {"dit": ("double.1.*",)}
    plans = plans_of(tiny, {"dit": Precision.FP8}, kept)
    entries = Placed(tiny, tmp_path / "b", plans, "dit").entries["dit"]
    shapes = tiny.stages["dit"].parameter_shapes()
    eight_bit = {f"{layer}.weight" for layer in plans["dit"].layers}
    order = [name for weight in shapes for name in ((weight, f"{weight}.scale") if weight in eight_bit else (weight,))]
    assert sorted(entries) == sorted(order)
    assert list(entries) == [
        name for weight in tiny.resolved["dit"] for name in (weight, f"{weight}.scale") if name in set(order)
    ]
    for name, entry in entries.items():
        weight = name.removesuffix(".scale")
        assert entry.name == name
        expected = ("F32", shapes[weight][:1]) if weight != name else ("F32", shapes[weight])
        assert (entry.dtype, entry.shape) == (("F8_E4M3", shapes[name]) if name in eight_bit else expected)
        size = 1 if name in eight_bit else 4
        assert entry.length == size * int(np.prod(entry.shape))
        assert entry.offset % size == 0
    assert eight_bit
    assert any(name.startswith("double.1.image.q.") for name in set(entries) - eight_bit)


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8])
def test_a_quantised_stage_refers_to_no_file_of_the_checkpoint(
    tmp_path: Path, tiny: TinyStages, precision: Precision
) -> None:
    """Its float weights would stay in the bundle with it."""
    placed = Placed(tiny, tmp_path / "b", plans_of(tiny, {"llm": precision}), "llm")
    codes = f"llm.{FILES[precision]}.safetensors"
    assert placed.files == {codes, "llm.scales.safetensors", "llm.safetensors"}
    by_file: dict[str, set[str]] = {}
    for entry in placed.entries["llm"].values():
        by_file.setdefault(Path(entry.file).name, set()).add(entry.name)
    layers = {f"layers.{i}.{name}.weight" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")}
    assert layers <= by_file[codes]
    assert by_file["llm.scales.safetensors"] == {f"{name}.scale" for name in by_file[codes]}
    assert {"embed_tokens.weight", "layers.1.input_layernorm.weight"} <= by_file["llm.safetensors"]
    for file, names in by_file.items():  # nothing else is in the files, and another library finds the same there
        with safe_open(placed.folder / "weights" / file, "pt") as opened:
            assert set(opened.keys()) == names
            for name in names:
                stored = opened.get_tensor(name)
                received = torch.frombuffer(bytearray(placed.values("llm", name).tobytes()), dtype=stored.dtype)
                assert torch.equal(received.reshape(stored.shape).float(), stored.float())


def test_what_a_quantised_stage_keeps_is_unchanged(tmp_path: Path, tiny: TinyStages) -> None:
    plans = plans_of(tiny, {"dit": Precision.INT8}, smoothing=False)
    placed = Placed(tiny, tmp_path / "b", plans, "dit")
    assert set(plans) == {"dit"}
    kept = {name: values for name, values in tiny.parameters("dit").items() if name[:-7] not in plans["dit"].layers}
    assert {"patch_embed.weight", "final.proj.weight", "double.0.image.q_norm.weight", "single.1.v.bias"} <= set(kept)
    for name, values in kept.items():
        np.testing.assert_array_equal(placed.values("dit", name), values)


def test_folded_modulation_is_written_and_the_rest_stays_linked(
    tmp_path: Path, tiny: TinyStages, tiny_checkpoint: Path
) -> None:
    plans = plans_of(tiny, {"dit": Precision.INT8})
    placed = Placed(tiny, tmp_path / "b", plans, "modulation")
    assert plans["modulation"].layers == {}
    linears = {f"double.{i}.{stream}.linear" for i in range(2) for stream in ("image", "text")}
    linears |= {f"single.{i}.linear" for i in range(2)}
    folded = {f"{name}.{parameter}" for name in linears for parameter in ("weight", "bias")}
    converted = {name for name, weight in tiny.resolved["modulation"].items() if isinstance(weight, Conversion)}
    assert converted == {"final.linear.weight", "final.linear.bias"}
    entries = placed.entries["modulation"]
    assert list(entries) == list(tiny.resolved["modulation"])
    written = {name for name, entry in entries.items() if entry.file == "weights/modulation.safetensors"}
    assert written == folded | converted
    for name in set(entries) - written:
        shard = Path(entries[name].file).name
        assert shard.startswith("transformer.")
        source = tiny_checkpoint / "transformer" / shard.removeprefix("transformer.")
        assert os.path.samefile(placed.folder / "weights" / shard, source)  # noqa: PTH121
    expected = changed(tiny.parameters("modulation"), plans["modulation"])
    for name, values in expected.items():
        np.testing.assert_array_equal(placed.values("modulation", name), values)
    changes = {
        name for name, values in tiny.parameters("modulation").items() if not np.array_equal(values, expected[name])
    }
    assert changes == folded


def test_values_in_high_precision_take_in_what_their_projection_needs(tmp_path: Path, tiny: TinyStages) -> None:
    """A folded weight of the quantised stage itself, rather than of the modulation."""
    plans = plans_of(tiny, {"dit": Precision.INT8}, {"dit": ("*.v",)})
    placed = Placed(tiny, tmp_path / "b", plans, "dit")
    expected = changed(tiny.parameters("dit"), plans["dit"])
    for name in ("double.0.image.v.weight", "double.0.text.v.bias", "single.1.v.weight"):
        assert name in plans["dit"].folded
        assert not np.array_equal(expected[name], tiny.parameters("dit")[name])
        np.testing.assert_array_equal(placed.values("dit", name), expected[name])
    require_half_a_step(placed, tiny, "dit", plans["dit"])


def test_bf16_checkpoints(tmp_path: Path, tiny_bf16: TinyStages) -> None:
    """What is folded becomes fp16; what is not keeps its type; codes are as for any other type."""
    plans = plans_of(tiny_bf16, {"dit": Precision.FP8})
    placed = Placed(tiny_bf16, tmp_path / "b", plans, "modulation", "dit")
    for stage, entries in placed.entries.items():
        for name, entry in entries.items():
            if name.removesuffix(".weight") in plans[stage].layers:
                assert entry.dtype == "F8_E4M3"
            elif name.endswith(".scale"):
                assert entry.dtype == "F32"
            else:
                assert entry.dtype == ("F16" if name in plans[stage].folded else "BF16")
            assert entry.offset % np.dtype({**CODES, **FLOATS}[entry.dtype]).itemsize == 0
    require_half_a_step(placed, tiny_bf16, "dit", plans["dit"])
    exact = changed(tiny_bf16.parameters("modulation"), plans["modulation"])["double.0.image.linear.weight"]
    received = placed.values("modulation", "double.0.image.linear.weight").astype(np.float32)
    np.testing.assert_allclose(received, exact, rtol=2.0**-11, atol=2.0**-25)


@pytest.mark.parametrize("plan", [None, StagePlan()])
def test_a_plan_that_changes_nothing(tmp_path: Path, tiny: TinyStages, plan: StagePlan | None) -> None:
    """The same entries as without a plan, and references stay references."""
    placed = Placed(tiny, tmp_path / "b", {} if plan is None else {"clip": plan}, "clip")
    assert {entry.file for entry in placed.entries["clip"].values()} == {"weights/text_encoder_2.model.safetensors"}
    assert placed.files == {"text_encoder_2.model.safetensors"}


def test_stages_with_different_formats_share_a_bundle(tmp_path: Path, tiny: TinyStages) -> None:
    precision = {"llm": Precision.INT8, "dit": Precision.FP8, "vae_decoder": Precision.INT8}
    plans = plans_of(tiny, precision)
    placed = Placed(tiny, tmp_path / "b", plans, *FAMILY.stage_names)
    for stage, wanted in precision.items():
        received = {placed.entries[stage][f"{layer}.weight"].dtype for layer in plans[stage].layers}
        assert received == {SAFETENSORS_NAMES[wanted]}
        assert not {file for file in _files(placed.entries[stage]) if not file.startswith(f"weights/{stage}.")}


def _files(entries: Mapping[str, WeightEntry]) -> set[str]:
    return {entry.file for entry in entries.values()}


def test_the_same_bytes_every_time(tmp_path: Path, tiny: TinyStages) -> None:
    plans = plans_of(tiny, {"dit": Precision.INT8})
    first, second = (Placed(tiny, tmp_path / name, plans, "dit", "modulation") for name in ("a", "b"))
    assert first.entries == second.entries
    for file in first.files:
        assert (first.folder / "weights" / file).read_bytes() == (second.folder / "weights" / file).read_bytes()


def test_progress_counts_every_byte_of_the_checkpoint(tmp_path: Path, tiny: TinyStages) -> None:
    plans = plans_of(tiny, {"dit": Precision.INT8}, {"dit": ("single.1.*",)})
    placed = Placed(tiny, tmp_path / "b", plans, "dit", "modulation")
    assert placed.progress == sum(
        weight.nbytes for stage in ("dit", "modulation") for weight in tiny.resolved[stage].values()
    )


def test_no_room_for_the_codes(tmp_path: Path, tiny: TinyStages, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = plans_of(tiny, {"llm": Precision.INT8})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    shapes = tiny.stages["llm"].parameter_shapes()
    needed = sum(
        int(np.prod(shapes[f"{layer}.weight"])) + 4 * shapes[f"{layer}.weight"][0] for layer in plans["llm"].layers
    )
    with pytest.raises(BuildError) as caught, BundleWriter(tmp_path / "b") as writer:
        WeightPlacer(writer).place(tiny.stages["llm"], tiny.resolved["llm"], plans["llm"])
    for part in ("the disk is full", "1,000 bytes free", f"{needed:,} bytes", "fix: free space"):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """In an 8-bit weight an error, since no code stands for them; elsewhere counted as ever, folded or not."""
    path = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    bad = {"transformer_blocks.1.norm1.linear.weight": (3, 5), "proj_out.bias": (0,)}
    _spoil(path, bad)
    tiny = TinyStages.open(path)
    plans = plans_of(tiny, {"dit": Precision.INT8})
    placed = Placed(tiny, tmp_path / "b", plans, "modulation", "dit")
    assert placed.non_finite == {"modulation.double.1.image.linear.weight": 1, "dit.final.proj.bias": 1}

    _spoil(path, {"transformer_blocks.0.attn.to_q.weight": (2, 7)})
    with pytest.raises(CalibrationError) as caught, BundleWriter(tmp_path / "c") as writer:
        WeightPlacer(writer).place(tiny.stages["dit"], tiny.resolved["dit"], plans["dit"])
    for part in (
        "'dit.double.0.image.q.weight'",
        "not finite",
        "output channel 1",
        "fix: ",
    ):  # row 2 in half-split order
        assert part in str(caught.value)
    assert {file.name for file in tmp_path.iterdir()} == {"copy", "b.kept"}


def _spoil(checkpoint: Path, elements: Mapping[str, tuple[int, ...]]) -> None:
    """Set one element of each of these tensors to NaN."""
    for shard in sorted((checkpoint / "transformer").glob("*.safetensors")):
        tensors = load_file(shard)
        for name in set(tensors) & set(elements):
            tensors[name][elements[name]] = float("nan")
        save_file(tensors, shard, {"format": "pt"})
