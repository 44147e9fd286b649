"""Protocol buffers' text format, as far as a ``config.pbtxt`` needs it, without protocol buffers.

The module knows no field of Triton's; tests parse what it writes with Triton's own schema.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

Value: TypeAlias = "str | int | bool | Word | Sequence[Value] | Mapping[str, Value]"
"""A message is a mapping, a repeated field a sequence."""


class Word(str):
    """A name of an enumeration, which is written without quotes."""

    __slots__ = ()


def text_of(message: Mapping[str, Value], indent: int = 0) -> str:
    """Return a message in text format, one field per line, in the order of the mapping."""
    return "".join(_field(name, value, indent) for name, value in message.items())


def _field(name: str, value: Value, indent: int) -> str:
    margin = "  " * indent
    if isinstance(value, Mapping):
        inner = text_of(value, indent + 1)
        return f"{margin}{name} {{\n{inner}{margin}}}\n" if inner else f"{margin}{name} {{ }}\n"
    if isinstance(value, str | int):
        return f"{margin}{name}: {_scalar(value)}\n"
    if all(isinstance(item, str | int) for item in value):
        return f"{margin}{name}: [ {', '.join(_scalar(item) for item in value)} ]\n" if value else ""
    return "".join(_field(name, item, indent) for item in value)


def _scalar(value: Value) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    # Octal bytes: the one form of escape that all of the format's readers take for any text.
    text = "".join(_escaped(byte) for byte in str(value).encode())
    return f'"{text}"'


def _escaped(byte: int) -> str:
    return chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\' else f"\\{byte:03o}"
