"""Where a parameter comes from, as a small expression over a checkpoint's tensors.

Every parameter is a choice of rows and columns of one stored tensor. If the rows are one run and all columns are taken,
the parameter lies in the file already and is referenced in place; otherwise it is a :class:`Conversion`, a stream of
bytes in the new order. Values and types are never changed. The module knows no model and no names.

A tensor of shape ``[R, ...]`` is seen as ``R`` rows of all its other elements; a vector has one element per row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from reelforge.export.checkpoint.tensor_ref import DTYPES, TensorRef, nbytes_of

CONVERSION_PIECE_BYTES = 4 << 20
_ROW_GROUP = 256  # pieces end at multiples of this many rows: whole heads, whose permuted rows are one run when sorted


class SourceError(ValueError):
    """An expression does not fit the stored tensor; the message says why."""


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows (in this order) and a run of columns of a stored tensor."""

    rows: NDArray[np.int64]
    column_start: int
    column_stop: int


@dataclass(frozen=True)
class Whole:
    """The whole tensor ``key``; ``shape`` may see its trailing dimensions as one (a patch convolution as a matrix)."""

    key: str

    def select(self, stored: tuple[int, ...]) -> Selection:
        """Return the selection from a tensor of shape ``stored``."""
        rows, columns = _matrix(stored)
        return Selection(np.arange(rows), 0, columns)


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` up to ``stop`` of ``key``: one part of a fused weight or bias."""

    key: str
    start: int
    stop: int

    def select(self, stored: tuple[int, ...]) -> Selection:
        """Return the selection from a tensor of shape ``stored``."""
        rows, columns = _matrix(stored)
        if not 0 <= self.start <= self.stop <= rows:
            raise SourceError(f"has {rows} rows, rows {self.start}:{self.stop} are needed")
        return Selection(np.arange(self.start, self.stop), 0, columns)


@dataclass(frozen=True)
class Columns:
    """Columns ``start`` up to ``stop`` of the matrix ``key``."""

    key: str
    start: int
    stop: int

    def select(self, stored: tuple[int, ...]) -> Selection:
        """Return the selection from a tensor of shape ``stored``."""
        if len(stored) != 2 or not 0 <= self.start <= self.stop <= stored[1]:
            raise SourceError(f"is {list(stored)}, columns {self.start}:{self.stop} of a matrix are needed")
        return Selection(np.arange(stored[0]), self.start, self.stop)


@dataclass(frozen=True)
class HalfSplit:
    """Rows of ``source`` reordered per head from interleaved rotary pairs (2i, 2i+1) to halves (i, i + head_dim/2).

    Applied to queries and keys alike (weights, biases and norm weights), it leaves their dot products unchanged while
    rotary embedding becomes a rotation of two contiguous halves.
    """

    source: Whole | Rows
    head_dim: int

    @property
    def key(self) -> str:
        """The stored tensor's name."""
        return self.source.key

    def select(self, stored: tuple[int, ...]) -> Selection:
        """Return the selection from a tensor of shape ``stored``."""
        inner = self.source.select(stored)
        if self.head_dim % 2 or len(inner.rows) % self.head_dim:
            raise SourceError(f"gives {len(inner.rows)} rows, whole heads of {self.head_dim} are needed")
        pairs = inner.rows.reshape(-1, self.head_dim // 2, 2)
        return Selection(pairs.swapaxes(1, 2).reshape(-1), inner.column_start, inner.column_stop)


@dataclass(frozen=True)
class SwapHalves:
    """Rows of ``source`` with the second half first: diffusers' (scale, shift) as (shift, scale)."""

    source: Whole | Rows

    @property
    def key(self) -> str:
        """The stored tensor's name."""
        return self.source.key

    def select(self, stored: tuple[int, ...]) -> Selection:
        """Return the selection from a tensor of shape ``stored``."""
        inner = self.source.select(stored)
        if len(inner.rows) % 2:
            raise SourceError(f"gives {len(inner.rows)} rows, an even number is needed")
        return Selection(np.roll(inner.rows, len(inner.rows) // 2), inner.column_start, inner.column_stop)


Source = Whole | Rows | Columns | HalfSplit | SwapHalves


@dataclass(frozen=True, eq=False)
class Conversion:
    """A parameter whose bytes must be put in another order.

    Attributes:
        ref: The stored tensor.
        selection: Which rows and columns of it, in which order.
        dtype: Its type, as stored.
        shape: The parameter's shape.
    """

    ref: TensorRef
    selection: Selection
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Length of the result in bytes."""
        return nbytes_of(self.dtype, self.shape)

    def pieces(self, limit: int = CONVERSION_PIECE_BYTES) -> Iterator[NDArray[np.uint8]]:
        """Yield the result's bytes in order, about ``limit`` at a time (at least a row); each is the caller's.

        Whole stored rows are read, in runs as long as the order allows, so that a cold disk sees sequential reads.
        """
        if self.nbytes == 0:
            return
        item = DTYPES[self.dtype].itemsize
        row_bytes = _matrix(self.ref.shape)[1] * item
        start, stop = self.selection.column_start * item, self.selection.column_stop * item
        step = max(1, limit // row_bytes)
        step -= step % _ROW_GROUP if step > _ROW_GROUP else 0
        with self.ref.path.open("rb", buffering=0) as file:
            for first in range(0, len(self.selection.rows), step):
                wanted = self.selection.rows[first : first + step]
                stored = np.sort(wanted)
                buffer = np.empty((len(stored), row_bytes), np.uint8)
                edges = [0, *(np.flatnonzero(np.diff(stored) != 1) + 1).tolist(), len(stored)]
                for begin, end in itertools.pairwise(edges):
                    self.ref.read_into(file.fileno(), buffer[begin:end].reshape(-1), int(stored[begin]) * row_bytes)
                yield buffer[np.searchsorted(stored, wanted), start:stop].reshape(-1)


Resolved = TensorRef | Conversion


class WeightSource(Protocol):
    """Anything that yields a parameter's bytes: a reference, a conversion, or one of them changed while it is read."""

    @property
    def dtype(self) -> str:
        """The safetensors name of its type."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def nbytes(self) -> int:
        """Its length in bytes."""
        ...

    def pieces(self, limit: int = CONVERSION_PIECE_BYTES) -> Iterator[NDArray[np.uint8]]:
        """Yield its bytes in order, in whole elements."""
        ...


def resolve(source: Source, tensors: Mapping[str, TensorRef], shape: tuple[int, ...]) -> Resolved:
    """Return the parameter of shape ``shape`` that ``source`` describes.

    Args:
        source: The expression.
        tensors: The component's stored tensors; ``source.key`` must be among them.
        shape: The parameter's shape.

    Returns:
        A reference in place where the bytes already lie in order, else a :class:`Conversion`.

    Raises:
        SourceError: If the stored tensor does not have the rows and columns that are needed.
    """
    ref = tensors[source.key]
    selection = source.select(ref.shape)
    natural = _selected_shape(ref.shape, selection)
    # Only trailing dimensions may merge: any other reshape would accept a transposed or foreign tensor.
    if shape != natural and not (len(natural) > 2 and shape == _matrix(natural)):
        raise SourceError(f"gives {list(natural)}, {list(shape)} is needed")
    rows, columns = selection.rows, _matrix(ref.shape)[1]
    full_width = (selection.column_start, selection.column_stop) == (0, columns)
    if full_width and bool((np.diff(rows) == 1).all()):
        first = int(rows[0]) if len(rows) else 0
        offset = ref.offset + first * columns * DTYPES[ref.dtype].itemsize
        return TensorRef(ref.name, ref.path, offset, ref.dtype, shape)
    return Conversion(ref, selection, ref.dtype, shape)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (rows, elements per row)."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _selected_shape(stored: tuple[int, ...], selection: Selection) -> tuple[int, ...]:
    if len(stored) == 0:
        return stored
    if len(stored) == 2:
        return (len(selection.rows), selection.column_stop - selection.column_start)
    return (len(selection.rows), *stored[1:])


def loaded(weight: Resolved) -> NDArray[Any]:
    """Return a weight as an array in memory, of its own type. For small weights and tests; builds stream instead."""
    data = b"".join(piece.tobytes() for piece in weight.pieces())
    return np.frombuffer(data, DTYPES[weight.dtype]).reshape(weight.shape)
