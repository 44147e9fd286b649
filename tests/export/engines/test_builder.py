"""Real plans of tiny graphs, in this process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto as Kind

from reelforge.export.engines.builder import build_plan
from reelforge.export.engines.check import check_plan
from reelforge.export.engines.module import Message
from reelforge.export.engines.plan_writer import partial_path
from reelforge.export.engines.request import Expected, PlanRequest, Profile
from reelforge.runtime.errors import BuildError
from reelforge.runtime.plan_file import plan_architectures, read_header
from reelforge.runtime.receipt import LayerRecord
from reelforge.runtime.recipe import Precision
from tests.export.engines.tiny_graphs import (
    expect_attention,
    expect_linears,
    request_for,
    save_attention,
    save_linears,
)


def layers_of(rtx: Any, request: PlanRequest) -> tuple[LayerRecord, ...]:
    """Compile, check, and return the layers of the only profile."""
    built = build_plan(rtx, request)
    built.writer.finish()
    check_plan(request.stage, built.information.profiles, request.expected)
    assert plan_architectures(read_header(Path(request.plan))) == request.target.architectures
    (layers,) = built.information.profiles
    return layers


@pytest.mark.parametrize(
    ("precision", "kind", "target"),
    [
        (Precision.FP8, Kind.BFLOAT16, "rtx:sm89+sm120"),
        (Precision.FP8, Kind.FLOAT16, "rtx:sm120"),
        (Precision.INT8, Kind.BFLOAT16, "rtx:sm86"),
        (Precision.INT8, Kind.FLOAT16, "rtx:sm80+sm89"),
    ],
)
def test_products_in_eight_bits(tmp_path: Path, rtx: Any, precision: Precision, kind: int, target: str) -> None:
    graph = save_linears(tmp_path / "g.onnx", precision, kind)
    layers = layers_of(rtx, request_for(graph, target, expect_linears(precision), out=tmp_path))
    assert sum(layer.kind == "gemm" for layer in layers) == 2


def test_a_product_that_is_not_in_its_format(tmp_path: Path, rtx: Any) -> None:
    graph = save_linears(tmp_path / "g.onnx")
    with pytest.raises(BuildError, match="2 of 2") as caught:
        layers_of(rtx, request_for(graph, "rtx:sm89", expect_linears(Precision.FP8), out=tmp_path))
    assert "blocks.0.fc: computed in BFloat16 x BFloat16, wanted fp8" in str(caught.value)


@pytest.mark.parametrize(("kind", "precision"), [(Kind.BFLOAT16, Precision.BF16), (Kind.FLOAT16, Precision.FP16)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_is_one_kernel(tmp_path: Path, rtx: Any, kind: int, precision: Precision, head_dim: int) -> None:
    graph = save_attention(tmp_path / "g.onnx", kind, head_dim)
    layers = layers_of(rtx, request_for(graph, "rtx:sm86+sm120", expect_attention(precision), out=tmp_path))
    assert not [layer for layer in layers if layer.kind == "gemm"]


@pytest.mark.parametrize("kind", [Kind.BFLOAT16, Kind.FLOAT16])
def test_attention_in_fp8(tmp_path: Path, rtx: Any, kind: int) -> None:
    graph = save_attention(tmp_path / "g.onnx", kind, 128, eight_bits=True)
    layers = layers_of(rtx, request_for(graph, "rtx:sm89+sm120", expect_attention(Precision.FP8), out=tmp_path))
    assert [layer.inputs for layer in layers if layer.kind == "attention"] == [("FP8",) * 3]


def test_attention_that_silently_stays_in_high_precision(tmp_path: Path, rtx: Any) -> None:
    # The three Q/DQ pairs alone do not make the kernel take FP8.
    graph = save_attention(tmp_path / "g.onnx", eight_bits=True)
    request = request_for(graph, "rtx:sm89", out=tmp_path)
    built = build_plan(rtx, request)
    built.writer.discard()
    with pytest.raises(BuildError, match=r"double\.0\.attention: fused in BFloat16, BFloat16, BFloat16, wanted fp8"):
        check_plan("toy", built.information.profiles, expect_attention(Precision.FP8))


def test_attention_in_fp8_needs_32_tokens(tmp_path: Path, rtx: Any) -> None:
    graph = save_attention(tmp_path / "g.onnx", eight_bits=True)
    expected = expect_attention(Precision.FP8)
    short = request_for(graph, "rtx:sm89", expected, (Profile("short", {"tokens": (31, 64, 64)}),), tmp_path)
    with pytest.raises(BuildError, match="not supported by a dedicated kernel") as caught:
        build_plan(rtx, short)
    assert "FP8 needs 32 tokens or more" in caught.value.fix
    layers_of(rtx, dataclasses.replace(short, profiles=(Profile("enough", {"tokens": (32, 64, 64)}),)))


@pytest.mark.parametrize(("kind", "head_dim"), [(Kind.FLOAT, 64), (Kind.BFLOAT16, 512)])
def test_attention_that_no_kernel_covers(tmp_path: Path, rtx: Any, kind: int, head_dim: int) -> None:
    graph = save_attention(tmp_path / "g.onnx", kind, head_dim)
    request = request_for(graph, "rtx:sm89", out=tmp_path)
    with pytest.raises(BuildError, match="did not compile the graph of stage 'toy' for rtx:sm89") as caught:
        build_plan(rtx, request)
    text = str(caught.value)
    assert "not supported by a dedicated kernel" in text
    assert "cudaError" not in text  # what a machine without a GPU says after any failure
    assert "has to be decomposed" in text
    assert not list(tmp_path.glob("*.plan*"))
    layers = layers_of(rtx, dataclasses.replace(request, expected=Expected(decomposed=("double.0.attention",))))
    assert sum(layer.kind == "gemm" for layer in layers) == 2


def test_a_compiler_without_attention(tmp_path: Path, rtx: Any) -> None:
    class Older:
        """The module as it was before attention came."""

        def __getattr__(self, name: str) -> Any:
            if name == "IAttentionInputLayer":
                raise AttributeError(name)
            return getattr(rtx, name)

    older = Older()
    older.__name__, older.__version__ = "tensorrt", "10.13.0"
    graph = save_attention(tmp_path / "g.onnx", eight_bits=True)
    with pytest.raises(BuildError, match="this version of the compiler has no attention") as caught:
        build_plan(older, request_for(graph, "rtx:sm89", expect_attention(Precision.FP8), out=tmp_path))
    assert "received: tensorrt 10.13.0" in str(caught.value)


def test_executions_allocate_nothing(tmp_path: Path, rtx: Any) -> None:
    """The plan says so, where the compiler can; kernels and memory are the same with and without."""

    class Older:
        """The module as it was before the flag came."""

        BuilderFlag = object()

        def __getattr__(self, name: str) -> Any:
            return getattr(rtx, name)

    graph = save_attention(tmp_path / "g.onnx", eight_bits=True)
    request = request_for(graph, "rtx:sm89+sm120", expect_attention(Precision.FP8), out=tmp_path)
    plans, information = [], []
    for module in (rtx, rtx, Older()):
        built = build_plan(module, request)
        built.writer.finish()
        plans.append(Path(request.plan).read_bytes())
        information.append(built.information)
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]
    assert information[0] == information[2]


def test_the_parser_refuses(tmp_path: Path, rtx: Any) -> None:
    graph = save_linears(tmp_path / "g.onnx", domain="trt")
    with pytest.raises(BuildError, match="did not parse the graph of stage 'toy'") as caught:
        build_plan(rtx, request_for(graph, "rtx:sm89", out=tmp_path))
    assert "Special" in str(caught.value)
    assert not list(tmp_path.glob("*.plan*"))


def test_inputs_that_were_not_stated(tmp_path: Path, rtx: Any) -> None:
    request = request_for(save_attention(tmp_path / "g.onnx"), "rtx:sm89", out=tmp_path)
    with pytest.raises(BuildError, match="has other inputs than were stated") as caught:
        build_plan(rtx, dataclasses.replace(request, inputs=request.inputs[:2]))
    assert "received: q, k, v   expected: q, k" in str(caught.value)


def test_a_profile_without_a_dimension(tmp_path: Path, rtx: Any) -> None:
    graph = save_linears(tmp_path / "g.onnx")
    with pytest.raises(BuildError, match="does not say the sizes of tokens"):
        build_plan(rtx, request_for(graph, "rtx:sm89", profiles=(Profile("p", {"other": (1, 1, 1)}),), out=tmp_path))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path: Path, rtx: Any) -> None:
    # The compiler itself takes no notice: it reports a success.
    request = request_for(save_linears(tmp_path / "g.onnx"), "rtx:sm89", out=tmp_path)
    partial_path(Path(request.plan)).symlink_to("/dev/full")
    with pytest.raises(BuildError, match="No space left on device"):
        build_plan(rtx, request)
    assert not list(tmp_path.glob("*.plan*"))


def test_what_the_caller_hears(tmp_path: Path, rtx: Any) -> None:
    messages: list[Message] = []
    steps: list[tuple[str, int, int]] = []
    request = request_for(save_linears(tmp_path / "g.onnx"), "rtx:sm89", out=tmp_path)
    built = build_plan(rtx, request, messages.append, lambda *step: steps.append(step))
    built.writer.discard()
    assert {"VERBOSE", "INFO"} <= {message.severity for message in messages}
    assert any(message.text.startswith("Layers:") for message in messages)
    assert all(0 <= done <= total for _, done, total in steps)
    assert len({phase for phase, _, _ in steps}) > 3
    assert built.seconds > 0
