"""Operations against figures worked out by hand, and against PyTorch's own counter on our modules without storage."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from reelforge.export.planner.flops import Flops, call_flops
from reelforge.export.planner.layers import StageLayers, rows_of
from reelforge.export.planner.work import Call, Workload
from reelforge.export.stage import Stage
from reelforge.runtime.recipe import VideoShape
from reelforge.tools.synthesize_layout import SIZES
from tests.export.planner.models import FAMILY, HD, MIDDLE, SMALL, TEMPLATE_TOKENS, model, recipe

DTYPES = {"float32": torch.float32, "int64": torch.int64, "compute": torch.float32}


def planned(
    stage: str, shape: VideoShape, size: str, steps: int = 50, text: int = 256
) -> tuple[Stage, list[Call], StageLayers]:
    what = model(size)
    found = next(one for one in what.stages if one.name == stage)
    workload = Workload(shape, steps, text, text + TEMPLATE_TOKENS)
    return found, list(FAMILY.work(what.spec, workload)[stage].calls), what.layers(stage, recipe(shape))


def counted(stage: Stage, dimensions: Mapping[str, int]) -> Flops:
    """Run a stage on tensors without storage and return what PyTorch counts."""
    environment = {
        name: torch.zeros(
            [dimensions[size] if isinstance(size, str) else size for size in stage.values[name].shape],
            dtype=DTYPES[stage.values[name].dtype],
            device="meta",
        )
        for name in stage.inputs
    }
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode(), torch.device("meta"):
        for part in stage.parts:
            module = part.build().eval()
            for index in range(part.repeat):
                arguments = [
                    environment[port.value][:, index] if port.indexed else environment[port.value]
                    for port in part.input_ports
                ]
                results = module(*arguments)
                results = results if isinstance(results, tuple) else (results,)
                environment.update(
                    {
                        port.value: result
                        for port, result in zip(part.output_ports, results, strict=True)
                        if not port.indexed
                    }
                )
    kinds = {"gemm": 0, "attention": 0, "convolution": 0}
    for operator, count in counter.get_flop_counts()["Global"].items():
        name = str(operator)
        kind = "convolution" if "conv" in name else "gemm" if name in ("aten.mm", "aten.addmm") else "attention"
        kinds[kind] += count
    return Flops(**kinds)


# Worked out by hand: 60 blocks of 24 d^2 parameters, S tokens, attention 60 * 4 S^2 d.
@pytest.mark.parametrize(
    ("shape", "gemm_pflop", "attention_pflop"), [(HD, 1.618, 10.451), (MIDDLE, 0.918, 3.367), (SMALL, 0.449, 0.804)]
)
def test_a_step_costs_what_the_formulas_say(shape: VideoShape, gemm_pflop: float, attention_pflop: float) -> None:
    _, (call,), layers = planned("dit", shape, "full")
    flops = call_flops(call, layers)
    assert flops.gemm / 1e15 == pytest.approx(gemm_pflop, abs=6e-4)
    assert flops.attention / 1e15 == pytest.approx(attention_pflop, abs=6e-4)
    assert flops.convolution == 0
    assert call.times == 50


@pytest.mark.parametrize(
    ("shape", "calls", "pflop"),
    [(HD, 84, 4.24), (MIDDLE, 45, 2.28), (SMALL, 30, 1.11), (VideoShape(720, 1280, 1), 28, 0.0426)],
)
def test_decoding_costs_what_the_specification_says(shape: VideoShape, calls: int, pflop: float) -> None:
    _, tiles, layers = planned("vae_decoder", shape, "full")
    total = sum(call_flops(call, layers).total * call.times for call in tiles)
    assert sum(call.times for call in tiles) == calls
    assert total / 1e15 == pytest.approx(pflop, rel=0.01)


def test_the_text_encoder_costs_two_operations_per_parameter_and_token() -> None:
    _, (call,), layers = planned("llm", HD, "full")
    assert call_flops(call, layers).gemm / 1e12 == pytest.approx(4.59, abs=0.01)  # 2 * 351 * 6.54e9


@pytest.mark.parametrize("stage", ["refiner", "modulation", "dit"])
def test_a_tiny_stage_is_counted_as_pytorch_counts_it(stage: str) -> None:
    found, (call,), layers = planned(stage, VideoShape(48, 64, 9), "tiny", steps=3, text=7)
    assert call_flops(call, layers) == counted(found, call.dimensions)


@pytest.mark.parametrize("stage", ["llm", "clip"])
def test_a_tiny_text_encoder_is_counted_as_pytorch_counts_it_but_for_what_is_masked(stage: str) -> None:
    found, (call,), layers = planned(stage, VideoShape(48, 64, 9), "tiny", text=7)
    ours, theirs = call_flops(call, layers), counted(found, call.dimensions)
    full = sum(4 * one.count * one.heads * one.head_dim * one.tokens**2 for one in call.attentions)
    assert (ours.gemm, ours.convolution) == (theirs.gemm, theirs.convolution)
    assert theirs.attention == full  # PyTorch's counter takes a causal attention for a full one
    assert full / 2 < ours.attention < full


@pytest.mark.parametrize("size", ["tiny", "full"])
def test_a_tile_is_counted_as_pytorch_counts_it(size: str) -> None:
    found, calls, layers = planned("vae_decoder", SMALL, size)
    ours, theirs = call_flops(calls[0], layers), counted(found, calls[0].dimensions)
    assert ours.convolution == theirs.convolution
    # PyTorch computes some projections of the middle attention as batched products, like the attention itself.
    assert ours.gemm + ours.attention == theirs.gemm + theirs.attention


def test_a_full_step_is_counted_as_pytorch_counts_it() -> None:
    found, (call,), layers = planned("dit", SMALL, "full")
    assert call_flops(call, layers) == counted(found, call.dimensions)


def test_tiles_of_every_size_are_counted_once() -> None:
    _, calls, _ = planned("vae_decoder", HD, "full")
    assert len({tuple(call.dimensions.items()) for call in calls}) == len(calls)
    assert max(call.dimensions["tile_height"] for call in calls) == SIZES["full"].tiling.tile


@pytest.mark.parametrize("size", ["tiny", "demo", "full"])
def test_every_layer_is_accounted_for(size: str) -> None:
    for stage in model(size).counted:
        _, calls, layers = planned(stage.name, VideoShape(48, 64, 9), size)
        tables = [name for name in layers.layers if "embed_tokens" in name or "_embedding" in name]
        for call in calls:
            assert set(rows_of(call, layers)) == set(layers.layers) - set(tables)


def test_a_layer_that_the_cost_model_forgets_is_a_bug() -> None:
    _, (call,), layers = planned("clip", HD, "tiny")
    forgetful = Call(1, call.rows[:1], call.attentions, 0, (), call.dimensions)
    with pytest.raises(AssertionError, match=r"says nothing about clip\.encoder"):
        rows_of(forgetful, layers)


def test_sums_and_multiples() -> None:
    assert (Flops(1, 2, 3) + Flops(10, 20, 30)) * 2 == Flops(22, 44, 66)
    assert Flops(1, 2, 3).total == 6
