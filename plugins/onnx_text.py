"""Pieces of ONNX's text syntax that the plugins' functions are made of: constants, padding, the order of values.

A body is lines ``result = Operator <attributes> (inputs)``. It may use constants by name without declaring them:
``i_2`` is int64 [2], ``i_3_4`` is [3, 4], ``i_m1`` is [-1], ``i_max`` is larger than every size, and the names of
_FLOATS are fp32 scalars. The module does not know plugins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from reelforge.plugins.schema import DType

ONNX_CODES = {
    DType.FLOAT32: 1,
    DType.INT8: 3,
    DType.INT32: 6,
    DType.FLOAT16: 10,
    DType.BFLOAT16: 16,
    DType.FP8_E4M3: 17,
}
"""Numbers of ``onnx.TensorProto.DataType``, which the attribute of ``Cast`` wants."""

INT64_CODE = 7

_FLOATS = {
    "f_0": 0.0,
    "f_1": 1.0,
    "f_2": 2.0,
    "f_127": 127.0,
    "f_tiny": 1e-30,
    "f_hidden": -1e30,
    "f_log2_e": 1.4426950408889634,
    "f_log2_448": 8.807354922057604,
}
_NAME = re.compile(r"(?<![\w@])(?:i_m?(?:\d+(?:_\d+)*|max)|f_\w+)(?!\w)")
_LARGEST = 2**62


def with_constants(body: str) -> str:
    """Return ``body`` behind the constants that it uses.

    Raises:
        KeyError: For a name that stands for no constant.
    """
    lines = [f"{name} = {_constant(name)}" for name in sorted(set(_NAME.findall(body)))]
    return "\n".join([*lines, *(line for line in body.split("\n") if line.strip())])


def padded(source: str, result: str, axis: int, rank: int, multiple: int | str) -> str:
    """Return lines that fill ``axis`` of ``source`` up to a multiple with zeros."""
    before, behind = (" ".join(["i_0,"] * count) for count in (rank + axis, rank - 1 - axis))
    return f"""
{result}_length = Shape <start = {axis}, end = {axis + 1}> ({source})
{result}_negative = Neg ({result}_length)
{result}_missing = Mod ({result}_negative, i_{multiple})
{result}_pads = Concat <axis = 0> ({before} {result}_missing{"," if behind else ""} {behind.rstrip(",")})
{result} = Pad ({source}, {result}_pads)"""


def regrouped(source: str, result: str, parts: Sequence[int]) -> str:
    """Return lines that swap the two inner of four ``parts`` in every 32 of the last of four axes."""
    sizes = ", ".join(f"i_{part}" for part in parts)
    return f"""
{result}_shape = Concat <axis = 0> (i_0, i_0, i_0, i_m1, {sizes})
{result}_parts = Reshape ({source}, {result}_shape)
{result}_swapped = Transpose <perm = [0, 1, 2, 3, 4, 6, 5, 7]> ({result}_parts)
{result}_flat_shape = Concat <axis = 0> (i_0, i_0, i_0, i_m1)
{result} = Reshape ({result}_swapped, {result}_flat_shape)"""


def _constant(name: str) -> str:
    if name.startswith("f_"):
        return f"Constant <value = float {{{_FLOATS[name]!r}}}> ()"
    text = name.removeprefix("i_")
    numbers = [str(_LARGEST)] if text == "max" else text.replace("m", "-").split("_")
    return f"Constant <value = int64[{len(numbers)}] {{{', '.join(numbers)}}}> ()"
