"""Bytes: what a stage takes in the memory where it computes, and whether a budget suffices for it.

Weights are the manifest's: of plans as their receipts count them, on the CPU as float32 where 16-bit weights are
widened when a session is made, and as they are in the file, with the largest as float32, where that is done in the run.
Activations of plans are what the library states per profile. On the CPU nobody states them; what is counted is an
estimate, with constants read off ONNX Runtime 1.31 on the demonstration model (a decoder tile of 17 frames of 256 x 256
pixels: 327 MB). Not known, and not counted: the copies that a session makes while it is loaded (up to its weights once
more), convolutions' workspaces, graphs, the CUDA context, latents, conditions and pictures. A budget is therefore what
engines aim at, not a limit that the operating system would enforce.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reelforge.runtime.engines.narrow_weights import Widening, widens_in_the_run
from reelforge.runtime.errors import RequestError
from reelforge.runtime.host_memory import available_bytes
from reelforge.runtime.recipe import Backend

if TYPE_CHECKING:
    from reelforge.runtime.manifest import Manifest, PlanEntry, ProfileEntry, StageEntry, TensorInfo

LEAST = "least"
"""The budget that keeps no engine beyond its use: one stage at a time."""

HOST_SHARE = 0.5
"""Of the memory that is available when a pipeline is opened: what engines on the CPU may take without a budget."""

DEVICE_SHARE = 0.9
"""Likewise of a GPU's free memory when the first stage is loaded."""

_UNITS = {"": 1, "B": 1, **{f"{letter}B": 1000**n for n, letter in enumerate("KMGT", 1)}}
_UNITS |= {f"{letter}IB": 1024**n for n, letter in enumerate("KMGT", 1)}
_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_WIDE_BYTES = {"F16": 4, "BF16": 4}
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1}
_FLOAT_BYTES = 4
_TENSORS_PER_PIXEL = 5  # of the decoder's widest pictures, alive together: measured 4.6
_TENSORS_PER_TOKEN = 20  # of the transformer's width: queries, keys, values, the MLP of four widths, their inputs
_SCORES = 2  # matrices of tokens x tokens per head: before and after the softmax


@dataclass(frozen=True)
class StageBytes:
    """What a stage takes while it runs; without ``activations`` while it waits."""

    weights: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.activations


def parse_budget(value: int | str | None) -> int | None:
    """Return a budget in bytes; None for none.

    Args:
        value: Bytes, or a number with a unit: ``"20GiB"`` (1024) or ``"20GB"`` (1000); ``"least"`` is 0.

    Raises:
        RequestError: If it is neither.
    """
    if value is None:
        return None
    if value == LEAST:
        return 0
    found = _TEXT.fullmatch(value) if isinstance(value, str) else None
    amount = float(found[1]) * _UNITS.get(found[2].upper(), 0) if found else value
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not 1 <= amount < 2**63:
        raise RequestError(
            "the memory budget is not a number of bytes.",
            received=f"memory_budget={value!r}",
            expected="a whole number of bytes, or a number with KB, MB, GB, TB, KiB, MiB, GiB or TiB",
            fix=f"use for example '20GiB', {LEAST!r} for one stage at a time, or leave it out",
        )
    return int(amount)


def show_bytes(count: int) -> str:
    """Return bytes as a budget is written, rounded up to three digits, so that what is shown suffices."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            digits = max(2 - int(math.log10(count / size)), 0)
            scaled = math.ceil(count / size * 10**digits) / 10**digits
            return f"{scaled:.{digits}f}{unit}"
    return f"{count}B"


def default_host_budget() -> int:
    """Return :data:`HOST_SHARE` of what is available; 0, one stage at a time, where that is not known."""
    return int((available_bytes() or 0) * HOST_SHARE)


def stage_bytes(
    manifest: Manifest,
    entry: StageEntry,
    sizes: Mapping[str, int] | None = None,
    widening: Widening = Widening.AUTO,
) -> StageBytes:
    """Return what a stage takes.

    Args:
        manifest: Of the bundle.
        entry: The stage.
        sizes: Sizes of named dimensions. Of plans, a dimension that is not among them counts as the smallest that they
            were compiled for; on the CPU, tensors with such a dimension are not counted.
        widening: When 16-bit weights become float32 on the CPU.
    """
    sizes = sizes or {}
    if entry.plans:
        # Which GPU it will be is not known before it is opened: the group of plans that takes most.
        groups: dict[tuple[str, ...], list[PlanEntry]] = {}
        for plan in entry.plans:
            groups.setdefault(plan.architectures, []).append(plan)
        return max((_plan_bytes(plans, sizes) for plans in groups.values()), key=lambda need: need.total)
    weights = widened = 0
    wide = manifest.target.backend is Backend.CPU
    if wide and widens_in_the_run(entry, widening):
        widened, wide = max(math.prod(weight.shape) for weight in entry.weights) * _FLOAT_BYTES, False
    for weight in entry.weights:
        size = _WIDE_BYTES.get(weight.dtype) if wide else None
        weights += weight.length if size is None else math.prod(weight.shape) * size
    tensors = sum(_tensor_bytes(info, sizes) for info in (*entry.inputs, *entry.outputs))
    return StageBytes(weights, widened + tensors + _inner_bytes(manifest, entry.name, sizes))


def refuse_too_small(needs: Mapping[str, StageBytes], budget: int, what: str) -> None:
    """Refuse a budget in which some stage does not fit even alone. 0, one stage at a time, is never too small.

    Raises:
        RequestError: Saying what each stage needs and which budget is the smallest that works.
    """
    short = {stage: need for stage, need in needs.items() if need.total > budget}
    if not short or budget == 0:
        return
    listed = ", ".join(
        f"{stage} {show_bytes(need.total)} (weights {show_bytes(need.weights)})" for stage, need in short.items()
    )
    fitting = [stage for stage in needs if stage not in short]
    least = show_bytes(max(need.total for need in short.values()))
    raise RequestError(
        f"the memory budget is too small for {what}: it does not fit {listed}.",
        received=f"memory_budget={show_bytes(budget)}, in which {', '.join(fitting) or 'no stage'} would fit",
        expected=f"{least} or more, with which stages are loaded one after the other",
        fix=f"use memory_budget={least!r}, make a smaller or shorter video, or build with a lower precision",
    )


def _plan_bytes(plans: list[PlanEntry], sizes: Mapping[str, int]) -> StageBytes:
    activations = 0
    for plan in plans:
        fitting = [profile for profile in plan.profiles if _takes(profile, sizes)] or list(plan.profiles)
        activations = max(activations, min(profile.activation_bytes for profile in fitting))
    return StageBytes(sum(plan.weight_bytes for plan in plans), activations)


def _takes(profile: ProfileEntry, sizes: Mapping[str, int]) -> bool:
    ranges = profile.dimensions
    return all(ranges[name][0] <= size <= ranges[name][2] for name, size in sizes.items() if name in ranges)


def _tensor_bytes(info: TensorInfo, sizes: Mapping[str, int]) -> int:
    shape = [sizes.get(size, 0) if isinstance(size, str) else size for size in info.shape]
    return math.prod(shape) * _ITEM_BYTES.get(info.dtype, _FLOAT_BYTES)


def _inner_bytes(manifest: Manifest, stage: str, sizes: Mapping[str, int]) -> int:
    """Estimate what is alive inside of the two stages that are large because the video is."""
    spec = manifest.spec
    if stage == "vae_decoder":
        pixels = math.prod(sizes.get(name, 0) for name in ("video_frames", "video_height", "video_width"))
        return pixels * spec.vae.block_widths[0] * _FLOAT_BYTES * _TENSORS_PER_PIXEL
    if stage == "dit":
        tokens = sizes.get("image_tokens", 0)
        return _FLOAT_BYTES * tokens * (_TENSORS_PER_TOKEN * spec.dit.width + _SCORES * spec.dit.heads * tokens)
    return 0
