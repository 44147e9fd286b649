"""Base precisions by target: defaults that every architecture computes, refusals that say what to do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reelforge.export.engines.requirements import takes
from reelforge.export.target_rules import BASE_RULES, check_bases, check_sparse_attention, default_base, stage_bases
from reelforge.runtime.architectures import ARCHITECTURES
from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import Backend, Precision, Recipe, SparseAttention, SparseKind, Target

FP32, BF16, FP16, INT8, FP8 = (Precision(word) for word in ("fp32", "bf16", "fp16", "int8", "fp8"))


@pytest.mark.parametrize(
    ("target", "alone", "beside"),
    [
        ("cpu", FP32, FP32),
        ("cuda", FP32, FP32),
        ("rtx:sm89+sm120", BF16, BF16),
        ("rtx:sm75", FP16, FP16),
        ("rtx:sm75+sm89", FP16, FP16),
        ("trt:sm90", BF16, BF16),
    ],
)
def test_defaults(target: str, alone: Precision, beside: Precision) -> None:
    assert default_base(Target.parse(target)) is alone
    assert default_base(Target.parse(target), beside_8_bit=True) is beside


@pytest.mark.parametrize(
    ("target", "chosen", "own"),
    [
        ("rtx:sm89", {}, {"vae_decoder": FP16}),
        ("trt:sm90", {}, {"vae_decoder": FP16}),
        ("rtx:sm89", {"*": FP8}, {"vae_decoder": FP16}),
        ("rtx:sm89", {"dit": INT8}, {"vae_decoder": FP16}),
        ("rtx:sm89", {"*": BF16}, {}),
        ("rtx:sm89", {"vae_decoder": BF16}, {}),
        ("rtx:sm89", {"*": FP8, "vae_decoder": BF16}, {}),
        ("rtx:sm75", {}, {}),
        ("cpu", {}, {}),
        ("cuda", {}, {}),
    ],
)
def test_the_vae_has_a_default_of_its_own_where_others_have_bf16(
    target: str, chosen: dict[str, Precision], own: dict[str, Precision]
) -> None:
    assert stage_bases(Target.parse(target), chosen) == own


@pytest.mark.parametrize("backend", Backend)
def test_every_default_is_taken_by_every_architecture(backend: Backend) -> None:
    assert set(BASE_RULES) == set(Backend)
    for name, facts in ARCHITECTURES.items():
        if backend.value in facts.backends:
            target = Target(backend, (name,))
            assert takes(backend, name, default_base(target))
            check_bases(Recipe({"dit": default_base(target)}), target)
            check_bases(Recipe({"dit": INT8}, high_precision=default_base(target, beside_8_bit=True)), target)


@pytest.mark.parametrize("target", ["rtx:sm89", "trt:sm90"])
@pytest.mark.parametrize("base", [BF16, FP16])
def test_plans_take_either_half_precision(target: str, base: Precision) -> None:
    check_bases(Recipe({"llm": base, "dit": FP8}, high_precision=base), Target.parse(target))


@pytest.mark.parametrize(
    ("target", "recipe", "message", "fix"),
    [
        ("cpu", Recipe({"llm": BF16, "dit": FP32}), "cpu does not compute llm in bf16: ONNX Runtime", "--precision"),
        (
            "cpu",
            Recipe({"dit": INT8}, high_precision=FP16),
            "cpu does not compute dit in fp16 beside 8-bit layers",
            "use fp32 for the high precision",
        ),
        ("cuda", Recipe({"dit": BF16}), "cuda does not compute dit in bf16", "use fp32 for --precision"),
        ("rtx:sm89", Recipe({"dit": FP32}), "its compiler has no fp32 attention", "use bf16 for --precision"),
        ("rtx:sm75", Recipe({"clip": FP32, "llm": FP32}), "clip, llm in fp32", "use fp16 for --precision"),
        ("rtx:sm89", Recipe({"dit": FP8}), "dit in fp32 beside 8-bit layers", "use bf16 for the high precision"),
    ],
)
def test_refusals(target: str, recipe: Recipe, message: str, fix: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_bases(recipe, Target.parse(target))
    assert message in str(caught.value)
    assert fix in str(caught.value)


INTEGER = Recipe({"dit": INT8}, attention=INT8)


def test_attention_in_int8_is_the_cpu_s() -> None:
    check_bases(INTEGER, Target.parse("cpu"))
    check_bases(Recipe({"dit": FP32}, attention=INT8), Target.parse("cpu"))
    check_bases(Recipe({"dit": FP8, "vae_decoder": FP16}, attention=INT8), Target.parse("cpu"))
    check_bases(Recipe({"llm": FP16}, attention=INT8), Target.parse("cpu"))


@pytest.mark.parametrize(
    ("target", "recipe", "message", "fix"),
    [
        ("cuda", INTEGER, "cuda has no attention in int8", "leave --attention out"),
        ("rtx:sm89", INTEGER, "rtx:sm89 has no attention in int8: compilers for GPUs refuse it", "use fp8"),
        ("trt:sm90", INTEGER, "plugins have their own", "use fp8"),
        ("cpu", replace(INTEGER, batch=2), "sees every key", "leave --attention int8 or --batch out"),
        ("cpu", Recipe({"dit": FP16}, attention=INT8), "the rest of dit is in fp16", "use --precision dit=fp32"),
        (
            "cpu",
            replace(INTEGER, high_precision=FP16),
            "attention in int8 reads and makes fp32",
            "leave --attention int8 out",
        ),
        (
            "cpu",
            replace(INTEGER, sparse_attention=SparseAttention(SparseKind.LISTS)),
            "no mask between its products",
            "leave --attention int8 or --sparse-attention out",
        ),
    ],
)
def test_attention_in_int8_that_is_refused(target: str, recipe: Recipe, message: str, fix: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        check_bases(recipe, Target.parse(target))
    assert fix in caught.value.fix
    assert caught.value.received
    assert caught.value.expected


def sparse(kind: SparseKind = SparseKind.LISTS, query_block: int = 128, key_block: int = 64, batch: int = 1) -> Recipe:
    return Recipe({"dit": FP32}, batch=batch, sparse_attention=SparseAttention(kind, query_block, key_block))


def test_sparse_attention_that_is_allowed() -> None:
    check_sparse_attention(Recipe({"dit": FP32}), Target.parse("rtx:sm89"))
    for kind in SparseKind:
        check_sparse_attention(sparse(kind), Target.parse("cpu"))
        check_sparse_attention(sparse(kind, 4, 4), Target.parse("cpu"))


@pytest.mark.parametrize(
    ("target", "recipe", "message", "fix"),
    [
        ("rtx:sm89", sparse(), "takes no plugins, and its own attention visits every key", "leave --sparse-attention"),
        ("cuda", sparse(SparseKind.TOP_K), "its mask would be as large", "leave --sparse-attention out"),
        ("cpu", sparse(batch=2), "serves one video per call", "leave --batch or --sparse-attention out"),
        ("cpu", sparse(query_block=100), "do not fit each other", "leave --attention-blocks out"),
        ("cpu", sparse(query_block=0), "do not fit each other", "leave --attention-blocks out"),
        ("cpu", sparse(key_block=0), "do not fit each other", "leave --attention-blocks out"),
    ],
)
def test_sparse_attention_that_is_refused(target: str, recipe: Recipe, message: str, fix: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        check_sparse_attention(recipe, Target.parse(target))
    assert fix in caught.value.fix
    assert caught.value.received
    assert caught.value.expected
