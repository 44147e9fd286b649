"""What step caching measures in the transformer, against diffusers' own blocks with hooks on them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from reelforge.calibration.fingerprint import bundle_fingerprint
from reelforge.export.build import build_bundle
from reelforge.export.build_request import BuildRequest
from reelforge.export.build_source import open_source
from reelforge.export.models.hunyuan_video.stages import hunyuan_video_stages
from reelforge.export.partition import partition
from reelforge.export.plans import chained
from reelforge.runtime import Pipeline, Request
from reelforge.runtime.errors import RequestError
from reelforge.runtime.manifest import PlanEntry
from reelforge.runtime.recipe import Precision, SparseAttention, SparseKind
from reelforge.runtime.step_cache.settings import StepCache
from reelforge.tools.bench.oracle import (
    Oracle,
    Stages,
    normal,
    our_modulation,
    our_rope,
    our_text,
    their_velocity,
)
from tests.bundles import CPU, TraceMemory, once, session_folder

SHAPES = [(1, 2, 2), (1, 6, 8), (3, 6, 8), (5, 2, 10)]


@pytest.fixture(scope="module", autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def oracle(tiny_checkpoint: Path) -> Oracle:
    return Oracle(tiny_checkpoint)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("closeness", [1.0, 1e-2])
def test_the_input_s_change_is_that_of_diffusers_first_block(
    tiny_bundle: Path, oracle: Oracle, shape: tuple[int, int, int], closeness: float
) -> None:
    config = oracle.transformer.config
    before = normal(1, 1, config.in_channels, *shape)
    latents = before + closeness * normal(2, 1, config.in_channels, *shape)
    states, pooled = normal(3, 1, 5, config.text_embed_dim), normal(4, 1, config.pooled_projection_dim)
    times = torch.tensor([925.3, 925.3 - 50 * closeness])
    given: list[torch.Tensor] = []
    hook = oracle.transformer.transformer_blocks[0].norm1.register_forward_hook(
        lambda _module, _inputs, outputs: given.append(outputs[0].double())
    )
    try:
        for one, time in zip((before, latents), times, strict=True):
            their_velocity(oracle, one, states, torch.ones(1, 5, dtype=torch.int64), pooled, float(time))
    finally:
        hook.remove()
    first, second = given
    expected = float((second - first).abs().mean() / first.abs().mean())
    assert 1e-3 < expected < 3
    stages = Stages(tiny_bundle)
    rows = our_modulation(stages, oracle, pooled, times)["double_modulation"]
    received = stages(
        "input_change",
        latents=latents.numpy(),
        previous_latents=before.numpy(),
        double_modulation=rows[1:],
        previous_modulation=rows[:1],
    )["input_change"]
    assert received.shape == ()
    assert float(received) == pytest.approx(expected, rel=1e-4)


def test_the_input_s_change_has_the_weights_of_dit(tiny_bundle: Path) -> None:
    """No byte is stored twice: the entries are the same ranges of the same files."""
    manifest = Stages(tiny_bundle).bundle.manifest
    whole, own = manifest.stage("dit"), manifest.stage("input_change")
    assert whole is not None
    assert own is not None
    assert {weight.name for weight in own.weights} == {"patch_embed.weight", "patch_embed.bias"}
    assert set(own.weights) < set(whole.weights)
    assert manifest.recipe.precision["input_change"] is manifest.recipe.precision["dit"]


# The transformer in parts


@pytest.fixture(scope="module")
def parted(tiny_checkpoint: Path, trace_memory: TraceMemory, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    def make(path: Path) -> None:
        with trace_memory.used():
            build_bundle(BuildRequest(tiny_checkpoint, path, CPU, parted=True))

    return Stages(once(session_folder(tmp_path_factory) / "parted", make))


def in_parts(stages: Stages, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Head, body and tail one after the other; all that they put out."""
    known = dict(inputs)
    for part in ("dit_head", "dit_body", "dit_tail"):
        known.update(stages(part, **{info.name: known[info.name] for info in stages.bundle.stage(part).inputs}))
    return known


def step_inputs(
    stages: Stages, oracle: Oracle, shape: tuple[int, int, int], seed: int, time: float
) -> dict[str, np.ndarray]:
    config = oracle.transformer.config
    latents, states = normal(seed, 1, config.in_channels, *shape), normal(8, 1, 5, config.text_embed_dim)
    pooled, times = normal(9, 1, config.pooled_projection_dim), torch.tensor([time])
    return {
        "latents": latents.numpy(),
        "text": our_text(stages, oracle, states, times),
        **our_modulation(stages, oracle, pooled, times),
        **our_rope(stages, latents),
        "sigma_step": np.array(-0.25, np.float32),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_head_body_and_tail_are_the_whole_bit_for_bit(
    parted: Stages, oracle: Oracle, shape: tuple[int, int, int]
) -> None:
    """The same operators in the same order on the same numbers: in fp32 on one machine nothing may differ."""
    inputs = step_inputs(parted, oracle, shape, 1, 640.0)
    whole, parts = parted("dit", **inputs), in_parts(parted, inputs)
    for name in ("velocity", "next_latents"):
        np.testing.assert_array_equal(parts[name], whole[name])


def test_parts_have_the_weights_of_the_whole_once(parted: Stages) -> None:
    manifest = parted.bundle.manifest
    assert manifest.parted
    whole = {weight.name: weight for weight in parted.bundle.stage("dit").weights}
    found = [weight for part in ("dit_head", "dit_body", "dit_tail") for weight in parted.bundle.stage(part).weights]
    assert len(found) == len(whole)
    assert {weight.name: weight for weight in found} == whole
    assert {entry.path for entry in manifest.files if "dit_" in entry.path} == {
        f"{part}.onnx" for part in ("dit_head", "dit_body", "dit_tail")
    }, "graphs, and no weights of their own"
    assert not any(weight.name.startswith(("double.1", "single")) for weight in parted.bundle.stage("dit_head").weights)


def test_parts_are_no_other_checkpoint(
    parted: Stages, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Scales that were made with a bundle serve builds with and without parts, and a checkpoint read anew."""
    known = {bundle_fingerprint(Stages(tiny_bundle).bundle), bundle_fingerprint(parted.bundle)}
    for cut in (False, True):
        known.add(open_source(BuildRequest(tiny_checkpoint, tmp_path / "x", CPU, parted=cut)).fingerprint())
    assert len(known) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_the_head_s_change_is_that_of_diffusers_first_block(
    parted: Stages, oracle: Oracle, shape: tuple[int, int, int]
) -> None:
    config = oracle.transformer.config
    states, pooled = normal(8, 1, 5, config.text_embed_dim), normal(9, 1, config.pooled_projection_dim)
    added: list[torch.Tensor] = []
    hook = oracle.transformer.transformer_blocks[0].register_forward_hook(
        lambda _module, inputs, outputs: added.append(outputs[0].double() - inputs[0].double())
    )
    try:
        for seed, time in ((1, 640.0), (2, 600.0)):
            latents = normal(seed, 1, config.in_channels, *shape)
            their_velocity(oracle, latents, states, torch.ones(1, 5, dtype=torch.int64), pooled, time)
    finally:
        hook.remove()
    computed, now = added
    expected = float((now - computed).abs().mean() / computed.abs().mean())
    before = in_parts(parted, step_inputs(parted, oracle, shape, 1, 640.0))
    after = in_parts(parted, step_inputs(parted, oracle, shape, 2, 600.0))
    received = parted(
        "head_change",
        latents=after["latents"],
        computed_latents=before["latents"],
        head_image=after["head_image"],
        computed_head_image=before["head_image"],
    )["head_change"]
    assert float(received) == pytest.approx(expected, rel=1e-4)
    tokens = parted(
        "token_reuse",
        tokens=before["tokens"],
        head_image=after["head_image"],
        computed_head_image=before["head_image"],
    )["reused_tokens"]
    count = after["head_image"].shape[1]
    moved = before["tokens"][:, :count] + (after["head_image"] - before["head_image"])
    np.testing.assert_allclose(tokens[:, :count], moved, atol=1e-6)
    np.testing.assert_array_equal(tokens[:, count:], before["tokens"][:, count:])


def test_half_precision_passes_between_parts_in_half(
    tiny_checkpoint: Path, oracle: Oracle, trace_memory: TraceMemory, tmp_path: Path
) -> None:
    """With another batch too, whose keys are masked; every stage is within its tolerance of the fp32 reference."""
    for batch, precision in ((1, Precision.FP16), (2, Precision.FP32)):
        request = BuildRequest(
            tiny_checkpoint, tmp_path / f"{batch}", CPU, {"dit": precision}, parted=True, batch=batch, verify=True
        )
        with trace_memory.used():
            manifest = build_bundle(request)
        head = manifest.stage("dit_head")
        assert head is not None
        assert {info.name: info.dtype for info in head.outputs}["head_image"] == (
            "float16" if precision is Precision.FP16 else "float32"
        )
        assert manifest.recipe.precision["dit_body"] is precision
        assert any(info.name == "key_lengths" for info in head.outputs) == (batch > 1)
    half = Stages(tmp_path / "1")
    inputs = step_inputs(half, oracle, (3, 6, 8), 1, 640.0)
    whole, parts = half("dit", **inputs), in_parts(half, inputs)
    np.testing.assert_allclose(parts["velocity"], whole["velocity"], atol=2e-2)  # fused otherwise: fp16 is rounded anew


def test_a_body_may_be_cut_again(parted: Stages) -> None:
    """Where a compiler has too little memory: what passes on keeps the names that head and tail know."""
    stages = {stage.name: stage for stage in hunyuan_video_stages(parted.bundle.manifest.spec, parted=True)}
    body = stages["dit_body"]
    sizes = {name: 4 * math.prod(shape) for name, shape in body.parameter_shapes().items()}
    first, *_, last = partition(body, sizes, sum(sizes.values()) // 2)
    assert {"head_image", "head_text"} <= set(first.inputs) <= set(body.inputs)
    assert last.outputs == ("tokens",)
    assert last.aliases["tokens"] == "joint"


def test_plans_of_the_parts_are_the_whole_s(parted: Stages) -> None:
    """One series per group of architectures, in the order they run, over the same files."""
    groups = (("sm89", "sm120"), ("sm90",))
    entries = []
    for name, cuts in (("dit", 0), ("dit_head", 1), ("dit_body", 2), ("dit_tail", 1), ("head_change", 1)):
        entry = parted.bundle.stage(name)
        plans = [
            PlanEntry(f"{name}.{cut}.{group[0]}", "", group, cut, cuts, entry.inputs, entry.outputs, (), 1, "rtx 1")
            for cut in range(cuts)
            for group in groups
        ]
        entries.append(replace(entry, plans=tuple(plans)))
    made = chained(entries)
    for group in groups:
        series = [plan for plan in made if plan.architectures == group]
        expected = ["dit_head.0", "dit_body.0", "dit_body.1", "dit_tail.0"]
        assert [plan.path.removesuffix(f".{group[0]}") for plan in series] == expected
        assert [(plan.part, plan.parts) for plan in series] == [(number, 4) for number in range(4)]


def test_sparse_attention_has_no_parts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    request = BuildRequest(
        tiny_checkpoint, tmp_path / "x", CPU, sparse_attention=SparseAttention(SparseKind.LISTS), parted=True
    )
    with pytest.raises(RequestError, match="sparse attention has no head, body and tail"):
        build_bundle(request)


def test_a_pipeline_in_parts(parted: Stages) -> None:
    """A whole loop: a threshold of zero is the plain one bit for bit, with guidance too, and others skip."""
    request = Request("a ball", height=32, width=48, frames=5, steps=8, seed=3)
    with Pipeline.open(parted.bundle.path, threads=1) as pipeline:
        for guidance in ({}, {"cfg_scale": 3.0, "negative_prompt": "blurred"}):
            plain = replace(request, **guidance)  # type: ignore[arg-type]
            expected = pipeline.generate(plain)
            for text in ("fbcache:0", "fbcache:0,reuse=tokens", "easycache:0,reuse=tokens"):
                cached = replace(plain, step_cache=StepCache.parse(text))
                np.testing.assert_array_equal(pipeline.generate(cached), expected)
            for text in ("fbcache:9", "fbcache:9,reuse=tokens,max-skips=99", "easycache:9,reuse=tokens"):
                skipped: list[int] = []
                cached = replace(plain, step_cache=StepCache.parse(text))
                frames = pipeline.generate(cached, lambda progress, skipped=skipped: skipped.append(progress.skipped))
                assert max(skipped) == (5 if "99" in text else 4)
                assert not np.array_equal(frames, expected)


def test_a_bundle_without_parts_says_how_to_get_them(tiny_bundle: Path) -> None:
    request = Request("a ball", height=32, width=48, frames=5, steps=8, step_cache=StepCache.parse("fbcache:0.08"))
    with Pipeline.open(tiny_bundle, threads=1) as pipeline, pytest.raises(RequestError) as caught:
        pipeline.resolve(request)
    for said in ("step_cache=fbcache", "no stage 'dit_head' and no 'dit_body'", "--partition head,body,tail"):
        assert said in str(caught.value)


def test_a_default_step_cache_needs_its_parts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    request = BuildRequest(tiny_checkpoint, tmp_path / "x", CPU, step_cache="fbcache:0.08")
    with pytest.raises(RequestError, match="default step cache needs the transformer in parts") as caught:
        build_bundle(request)
    assert "add --partition head,body,tail" in str(caught.value)


def test_latents_that_rest_have_not_moved(tiny_bundle: Path) -> None:
    stages = Stages(tiny_bundle)
    dit = stages.bundle.manifest.spec.dit
    latents = normal(5, 1, dit.latent_channels, 1, 4, 4).numpy()
    modulation = normal(6, 1, dit.double_blocks, 2, 6, dit.width).numpy()
    still = stages("input_change", latents=latents, previous_latents=latents, double_modulation=modulation,
                   previous_modulation=modulation)  # fmt: skip
    assert float(still["input_change"]) == 0
    others = modulation.copy()
    others[:, 1:], others[:, 0, 1], others[:, 0, 0, 2:] = 7, 7, 7  # other blocks, the text stream, gates and the MLP
    same = stages("input_change", latents=latents, previous_latents=latents, double_modulation=others,
                  previous_modulation=modulation)  # fmt: skip
    assert float(same["input_change"]) == 0
    others[:, 0, 0, 0] += np.float32(0.1)
    moved = stages("input_change", latents=latents, previous_latents=latents, double_modulation=others,
                   previous_modulation=modulation)  # fmt: skip
    assert float(moved["input_change"]) > 0
