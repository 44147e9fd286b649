"""What an architecture must compute in, and which architectures can share a plan.

Measured with TensorRT-RTX 1.7.1.116 on a machine without a GPU, by compiling a product with fp32, fp16, bf16, FP8 and
INT8 operands (the last two over fp16 and bf16) and an attention in fp16 and bf16 for each of sm75, sm80, sm86, sm89,
sm120 and sm121, for each pair of them, and for larger sets: **a set shares a plan exactly where each member alone takes
every type in the graph**. On sm75 a product in fp32 is refused too ("FP32 GEMM is not supported"). Classic TensorRT
compiles for the GPU that it runs on, so there each architecture has its own plan. The module does not know graphs.
"""

from __future__ import annotations

from collections.abc import Iterable

from reelforge.runtime.architectures import ARCHITECTURES
from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import Backend, Precision, Recipe, Target

_TURING = "sm75"
_INSTEAD = {
    Precision.FP8: "use int8, or leave out the architectures before sm89",
    Precision.INT8: "use fp16, or leave out sm75",
    Precision.BF16: "use fp16, or leave out sm75",
    Precision.FP32: "use fp16, or leave out sm75",
}


def stage_precisions(recipe: Recipe, stage: str, *, has_attention: bool) -> frozenset[Precision]:
    """Return what a stage computes products in.

    Args:
        recipe: The recipe.
        stage: A stage of it.
        has_attention: Whether ``recipe.attention`` is about this stage.
    """
    attention = [recipe.attention] if has_attention and recipe.attention is not None else []
    return frozenset([recipe.precision[stage], recipe.base(stage), *attention])


def takes(backend: Backend, architecture: str, precision: Precision) -> bool:
    """Whether ``architecture`` computes products in ``precision``."""
    facts = ARCHITECTURES[architecture]
    if precision is Precision.FP32:
        return not (backend is Backend.RTX and architecture == _TURING)
    answers = {Precision.BF16: facts.bf16, Precision.FP8: facts.fp8, Precision.INT8: facts.int8}
    return answers.get(precision, True)


def check_precisions(target: Target, precisions: Iterable[Precision]) -> None:
    """Refuse what a compiler would refuse late, or would silently compute in something else.

    Raises:
        RequestError: Naming the precision, and the architectures that do not compute in it.
    """
    for precision in sorted(set(precisions), key=list(Precision).index):
        refused = [name for name in target.architectures if not takes(target.backend, name, precision)]
        if refused:
            able = [
                name
                for name, facts in ARCHITECTURES.items()
                if target.backend.value in facts.backends and takes(target.backend, name, precision)
            ]
            raise RequestError(
                f"{' and '.join(refused)} cannot compute in {precision.value}.",
                received=str(target),
                expected=f"{precision.value} on some of {', '.join(able)}",
                fix=_INSTEAD[precision],
            )


def compatible_groups(target: Target, precisions: Iterable[Precision]) -> tuple[Target, ...]:
    """Return ``target`` in groups that share one plan each, in the target's order.

    Args:
        target: With architectures.
        precisions: That the graph computes products in.

    Raises:
        RequestError: As :func:`check_precisions`.
    """
    check_precisions(target, precisions)
    if target.backend is Backend.TRT:
        return tuple(Target(target.backend, (name,)) for name in target.architectures)
    return (target,)
