"""Chooses which layers stay in high precision so that a quality budget is met with few bytes.

Greedy over what each layer loses alone per byte, then held against the truth: every choice that is returned has been
evaluated end to end. The module does not know what quality is measured as, only that more is better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from reelforge.runtime.errors import VerificationError

MAX_REMOVALS = 24
"""How many layers are tried to be given back after the search; each costs one evaluation."""


@dataclass(frozen=True)
class LayerCost:
    """One layer's choice: ``loss`` if it is quantised, ``high_precision_bytes`` if it is not.

    Losses of layers that are quantised together are taken to add up, as the energies of independent errors do.
    """

    loss: float
    high_precision_bytes: int


@dataclass(frozen=True)
class Choice:
    """The layers to keep, and what was measured with them.

    Attributes:
        kept: In the order of the costs.
        quality: What ``evaluate`` returned for them.
        kept_bytes: In high precision.
        total_bytes: Of all layers, if none were quantised.
        evaluations: How often ``evaluate`` was called.
    """

    kept: tuple[str, ...]
    quality: float
    kept_bytes: int
    total_bytes: int
    evaluations: int


def most_evaluations(layers: int, max_removals: int = MAX_REMOVALS) -> int:
    """Return how often :func:`choose_recipe` evaluates at most."""
    return 2 + layers.bit_length() + min(max_removals, layers)


def choose_recipe(
    costs: Mapping[str, LayerCost],
    budget: float,
    evaluate: Callable[[frozenset[str]], float],
    max_removals: int = MAX_REMOVALS,
) -> Choice:
    """Return layers to keep in high precision with which the quality is at least ``budget``.

    The layers are ordered by loss per byte. Bisection finds a shortest sufficient beginning of that order; then layers
    that turn out not to be needed, most bytes first, are quantised again. If losses add up and ``evaluate`` falls with
    their sum, the kept bytes exceed the optimum's by less than one layer.

    Args:
        costs: Of every layer.
        budget: In the unit of ``evaluate``.
        evaluate: The quality measured end to end when exactly these layers are kept.
        max_removals: How many layers are tried to be quantised again.

    Raises:
        VerificationError: If not even keeping all of them is enough.
    """
    measured: dict[frozenset[str], float] = {}

    def quality(kept: frozenset[str]) -> float:
        if kept not in measured:
            measured[kept] = evaluate(kept)
        return measured[kept]

    def choice(kept: frozenset[str]) -> Choice:
        return Choice(
            kept=tuple(name for name in costs if name in kept),
            quality=quality(kept),
            kept_bytes=sum(costs[name].high_precision_bytes for name in kept),
            total_bytes=sum(cost.high_precision_bytes for cost in costs.values()),
            evaluations=len(measured),
        )

    order = sorted(costs, key=lambda name: (-costs[name].loss / max(1, costs[name].high_precision_bytes), name))
    if quality(frozenset()) >= budget:
        return choice(frozenset())
    if quality(frozenset(order)) < budget:
        raise VerificationError(
            "the quality budget cannot be met, not even with all of these layers in high precision.",
            received=f"{quality(frozenset(order)):.6g} with all {len(order)} layers kept",
            expected=f"at least {budget:.6g}",
            fix="lower the budget, or look at what else differs from the reference",
        )
    too_few, enough = 0, len(order)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if quality(frozenset(order[:middle])) >= budget:
            enough = middle
        else:
            too_few = middle
    kept = frozenset(order[:enough])
    by_bytes = sorted(kept, key=lambda name: (-costs[name].high_precision_bytes, costs[name].loss, name))
    for name in by_bytes[:max_removals]:
        if quality(kept - {name}) >= budget:
            kept -= {name}
    return choice(kept)
