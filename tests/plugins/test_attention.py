"""Attention kernels, interpreted, from projected q, k and v to the output, against float64 attention."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reelforge.plugins.interpreter import Interpreter
from reelforge.plugins.kernels import int8_attention_reference as reference
from reelforge.plugins.schema import PLUGINS, DType
from reelforge.tools.bench.attention_problems import ATTENTION, EPS, Problem, cosine, relative_l1

GOALS = {"fp8": 0.9999, "fp8_fp16_accumulator": 0.9999, "fp16": 0.99999}
VARIANTS = tuple(GOALS)
SHAPES = [(200, 56), (1, 256), (320, 1), (255, 64), (33, 8)]


@pytest.mark.parametrize("pv", VARIANTS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("image", "text"), SHAPES)
def test_close_to_float64(interpreter: Interpreter, pv: str, head_dim: int, image: int, text: int) -> None:
    problem = Problem(image, text, head_dim, heads=1, activation=DType.FLOAT16)
    out = problem.attend(interpreter, pv)
    exact = problem.exact()
    assert cosine(out, exact) >= GOALS[pv]
    assert relative_l1(out, exact) <= (0.02 if pv != "fp16" else 0.005)


@pytest.mark.parametrize("pv", VARIANTS)
def test_kernel_against_its_own_reference(interpreter: Interpreter, pv: str) -> None:
    problem = Problem(140, 40, heads=2, batch=2)
    problem.tensors["key_lengths"] = np.array([180, 147], np.int32)
    out = problem.attend(interpreter, pv)
    schema = PLUGINS[ATTENTION[pv]]
    inputs = [problem.tensors[tensor.name] for tensor in schema.inputs]
    exact = getattr(importlib.import_module(reference.__name__), schema.name)(*inputs, key_group=64)
    assert cosine(out, exact) >= 0.99998
    # What is left is P's format and the output's: one part in 2**4 and 2**9 of each term.
    assert np.abs(out - exact).max() <= 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("pv", ["fp8", "fp16"])
def test_keys_beyond_the_length_do_not_count(interpreter: Interpreter, pv: str) -> None:
    problem = Problem(100, 60, batch=2, head_dim=64)
    problem.tensors["key_lengths"] = np.array([101, 160], np.int32)
    before = problem.attend(interpreter, pv)
    problem.tensors["v"][0, 101:] = problem.tensors["v"][0, 90:149]  # no larger than before: the same scales
    if pv == "fp16":
        after = problem.attend(interpreter, pv)
        np.testing.assert_array_equal(before[0], after[0])
    else:
        after = problem.attend(interpreter, pv)
        assert cosine(before[0], after[0]) > 0.9999
    assert cosine(after, problem.exact()) > 0.9995


@pytest.mark.parametrize("key_group", [64, 128])
def test_values_without_a_mean(interpreter: Interpreter, key_group: int) -> None:
    problem = Problem(600, 40, heads=1, value_mean=0.0, key_mean=0.5)
    assert cosine(problem.attend(interpreter, "fp8", key_group), problem.exact()) >= 0.999


def test_outlier_channels(interpreter: Interpreter) -> None:
    problem = Problem(200, 60, outliers=True)
    for pv in ("fp8", "fp16"):
        assert cosine(problem.attend(interpreter, pv), problem.exact()) >= 0.999


def test_taking_the_mean_off_the_keys_matters(interpreter: Interpreter) -> None:
    errors = {}
    for smoothing in (True, False):
        problem = Problem(240, 16, heads=1, activation=DType.FLOAT16)
        problem.tensors["k"][..., [63, 127]] += 20  # the slowest pair of channels, which rotation leaves its mean
        problem.attend(interpreter, "fp16")
        if not smoothing:
            problem.tensors["key_sums"] = np.zeros_like(problem.tensors["key_sums"])
            problem.run(interpreter, "rotary_qk_norm_quantise", EPS=EPS, KEY_GROUP=64)
            problem.run(interpreter, ATTENTION["fp16"], KEY_GROUP=64, BLOCK_M=64, BLOCK_N=64, STAGES=2)
        errors[smoothing] = relative_l1(problem.tensors["out"].astype(np.float64), problem.exact())
    assert errors[False] > 1.5 * errors[True]


def test_a_softmax_of_one_key(interpreter: Interpreter) -> None:
    problem = Problem(1, 0, head_dim=64)
    out = problem.attend(interpreter, "fp8")
    np.testing.assert_allclose(out, problem.tensors["v"].astype(np.float64), rtol=2**-4)


@pytest.mark.parametrize("pv", VARIANTS)
def test_queries_of_zeros_take_the_mean_of_the_keys_that_count(interpreter: Interpreter, pv: str) -> None:
    problem = Problem(100, 60, head_dim=64, heads=1)
    problem.tensors["q"][:] = 0
    problem.tensors["key_lengths"] = np.array([130], np.int32)
    out = problem.attend(interpreter, pv)
    mean = problem.tensors["v"][:, :130].astype(np.float64).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), atol=0.04)


def test_huge_scores_do_not_overflow(interpreter: Interpreter) -> None:
    problem = Problem(130, 20, head_dim=64)
    problem.tensors["query_norm"] = problem.tensors["query_norm"] * 100
    out = problem.attend(interpreter, "fp8")
    assert np.isfinite(out).all()
    # Nearly a hard maximum: every output is close to one value, so that the oracle's own key wins or ties.
    assert cosine(out, problem.exact()) > 0.98


@given(
    st.integers(1, 150),
    st.integers(0, 90),
    st.sampled_from([64, 128]),
    st.sampled_from(sorted(GOALS)),
    st.integers(0, 2**32 - 1),
    st.data(),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_lengths(
    interpreter: Interpreter, image: int, text: int, head_dim: int, pv: str, seed: int, data: st.DataObject
) -> None:
    problem = Problem(image, text, head_dim, heads=1, batch=2, seed=seed, activation=DType.FLOAT16)
    lengths = [data.draw(st.integers(1, image + text)) for _ in range(2)]
    problem.tensors["key_lengths"] = np.array(lengths, np.int32)
    out = problem.attend(interpreter, pv)
    exact = problem.exact()
    assert np.isfinite(out).all()
    # The error of a value's format does not shrink where few keys share the weight.
    assert np.abs(out - exact).max() <= 0.08 * np.abs(problem.tensors["v"].astype(np.float64)).max()
    assert cosine(out, exact) > 0.9985
