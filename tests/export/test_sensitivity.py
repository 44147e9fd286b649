"""Sensitivity finds what was sabotaged, and measures what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reelforge.calibration.budget import choose_recipe
from reelforge.calibration.gate import measure_quality, require_quality
from reelforge.calibration.number_formats import INT8
from reelforge.calibration.quality import cosine, relative_error
from reelforge.calibration.reference_run import ReferenceRun, run_reference
from reelforge.calibration.scale_file import ScaleFile, ScaleKind, tensor_name
from reelforge.export.sensitivity import (
    Metric,
    SensitivityOptions,
    SensitivityTable,
    block_of,
    blocks_of,
    evaluate_kept,
    layer_costs,
    measure_sensitivity,
    report_kept,
    spread_steps,
    worst_layers,
)
from reelforge.export.variants import LayerScales, Variants
from reelforge.runtime.codec import from_json, to_json
from reelforge.runtime.errors import VerificationError
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.quality import QualityThresholds
from tests.export.passes.layer_model import around_zero
from tests.variants import PROMPTS, PROVENANCE, SHAPE, STEPS, input_maxima, layer_scales

SABOTAGED = "double.1.image.k"
OTHERS = ("double.0.text.q", "double.1.image.fc1", "single.0.proj_attention", "single.1.q")


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Pipeline:
    return Pipeline.open(tiny_bundle)


@pytest.fixture(scope="module")
def scales(pipeline: Pipeline) -> dict[str, LayerScales]:
    """All layers', one of them 50 times too large: what it reads becomes a few levels around zero."""
    scales = layer_scales(input_maxima(pipeline, INT8), INT8)
    return {**scales, SABOTAGED: LayerScales(INT8, around_zero(50 * scales[SABOTAGED].activation.scale))}


@pytest.fixture(scope="module")
def run(pipeline: Pipeline) -> ReferenceRun:
    return run_reference(pipeline, PROMPTS, 0, STEPS, SHAPE)


@pytest.fixture(scope="module")
def short_run(pipeline: Pipeline) -> ReferenceRun:
    return run_reference(pipeline, PROMPTS[:1], 0, 2, SHAPE)


@pytest.fixture(scope="module")
def variants(pipeline: Pipeline, scales: dict[str, LayerScales]) -> Variants:
    return Variants(pipeline, "dit", {name: scales[name] for name in (*OTHERS, SABOTAGED)})


@pytest.fixture(scope="module")
def table(run: ReferenceRun, variants: Variants) -> SensitivityTable:
    return measure_sensitivity(run, variants, SensitivityOptions(sampled_steps=2))


def test_the_sabotaged_layer_and_its_block_come_first(table: SensitivityTable) -> None:
    assert [row.name for row in table.layers] == [
        "double.0.text.q",
        "double.1.image.k",
        "double.1.image.fc1",
        "single.0.proj_attention",
        "single.1.q",
    ]
    assert [row.name for row in table.blocks] == ["double.0", "double.1", "single.0", "single.1"]
    for rows, worst in ((table.layers, SABOTAGED), (table.blocks, "double.1")):
        assert max(rows, key=lambda row: row.relative_error).name == worst
        assert min(rows, key=lambda row: row.cosine).name == worst
        assert max(rows, key=lambda row: row.latent_error or 0).name == worst
    assert table.blocks[1].layers == ("double.1.image.k", "double.1.image.fc1")
    assert table.blocks[1].weight_bytes == (64 * 64 + 256 * 64) * 4
    assert (table.stage, table.seed, table.steps, table.sampled_steps) == ("dit", 0, STEPS, (0, 2))


def test_a_row_is_what_the_variant_gives(table: SensitivityTable, run: ReferenceRun, variants: Variants) -> None:
    row = table.layers[2]
    assert row.layers == (row.name,) == ("double.1.image.fc1",)
    variant = variants.pipeline_of(row.layers)
    errors, cosines, finals = [], [], []
    for video in run.videos:
        finals.append(variant.sample(video.request, video.conditions))
        with variant.engine("dit") as dit:
            for step in table.sampled_steps:
                rows = {name: values[step, ...] for name, values in video.conditions.per_step.items()}
                inputs = {"latents": video.latents[step], **video.conditions.fixed, **rows}
                velocity = dit.run(inputs)["velocity"]
                errors.append(relative_error(velocity, video.velocities[step]))
                cosines.append(cosine(velocity, video.velocities[step]))
    assert row.relative_error == pytest.approx(max(errors), rel=1e-6)
    assert row.cosine == row.velocity_cosine == pytest.approx(min(cosines), abs=1e-9)
    expected = [relative_error(final, video.latents[-1]) for final, video in zip(finals, run.videos, strict=True)]
    assert row.latent_error == pytest.approx(max(expected), rel=1e-6)
    assert row.psnr_db is None
    assert row.format == "int8"


def test_what_is_not_asked_for_is_not_measured(run: ReferenceRun, variants: Variants) -> None:
    counted = []
    one = Variants(variants.pipeline, "dit", {"single.1.q": variants.scales["single.1.q"]})
    options = SensitivityOptions(sampled_steps=1, loop=False, blocks=False)
    table = measure_sensitivity(run, one, options, lambda done, total: counted.append((done, total)))
    assert table.blocks == ()
    assert table.layers[0].latent_error is None
    assert table.sampled_steps == (STEPS - 1,)
    assert counted == [(1, 1)]
    with_video = measure_sensitivity(run, one, replace(options, video=True))
    assert with_video.layers[0].latent_error is not None
    assert 30 < (with_video.layers[0].psnr_db or 0) < 150


def test_a_table_survives_json(table: SensitivityTable) -> None:
    assert from_json(SensitivityTable, json.loads(json.dumps(to_json(table), allow_nan=False))) == table


def test_the_gate_names_the_sabotaged_layer_first(
    pipeline: Pipeline, scales: dict[str, LayerScales], tmp_path: Path
) -> None:
    """As a build does it: measured, refused, and the layers asked for."""
    names = [SABOTAGED, "double.1.image.fc1", "single.1.q", "single.1.v"]
    tensors = {}
    for name in names:
        activation = scales[name].activation
        tensors[tensor_name("dit", name, ScaleKind.ACTIVATION)] = np.array(activation.scale, np.float32)
        tensors[tensor_name("dit", name, ScaleKind.RANGE)] = np.array(activation.range, np.float32)
    scale_file = ScaleFile(tmp_path / "scales", PROVENANCE, tensors)
    candidate = Variants(pipeline, "dit", {name: scales[name] for name in names}).pipeline_of(names)
    report = measure_quality(pipeline, candidate, PROMPTS[:1], 0, STEPS, SHAPE)
    worst = worst_layers(
        pipeline, scale_file, {"dit": dict.fromkeys(names, INT8)}, PROMPTS[:1], 0, STEPS, SHAPE, count=3
    )
    assert worst[0] == f"dit.{SABOTAGED}"
    assert len(worst) == len(set(worst)) == 3
    thresholds = QualityThresholds(psnr_db=report.psnr_median_db + 1)
    with pytest.raises(VerificationError, match=f"the worst layers are dit.{SABOTAGED}, "):
        require_quality(report, thresholds, worst)


@pytest.mark.parametrize("metric", list(Metric))
def test_a_budget_keeps_the_sabotaged_layer(
    table: SensitivityTable, short_run: ReferenceRun, variants: Variants, metric: Metric
) -> None:
    def evaluate(kept: frozenset[str]) -> float:
        return evaluate_kept(short_run, variants, kept, metric)

    all_quantised = evaluate(frozenset())
    healthy = evaluate(frozenset({SABOTAGED}))
    assert healthy > all_quantised
    choice = choose_recipe(layer_costs(table, metric), (all_quantised + healthy) / 2, evaluate)
    assert choice.kept == (SABOTAGED,)
    assert choice.quality == pytest.approx(healthy)
    report = report_kept(short_run, variants, frozenset(choice.kept))
    received = report.psnr_median_db if metric is Metric.PSNR else report.velocity_cosine_worst
    assert received == pytest.approx(healthy, abs=1e-3)


def test_keeping_everything_is_the_reference(short_run: ReferenceRun, variants: Variants) -> None:
    everything = frozenset(variants.layers)
    assert evaluate_kept(short_run, variants, everything, Metric.COSINE) == 1.0
    assert evaluate_kept(short_run, variants, everything, Metric.PSNR) == np.inf
    assert report_kept(short_run, variants, everything).stages == {}


def test_the_decoder_s_layers(short_run: ReferenceRun, pipeline: Pipeline) -> None:
    """A stage after the loop has neither velocities nor latents; its loss is its output's."""
    layer = "decoder.mid_block.resnets.0.conv1.conv"
    variants = Variants(pipeline, "vae_decoder", {layer: LayerScales(INT8, around_zero(0.1))})
    row = measure_sensitivity(short_run, variants, SensitivityOptions(blocks=False)).layers[0]
    assert (row.velocity_cosine, row.latent_error) == (None, None)
    assert 0 < row.relative_error < 1
    table = SensitivityTable("vae_decoder", (), 0, SHAPE, 1, (0,), (row,), ())
    for metric in Metric:
        assert layer_costs(table, metric)[layer].loss == pytest.approx(row.relative_error**2)


def test_losses_by_metric(table: SensitivityTable) -> None:
    psnr, cosines = layer_costs(table, Metric.PSNR), layer_costs(table, Metric.COSINE)
    for row in table.layers:
        assert row.latent_error is not None
        assert row.velocity_cosine is not None
        assert psnr[row.name].loss == row.latent_error**2
        assert cosines[row.name].loss == 1 - row.velocity_cosine
        assert psnr[row.name].high_precision_bytes == row.weight_bytes


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("single.3.fc1", "single.3"),
        ("double.0.image.q", "double.0"),
        ("layers.12.self_attn.q_proj", "layers.12"),
        ("decoder.up_blocks.2.resnets.1.conv1.conv", "decoder.up_blocks.2"),
        ("decoder.mid_block.resnets.0.conv1.conv", "decoder.mid_block.resnets.0"),
        ("final.proj", "final.proj"),
        ("x2.y", "x2.y"),
    ],
)
def test_blocks(layer: str, block: str) -> None:
    assert block_of(layer) == block


def test_blocks_keep_the_order_of_their_layers() -> None:
    names = ("double.0.a", "double.1.a", "double.0.b", "single.0.a")
    assert blocks_of(names) == {
        "double.0": ("double.0.a", "double.0.b"),
        "double.1": ("double.1.a",),
        "single.0": ("single.0.a",),
    }


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [(20, 5, (0, 5, 10, 14, 19)), (3, 5, (0, 1, 2)), (1, 5, (0,)), (20, 1, (19,)), (20, 2, (0, 19)), (4, 3, (0, 2, 3))],
)
def test_sampled_steps(steps: int, count: int, expected: tuple[int, ...]) -> None:
    assert spread_steps(steps, count) == expected
