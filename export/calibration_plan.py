"""What a calibration observes, and which of it arrives smoothed: names from the recipe looked up in a bundle's graphs.

The module reads graphs and weights, the latter in pieces and only for smoothing; it runs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from reelforge.calibration.errors import CalibrationError
from reelforge.calibration.number_formats import INT8, NumberFormat
from reelforge.calibration.observe import FloatArray, ObservedTensor
from reelforge.calibration.rules import SmoothingGroup
from reelforge.calibration.scale_file import ScaleKind
from reelforge.calibration.smoothing import migration_factors
from reelforge.calibration.weight_maxima import stored_channel_maxima
from reelforge.export.cut import infer_types
from reelforge.export.observed import ObservedValue, observed_values, smoothed_attentions
from reelforge.runtime.bundle.open import Bundle

Formats = Mapping[str, Mapping[str, NumberFormat]]
"""Stage -> layer (or attention) -> the 8-bit format that it gets."""

ATTENTION_SUFFIX = ".attention"


@dataclass(frozen=True)
class PlannedGroup:
    """A smoothing group in a graph.

    Attributes:
        group: The group.
        inputs: Names of the tensors that its layers read.
        divided: Names of all tensors that arrive divided by its factors: ``inputs``, and an attention's values where
            the factors are folded into what computes them.
    """

    group: SmoothingGroup
    inputs: tuple[str, ...]
    divided: tuple[str, ...]

    def factors(self, bundle: Bundle, maxima: Mapping[str, FloatArray], alpha: float) -> FloatArray:
        """Return the group's factors, fp32 ``[C]``, from the channel maxima of ``inputs`` and of the layers' weights.

        Raises:
            CalibrationError: If a weight is not finite or stored in 8 bits.
            BundleError: If a weight cannot be read.
        """
        stored = {weight.name: weight for weight in bundle.stage(self.group.stage).weights}
        weights = [stored_channel_maxima(bundle.path, stored[f"{layer}.weight"]) for layer in self.group.layers]
        observed = [maxima[name] for name in self.inputs]
        return migration_factors(np.max(observed, axis=0), np.max(weights, axis=0), alpha)


def format_names(formats: Formats, attention: Formats) -> dict[str, list[str]]:
    """Return the names of the number formats in use by stage, as a scale file states them."""
    names = {stage: [item.name for item in layers.values()] for stage, layers in formats.items() if layers}
    for stage, nodes in attention.items():
        names[stage + ATTENTION_SUFFIX] = [item.name for item in nodes.values()]
    return names


@dataclass(frozen=True)
class CalibrationPlan:
    """What to observe of a bundle.

    Attributes:
        observed: By stage, in execution order.
        groups: The smoothing groups that apply.
    """

    observed: Mapping[str, tuple[ObservedValue, ...]]
    groups: tuple[PlannedGroup, ...]

    def values(self) -> list[ObservedValue]:
        """Return all observed values."""
        return [value for values in self.observed.values() for value in values]

    def tensors(self) -> list[ObservedTensor]:
        """Return all observed tensors."""
        return [value.tensor for value in self.values()]

    def divided(self) -> dict[str, PlannedGroup]:
        """Return the tensors that arrive divided, each with its group."""
        return {name: planned for planned in self.groups for name in planned.divided}

    def only(self, names: Collection[str]) -> dict[str, tuple[ObservedValue, ...]]:
        """Return ``observed`` without tensors that are not in ``names``, and without stages that have none of them."""
        kept = {
            stage: tuple(value for value in values if value.tensor.name in names)
            for stage, values in self.observed.items()
        }
        return {stage: values for stage, values in kept.items() if values}


def plan_calibration(
    bundle: Bundle, formats: Formats, attention: Formats, groups: Sequence[SmoothingGroup]
) -> CalibrationPlan:
    """Return what to observe.

    Args:
        bundle: In high precision.
        formats: The layers to quantise.
        attention: The attentions to quantise.
        groups: Where smoothing may be applied; those with a layer that is not quantised are left out.

    Raises:
        CalibrationError: If there is nothing to observe, or the bundle lacks a layer.
        BundleError: If the bundle lacks a stage.
    """
    observed: dict[str, tuple[ObservedValue, ...]] = {}
    planned: list[PlannedGroup] = []
    for stage in dict.fromkeys([*formats, *attention]):
        layers, attentions = formats.get(stage, {}), attention.get(stage, {})
        model = ir.load(bundle.graph(stage))
        graph = (infer_types(model) if attentions else model).graph  # an attention's operands need a shape
        outputs = [layer for layer, number_format in layers.items() if number_format is INT8]
        values = observed_values(graph, stage, layers, attentions, outputs)
        if values:
            observed[stage] = values
        own = [group for group in groups if group.stage == stage and all(layer in layers for layer in group.layers)]
        planned += [_planned(graph, group, values) for group in own]
    if not observed:
        raise CalibrationError(
            "there is nothing to calibrate.",
            received="no layer and no attention in 8 bits",
            expected="at least one",
            fix="choose int8 or fp8 for a stage, for example --precision dit=int8",
        )
    return CalibrationPlan(observed, tuple(planned))


def _planned(graph: ir.Graph, group: SmoothingGroup, values: Iterable[ObservedValue]) -> PlannedGroup:
    activations = [value for value in values if value.tensor.kind is ScaleKind.ACTIVATION]
    inputs = [value.tensor.name for value in activations if any(layer in group.layers for layer in value.layers)]
    attentions = smoothed_attentions(graph, group)
    mixed = [
        value.tensor.name
        for value in values
        if value.tensor.kind is ScaleKind.VALUE and value.tensor.layer in attentions
    ]
    return PlannedGroup(group, tuple(inputs), (*inputs, *mixed))
