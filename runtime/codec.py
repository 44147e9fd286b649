"""Frozen dataclasses to JSON and back, strictly: unknown, missing and mistyped fields are errors that name their path.

Understands dataclasses, enums, ``str``, ``int``, ``float``, ``bool``, ``None``, ``X | None``, ``tuple[X, ...]``, fixed
tuples, ``dict[str, X]`` and unions of scalars. It knows nothing of what the fields mean.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class CodecError(ValueError):
    """A JSON value does not describe the dataclass; the message begins with the path of the field."""


def to_json(value: Any) -> Any:
    """Return ``value`` as plain JSON types; dictionaries keep their order."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    return value


def from_json(kind: type[T], value: Any, path: str = "$") -> T:
    """Build a ``kind`` from plain JSON.

    Raises:
        CodecError: With the path of the first field that does not fit.
    """
    return typing.cast(T, _decode(kind, value, path))


def _decode(kind: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return _decode_union(kind, value, path)
    if origin is tuple:
        return _decode_tuple(typing.get_args(kind), value, path)
    if origin is dict:
        item_kind = typing.get_args(kind)[1]
        if not isinstance(value, dict):
            raise CodecError(f"{path}: expected an object, received {value!r}")
        return {key: _decode(item_kind, item, f"{path}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(typing.cast(type, kind), value, path)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        try:
            return kind(value)
        except ValueError as error:
            choices = ", ".join(repr(member.value) for member in kind)
            raise CodecError(f"{path}: expected one of {choices}, received {value!r}") from error
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (str, int, float, bool, type(None)):
        if type(value) is not kind:
            raise CodecError(f"{path}: expected {kind.__name__}, received {value!r}")
        return value
    if kind is Any:
        return value
    raise TypeError(f"the codec does not handle {kind!r} at {path}")


def _decode_union(kind: Any, value: Any, path: str) -> Any:
    members = typing.get_args(kind)
    for member in members:
        try:
            return _decode(member, value, path)
        except CodecError:
            continue
    names = " or ".join(getattr(member, "__name__", str(member)) for member in members)
    raise CodecError(f"{path}: expected {names}, received {value!r}")


def _decode_tuple(members: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise CodecError(f"{path}: expected a list, received {value!r}")
    if len(members) == 2 and members[1] is Ellipsis:
        return tuple(_decode(members[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if len(value) != len(members):
        raise CodecError(f"{path}: expected {len(members)} items, received {len(value)}")
    return tuple(_decode(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(zip(members, value, strict=True)))


def _decode_dataclass(kind: type, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise CodecError(f"{path}: expected an object, received {value!r}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(fields))
    missing = sorted(set(fields) - set(value))
    if unknown or missing:
        raise CodecError(f"{path}: unknown fields {unknown}, missing fields {missing} for {kind.__name__}")
    return kind(**{name: _decode(hints[name], value[name], f"{path}.{name}") for name in fields})
