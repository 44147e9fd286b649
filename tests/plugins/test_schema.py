"""One schema: the kernels' parameters, the references' and the shapes all agree with it."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelforge.plugins import kernels as kernels_package
from reelforge.plugins.schema import PLUGINS, DType, Extent
from reelforge.plugins.tactics import ARCHITECTURES, Variant, tactics, variants

KERNELS = Path(kernels_package.__file__ or "").parent


def kernel_parameters(module: str, function: str) -> list[tuple[str, bool]]:
    """Names, and whether each is a compile-time constant; from the text, as importing would need Triton."""
    tree = ast.parse((KERNELS / f"{module}.py").read_text(encoding="utf-8"))
    (node,) = [item for item in tree.body if isinstance(item, ast.FunctionDef) and item.name == function]
    return [(argument.arg, argument.annotation is not None) for argument in node.args.args]


@pytest.mark.parametrize("schema", PLUGINS.values(), ids=lambda schema: schema.name)
def test_kernels_take_what_the_schema_says(schema) -> None:
    parameters = kernel_parameters(schema.kernel, schema.function)
    assert tuple(name for name, constant in parameters if not constant) == schema.parameters
    constants = {name for name, constant in parameters if constant}
    decided = set(schema.constants) | {attribute.constant for attribute in schema.attributes} | {"HEAD_DIM"}
    tiles = constants - decided
    assert decided <= constants
    for architecture in ARCHITECTURES:
        for tactic in tactics(schema.name, architecture):
            assert set(Variant(schema.name, architecture, tactic).constants()) == decided | tiles


@pytest.mark.parametrize("schema", PLUGINS.values(), ids=lambda schema: schema.name)
def test_references_take_what_the_schema_says(schema) -> None:
    module = importlib.import_module(f"reelforge.plugins.kernels.{schema.kernel}_reference")
    signature = inspect.signature(getattr(module, schema.name))
    positional = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    keyword = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert positional == [tensor.name for tensor in schema.inputs]
    assert keyword == [attribute.name for attribute in schema.attributes]


@pytest.mark.parametrize("schema", PLUGINS.values(), ids=lambda schema: schema.name)
def test_schemas_are_complete(schema) -> None:
    names = [tensor.name for tensor in (*schema.inputs, *schema.outputs)]
    assert len(set(names)) == len(names)
    shown = {x.symbol for tensor in schema.inputs for x in tensor.shape if x == Extent(x.symbol)}
    needed = {x.symbol for tensor in (*schema.inputs, *schema.outputs) for x in tensor.shape}
    assert needed | {x.symbol for x in schema.grid} <= shown  # outputs' shapes and the grid follow from inputs' shapes
    by_name = {tensor.name: tensor for tensor in schema.inputs}
    assert all(by_name[extra.tensor].shape[extra.axis] == Extent(extra.name) for extra in schema.extras)
    signature = schema.signature(DType.BFLOAT16)
    assert tuple(signature) == schema.parameters
    assert set(signature.values()) <= {"*bf16", "*fp32", "*i8", "*i32", "*fp8e4nv", "i32"}


@given(st.integers(1, 300_000), st.sampled_from([64, 128]))
def test_extents_are_ceilings(tokens: int, group: int) -> None:
    constants = {"KEY_GROUP": group, "CHUNK": 2048}
    sizes = {"tokens": tokens}
    assert Extent("tokens").of(sizes, constants) == tokens
    padded = Extent("tokens", 128).of(sizes, constants)
    assert padded % 128 == 0
    assert 0 <= padded - tokens < 128
    assert Extent("tokens", 128, "KEY_GROUP").of(sizes, constants) * group == padded
    assert Extent("tokens", "CHUNK", "CHUNK").of(sizes, constants) == -(-tokens // 2048)
    assert Extent("tokens", 128, 128, closed=True).of(sizes, constants) == padded // 128 + 1


def test_wrong_shapes_are_named() -> None:
    schema = PLUGINS["value_statistics"]
    with pytest.raises(ValueError, match="value_statistics: v has shape"):
        schema.sizes({"v": (1, 2, 3)})
    quantise = PLUGINS["value_quantise"]
    with pytest.raises(ValueError, match="heads is 5 in value_max"):
        quantise.sizes({"v": (1, 200, 4, 64), "value_max": (1, 5, 1, 64)})
    with pytest.raises(ValueError, match=r"value_max has shape \[1, 4, 2, 64\], expected \[1, 4, 1, 64\]"):
        quantise.check_inputs({"v": (1, 200, 4, 64), "value_max": (1, 4, 2, 64)}, {"CHUNK": 2048})


def test_attributes_are_checked() -> None:
    (tactic,) = tactics("value_quantise", 89)
    assert Variant("value_quantise", 89, tactic, attributes=(("value_range", 2.25),)).constants()["RANGE"] == 2.25
    with pytest.raises(ValueError, match="value_range=3, expected one of"):
        Variant("value_quantise", 89, tactic, attributes=(("value_range", 3.0),)).constants()
    with pytest.raises(ValueError, match="has no attributes colour"):
        Variant("value_quantise", 89, tactic, attributes=(("colour", 3.0),)).constants()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_can_attend(architecture: int) -> None:
    found = list(variants(architecture))
    names = [variant.name for variant in found]
    assert len(set(names)) == len(names)
    plugins = {variant.plugin for variant in found}
    has_fp8 = ARCHITECTURES[architecture].fp8_instruction is not None
    assert ("int8_fp8_attention" in plugins) is has_fp8
    assert ("int8_fp16_attention" in plugins) is not has_fp8
    assert {"key_statistics", "rotary_qk_norm_quantise"} <= plugins
    # What attention reads, the kernels before it can write.
    groups = {variant.constants()["KEY_GROUP"] for variant in found if "PV" in variant.constants()}
    written = {v.constants()["KEY_GROUP"] for v in found if v.plugin == "rotary_qk_norm_quantise"}
    assert groups <= written
