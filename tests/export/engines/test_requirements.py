"""Which architectures take which precisions, in words and against the compiler itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto as Kind

from reelforge.export.engines.builder import build_plan
from reelforge.export.engines.requirements import check_precisions, compatible_groups, stage_precisions, takes
from reelforge.runtime.errors import BuildError, RequestError
from reelforge.runtime.recipe import Backend, Precision, Recipe, Target
from tests.export.engines.tiny_graphs import request_for, save_attention, save_linears


@pytest.mark.parametrize(
    ("target", "precision", "message"),
    [
        ("rtx:sm86+sm89", Precision.FP8, "sm86 cannot compute in fp8"),
        ("rtx:sm75+sm80", Precision.FP8, "sm75 and sm80 cannot compute in fp8"),
        ("trt:sm80+sm90", Precision.FP8, "sm80 cannot compute in fp8"),
        ("rtx:sm75+sm121", Precision.BF16, "sm75 cannot compute in bf16"),
        ("rtx:sm75", Precision.INT8, "sm75 cannot compute in int8"),
        ("rtx:sm75", Precision.FP32, "sm75 cannot compute in fp32"),
    ],
)
def test_what_is_refused(target: str, precision: Precision, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        check_precisions(Target.parse(target), [Precision.FP16, precision])
    text = str(caught.value)
    assert target in text
    assert "fix: use " in text
    able = caught.value.expected
    assert precision.value in able
    assert "sm120" in able


def test_groups() -> None:
    everything = Target.parse("rtx:sm80+sm86+sm89+sm120+sm121")
    assert compatible_groups(everything, [Precision.INT8, Precision.BF16]) == (everything,)
    assert compatible_groups(Target.parse("rtx:sm75+sm80"), [Precision.FP16]) == (Target.parse("rtx:sm75+sm80"),)
    # Classic TensorRT compiles for the GPU that it runs on.
    assert compatible_groups(Target.parse("trt:sm80+sm90"), [Precision.FP16]) == (
        Target.parse("trt:sm80"),
        Target.parse("trt:sm90"),
    )
    with pytest.raises(RequestError, match="sm80"):
        compatible_groups(everything, [Precision.FP8])


def test_precisions_of_a_stage() -> None:
    recipe = Recipe(
        {"dit": Precision.FP8, "llm": Precision.BF16}, high_precision=Precision.FP16, attention=Precision.FP8
    )
    assert stage_precisions(recipe, "dit", has_attention=True) == {Precision.FP8, Precision.FP16}
    assert stage_precisions(recipe, "llm", has_attention=False) == {Precision.BF16}
    mixed = Recipe({"dit": Precision.INT8}, attention=Precision.FP8)
    assert stage_precisions(mixed, "dit", has_attention=True) == {Precision.INT8, Precision.FP32, Precision.FP8}


@pytest.mark.parametrize(
    ("kind", "precision", "architectures"),
    [
        (Kind.FLOAT, None, "sm80+sm86+sm89+sm120+sm121"),
        (Kind.FLOAT16, None, "sm75+sm80+sm86+sm89+sm120+sm121"),
        (Kind.BFLOAT16, None, "sm80+sm86+sm89+sm120+sm121"),
        (Kind.BFLOAT16, Precision.INT8, "sm80+sm86+sm89+sm120+sm121"),
        (Kind.BFLOAT16, Precision.FP8, "sm89+sm120+sm121"),
    ],
)
def test_the_compiler_agrees_on_what_shares_a_plan(
    tmp_path: Path, rtx: Any, kind: int, precision: Precision | None, architectures: str
) -> None:
    graph = save_linears(tmp_path / "toy.onnx", precision, kind, blocks=1)
    request = request_for(graph, f"rtx:{architectures}", out=tmp_path)
    build_plan(rtx, request).writer.finish()
    assert Path(request.plan).stat().st_size > 0


@pytest.mark.parametrize(
    ("kind", "precision", "architecture", "computes"),
    [
        (Kind.FLOAT, None, "sm75", Precision.FP32),
        (Kind.BFLOAT16, None, "sm75", Precision.BF16),
        (Kind.BFLOAT16, Precision.FP8, "sm86", Precision.FP8),
    ],
)
def test_the_compiler_agrees_on_what_is_refused(
    tmp_path: Path, rtx: Any, kind: int, precision: Precision | None, architecture: str, computes: Precision
) -> None:
    assert not takes(Backend.RTX, architecture, computes)
    graph = save_linears(tmp_path / "toy.onnx", precision, kind, blocks=1)
    with pytest.raises(BuildError, match="did not compile") as caught:
        build_plan(rtx, request_for(graph, f"rtx:sm120+{architecture}", out=tmp_path))
    assert "annot compile" in str(caught.value)
    assert not list(tmp_path.glob("toy.plan*"))


def test_attentions_of_all_architectures_share_a_plan(tmp_path: Path, rtx: Any) -> None:
    graph = save_attention(tmp_path / "attention.onnx", Kind.FLOAT16)
    built = build_plan(rtx, request_for(graph, "rtx:sm75+sm80+sm86+sm89+sm120+sm121", out=tmp_path))
    assert [layer.inputs for layer in built.information.profiles[0] if layer.kind == "attention"] == [("Half",) * 3]
    built.writer.discard()
