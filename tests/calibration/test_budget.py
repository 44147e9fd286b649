"""Choosing layers for a budget: it is met, nothing in the choice is superfluous, and the optimum is near."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelforge.calibration.budget import LayerCost, choose_recipe, most_evaluations
from reelforge.runtime.errors import VerificationError

Costs = Mapping[str, LayerCost]

TABLES = st.lists(st.tuples(st.floats(1e-9, 1.0), st.integers(1, 1000)), min_size=1, max_size=8).map(
    lambda rows: {f"layer.{index}": LayerCost(*row) for index, row in enumerate(rows)}
)


def psnr_of(costs: Costs) -> Callable[[frozenset[str]], float]:
    """Losses that add up, as the search expects them to."""

    def evaluate(kept: frozenset[str]) -> float:
        loss = sum(cost.loss for name, cost in costs.items() if name not in kept)
        return math.inf if loss == 0 else -10 * math.log10(loss)

    return evaluate


def size(costs: Costs, kept: tuple[str, ...]) -> int:
    return sum(costs[name].high_precision_bytes for name in kept)


@given(TABLES, st.floats(-10, 90))
def test_the_budget_is_met_with_nothing_superfluous(costs: Costs, budget: float) -> None:
    evaluate = psnr_of(costs)
    choice = choose_recipe(costs, budget, evaluate)
    assert choice.quality == evaluate(frozenset(choice.kept)) >= budget
    assert choice.kept_bytes == size(costs, choice.kept)
    assert choice.total_bytes == size(costs, tuple(costs))
    assert choice.kept == tuple(name for name in costs if name in choice.kept)
    for name in choice.kept:
        assert evaluate(frozenset(choice.kept) - {name}) < budget


@given(TABLES, st.floats(-10, 90))
def test_bytes_exceed_the_optimum_by_less_than_a_layer(costs: Costs, budget: float) -> None:
    """The optimum by trying every subset."""
    evaluate = psnr_of(costs)
    choice = choose_recipe(costs, budget, evaluate)
    subsets = itertools.chain.from_iterable(itertools.combinations(costs, count) for count in range(len(costs) + 1))
    best = min(size(costs, kept) for kept in subsets if evaluate(frozenset(kept)) >= budget)
    largest = max(cost.high_precision_bytes for cost in costs.values())
    assert best <= choice.kept_bytes < best + largest or choice.kept_bytes == best


@given(TABLES, st.floats(0, 60), st.randoms(use_true_random=False))
def test_a_choice_is_verified_whatever_the_measurements_are(costs: Costs, budget: float, random: object) -> None:
    """Also where keeping more layers may measure worse."""
    noise: dict[frozenset[str], float] = {}

    def evaluate(kept: frozenset[str]) -> float:
        if len(kept) == len(costs):
            return math.inf
        return noise.setdefault(kept, random.uniform(0, 60))  # type: ignore[attr-defined]

    choice = choose_recipe(costs, budget, evaluate)
    assert evaluate(frozenset(choice.kept)) == choice.quality >= budget


@settings(max_examples=25)
@given(st.integers(1, 400), st.integers(0, 400), st.integers(0, 30))
def test_evaluations_are_few_and_counted(layers: int, needed: int, removals: int) -> None:
    costs = {f"{index:03d}": LayerCost(1.0 / (index + 1), 8) for index in range(layers)}
    calls = []

    def evaluate(kept: frozenset[str]) -> float:
        calls.append(kept)
        return len(kept)

    choice = choose_recipe(costs, min(needed, layers), evaluate, removals)
    assert len(choice.kept) == min(needed, layers)
    assert choice.evaluations == len(calls) == len(set(calls)) <= most_evaluations(layers, removals)


def test_the_best_per_byte_come_first() -> None:
    costs = {"large": LayerCost(0.5, 100), "small": LayerCost(0.4, 10), "dull": LayerCost(0.01, 10)}
    choice = choose_recipe(costs, -10 * math.log10(0.52), psnr_of(costs))
    assert choice.kept == ("small",)


def test_layers_that_turn_out_superfluous_are_given_back() -> None:
    """What a layer loses alone is not what it loses in company: here ``a`` does not matter at all."""
    costs = {"a": LayerCost(0.9, 10), "b": LayerCost(0.5, 10)}
    assert choose_recipe(costs, 1.0, lambda kept: float("b" in kept)).kept == ("b",)
    assert choose_recipe(costs, 1.0, lambda kept: float("b" in kept), max_removals=0).kept == ("a", "b")


def test_nothing_is_kept_where_nothing_need_be() -> None:
    choice = choose_recipe({"a": LayerCost(0.1, 10)}, 5.0, psnr_of({"a": LayerCost(0.1, 10)}))
    assert (choice.kept, choice.kept_bytes, choice.total_bytes, choice.evaluations) == ((), 0, 10, 1)


def test_a_budget_that_cannot_be_met() -> None:
    costs = {"a": LayerCost(0.1, 10), "b": LayerCost(0.2, 10)}
    with pytest.raises(VerificationError) as caught:
        choose_recipe(costs, 50.0, lambda kept: 31.25)
    assert caught.value.exit_code == 6
    text = str(caught.value)
    assert "cannot be met, not even with all of these layers in high precision" in text
    assert "received: 31.25 with all 2 layers kept" in text
    assert "expected: at least 50" in text
    assert "lower the budget" in text
