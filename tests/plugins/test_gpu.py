"""The compiled kernels on a real GPU: what the interpreter cannot show - layouts, races, accumulators of few bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reelforge.plugins.kernels import rotary_quantise_reference as rotary
from reelforge.plugins.kernels import value_quantise_reference as values
from reelforge.plugins.kernels.block_sparse_attention_reference import visible_keys
from reelforge.plugins.kernels.int8_attention_reference import attention
from reelforge.plugins.schema import DType
from reelforge.plugins.tactics import ARCHITECTURES, tactics
from reelforge.runtime.attention import patterns
from reelforge.runtime.attention.patterns import Layout, block_lists
from reelforge.tools.bench.attention_problems import ATTENTION, EPS, SPARSE, Problem, cosine, relative_l1
from tests.plugins.gpu_runner import GpuRunner

pytestmark = pytest.mark.gpu
GOALS = {"fp8": 0.9999, "fp8_fp16_accumulator": 0.9999, "fp16": 0.99999}


@pytest.fixture(scope="module")
def gpu(kernel_cache: Path) -> GpuRunner:
    import torch

    major, minor = torch.cuda.get_device_capability()
    architecture = 10 * major + minor
    if architecture not in ARCHITECTURES:
        pytest.skip(f"no kernels for compute capability {major}.{minor}")
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    return GpuRunner(architecture, kernel_cache)


def kinds(gpu: GpuRunner) -> list[str]:
    return [pv for pv, plugin in ATTENTION.items() if tactics(plugin, gpu.architecture)]


@pytest.mark.parametrize(
    "problem", [Problem(1900, 203, batch=2), Problem(70, 59, head_dim=64, outliers=True)], ids=["long", "short"]
)
@pytest.mark.parametrize("key_group", [64, 128])
def test_quantising(gpu: GpuRunner, problem: Problem, key_group: int) -> None:
    if key_group == 128 and gpu.architecture != 90:
        pytest.skip("groups of 128 are Hopper's")
    t = problem.tensors
    problem.run(gpu, "key_statistics", EPS=EPS)
    expected = rotary.key_statistics(t["k"], t["key_norm"], t["rope_cos"], t["rope_sin"], eps=EPS)
    np.testing.assert_allclose(t["key_sums"], expected, atol=5e-3, rtol=1e-5)
    out = problem.run(gpu, "rotary_qk_norm_quantise", EPS=EPS, KEY_GROUP=key_group)
    names = ("q", "k", "query_norm", "key_norm", "rope_cos", "rope_sin", "key_sums")
    reference = rotary.rotary_qk_norm_quantise(*(t[name] for name in names), eps=EPS, key_group=key_group)
    for (name, found), wanted in zip(out.items(), reference, strict=True):
        if found.dtype == np.int8:
            difference = np.abs(found.astype(int) - wanted.astype(int))
            assert difference.max() <= 1, name
            assert (difference > 0).mean() < 1e-3, name
        else:
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
    if "fp8" not in kinds(gpu):
        return
    problem.run(gpu, "value_statistics")
    np.testing.assert_array_equal(t["value_max"], values.value_statistics(t["v"]))
    out = problem.run(gpu, "value_quantise", RANGE=448.0)
    codes, scale = values.value_quantise(t["v"], t["value_max"], value_range=448.0)
    np.testing.assert_allclose(out["value_scale"], scale, rtol=1e-6)
    assert (out["value"].view(np.uint8) != codes.view(np.uint8)).mean() < 1e-3


@pytest.mark.parametrize("tactic", range(3))
@pytest.mark.parametrize("activation", [DType.BFLOAT16, DType.FLOAT16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention(gpu: GpuRunner, tactic: int, activation: DType, head_dim: int) -> None:
    for pv in kinds(gpu):
        offered = tactics(ATTENTION[pv], gpu.architecture)
        if tactic >= len(offered):
            continue
        group = offered[tactic].tiles["BLOCK_N"]
        gpu.tactic = sum(other.tiles["BLOCK_N"] == group for other in offered[:tactic])
        for image, text in ((1000, 77), (1, 256), (64, 0)):
            problem = Problem(image, text, head_dim, activation=activation)
            out = problem.attend(gpu, pv, group)
            limit = GOALS[pv] if activation is DType.FLOAT16 else min(GOALS[pv], 0.99997)
            assert np.isfinite(out).all()
            assert cosine(out, problem.exact()) >= limit, (pv, image, text)


def test_videos_of_different_lengths(gpu: GpuRunner) -> None:
    for pv in kinds(gpu):
        problem = Problem(500, 256, batch=3)
        problem.tensors["key_lengths"] = np.array([756, 501, 640], np.int32)
        assert cosine(problem.attend(gpu, pv), problem.exact()) > 0.9999


def test_long_sequences_are_summed_in_fp32(gpu: GpuRunner) -> None:
    """Values with a mean, over more keys than an accumulator of 14 bits can count."""
    for pv in kinds(gpu):
        problem = Problem(32_700, 68, heads=1, value_mean=3.0)
        out = problem.attend(gpu, pv)
        rows = np.linspace(0, problem.tokens - 1, 40).astype(int)
        q, k = problem.rotated()
        exact = attention(q[:, rows], k, problem.tensors["v"])
        assert relative_l1(out[:, rows], exact) < 0.005, pv


def test_block_sparse(gpu: GpuRunner) -> None:
    for pv in kinds(gpu):
        for tactic in tactics(SPARSE[pv], gpu.architecture):
            group = tactic.tiles["BLOCK_N"]
            gpu.tactic = 0
            problem = Problem(1024, 100)
            layout = Layout(1024, 100, group)
            random = np.random.default_rng(5)
            image = random.random((2, layout.query_blocks, layout.key_blocks)) < 0.3
            mask = layout.with_text(image)
            mask[0, 2] = False  # an empty list
            lists = block_lists(mask)
            problem.tensors |= {"block_index": lists.block_index, "block_start": lists.block_start}
            problem.tensors["block_keys"] = layout.key_counts()
            out = problem.attend(gpu, pv, group, sparse=True)
            visible = visible_keys(lists.block_index, lists.block_start, layout.key_counts(), 1124, group)
            assert cosine(out, problem.exact(visible)) > 0.9995
            assert not out[:, 256:384, 0].any()


def test_dense_lists_are_dense_attention(gpu: GpuRunner) -> None:
    for pv in kinds(gpu):
        problem = Problem(900, 41)
        layout = Layout(900, 41, 64)
        lists = block_lists(np.broadcast_to(patterns.dense(layout), (2, layout.query_blocks, layout.key_blocks)))
        problem.tensors |= {"block_index": lists.block_index, "block_start": lists.block_start}
        problem.tensors["block_keys"] = layout.key_counts()
        assert cosine(problem.attend(gpu, pv, sparse=True), problem.attend(gpu, pv)) > 0.99999


def test_runs_are_alike_to_the_bit(gpu: GpuRunner) -> None:
    for pv in kinds(gpu):
        problem = Problem(3000, 200)
        first = problem.attend(gpu, pv)
        for _ in range(3):
            np.testing.assert_array_equal(problem.attend(gpu, pv), first)
