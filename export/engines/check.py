"""What a plan holds against what its recipe promises: layers in their format, attentions in one kernel or plugin each.

The check is on the compiler's own layer information, under every profile; it runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from reelforge.export.engines.request import Expected
from reelforge.runtime.errors import BuildError
from reelforge.runtime.receipt import LayerRecord
from reelforge.runtime.recipe import Precision

TYPES = {
    Precision.FP32: "Float",
    Precision.FP16: "Half",
    Precision.BF16: "BFloat16",
    Precision.INT8: "Int8",
    Precision.FP8: "FP8",
}
"""The compilers' words."""

_SHOWN = 5
_LENGTHS = "Int32"


def check_plan(stage: str, profiles: Sequence[Sequence[LayerRecord]], expected: Expected) -> None:
    """Every expected layer is computed in its format, and every expected attention is one fused kernel in its own.

    Args:
        stage: For the message.
        profiles: The plan's layers under each profile.
        expected: What the recipe promises.

    Raises:
        BuildError: Naming the first few that are not so, how many they are, and what they became.
    """
    problems: dict[str, str] = {}
    for layers in profiles:
        problems |= dict(_layer_problems(layers, expected)) | dict(_attention_problems(layers, expected))
        problems |= dict(_plugin_problems(layers, expected))
    if not any(profiles) and (expected.layers or expected.attentions or expected.plugins):
        raise BuildError(
            f"the compiler said nothing about the layers of stage {stage!r}, so its plan cannot be checked.",
            expected="layer information in the compiler's log",
            fix="use the version of the compiler that reelforge is tested with (constraints.txt)",
        )
    if problems:
        shown = list(problems.items())[:_SHOWN]
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        promised = len(expected.layers) + len(expected.attentions) + len(expected.plugins)
        raise BuildError(
            f"{len(problems)} of {promised} layers and attentions of stage {stage!r} are not in their format.",
            received="; ".join(f"{name}: {problem}" for name, problem in shown) + more,
            expected="what the recipe says, in every optimisation profile",
            fix="keep these layers in high precision (--keep), or choose another precision or architecture",
        )


def _layer_problems(layers: Sequence[LayerRecord], expected: Expected) -> Iterator[tuple[str, str]]:
    found = _by_node(layers, ("gemm", "convolution"))
    for name, precision in expected.layers.items():
        # A neighbouring product may name the layer too, where the addition of its bias is fused to that one.
        operands = [(*record.inputs[:1], *record.constants[:1]) for record in found.get(name, [])]
        if not operands:
            yield name, f"no product found, wanted {precision.value}"
        elif not any(set(types) == {TYPES[precision]} for types in operands):
            words = " and ".join(" x ".join(types) or "nothing" for types in operands)
            yield name, f"computed in {words}, wanted {precision.value}"


def _attention_problems(layers: Sequence[LayerRecord], expected: Expected) -> Iterator[tuple[str, str]]:
    fused, products = _by_node(layers, ("attention",)), _by_node(layers, ("gemm",))
    for name, precision in expected.attentions.items():
        records = fused.get(name, [])
        if len(records) != 1:
            yield name, f"not fused: {len(records)} attention kernels and {len(products.get(name, []))} products"
            continue
        queries, keys, *others = records[0].inputs
        values = [kind for kind in others if kind != _LENGTHS][-1:]  # a mask comes before them
        types = (queries, keys, *values)
        if set(types) != {TYPES[precision]}:
            yield name, f"fused in {', '.join(types)}, wanted {precision.value}"


def _plugin_problems(layers: Sequence[LayerRecord], expected: Expected) -> Iterator[tuple[str, str]]:
    found, fused = _by_node(layers, ("plugin",)), _by_node(layers, ("attention",))
    for name, plugin in expected.plugins.items():
        records = found.get(name, [])
        if len(records) != 1:
            others = len(fused.get(name, []))
            yield name, f"not one layer of {plugin}: {len(records)} plugins and {others} attention kernels"


def _by_node(layers: Sequence[LayerRecord], kinds: Sequence[str]) -> dict[str, list[LayerRecord]]:
    found: dict[str, list[LayerRecord]] = {}
    for record in layers:
        if record.kind in kinds:
            for name in record.nodes:
                found.setdefault(name, []).append(record)
    return found
