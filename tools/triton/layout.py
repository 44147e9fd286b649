"""Which stages become models of their own, and which run inside the pipeline's model.

Triton's ONNX Runtime backend loads every graph of ours. Its TensorRT backend compares ranks and has no tensors of rank
0, which the sampling loop's stages take; and none of its backends loads plans of TensorRT-RTX. Such stages run inside
the pipeline's model, on this package's own engines. The module reads manifests, and writes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from reelforge.runtime.errors import RequestError
from reelforge.runtime.manifest import Manifest, PlanEntry, StageEntry, TensorInfo
from reelforge.runtime.recipe import Backend
from reelforge.runtime.step_cache.settings import CHANGE_STAGE, INPUT_STAGE, PARTED_STAGES, REUSE_STAGE

LOOP_STAGES = ("dit", "guidance", CHANGE_STAGE, REUSE_STAGE, INPUT_STAGE, *PARTED_STAGES)
"""Stages that exchange registers between steps, which have to be in one place (see ``runtime.registers``)."""

EVERY_STAGE = "all"


@dataclass(frozen=True)
class Layout:
    """Where each stage runs.

    Attributes:
        models: Stages that are models of their own, in the manifest's order.
        inside: Those that run inside the pipeline's model.
        reasons: Stage -> why it is inside.
    """

    models: tuple[str, ...]
    inside: tuple[str, ...]
    reasons: dict[str, str]


def decide_layout(manifest: Manifest, inside: Collection[str] = ()) -> Layout:
    """Decide where each stage runs.

    Args:
        manifest: Of the bundle.
        inside: Stages that are wanted inside, or ``"all"``.

    Raises:
        RequestError: For a stage that the bundle does not have.
    """
    names = [stage.name for stage in manifest.stages]
    unknown = [name for name in inside if name not in (*names, EVERY_STAGE)]
    if unknown:
        raise RequestError(
            "--inside names stages that the bundle does not have.",
            received=", ".join(unknown),
            expected=", ".join([*names, EVERY_STAGE]),
            fix="write for example --inside dit,vae_decoder, or --inside all",
        )
    reasons = {}
    for stage in manifest.stages:
        if stage.name in inside or EVERY_STAGE in inside:
            reasons[stage.name] = "as asked"
        elif reason := obstacle(stage, manifest.target.backend):
            reasons[stage.name] = reason
    if first := next((name for name in LOOP_STAGES if name in reasons), None):
        for name in LOOP_STAGES:
            if name in names:
                reasons.setdefault(name, f"it works on what {first!r} leaves where it computes")
    models = tuple(name for name in names if name not in reasons)
    return Layout(models, tuple(name for name in names if name in reasons), reasons)


def obstacle(stage: StageEntry, backend: Backend) -> str:
    """Return why none of Triton's own backends loads a stage, or nothing."""
    if not backend.has_plans:
        return ""
    if backend is Backend.RTX:
        return "Triton has no backend for plans of TensorRT-RTX"
    scalars = _scalars([info for plan in stage.plans for info in (*plan.inputs, *plan.outputs)])
    if scalars:
        return f"Triton's TensorRT backend takes no tensors of rank 0 ({', '.join(scalars)})"
    series = _series(stage)
    if any(_signatures(other) != _signatures(series[0]) for other in series[1:]):
        return "its plans are cut differently for different architectures"
    return ""


def parts_of(stage: StageEntry) -> list[list[PlanEntry]]:
    """Return the plans of each part of a stage without an obstacle, one per group of architectures."""
    return [list(plans) for plans in zip(*_series(stage), strict=True)]


def _series(stage: StageEntry) -> list[list[PlanEntry]]:
    """Return the plans of each group of architectures, in the order of their parts."""
    groups = dict.fromkeys(plan.architectures for plan in stage.plans)
    ordered = sorted(stage.plans, key=lambda plan: plan.part)
    return [[plan for plan in ordered if plan.architectures == group] for group in groups]


def _signatures(plans: Sequence[PlanEntry]) -> list[tuple[object, ...]]:
    return [(plan.inputs, plan.outputs, [profile.name for profile in plan.profiles]) for plan in plans]


def _scalars(tensors: Sequence[TensorInfo]) -> list[str]:
    return list(dict.fromkeys(info.name for info in tensors if not info.shape))
