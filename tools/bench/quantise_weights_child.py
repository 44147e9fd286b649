"""One measured pass of ``quantise_weights``, in a process of its own so that its memory can be sampled.

Quantises a checkpoint's quantisable weights of one stage, or reads, casts and writes the same bytes without looking at
them: the same pieces, writer, digests and threads, and PyTorch's direct cast. Prints one line of JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray

from reelforge.calibration.cast_torch import one_thread_per_operation
from reelforge.calibration.number_formats import FORMATS, INT8, NumberFormat
from reelforge.calibration.weight_stream import WeightQuantisation
from reelforge.export.checkpoint.open import open_checkpoint
from reelforge.export.checkpoint.safetensors_writer import StreamedTensor, write_safetensors
from reelforge.export.checkpoint.sources import Resolved
from reelforge.export.family import FAMILIES
from reelforge.export.models.hunyuan_video.spec_from_checkpoint import Numerics
from reelforge.export.quantised_weights import place_quantised, row_pieces
from reelforge.export.weights import resolve_stages
from reelforge.runtime.bundle.write import BundleWriter

_STAGE = "dit"
_STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class _DoneError(Exception):
    """Leaves the writer's block; what was written is removed."""


def quantisable(path: Path) -> dict[str, Resolved]:
    """Return the weights of the DiT that an 8-bit precision covers."""
    family = FAMILIES["hunyuan_video"]
    checkpoint = open_checkpoint(path)
    spec = family.spec(checkpoint, Numerics.TENCENT)
    resolved = resolve_stages(checkpoint, family.key_maps[checkpoint.layout], spec, family.stages(spec, 1))
    rules = family.quantisation(spec)[_STAGE]
    return {
        name: weight
        for name, weight in resolved[_STAGE].items()
        if name.endswith(".weight") and len(weight.shape) > 1 and rules.covers(name.removesuffix(".weight"))
    }


def place_cast(
    writer: BundleWriter, stage_name: str, weights: dict[str, Resolved], number_format: NumberFormat
) -> None:
    """Write the weights' values cast as they are."""
    tensors = [
        StreamedTensor(name, number_format.safetensors_name, weight.shape, partial(_cast, weight, number_format))
        for name, weight in weights.items()
    ]
    path = writer.path(f"weights/{stage_name}.{number_format.name}.safetensors")
    with one_thread_per_operation():
        write_safetensors(path, tensors)


def _cast(weight: Resolved, number_format: NumberFormat) -> Iterator[NDArray[np.uint8]]:
    kind = torch.int8 if number_format == INT8 else torch.float8_e4m3fn
    for piece in row_pieces(weight):
        yield torch.from_numpy(piece).view(_STORED[weight.dtype]).to(kind).view(torch.uint8).numpy()


@click.command()
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path))
@click.option("--format", "format_name", required=True, type=click.Choice(list(FORMATS)))
@click.option("--plain", is_flag=True, help="Cast only.")
def main(checkpoints: tuple[Path, ...], output: Path, format_name: str, plain: bool) -> None:
    """Quantise, or only cast, the DiT of CHECKPOINTS into an unfinished bundle, which is removed."""
    number_format = FORMATS[format_name]
    stages = {f"{_STAGE}{index}": quantisable(path) for index, path in enumerate(checkpoints)}
    how = WeightQuantisation(number_format)
    with suppress(_DoneError), BundleWriter(output) as writer:
        started = time.monotonic()
        for stage_name, weights in stages.items():
            if plain:
                place_cast(writer, stage_name, weights, number_format)
            else:
                place_quantised(writer, stage_name, weights, dict.fromkeys(weights, how))
        seconds = time.monotonic() - started
        total = sum(weight.nbytes for weights in stages.values() for weight in weights.values())
        count = sum(len(weights) for weights in stages.values())
        print(json.dumps({"seconds": seconds, "source_bytes": total, "tensors": count}))
        raise _DoneError


if __name__ == "__main__":
    main()
