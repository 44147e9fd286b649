"""The real ``tensorrt.plugin`` of NVIDIA's wheel, over a stub of its native part: what an engine would hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reelforge.plugins.compile import compile_kernels
from reelforge.plugins.registration import OUTPUT_TYPE, register_plugins
from reelforge.plugins.schema import PLUGINS, DType
from reelforge.plugins.tactics import variants
from reelforge.runtime.errors import BuildError
from tests.plugins.stub_tensorrt import Built, drive, stubbed_tensorrt, wheel_folder

pytestmark = pytest.mark.skipif(
    wheel_folder() is None, reason="needs the Python files of tensorrt-cu13-bindings (pip install --no-deps)"
)


@pytest.fixture
def trt() -> Iterator[tuple[Any, Any]]:
    with stubbed_tensorrt() as modules:
        yield modules


def sizes(tokens: int, image_tokens: int) -> dict[str, int]:
    return {
        **{"batch": 1, "tokens": tokens, "heads": 24, "head_dim": 128, "image_tokens": image_tokens},
        **{"norms": 2, "entries": 1000},
    }


def drive_plugin(
    tensorrt: Any, name: str, tokens: int, attributes: dict[str, Any], activation: DType, tactic: int | None = None
) -> Built:
    schema = PLUGINS[name]
    constants = schema.constants | {a.constant: attributes[a.name] for a in schema.attributes}
    shapes = [tuple(x.of(sizes(tokens, tokens - 256), constants) for x in tensor.shape) for tensor in schema.inputs]
    types = [tensorrt.DataType[(tensor.dtype or activation).tensorrt_name] for tensor in schema.inputs]
    return drive(tensorrt, f"reelforge::{name}", shapes, types, attributes, tactic)


@pytest.mark.parametrize("tokens", [119_056, 33_016, 4500])
def test_an_engine_gets_what_the_schema_says(trt: tuple[Any, Any], kernel_cache: Path, tokens: int) -> None:
    tensorrt, trtp = trt
    register_plugins(tensorrt, trtp, 90, kernel_cache, ["int8_fp8_attention"])
    attributes = {"key_group": 128, OUTPUT_TYPE: "bf16"}
    built = drive_plugin(tensorrt, "int8_fp8_attention", tokens, attributes, DType.BFLOAT16)
    assert built.output_shapes == [(1, tokens, 24, 128)]
    assert built.output_types == [tensorrt.DataType.BF16]
    assert built.tactics == [2, 3]  # the first has key groups of 64
    offered = list(variants(90, plugin="int8_fp8_attention"))
    (kernel,) = compile_kernels([offered[1]], kernel_cache)
    assert (built.kernel, built.ptx) == (kernel.entry, kernel.ptx)
    assert built.grid == (-(-tokens // 64), 24, 1)
    assert built.block == (128, 1, 1)
    assert built.shared_bytes == kernel.sheet.shared_bytes > 48 << 10
    assert built.extras == [tokens]


def test_the_kernels_before_it(trt: tuple[Any, Any], kernel_cache: Path) -> None:
    tensorrt, trtp = trt
    names = ["key_statistics", "rotary_qk_norm_quantise", "value_statistics", "value_quantise"]
    register_plugins(tensorrt, trtp, 90, kernel_cache, names)
    tokens, padded, blocks = 5000, 5120, 40
    built = drive_plugin(tensorrt, names[0], tokens, {"eps": 1e-6}, DType.BFLOAT16)
    assert built.output_shapes == [(1, 24, 3, 128)]
    assert built.grid == (24, 3, 1)
    assert built.extras == [tokens, tokens - 256]
    built = drive_plugin(tensorrt, names[1], tokens, {"eps": 1e-6, "key_group": 128}, DType.BFLOAT16)
    heads = (1, 24)
    assert built.output_shapes == [(*heads, tokens, 128), (*heads, 4 * blocks), (*heads, padded, 128), (*heads, blocks)]
    kinds = tensorrt.DataType
    assert built.output_types == [kinds.INT8, kinds.FLOAT, kinds.INT8, kinds.FLOAT]
    assert built.grid == (24, blocks, 1)
    assert built.tactics == [1, 2]
    built = drive_plugin(tensorrt, names[2], tokens, {}, DType.BFLOAT16)
    assert built.output_shapes == [(1, 24, 3, 128)]
    built = drive_plugin(tensorrt, names[3], tokens, {"value_range": 448.0}, DType.BFLOAT16)
    assert built.output_shapes == [(*heads, 128, padded), (*heads, 128)]
    assert built.output_types == [kinds.FP8, kinds.FLOAT]
    assert built.extras == [tokens]


def test_a_small_tactic_is_offered(trt: tuple[Any, Any], kernel_cache: Path) -> None:
    tensorrt, trtp = trt
    register_plugins(tensorrt, trtp, 90, kernel_cache, ["block_sparse_attention"])
    attributes = {"key_group": 64, OUTPUT_TYPE: "bf16"}
    built = drive_plugin(tensorrt, "block_sparse_attention", 9000, attributes, DType.BFLOAT16)
    assert built.tactics == [1]
    assert built.shared_bytes <= 48 << 10
    with pytest.raises(BuildError, match="asks for tactic 2 of block_sparse_attention, which was not offered"):
        drive_plugin(tensorrt, "block_sparse_attention", 9000, attributes, DType.BFLOAT16, tactic=2)


def test_what_an_architecture_lacks_is_not_registered(trt: tuple[Any, Any]) -> None:
    tensorrt, trtp = trt
    register_plugins(tensorrt, trtp, 80)
    creators = tensorrt.get_plugin_registry().creators
    assert "reelforge::int8_fp16_attention" in creators
    assert "reelforge::int8_fp8_attention" not in creators
    with pytest.raises(BuildError, match=r"compute capability 7\.5"):
        register_plugins(tensorrt, trtp, 75)


def test_refusals(trt: tuple[Any, Any], kernel_cache: Path) -> None:
    tensorrt, trtp = trt
    register_plugins(
        tensorrt, trtp, 89, kernel_cache, ["value_statistics", "int8_fp8_attention", "rotary_qk_norm_quantise"]
    )
    wrong = [tensorrt.DataType.FLOAT]
    with pytest.raises(BuildError, match="computes in 16 bits only"):
        drive(tensorrt, "reelforge::value_statistics", [(1, 300, 2, 128)], wrong, {})
    with pytest.raises(BuildError, match="no kernels for heads of 96"):
        drive(tensorrt, "reelforge::value_statistics", [(1, 300, 2, 96)], [tensorrt.DataType.BF16], {})
    with pytest.raises(BuildError, match="computes in 16 bits only"):
        drive_plugin(tensorrt, "int8_fp8_attention", 500, {"key_group": 64, OUTPUT_TYPE: "fp32"}, DType.BFLOAT16)
    with pytest.raises(BuildError, match="has no kernel with these attributes on sm_89"):
        drive_plugin(tensorrt, "int8_fp8_attention", 500, {"key_group": 128, OUTPUT_TYPE: "fp16"}, DType.BFLOAT16)
    swapped = {"key_group": 64, "eps": 1e-6}
    with pytest.raises(BuildError, match="passes eps of rotary_qk_norm_quantise in another place"):
        drive_plugin(tensorrt, "rotary_qk_norm_quantise", 500, swapped, DType.BFLOAT16)
