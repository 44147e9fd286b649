"""From a recipe and a scale file to what happens to each stage's weights: codes, scales, and folded smoothing.

A plan is data: which layers are stored in which 8-bit format with which factors on their columns and rows, and which
other parameters take in the inverse of a smoothing. It is the same whatever target the graph is lowered to. The module
reads no weights and knows no model: rules come from the family, numbers from the scale file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from reelforge.calibration.number_formats import FP8_E4M3, INT8, NumberFormat
from reelforge.calibration.rules import Fold, FoldKind, Formats, SmoothingGroup, StageRules, matches
from reelforge.calibration.scale_file import ScaleFile, ScaleKind, tensor_name
from reelforge.calibration.weight_stream import WeightQuantisation
from reelforge.export.passes.quantise_attention import AttentionScales
from reelforge.export.passes.quantise_layers import ActivationScales
from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import Precision, Recipe

if TYPE_CHECKING:  # importing it imports PyTorch
    from reelforge.export.stage import Stage

NUMBER_FORMATS: Mapping[Precision, NumberFormat] = {Precision.INT8: INT8, Precision.FP8: FP8_E4M3}
_PRECISIONS = {number_format: precision for precision, number_format in NUMBER_FORMATS.items()}


@dataclass
class RowAffine:
    """``row * multiplier + offset`` for every row of a parameter, its columns multiplied by ``columns`` before.

    ``multiplier`` and ``offset`` are fp64 ``[rows]``, ``columns`` is fp64 ``[columns]`` or None.
    """

    multiplier: NDArray[np.float64]
    offset: NDArray[np.float64]
    columns: NDArray[np.float64] | None = None

    @classmethod
    def identity(cls, rows: int) -> RowAffine:
        """Return one that changes nothing."""
        return cls(np.ones(rows), np.zeros(rows))


@dataclass(frozen=True)
class LayerPlan:
    """What one 8-bit layer needs.

    Attributes:
        weight: How its weight is quantised.
        activation: How its input may be.
        output_range: Of an INT8 convolution, what its output spans; of others None.
    """

    weight: WeightQuantisation
    activation: ActivationScales
    output_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class StagePlan:
    """What happens to one stage's weights.

    Attributes:
        layers: The 8-bit layers, by name.
        folded: Parameters in high precision whose rows change, by name.
        attentions: Scales of the attentions whose inputs are in 8 bits, by name.
    """

    layers: Mapping[str, LayerPlan] = field(default_factory=dict)
    folded: Mapping[str, RowAffine] = field(default_factory=dict)
    attentions: Mapping[str, AttentionScales] = field(default_factory=dict)


def layers_of(stage: Stage) -> list[str]:
    """Return the names of a stage's layers: what has a weight of two or more dimensions."""
    shapes = stage.parameter_shapes()
    return [key.removesuffix(".weight") for key, shape in shapes.items() if key.endswith(".weight") and shape[1:]]


def quantised_formats(recipe: Recipe, rules: Mapping[str, StageRules], stages: Mapping[str, Stage]) -> Formats:
    """Return which layers the recipe quantises, and to what.

    Raises:
        RequestError: If a stage cannot be quantised, or a pattern of ``recipe.kept`` fits no layer.
    """
    formats: dict[str, dict[str, NumberFormat]] = {}
    for name in recipe.quantised_stages():
        if name not in rules:
            raise RequestError(
                f"the stage {name!r} cannot be computed in 8 bits.",
                received=f"{name}={recipe.precision[name].value}",
                expected="8 bits for " + " or ".join(rules),
                fix=f"leave {name} in fp32 or fp16: it is small, and every error in it reaches all blocks",
            )
        layers = [layer for layer in layers_of(stages[name]) if rules[name].covers(layer)]
        kept = recipe.kept.get(name, ())
        unused = [pattern for pattern in kept if not any(matches(layer, (pattern,)) for layer in layers)]
        if unused:
            raise RequestError(
                f"no layer of stage {name!r} fits what the recipe keeps in high precision.",
                received=", ".join(unused),
                expected=f"names such as {', '.join(layers[:3])}; * stands for any characters",
                fix="list the layers with reelforge sensitivity",
            )
        number_format = NUMBER_FORMATS[recipe.precision[name]]
        formats[name] = {layer: number_format for layer in layers if not matches(layer, kept)}
    return formats


def attention_formats(recipe: Recipe, rules: Mapping[str, StageRules]) -> Formats:
    """Return which attentions the recipe quantises, and to what.

    Raises:
        RequestError: If there is no attention in that precision.
    """
    if recipe.attention is None:
        return {}
    if recipe.attention not in NUMBER_FORMATS:
        raise RequestError(
            f"attention cannot be computed in {recipe.attention.value}.",
            received=recipe.attention.value,
            expected="fp8, int8 (for --target cpu), or nothing for high precision",
            fix="use --attention fp8 or --attention int8",
        )
    return {
        stage: dict.fromkeys(rules[stage].attentions, NUMBER_FORMATS[recipe.attention])
        for stage in recipe.precision
        if stage in rules and rules[stage].attentions
    }


def applicable_groups(rules: Mapping[str, StageRules], formats: Formats) -> tuple[SmoothingGroup, ...]:
    """Return the groups of which every layer is quantised: a layer in high precision has nothing to gain from one."""
    return tuple(
        group
        for stage, layers in formats.items()
        for group in rules[stage].groups
        if all(layer in layers for layer in group.layers)
    )


def required_scales(formats: Formats, attentions: Formats, stages: Mapping[str, Stage]) -> list[str]:
    """Return the names of the tensors that a scale file must have."""
    of_layers = [
        tensor_name(stage, layer, kind)
        for stage, layers in formats.items()
        for layer, number_format in layers.items()
        for kind in (ScaleKind.ACTIVATION, *_ranges(stages[stage], layer, number_format))
    ]
    of_attentions = [
        tensor_name(stage, name, kind)
        for stage, names in attentions.items()
        for name in names
        for kind in (ScaleKind.QUERY, ScaleKind.KEY, ScaleKind.VALUE)
    ]
    return [*of_layers, *of_attentions]


def _ranges(stage: Stage, layer: str, number_format: NumberFormat) -> tuple[ScaleKind, ...]:
    """Return which ranges a layer has: INT8 one of its input, and a convolution one of its output."""
    if number_format is not INT8:
        return ()
    convolves = len(stage.parameter_shapes()[f"{layer}.weight"]) > 2
    return (ScaleKind.RANGE, ScaleKind.OUTPUT) if convolves else (ScaleKind.RANGE,)


def activation_scales(scales: ScaleFile, stage: str, layer: str, number_format: NumberFormat) -> ActivationScales:
    """Return what the scale file has for a layer's input; only INT8 has a range.

    Raises:
        CalibrationError: If the scale file lacks it.
    """
    scale = float(scales.get(stage, layer, ScaleKind.ACTIVATION))
    if number_format is not INT8:
        return ActivationScales(scale)
    return ActivationScales(scale, _range(scales, stage, layer, ScaleKind.RANGE))


def _range(scales: ScaleFile, stage: str, layer: str, kind: ScaleKind) -> tuple[float, float]:
    lowest, highest = (float(limit) for limit in scales.get(stage, layer, kind))
    return lowest, highest


def plan_quantisation(
    formats: Formats,
    attentions: Formats,
    groups: tuple[SmoothingGroup, ...],
    scales: ScaleFile,
    stages: Mapping[str, Stage],
) -> dict[str, StagePlan]:
    """Return the plan of every stage that changes.

    Args:
        formats: From :func:`quantised_formats`.
        attentions: From :func:`attention_formats`.
        groups: All that the quantised stages have; those without factors in the scale file are left alone.
        scales: The activations' scales and the smoothing factors.
        stages: All stages of the model, by name.

    Raises:
        CalibrationError: If the scale file lacks a layer.
    """
    columns: dict[tuple[str, str], NDArray[np.float32]] = {}
    divisors: dict[tuple[str, str], NDArray[np.float32]] = {}
    folded: dict[str, dict[str, RowAffine]] = {}
    for group in groups:
        if tensor_name(group.stage, group.layers[0], ScaleKind.SMOOTHING) not in scales.tensors:
            continue
        for layer in group.layers:
            factors = scales.get(group.stage, layer, ScaleKind.SMOOTHING)
            if layer in formats.get(group.stage, {}):
                columns[group.stage, layer] = factors
                continue
            # A layer in high precision reads the smoothed input, too, if its neighbours are in 8 bits.
            shapes = stages[group.stage].parameter_shapes()
            affine = folded.setdefault(group.stage, {})
            name = f"{layer}.weight"
            affine.setdefault(name, RowAffine.identity(shapes[name][0])).columns = factors.astype(np.float64)
        for fold in group.folds:
            shapes = stages[fold.stage].parameter_shapes()
            affine = folded.setdefault(fold.stage, {})
            if fold.layer in formats.get(fold.stage, {}):
                divisors[fold.stage, fold.layer] = factors
                _fold(affine, shapes, fold, factors, ("bias",))
            else:
                _fold(affine, shapes, fold, factors, ("weight", "bias"))
    return {
        stage: StagePlan(
            layers={
                layer: LayerPlan(
                    WeightQuantisation(number_format, columns.get((stage, layer)), divisors.get((stage, layer))),
                    activation_scales(scales, stage, layer, number_format),
                    _range(scales, stage, layer, ScaleKind.OUTPUT)
                    if ScaleKind.OUTPUT in _ranges(stages[stage], layer, number_format)
                    else None,
                )
                for layer, number_format in formats.get(stage, {}).items()
            },
            folded=folded.get(stage, {}),
            attentions={
                name: AttentionScales(
                    float(scales.get(stage, name, ScaleKind.QUERY)),
                    float(scales.get(stage, name, ScaleKind.KEY)),
                    float(scales.get(stage, name, ScaleKind.VALUE)),
                    _PRECISIONS[number_format],
                )
                for name, number_format in attentions.get(stage, {}).items()
            },
        )
        for stage in {**formats, **attentions, **folded}
    }


def _fold(
    folded: dict[str, RowAffine],
    shapes: Mapping[str, tuple[int, ...]],
    fold: Fold,
    factors: NDArray[np.float32],
    parameters: tuple[str, ...],
) -> None:
    """Divide the rows that feed the smoothed input by ``s``; ``1 + scale`` too, which moves the bias of the scale."""
    inverse = 1.0 / factors.astype(np.float64)
    for parameter in parameters:
        name = f"{fold.layer}.{parameter}"
        if name not in shapes:
            continue
        affine = folded.setdefault(name, RowAffine.identity(shapes[name][0]))
        first = slice(*(fold.shift_rows or (0, shapes[name][0])))
        affine.multiplier[first] *= inverse
        affine.offset[first] *= inverse
        if fold.kind is FoldKind.MODULATION:
            rows = slice(*(fold.scale_rows or ()))
            affine.multiplier[rows] *= inverse
            if parameter == "bias":
                affine.offset[rows] = (affine.offset[rows] + 1.0) * inverse - 1.0
