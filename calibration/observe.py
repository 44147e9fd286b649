"""Observing: the values that flow into chosen layers become statistics, and are not kept.

The module knows how channels lie in a tensor and how a NaN is reported; it knows no graph and nothing of what runs.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reelforge.calibration.errors import CalibrationError, NonFiniteError
from reelforge.calibration.scale_file import ScaleKind, tensor_name
from reelforge.calibration.statistics import TensorStatistics

FloatArray = NDArray[np.float32]

_PIECE_ELEMENTS = 1 << 20


class ChannelLayout(enum.Enum):
    """Where a tensor has its channels."""

    LAST = "last"  # [..., channels]: what a Gemm reads
    SECOND = "second"  # [batch, channels, ...]: what a Conv reads
    HEADS = "heads"  # [batch, heads, tokens, width]: an attention's operand; a channel is a head's column


@dataclass(frozen=True)
class ObservedTensor:
    """One tensor that is quantised before one or more layers read it.

    Attributes:
        stage: Where it is.
        layer: The first layer that reads it.
        kind: What it is for that layer.
        channels: How many there are.
        layout: Where they lie.
    """

    stage: str
    layer: str
    kind: ScaleKind
    channels: int
    layout: ChannelLayout

    @property
    def name(self) -> str:
        """The name of its scale in a scale file."""
        return tensor_name(self.stage, self.layer, self.kind)


class ChannelExtremes:
    """The smallest and the largest value per channel, both with zero: all that smoothing factors need.

    They cost a third of full statistics.

    Attributes:
        count: Elements observed.
        lowest: fp32 ``[channels]``, zero or below.
        highest: fp32 ``[channels]``, zero or above.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.lowest = np.zeros(channels, np.float32)
        self.highest = np.zeros(channels, np.float32)

    @property
    def magnitudes(self) -> FloatArray:
        """The largest magnitude per channel, fp32 ``[channels]``; zero before the first."""
        return np.maximum(self.highest, -self.lowest)

    def update(self, rows: NDArray[Any]) -> None:
        """Add ``rows``, ``[..., channels]``.

        Raises:
            NonFiniteError: If they hold NaN or infinities.
        """
        if not rows.size:
            return
        values = rows.reshape(-1, len(self.lowest)).astype(np.float32, copy=False)
        lowest, highest = values.min(axis=0), values.max(axis=0)
        if not (np.isfinite(lowest).all() and np.isfinite(highest).all()):
            raise NonFiniteError(int(np.isnan(values).sum()), int(np.isinf(values).sum()), values.size)
        np.minimum(self.lowest, lowest, out=self.lowest)
        np.maximum(self.highest, highest, out=self.highest)
        for extremes in (self.lowest, self.highest):
            extremes += np.float32(0)  # no -0.0, which would show in the bytes
        self.count += values.size

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the extremes as plain arrays by name."""
        return {"count": np.array(self.count, np.int64), "channel_extremes": np.stack([self.lowest, self.highest])}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> ChannelExtremes:
        """Build them from what :meth:`to_arrays` returned.

        Raises:
            CalibrationError: If an array is missing or has another type or shape.
        """
        count, values = arrays.get("count"), arrays.get("channel_extremes")
        if (
            count is None
            or values is None
            or count.shape != ()
            or values.ndim != 2
            or len(values) != 2
            or values.dtype != np.float32
        ):
            raise CalibrationError(
                "saved channel extremes are damaged or were written by another version.",
                received=", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in arrays.items()),
                expected="count and channel_extremes",
                fix="delete them and calibrate again",
            )
        result = cls(values.shape[1])
        result.count, result.lowest, result.highest = int(count), values[0].copy(), values[1].copy()
        return result


class Observer:
    """Collects what is observed of ``tensors``, by name.

    Args:
        tensors: What to expect.
        extremes_only: Names of tensors of which only channel extremes are wanted.
        divisors: Smoothing factors by name, fp32 ``[channels]``: the tensor is observed divided by them.

    Attributes:
        statistics: Of every tensor that is not in ``extremes_only``.
        extremes: Of those that are.
    """

    def __init__(
        self,
        tensors: Iterable[ObservedTensor],
        extremes_only: Iterable[str] = (),
        divisors: Mapping[str, FloatArray] | None = None,
    ) -> None:
        self.tensors = {tensor.name: tensor for tensor in tensors}
        few = set(extremes_only)
        self.statistics = {
            name: TensorStatistics(tensor.channels) for name, tensor in self.tensors.items() if name not in few
        }
        self.extremes = {name: ChannelExtremes(tensor.channels) for name, tensor in self.tensors.items() if name in few}
        self.divisors = dict(divisors or {})

    def update(self, name: str, values: NDArray[Any], step: int | None = None) -> None:
        """Add ``values`` of the tensor ``name``.

        Args:
            name: Of one of ``tensors``.
            values: As the layer reads them.
            step: The sampling step, counted from 0, for messages.

        Raises:
            NonFiniteError: Naming stage, layer and step.
        """
        tensor = self.tensors[name]
        target = self.statistics[name] if name in self.statistics else self.extremes[name]
        divisor = self.divisors.get(name)
        try:
            for rows in row_pieces(values, tensor.layout):
                target.update(rows if divisor is None else rows / divisor)
        except NonFiniteError as error:  # counted again, because it saw one piece and a division may overflow
            nan = sum(int(np.isnan(rows).sum()) for rows in row_pieces(values, tensor.layout))
            infinite = sum(int(np.isinf(rows).sum()) for rows in row_pieces(values, tensor.layout))
            whole = NonFiniteError(nan or error.nan, infinite or error.infinite, values.size)
            raise whole.located(tensor.stage, tensor.layer, step) from error

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return everything as arrays named ``<tensor>/<field>``."""
        parts: dict[str, TensorStatistics | ChannelExtremes] = {**self.statistics, **self.extremes}
        return {f"{name}/{key}": array for name in parts for key, array in parts[name].to_arrays().items()}

    def load_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Continue from what :meth:`to_arrays` returned, of an observer of the same tensors.

        Raises:
            CalibrationError: If arrays are missing or damaged.
        """
        grouped: dict[str, dict[str, NDArray[Any]]] = {}
        for name, array in arrays.items():
            tensor, _, key = name.rpartition("/")
            grouped.setdefault(tensor, {})[key] = array
        for name in self.statistics:
            self.statistics[name] = TensorStatistics.from_arrays(grouped.get(name, {}))
        for name in self.extremes:
            self.extremes[name] = ChannelExtremes.from_arrays(grouped.get(name, {}))


def row_pieces(values: NDArray[Any], layout: ChannelLayout) -> Iterator[NDArray[Any]]:
    """Yield ``values`` as ``[rows, channels]``, a piece at a time, so that no tensor is copied whole."""
    if layout is ChannelLayout.LAST:
        rows = values.reshape(-1, values.shape[-1])
        step = _rows_per_piece(values.shape[-1])
        yield from (rows[start : start + step] for start in range(0, len(rows), step))
        return
    for item in values:
        if layout is ChannelLayout.SECOND:
            columns = item.reshape(len(item), -1)
            step = _rows_per_piece(len(item))
            yield from (columns[:, start : start + step].T for start in range(0, columns.shape[1], step))
        else:
            heads, tokens, width = item.shape
            step = _rows_per_piece(heads * width)
            for start in range(0, tokens, step):
                yield item[:, start : start + step].transpose(1, 0, 2).reshape(-1, heads * width)


def _rows_per_piece(channels: int) -> int:
    return max(1, _PIECE_ELEMENTS // max(channels, 1))
