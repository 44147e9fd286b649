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
from reelforge.runtime.recipe import EVERY_STAGE, Backend, Precision, Recipe, Target


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


STAGE_BASES: Mapping[str, Precision] = {"vae_decoder": Precision.FP16}
"""Stages that a build without a word about them computes in this where it would be bf16.

The decoder's values lie far inside of fp16's range, and its rounding is in the picture. Demonstration checkpoint in
PyTorch on a CPU, against fp32: 78 dB in fp16 and 58 dB in bf16 on sampled latents (74 and 54 dB on random ones), no
value above 25. That the published decoder does not overflow was not measured here: its authors run it in fp16 (the
default of ``--vae-precision`` in Tencent's HunyuanVideo), and so does diffusers' page of ``AutoencoderKLHunyuanVideo``.
"""


def stage_bases(target: Target, chosen: Mapping[str, Precision]) -> dict[str, Precision]:
    """Return what is added to ``chosen``, the precisions that a user asked for: stages with a default of their own.

    Args:
        target: Backend and architectures.
        chosen: By stage, and for the model under ``"*"``; a base precision for the model is one for these stages too.
    """
    general = chosen.get(EVERY_STAGE)
    if default_base(target) is not Precision.BF16 or (general is not None and not general.quantised):
        return {}
    return {stage: base for stage, base in STAGE_BASES.items() if stage not in chosen}


_NO_BLOCK_LISTS: Mapping[Backend, str] = {
    Backend.CUDA: "ONNX Runtime has no kernel that visits lists of key blocks, and its mask would be as large as dense "
    "attention",
    Backend.RTX: "TensorRT-RTX takes no plugins, and its own attention visits every key",
    Backend.TRT: "its graphs would get the plugin that visits lists of blocks, but plans have no profiles for them yet",
}
"""Backends without sparse attention, and why."""


def check_sparse_attention(recipe: Recipe, target: Target) -> None:
    """Refuse sparse attention where the target has no kernel for it, or the recipe no meaning.

    Raises:
        RequestError: Saying which.
    """
    sparse = recipe.sparse_attention
    if sparse is None:
        return
    if target.backend in _NO_BLOCK_LISTS:
        raise RequestError(
            f"the target {target} has no sparse attention: {_NO_BLOCK_LISTS[target.backend]}.",
            received=f"--sparse-attention {sparse.kind.value}",
            expected="--target cpu, which computes what the kernels would, and saves nothing",
            fix="leave --sparse-attention out",
        )
    if recipe.batch > 1:
        raise RequestError(
            "sparse attention serves one video per call.",
            received=f"--batch {recipe.batch}",
            expected="--batch 1",
            fix="leave --batch or --sparse-attention out",
        )
    if sparse.key_block < 1 or sparse.query_block < 1 or sparse.query_block % sparse.key_block:
        raise RequestError(
            "the blocks of sparse attention do not fit each other.",
            received=f"blocks of {sparse.query_block} queries and {sparse.key_block} keys",
            expected="queries a multiple of keys, as many as the kernel has",
            fix="leave --attention-blocks out for 128x64",
        )


def check_integer_attention(recipe: Recipe, target: Target) -> None:
    """Refuse attention in INT8 where nothing computes it.

    Raises:
        RequestError: Saying which.
    """
    if recipe.attention is not Precision.INT8:
        return
    if target.backend is not Backend.CPU:
        raise RequestError(
            f"the target {target} has no attention in int8: compilers for GPUs refuse it, and plugins have their own.",
            received="--attention int8",
            expected="--attention fp8, or none",
            fix="leave --attention out, or use fp8 where the architecture has it",
        )
    base = recipe.base("dit") if "dit" in recipe.precision else Precision.FP32
    if base is not Precision.FP32:
        raise RequestError(
            f"attention in int8 reads and makes fp32, and the rest of dit is in {base.value}.",
            received=f"--attention int8 and dit={base.value}",
            expected="dit in fp32, or in 8 bits with fp32 beside them",
            fix="use --precision dit=fp32, or leave --attention int8 out",
        )
    if recipe.batch > 1 or recipe.sparse_attention is not None:
        received = f"--batch {recipe.batch}" if recipe.batch > 1 else "--sparse-attention"
        raise RequestError(
            "attention in int8 sees every key: there is no mask between its products.",
            received=f"--attention int8 and {received}",
            expected="--batch 1, without --sparse-attention",
            fix=f"leave --attention int8 or {received.split()[0]} out",
        )


def check_bases(recipe: Recipe, target: Target) -> None:
    """Refuse a recipe whose base precisions, or whose 8-bit attention, the target's backend does not take.

    Raises:
        RequestError: Naming the stages.
    """
    check_integer_attention(recipe, target)
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
