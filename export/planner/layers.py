"""Layers of a stage as the planner sees them: how large each is, in which precision, and how much work one call is.

Derived from the stage's own parameters, the family's quantisation rules and the recipe; nothing is built. The module
does not know GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from reelforge.calibration.rules import StageRules, matches
from reelforge.export.planner.work import Attention, Call, Live, Moment
from reelforge.runtime.recipe import Precision, Recipe

BYTES: Mapping[Precision, int] = {
    Precision.FP32: 4,
    Precision.BF16: 2,
    Precision.FP16: 2,
    Precision.INT8: 1,
    Precision.FP8: 1,
}
_SCALE_BYTES = 4  # fp32, one per output channel of the weight and one for the activation


@dataclass(frozen=True)
class Layer:
    """A matrix product, a convolution, or a table that is looked up.

    Attributes:
        name: Without ``.weight``.
        shape: Of the weight: outputs, inputs, kernel.
        precision: Of its arithmetic.
        bytes: Of its weight, bias and scales.
    """

    name: str
    shape: tuple[int, ...]
    precision: Precision
    bytes: int

    @property
    def convolution(self) -> bool:
        """Whether it is a convolution (of any kernel size) and no matrix product."""
        return len(self.shape) > 2


@dataclass(frozen=True)
class StageLayers:
    """All parameters of a stage.

    Attributes:
        name: The stage's.
        base: Precision of what is not in 8 bits.
        attention: Precision of the attentions that a recipe may quantise.
        layers: By name.
        sizes: Bytes by parameter; a scale counts to its weight.
    """

    name: str
    base: Precision
    attention: Precision
    layers: Mapping[str, Layer]
    sizes: Mapping[str, int]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters, in the precisions of the recipe."""
        return sum(self.sizes.values())

    def of(self, name: str, parameters: Iterable[str]) -> StageLayers:
        """Return those of the layers that another view of the stage has, under its name."""
        own = set(parameters)
        layers = {key: layer for key, layer in self.layers.items() if f"{key}.weight" in own}
        return replace(self, name=name, layers=layers, sizes={key: self.sizes[key] for key in self.sizes if key in own})

    def attention_precision(self, attention: Attention) -> Precision:
        """Return the precision in which an attention of this stage is computed."""
        return self.attention if attention.quantisable else self.base

    def moment_bytes(self, moment: Moment) -> int:
        """Return the size of what is alive at a moment; nothing, if the moment does not exist in these precisions."""
        if moment.layer and self.layers[moment.layer].precision.quantised is not moment.eight_bit:
            return 0
        return sum(live.elements * BYTES[self._precision(live)] for live in moment.live)

    def _precision(self, live: Live) -> Precision:
        if live.fp32:
            return Precision.FP32
        if live.attended:
            return self.attention
        found = self.layers.get(live.read_by)
        return self.base if found is None else found.precision


def stage_layers(
    stage: str, shapes: Mapping[str, tuple[int, ...]], recipe: Recipe, rules: StageRules | None
) -> StageLayers:
    """Return the layers of one stage in the precisions of a recipe.

    Args:
        stage: Its name.
        shapes: Of its parameters.
        recipe: Holds its precision.
        rules: Of the family; None if nothing of the stage may be in 8 bits.
    """
    precision, base = recipe.precision[stage], recipe.base(stage)
    kept = recipe.kept.get(stage, ())
    layers: dict[str, Layer] = {}
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        layer, _, role = name.rpartition(".")
        if role != "weight" or len(shape) < 2:
            sizes[name] = math.prod(shape) * BYTES[base]
            continue
        eight_bit = precision.quantised and rules is not None and rules.covers(layer) and not matches(layer, kept)
        chosen = precision if eight_bit else base
        sizes[name] = math.prod(shape) * BYTES[chosen] + (_SCALE_BYTES * (shape[0] + 1) if eight_bit else 0)
        bias = math.prod(shapes.get(f"{layer}.bias", (0,))) * BYTES[base]
        layers[layer] = Layer(layer, shape, chosen, sizes[name] + bias)
    attention = base if recipe.attention is None else recipe.attention
    return StageLayers(stage, base, attention, layers, sizes)


def rows_of(call: Call, layers: StageLayers) -> Mapping[str, int]:
    """Return how many rows one call sends through each layer; layers without any are left out.

    Raises:
        AssertionError: If the family's work says nothing about a layer, which is a bug in its cost model.
    """
    result = {}
    for name in layers.layers:
        found = next((rows.rows for rows in call.rows if matches(name, (rows.pattern,))), None)
        if found is None:
            raise AssertionError(f"the cost model says nothing about {layers.name}.{name}")
        if found:
            result[name] = found
    return result
