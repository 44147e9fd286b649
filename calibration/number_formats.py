"""The 8-bit number formats as data, and the casts into and out of them; zero is always exact.

``q = saturate(round_half_even(x / scale))`` in fp32, as ONNX's QuantizeLinear defines it, and ``x' = q * scale``. The
formats are symmetric. What a layer reads may instead have unsigned codes with a zero point, for engines that prefer
them: see :func:`unsigned_codes`. The module does not know where scales come from, nor what is quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from reelforge.calibration.errors import NonFiniteError


@dataclass(frozen=True)
class NumberFormat:
    """One 8-bit format.

    Attributes:
        name: numpy's and ``ml_dtypes``' name, also used in scale files.
        safetensors_name: The name of the type in a safetensors header.
        dtype: The stored type.
        largest: Largest value in use, also with a minus sign.
        smallest_step: Distance between zero and the next value.
        mantissa_bits: Stored bits after the leading one; None if all steps are equal.
    """

    name: str
    safetensors_name: str
    dtype: np.dtype[Any]
    largest: float
    smallest_step: float
    mantissa_bits: int | None

    @cached_property
    def grid(self) -> NDArray[np.float64]:
        """All values that are not negative, in order, starting with zero."""
        codes = np.arange(128, dtype=np.uint8)
        values: NDArray[np.float64] = codes.view(self.dtype).astype(np.float64)
        values = values[values <= self.largest]  # leaves FP8's NaN out
        values.flags.writeable = False
        return values

    def step(self, values: ArrayLike) -> NDArray[np.float64]:
        """Return the distance between neighbouring values of the format around ``values`` (in units of the scale)."""
        magnitudes = np.abs(np.asarray(values, np.float64))
        if self.mantissa_bits is None:
            return np.full_like(magnitudes, self.smallest_step)
        _, exponent = np.frexp(np.minimum(magnitudes, self.largest))
        steps: NDArray[np.float64] = np.ldexp(1.0, exponent - 1 - self.mantissa_bits)
        return np.maximum(steps, self.smallest_step)


INT8 = NumberFormat("int8", "I8", np.dtype(np.int8), 127.0, 1.0, None)
"""-127 to 127: -128 is left out so that the range is symmetric. An engine's own QuantizeLinear may still give -128, for
values below what the scale was chosen for; that is nearer to them than -127."""

FP8_E4M3 = NumberFormat("float8_e4m3fn", "F8_E4M3", np.dtype(ml_dtypes.float8_e4m3fn), 448.0, 2.0**-9, 3)
"""Four exponent and three mantissa bits, finite only: no infinities, one NaN per sign."""

UNSIGNED_LEVELS = 255
"""Steps from the smallest to the largest unsigned code."""

FORMATS: Mapping[str, NumberFormat] = MappingProxyType({item.name: item for item in (INT8, FP8_E4M3)})


class UnsignedCodes(NamedTuple):
    """Codes 0 to 255 for a range that holds zero: ``x' = (q - zero_point) * scale``.

    ``scale`` is an fp32 number; ``zero_point`` is the code of zero.
    """

    scale: float
    zero_point: int


def unsigned_codes(lowest: float, highest: float) -> UnsignedCodes:
    """Return the codes that span the range and have zero among them; every value in it is at most half a step off.

    The formulas are those of ONNX's DynamicQuantizeLinear. A range of zero alone has the scale 1.

    Args:
        lowest: Zero or below.
        highest: Zero or above.

    Raises:
        ValueError: If the range does not hold zero, or is not finite.
    """
    if not -np.inf < lowest <= 0 <= highest < np.inf:
        raise ValueError(f"the range {lowest} to {highest} must be finite and hold zero")
    scale = np.float32((float(highest) - float(lowest)) / UNSIGNED_LEVELS)
    scale = max(scale, np.finfo(np.float32).tiny) if highest > lowest else np.float32(1)
    return UnsignedCodes(float(scale), int(np.clip(np.rint(-float(lowest) / float(scale)), 0, UNSIGNED_LEVELS)))


def quantise(
    values: NDArray[Any], scale: ArrayLike, number_format: NumberFormat, axis: int | None = None
) -> NDArray[Any]:
    """Return ``values / scale`` rounded half to even and saturated at plus and minus ``number_format.largest``.

    Args:
        values: Any shape; computed in fp32.
        scale: A positive finite number, or with ``axis`` a vector of them, one per index of that axis.
        number_format: The result's format.
        axis: The axis of ``scale``; None for one scale in all.

    Raises:
        NonFiniteError: If ``values`` hold NaN, which no integer can represent. Infinities saturate.
        ValueError: If the scale has another shape or is not positive and finite.
    """
    divisor = _broadcast_scale(values.ndim, values.shape, scale, axis)
    with np.errstate(over="ignore"):  # too large for fp32 saturates as any other value
        quotient = np.divide(values, divisor, dtype=np.float32)
    quotient = np.asarray(quotient)
    np.clip(quotient, -number_format.largest, number_format.largest, out=quotient)
    # A minimum passes NaN on and is much cheaper than to look at every element.
    if quotient.size and np.isnan(quotient.min()):
        raise NonFiniteError(int(np.isnan(quotient).sum()), 0, quotient.size, "the tensor to quantise")
    if number_format.mantissa_bits is None:
        np.rint(quotient, out=quotient)
    return quotient.astype(number_format.dtype)


def dequantise(codes: NDArray[Any], scale: ArrayLike, axis: int | None = None) -> NDArray[np.float32]:
    """Return ``codes * scale`` in fp32; ``codes`` in one of the formats' types, ``scale`` and ``axis`` as quantised.

    Raises:
        ValueError: If the scale has another shape or is not positive and finite.
    """
    factor = _broadcast_scale(codes.ndim, codes.shape, scale, axis)
    return np.asarray(codes.astype(np.float32) * factor)


def _broadcast_scale(ndim: int, shape: tuple[int, ...], scale: ArrayLike, axis: int | None) -> NDArray[np.float32]:
    factors = np.asarray(scale, np.float32)
    expected = () if axis is None else (shape[axis],)
    if factors.shape != expected:
        raise ValueError(f"the scale has shape {list(factors.shape)}, expected {list(expected)}")
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ValueError("a scale is zero, negative or not finite")
    if axis is None:
        return factors
    aligned = [1] * ndim
    aligned[axis] = shape[axis]
    return factors.reshape(aligned)
