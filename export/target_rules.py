"""What each backend computes a stage in, as data: base precisions and their default, with the reasons.

A base precision is that of a stage without 8-bit layers, or of everything else in a stage that has some
(``runtime.recipe.Recipe.base``). What an architecture can do is in ``runtime.architectures``; which architectures share
a plan, in ``export.engines.requirements``. The module knows no graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reelforge.runtime.architectures import ARCHITECTURES
from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import Backend, Precision, Recipe, Target


@dataclass(frozen=True)
class BaseRule:
    """Which base precisions a backend takes.

    Attributes:
        alone: Of a stage without 8-bit layers; the first that every architecture of the target computes in is what a
            build gets that asks for nothing.
        beside_8_bit: Of what is not in 8 bits in a stage that has such layers; likewise.
        why: What stands against the others, as a sentence for the user.
    """

    alone: tuple[Precision, ...]
    beside_8_bit: tuple[Precision, ...]
    why: str


_COMPILED = BaseRule(
    (Precision.BF16, Precision.FP16),
    (Precision.BF16, Precision.FP16),
    "its compiler has no fp32 attention",
)

BASE_RULES: Mapping[Backend, BaseRule] = {
    Backend.CPU: BaseRule(
        (Precision.FP32, Precision.FP16),
        (Precision.FP32,),
        "ONNX Runtime's CPU provider has no bf16 kernels, and computes fp16 by way of fp32",
    ),
    Backend.CUDA: BaseRule(
        (Precision.FP32, Precision.FP16),
        (Precision.FP32, Precision.FP16),
        "ONNX Runtime's CUDA provider has bf16 kernels for some operators only",
    ),
    Backend.RTX: _COMPILED,
    Backend.TRT: _COMPILED,
}


def default_base(target: Target, *, beside_8_bit: bool = False) -> Precision:
    """Return the base precision of a build that asks for none: bf16 for plans, fp16 where sm75 is among them.

    Args:
        target: Backend and architectures.
        beside_8_bit: For what is not in 8 bits in a stage with 8-bit layers.
    """
    rule = BASE_RULES[target.backend]
    return next(
        precision
        for precision in (rule.beside_8_bit if beside_8_bit else rule.alone)
        if precision is not Precision.BF16 or all(ARCHITECTURES[name].bf16 for name in target.architectures)
    )


def check_bases(recipe: Recipe, target: Target) -> None:
    """Refuse a recipe whose base precisions the target's backend does not take.

    Raises:
        RequestError: Naming the stages.
    """
    rule = BASE_RULES[target.backend]
    for eight_bit, allowed, option in (
        (False, rule.alone, "--precision"),
        (True, rule.beside_8_bit, "the high precision"),
    ):
        stages = [name for name, precision in recipe.precision.items() if precision.quantised == eight_bit]
        refused = [name for name in stages if recipe.base(name) not in allowed]
        if refused:
            received = ", ".join(f"{name}={recipe.base(name).value}" for name in refused)
            beside = " beside 8-bit layers" if eight_bit else ""
            what = f"{', '.join(refused)} in {recipe.base(refused[0]).value}{beside}"
            raise RequestError(
                f"the target {target} does not compute {what}: {rule.why}.",
                received=received,
                expected=" or ".join(precision.value for precision in allowed) + beside,
                fix=f"use {default_base(target, beside_8_bit=eight_bit).value} for {option}",
            )
