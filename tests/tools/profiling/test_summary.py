"""Sums over runs, layers from nodes, notes about noise: computed by hand."""

from __future__ import annotations

import pytest

from reelforge.tools.profiling.layers import NodeTime, layer_profile, no_layers, stage_layers
from reelforge.tools.profiling.session import _summed_up
from reelforge.tools.profiling.summary import gaps, is_decoder, is_loop, summarise
from reelforge.tools.profiling.trust import noise_notes
from tests.tools.profiling.profiles import LAYERS, profile, run


def test_parts_stages_and_gaps() -> None:
    found = summarise([run(), run(step_ms=12.0)])
    assert found is not None
    assert found.total.median_ms == pytest.approx((62 + 68) / 2)
    parts = {name: part.median_ms for name, part in found.parts.items()}
    assert parts == pytest.approx(
        {"tokenise": 1, "load engines": 5, "run engines": 53, "encode video": 2, "between": 4}
    )
    dit, vae = found.stages
    assert (dit.stage, dit.calls, dit.run.median_ms, dit.call.count) == ("dit", 3, pytest.approx(33), 6)
    assert dit.share == pytest.approx(33 / 53)
    assert dit.load is not None
    assert dit.load.median_ms == 5
    assert vae.load is None
    assert found.steps is not None
    assert (found.steps.count, found.steps.max_ms) == (6, 13)
    assert found.step_gaps is not None
    assert found.step_gaps.max_ms == pytest.approx(1)
    assert found.tile_gaps is None
    assert [(one.phase, one.anonymous_bytes) for one in found.memory] == [
        ("text", 10_000_000), ("sampling", 30_000_000), ("decoding", 20_000_000),
    ]  # fmt: skip


def test_runs_that_were_interrupted_do_not_count() -> None:
    assert summarise([run(complete=False)]) is None
    found = summarise([run(), run(step_ms=99.0, complete=False)])
    assert found is not None
    assert found.runs == 1


def test_loading_during_the_warm_up_counts() -> None:
    found = summarise([run()], loaded=[run(), run()])
    assert found is not None
    assert found.stages[0].load is not None
    assert found.stages[0].load.count == 3


def test_gaps_are_between_calls_of_one_stage() -> None:
    assert gaps(run(), is_loop) == pytest.approx([1, 1])
    assert gaps(run(), is_decoder) == []


def node(name: str, operator: str, ms: float, flops: int = 0, precision: str = "") -> NodeTime:
    return NodeTime(name, operator, ms, flops, 10, precision)


def test_nodes_become_layers_by_the_median_over_calls() -> None:
    calls = [
        [node("double.0.image.fc1", "Gemm", ms, 100, "fp32"), node("double.0.image.fc1.Add.3", "Add", 1.0),
         node("double.0.Attention", "Attention", 2.0), node("Squeeze_token_4", "Squeeze", 0.5)]
        for ms in (9.0, 3.0, 4.0)
    ]  # fmt: skip
    found = stage_layers("dit", ["double.0.image.fc1.weight", "double.0.image.fc1.bias"], calls)
    layers = {layer.name: layer for layer in found.layers}
    assert set(layers) == {"double.0.image.fc1", "double.0.attention", "double.0.layout"}
    fc1 = layers["double.0.image.fc1"]
    assert (fc1.call_ms, fc1.kind, fc1.precision, fc1.flops, fc1.kernels) == (5.0, "gemm", "fp32", 100, ("Gemm", "Add"))
    assert fc1.words == "double block 0, image MLP up-projection"
    assert found.unnamed_ms == 0.5
    profiled = layer_profile("a profiler", [found], {"dit": 20}, {"dit": 8.0})
    assert [layer.name for layer in profiled.layers][:2] == ["double.0.image.fc1", "double.0.attention"]
    assert profiled.layers[0].per_video_ms == 100
    assert sum(layer.share for layer in profiled.layers) == pytest.approx(1)
    assert profiled.unnamed_share == pytest.approx(0.5 / 7.5)


def test_what_is_missing_is_summed_up() -> None:
    names = ["the cold run", "warm-up run 1 of 1", *(f"warm run {number} of 5" for number in range(1, 6)), "the layers"]
    assert _summed_up(names) == ["the cold run", "warm-up run 1 of 1", "warm runs 1 to 5 of 5", "the layers"]
    assert _summed_up(["warm-up run 2 of 3", "warm-up run 3 of 3", "warm run 1 of 1"]) == [
        "warm-up runs 2 to 3 of 3", "warm run 1 of 1",
    ]  # fmt: skip
    assert _summed_up([]) == []


def test_no_layers_say_why() -> None:
    assert no_layers("they are on the moon").source == "they are on the moon"


def test_notes_about_noise() -> None:
    made = profile()
    notes = noise_notes(made.machine, [run(), run(step_ms=11.0)], made.warm, LAYERS)
    text = " ".join(notes)
    assert "2 warm runs took 62 to 65 ms" in text
    assert "steady" in text
    assert "0.05 of 2 cores" in text
    assert "the machine was quiet" in text
    assert "their sum is 1.10 times" in text
    assert "1.0% of the layers' time" in text
    assert "No warm run" in noise_notes(made.machine, [], None, None)[0]
    single = summarise([run()])
    assert "A single warm run" in noise_notes(made.machine, [run()], single, None)[0]
