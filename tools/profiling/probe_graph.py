"""ONNX graphs that keep a processor busy: one operator, several times in a row, written byte by byte.

The runtime has no onnx, and what a peak is measured with must not need it. Field numbers are those of ``onnx.proto``.
The module knows no engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

FLOAT, UINT8, INT8, INT32, FLOAT16, BFLOAT16 = 1, 2, 3, 6, 10, 16  # of onnx.TensorProto.DataType
_OPSET, _IR_VERSION = 17, 8


@dataclass(frozen=True)
class Chain:
    """``c = operator(...operator(operator(a, b), b)..., b)``, or without ``b`` for an operator of one tensor.

    Attributes:
        operator: Of ONNX.
        shape: Of every tensor.
        inputs: Element types of ``a`` and, if there is one, ``b``.
        result: Element type of ``c``.
        count: How many times; above 1 the result must be what the operator takes.
        cast: Element type that the inputs are cast to first; None leaves them as they are.
    """

    operator: str
    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    result: int
    count: int = 1
    cast: int | None = None


def graph_of(chain: Chain, constant: bytes | None = None) -> bytes:
    """Return the chain as a serialised ONNX model; with ``constant``, its bytes, the last input is part of it."""
    names = ("a", "b")[: len(chain.inputs)]
    nodes, operands = [], list(names)
    if chain.cast is not None:
        for name in names:
            to = _text(1, "to") + _number(3, chain.cast) + _number(20, 2)  # an AttributeProto of type INT
            nodes.append(_node("Cast", [name], f"{name}_cast", _field(5, to)))
        operands = [f"{name}_cast" for name in names]
    for number in range(1, chain.count + 1):
        result = "c" if number == chain.count else f"c{number}"
        nodes.append(_node(chain.operator, operands, result))
        operands[0] = result
    parts = [_field(1, node) for node in nodes]
    parts.append(_text(2, "probe"))
    given = list(zip(names, chain.inputs, strict=True))
    if constant is not None:
        name, element = given.pop()
        dims = b"".join(_number(1, size) for size in chain.shape)
        parts.append(_field(5, dims + _number(2, element) + _text(8, name) + _field(9, constant)))
    parts += [_field(11, _value(name, element, chain.shape)) for name, element in given]
    parts.append(_field(12, _value("c", chain.result, chain.shape)))
    opset = _text(1, "") + _number(2, _OPSET)
    return _number(1, _IR_VERSION) + _field(7, b"".join(parts)) + _field(8, opset)


def _node(operator: str, inputs: Sequence[str], output: str, attributes: bytes = b"") -> bytes:
    named = b"".join(_text(1, name) for name in inputs)
    return named + _text(2, output) + _text(3, f"make_{output}") + _text(4, operator) + attributes


def _value(name: str, element: int, sizes: Sequence[int]) -> bytes:
    shape = b"".join(_field(1, _number(1, size)) for size in sizes)
    tensor = _number(1, element) + _field(2, shape)
    return _text(1, name) + _field(2, _field(1, tensor))


def _text(number: int, text: str) -> bytes:
    return _field(number, text.encode())


def _field(number: int, content: bytes) -> bytes:
    return bytes(_varint([number << 3 | 2, len(content)])) + content


def _number(number: int, value: int) -> bytes:
    return bytes(_varint([number << 3, value]))


def _varint(values: Sequence[int]) -> Iterator[int]:
    for value in values:
        while value > 127:
            yield value & 127 | 128
            value >>= 7
        yield value
