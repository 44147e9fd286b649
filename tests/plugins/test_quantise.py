"""The kernels before the attention, interpreted, against their float64 references and against invariants."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from reelforge.plugins.interpreter import Interpreter
from reelforge.plugins.kernels import rotary_quantise_reference as rotary
from reelforge.plugins.kernels import value_quantise_reference as values
from reelforge.plugins.kernels.int8_attention_reference import dequantise_query_and_key
from reelforge.plugins.schema import DType
from reelforge.tools.bench.attention_problems import EPS, Problem

CASES = [
    Problem(150, 50),
    Problem(128, 0, head_dim=64),
    Problem(1, 1, head_dim=64, heads=3),
    Problem(70, 59, batch=2, outliers=True, activation=DType.FLOAT16),
    Problem(2050, 3, heads=1, head_dim=64),  # two partial sums
]


@pytest.mark.parametrize("problem", CASES, ids=lambda p: f"{p.image}+{p.text}x{p.head_dim}b{p.batch}")
@pytest.mark.parametrize("key_group", [64, 128])
def test_queries_and_keys(interpreter: Interpreter, problem: Problem, key_group: int) -> None:
    t = problem.tensors
    sums = problem.run(interpreter, "key_statistics", EPS=EPS, ROWS=32)["key_sums"]
    expected = rotary.key_statistics(t["k"], t["key_norm"], t["rope_cos"], t["rope_sin"], eps=EPS)
    np.testing.assert_allclose(sums, expected, atol=2e-3)
    out = problem.run(interpreter, "rotary_qk_norm_quantise", EPS=EPS, KEY_GROUP=key_group)
    names = ("q", "k", "query_norm", "key_norm", "rope_cos", "rope_sin", "key_sums")
    reference = rotary.rotary_qk_norm_quantise(*(t[name] for name in names), eps=EPS, key_group=key_group)
    for (name, found), wanted in zip(out.items(), reference, strict=True):
        assert found.shape == wanted.shape, name
        if found.dtype == np.int8:  # a value between two codes may go either way
            difference = np.abs(found.astype(int) - wanted.astype(int))
            assert difference.max() <= 1
            assert (difference > 0).mean() < 1e-3
        else:
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
    assert np.abs(out["query"].astype(int)).max() <= 127
    assert not out["key"][:, :, problem.tokens :].any()  # padding is zero


def test_codes_are_as_near_as_their_step_allows(interpreter: Interpreter) -> None:
    problem = Problem(200, 40)
    problem.quantise(interpreter)
    t = problem.tensors
    q, k = problem.rotated()
    codes = dequantise_query_and_key(t["query"], t["query_scale"], t["key"], t["key_scale"], 64)
    mean = k.mean(axis=1, keepdims=True)
    for found, exact in zip(codes, (q, k - mean), strict=True):
        assert np.abs(found - exact).max() <= np.abs(exact).max() / 127 * 0.51


@pytest.mark.parametrize("problem", CASES, ids=lambda p: f"{p.image}+{p.text}x{p.head_dim}b{p.batch}")
@pytest.mark.parametrize("value_range", [448.0, 2.25])
def test_values(interpreter: Interpreter, problem: Problem, value_range: float) -> None:
    v = problem.tensors["v"]
    largest = problem.run(interpreter, "value_statistics", ROWS=64)["value_max"]
    np.testing.assert_array_equal(largest, values.value_statistics(v))
    out = problem.run(interpreter, "value_quantise", RANGE=value_range)
    codes, scale = values.value_quantise(v, largest, value_range=value_range)
    np.testing.assert_allclose(out["value_scale"], scale, rtol=1e-6)
    found, wanted = out["value"].astype(np.float64), codes.astype(np.float64)
    assert found.shape == wanted.shape
    assert (found != wanted).mean() < 1e-3
    np.testing.assert_allclose(found, wanted, rtol=2**-3, atol=2**-9)
    assert np.abs(found).max() <= value_range
    decoded = values.ungroup(found)[..., : problem.tokens] * scale[..., None]
    exact = v.astype(np.float64).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(decoded, exact, rtol=2**-4 * 1.001, atol=float(scale.max()) * 2**-9)
    assert not values.ungroup(found)[..., problem.tokens :].any()


def test_a_channel_of_zeros_has_no_scale(interpreter: Interpreter) -> None:
    problem = Problem(60, 4, head_dim=64)
    for name in ("q", "k", "v"):
        problem.tensors[name][:] = 0
    out = problem.attend(interpreter)
    assert not problem.tensors["value_scale"].any()
    assert not problem.tensors["query_scale"].any()
    assert not out.any()


def test_regrouping_is_a_permutation_within_32() -> None:
    order = values.regroup(np.arange(128))
    np.testing.assert_array_equal(values.ungroup(order), np.arange(128))
    np.testing.assert_array_equal(order // 32, np.arange(128) // 32)
    # What one thread of four holds of a row of scores, columns 2t and 2t+1 of every 8, is four by four side by side.
    np.testing.assert_array_equal(order[:8], [0, 1, 8, 9, 2, 3, 10, 11])


def test_the_interpreters_cast_to_e4m3(interpreter: Interpreter) -> None:
    random = np.random.default_rng(3)
    x = np.concatenate((random.normal(0, 60, 4000), random.normal(0, 0.01, 2000), [31.6, 448, 449, 1e9, -1e9, 0, -0.0]))
    found = interpreter.cast_to_e4m3(x.astype(np.float32)).astype(np.float64)
    wanted = np.clip(x.astype(np.float32), -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(found, wanted)
    assert found[-7] == 32


def test_the_interpreters_product_of_bfloat16(interpreter: Interpreter) -> None:
    """A single key with a single value: the output is the value, which bits taken for integers would not be."""
    problem = Problem(1, 0, head_dim=64, heads=1)
    out = problem.attend(interpreter, "fp16")
    np.testing.assert_array_equal(out, problem.tensors["v"].astype(np.float64))
