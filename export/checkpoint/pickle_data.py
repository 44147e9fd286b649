"""Reads the pickle of a PyTorch file as data: a small stack machine that can build containers and nothing else.

Python's unpickler calls whatever a pickle names. This reader has no way to call anything: it knows the opcodes that
``torch.save`` writes for dictionaries of tensors, turns the few functions such files name into records, and refuses
every other name before anything is built from it. It knows nothing of zip files or of where the data lies.

Opcodes: https://github.com/python/cpython/blob/main/Lib/pickletools.py.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import Any

TORCH_STORAGES = {
    "BFloat16Storage": "BF16",
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "ShortStorage": "I16",
}
TORCH_DTYPES = {
    "bfloat16": "BF16",
    "bool": "BOOL",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "int8": "I8",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
}


class PickleRefusedError(Exception):
    """The pickle holds something other than containers of tensors; the message says what."""


@dataclass(frozen=True)
class StorageRecord:
    """A storage named by a persistent id: ``key`` is its entry in the zip file, ``dtype`` None if untyped."""

    dtype: str | None
    key: str


@dataclass(frozen=True)
class TensorRecord:
    """A view of a storage; ``offset`` and ``stride`` count elements."""

    storage: StorageRecord
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Name:
    """A global that the pickle mentions, already known to be harmless."""

    name: str


@dataclass
class _Machine:
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"),
}
_HARMLESS = {
    "collections OrderedDict",
    "torch Size",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch.storage UntypedStorage",
    *(f"torch {name}" for name in TORCH_STORAGES),
    *(f"torch {name}" for name in TORCH_DTYPES),
}


def read_pickle(data: bytes) -> Any:
    """Return the object that ``data`` describes, made of plain containers and :class:`TensorRecord`.

    Raises:
        PickleRefusedError: If the pickle names any function or class beyond those of tensors, or is malformed.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                (result,) = machine.stack
                return result
            _step(machine, opcode.name, argument)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise PickleRefusedError(f"a malformed pickle ({error})") from error
    raise PickleRefusedError("a pickle without an end")


def _step(machine: _Machine, name: str, argument: Any) -> None:
    stack = machine.stack
    if name in ("PROTO", "FRAME"):
        return
    if name in _LITERALS:
        stack.append(argument)
    elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name in ("BINPUT", "LONG_BINPUT"):
        machine.memo[argument] = stack[-1]
    elif name == "MEMOIZE":
        machine.memo[len(machine.memo)] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(machine.memo[argument])
    elif name == "MARK":
        machine.marks.append(stack)
        machine.stack = []
    elif name in ("GLOBAL", "STACK_GLOBAL"):
        full = argument if name == "GLOBAL" else " ".join(reversed([stack.pop(), stack.pop()]))
        if full not in _HARMLESS:
            raise PickleRefusedError(f"the name {full.replace(' ', '.')!r}")
        stack.append(_Name(full.split(" ")[1]))
    elif name == "BINPERSID":
        stack.append(_storage(stack.pop()))
    elif name == "REDUCE":
        arguments = stack.pop()
        stack.append(_rebuilt(stack.pop(), arguments))
    elif name == "BUILD":
        _build(stack)
    else:
        _container(machine, name)


def _container(machine: _Machine, name: str) -> None:
    if name in ("TUPLE", "LIST"):
        items = machine.pop_mark()
        machine.stack.append(tuple(items) if name == "TUPLE" else items)
        return
    if name == "DICT":
        items = machine.pop_mark()
        machine.stack.append(dict(zip(items[::2], items[1::2], strict=True)))
        return
    if name in ("SETITEMS", "APPENDS"):
        items = machine.pop_mark()
        if name == "SETITEMS":
            _dictionary(machine.stack[-1]).update(zip(items[::2], items[1::2], strict=True))
        else:
            _list(machine.stack[-1]).extend(items)
        return
    stack = machine.stack
    if name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
        stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[name])
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        count = int(name[-1])
        stack[-count:] = [tuple(stack[-count:])]
    elif name == "SETITEM":
        value, key = stack.pop(), stack.pop()
        _dictionary(stack[-1])[key] = value
    elif name == "APPEND":
        value = stack.pop()
        _list(stack[-1]).append(value)
    else:
        raise PickleRefusedError(f"the instruction {name}")


def _storage(identifier: Any) -> StorageRecord:
    tag, kind, key, _location, _count = identifier
    if tag != "storage" or not isinstance(kind, _Name) or not isinstance(key, str):
        raise PickleRefusedError(f"the persistent id {identifier!r}")
    if kind.name != "UntypedStorage" and kind.name not in TORCH_STORAGES:
        raise PickleRefusedError(f"a storage of type {kind.name!r}")
    return StorageRecord(TORCH_STORAGES.get(kind.name), key)


def _rebuilt(function: Any, arguments: Any) -> Any:
    """Return the record that stands for ``function(*arguments)``."""
    name = function.name if isinstance(function, _Name) else None
    if name == "OrderedDict" and (arguments == () or arguments == ([],)):
        return {}
    if name == "Size":
        (dimensions,) = arguments
        return _counts(dimensions)
    if name == "_rebuild_parameter":
        if not isinstance(arguments[0], TensorRecord):
            raise PickleRefusedError("a parameter without a tensor")
        return arguments[0]
    if name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
        storage, offset, shape, stride = arguments[:4]
        if not isinstance(storage, StorageRecord):
            raise PickleRefusedError("a tensor without a storage")
        dtype = storage.dtype if name == "_rebuild_tensor_v2" else _dtype(arguments[6])
        if dtype is None:
            raise PickleRefusedError("a tensor without a type")
        (start,) = _counts((offset,))
        return TensorRecord(storage, dtype, start, _counts(shape), _counts(stride))
    raise PickleRefusedError(f"a call of {name or function!r}")


def _dtype(value: Any) -> str | None:
    return TORCH_DTYPES.get(value.name) if isinstance(value, _Name) else None


def _build(stack: list[Any]) -> None:
    """Drop attributes of a dictionary (``state_dict()`` carries ``_metadata``); refuse them on anything else."""
    stack.pop()
    _dictionary(stack[-1])


def _counts(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or not all(type(value) is int and value >= 0 for value in values):
        raise PickleRefusedError(f"the numbers {values!r}")
    return tuple(values)


def _dictionary(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise PickleRefusedError(f"items set on a {type(value).__name__}")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise PickleRefusedError(f"items appended to a {type(value).__name__}")
    return value
