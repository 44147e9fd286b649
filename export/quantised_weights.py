"""Quantised weights: from a checkpoint's tensors to 8-bit codes and scales in a bundle, as a stream.

Codes go to ``weights/<stage>.<format>.safetensors``, one file per number format, scales to
``weights/<stage>.scales.safetensors``. Every byte is read once and nothing but the scales is kept. The module knows no
graphs, nor which layers are worth quantising.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reelforge.calibration.casts import Casts, CastWork, choose_casts
from reelforge.calibration.number_formats import FORMATS
from reelforge.calibration.weight_stream import WeightQuantisation, quantised_pieces
from reelforge.export.checkpoint.digest import THREADS, Progress, ProgressMeter
from reelforge.export.checkpoint.safetensors_writer import StreamedTensor, WrittenTensor, write_safetensors
from reelforge.export.checkpoint.sources import Resolved
from reelforge.export.checkpoint.tensor_ref import PIECE_BYTES, nbytes_of
from reelforge.runtime.bundle.write import BundleWriter
from reelforge.runtime.manifest import WeightEntry

SCALE_SUFFIX = ".scale"


class QuantisedEntries(NamedTuple):
    """Where one quantised weight lies in the bundle: its codes in the weight's shape, and an fp32 scale per row."""

    codes: WeightEntry
    scale: WeightEntry


def place_quantised(
    writer: BundleWriter,
    stage_name: str,
    weights: Mapping[str, Resolved],
    plan: Mapping[str, WeightQuantisation],
    progress: Progress | None = None,
    threads: int = THREADS,
) -> dict[str, QuantisedEntries]:
    """Quantise the planned weights of one stage into a bundle that is being written.

    Args:
        writer: The bundle.
        stage_name: Names the files.
        weights: Where each of the stage's parameters comes from.
        plan: How to quantise each weight that is to be; all others are left alone.
        progress: Called with bytes of the checkpoint done; an exception raised in it stops the work.
        threads: How many weights are read, quantised, hashed and written at a time.

    Returns:
        The entries by weight, in the plan's order.

    Raises:
        CalibrationError: If a weight holds NaN or infinities, or is of a type that is not quantised; it is named.
        CheckpointError: If a file ends before its tensor does.
        BuildError: If there is no room, found before the work if possible.
    """
    unknown = [name for name in plan if name not in weights]
    if unknown:
        raise ValueError(f"stage {stage_name!r} has no weights {', '.join(unknown)}")
    writer.require_space(quantised_bytes(weights, plan))
    scales = {name: np.ones(weights[name].shape[0], np.float32) for name in plan}
    meter = ProgressMeter(progress)
    casts = casts_for(weights, plan)
    streams = {}
    for name, how in plan.items():
        stream = _codes(f"{stage_name}.{name}", weights[name], how, scales[name], meter, casts)
        streams[name] = StreamedTensor(
            name, how.number_format.safetensors_name, weights[name].shape, partial(iter, stream)
        )
    codes: dict[str, WeightEntry] = {}
    for number_format in FORMATS.values():
        chosen = [name for name, how in plan.items() if how.number_format == number_format]
        file = f"weights/{stage_name}.{number_format.name}.safetensors"
        with casts.one_thread_per_operation():
            codes.update(_write(writer, file, [streams[name] for name in chosen], threads))
    tensors = [
        StreamedTensor(f"{name}{SCALE_SUFFIX}", "F32", values.shape, partial(_whole, values))
        for name, values in scales.items()
    ]
    placed = _write(writer, f"weights/{stage_name}.scales.safetensors", tensors, threads)
    return {name: QuantisedEntries(codes[name], placed[f"{name}{SCALE_SUFFIX}"]) for name in plan}


def quantised_bytes(weights: Mapping[str, Resolved], plan: Mapping[str, WeightQuantisation]) -> int:
    """Return how many bytes of codes and scales the plan gives."""
    shapes = [(weights[name].shape, how.number_format.safetensors_name) for name, how in plan.items()]
    return sum(nbytes_of(dtype, shape) + nbytes_of("F32", shape[:1]) for shape, dtype in shapes)


def casts_for(weights: Mapping[str, Resolved], plan: Mapping[str, WeightQuantisation]) -> Casts:
    """Return the library that casts the planned weights."""
    return choose_casts(
        CastWork(weights[name].dtype, math.prod(weights[name].shape), how.number_format) for name, how in plan.items()
    )


def _write(writer: BundleWriter, file: str, tensors: list[StreamedTensor], threads: int) -> dict[str, WeightEntry]:
    """Write one file, if there is anything to write, and return its entries by tensor."""
    if not tensors:
        return {}
    written = write_safetensors(writer.path(file), tensors, threads=threads)
    return {name: _entry(file, tensor) for name, tensor in written.items()}


def _entry(file: str, written: WrittenTensor) -> WeightEntry:
    ref = written.ref
    assert written.non_finite == 0, ref.name
    return WeightEntry(ref.name, ref.dtype, tuple(ref.shape), file, ref.offset, ref.nbytes, written.sha256)


def _codes(
    name: str,
    weight: Resolved,
    how: WeightQuantisation,
    scales: NDArray[np.float32],
    meter: ProgressMeter,
    casts: Casts,
) -> Iterator[NDArray[np.uint8]]:
    """Return the stream of one weight's codes; what does not fit is found now, nothing is read yet."""

    def counted() -> Iterator[NDArray[np.uint8]]:
        for piece in row_pieces(weight):
            yield piece
            meter.advance(piece.nbytes)

    return quantised_pieces(name, weight.dtype, weight.shape, counted(), how, scales, casts)


def row_pieces(weight: Resolved) -> Iterator[NDArray[np.uint8]]:
    """Return the weight's bytes in pieces of whole rows, so that no row must be put together from two."""
    row_bytes = max(1, nbytes_of(weight.dtype, (1, *weight.shape[1:])))
    return weight.pieces(max(row_bytes, PIECE_BYTES - PIECE_BYTES % row_bytes))


def _whole(values: NDArray[np.float32]) -> Iterator[NDArray[np.uint8]]:
    if values.size:
        yield values.view(np.uint8)
