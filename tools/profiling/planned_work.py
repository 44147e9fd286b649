"""Operations and bytes as the planner counts them, for backends that do not report shapes, and for whole stages.

Texts are as long as those of the request, which the bundle's tokenizers say. Needs the planner and the family's cost
model in ``export``, which need neither torch nor onnx, but ml_dtypes. Where they are missing, or a family has no model,
nothing is counted. The module measures nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.request import NO_GUIDANCE, Request, resolve_request
from reelforge.runtime.stage_inputs import StageInputs
from reelforge.tools.profiling.schema_work import StageWork

if TYPE_CHECKING:
    from reelforge.export.planner.layers import StageLayers
    from reelforge.export.planner.work import Call
    from reelforge.export.planner.work import StageWork as Planned


def planner_missing() -> str:
    """Return a sentence that says why nothing can be counted here; empty if it can be."""
    try:
        importlib.import_module("reelforge.export.planner.flops")
    except ImportError as error:
        return f"The planner, which counts operations, is not installed: {error} (pip install reelforge[export])"
    return ""


def planned_flops(bundle: Bundle, request: Request) -> Mapping[str, Mapping[str, int]]:
    """Return stage -> layer -> operations of one call, the largest one; a multiply-add is two.

    Raises:
        RequestError: If the bundle does not serve the request.
    """
    if planner_missing():
        return {}
    from reelforge.export.planner.flops import layer_flops
    from reelforge.export.planner.layers import rows_of

    found: dict[str, dict[str, int]] = {}
    for stage, (work, layers) in _planned(bundle, request).items():
        rows = rows_of(work.calls[0], layers)
        found[stage] = {name: layer_flops(layers.layers[name].shape, count) for name, count in rows.items()}
    return found


def planned_stages(bundle: Bundle, request: Request) -> tuple[StageWork, ...]:
    """Return what one call of each stage computes and moves at least, the mean over calls of different sizes.

    Nothing for classifier-free guidance, whose two prompts make calls of two sizes.

    Raises:
        RequestError: If the bundle does not serve the request.
    """
    if resolve_request(request, bundle.manifest, bundle.name).cfg_scale != NO_GUIDANCE or planner_missing():
        return ()
    from reelforge.export.planner.flops import call_flops

    precision = bundle.manifest.recipe.precision
    found = []
    for stage, (work, layers) in _planned(bundle, request).items():
        calls = sum(call.times for call in work.calls)
        flops = sum(call_flops(call, layers).total * call.times for call in work.calls)
        moved = sum(_bytes(call, layers) * call.times for call in work.calls)
        if flops:
            found.append(StageWork(stage, flops // calls, moved // calls, precision[stage].value))
    return tuple(found)


def _planned(bundle: Bundle, request: Request) -> dict[str, tuple[Planned, StageLayers]]:
    """Return work and layers of the stages that the family's cost model knows."""
    from reelforge.export.planner.layers import stage_layers
    from reelforge.export.planner.work import Workload

    manifest = bundle.manifest
    resolved = resolve_request(request, manifest, bundle.name)
    try:
        costs = importlib.import_module(f"reelforge.export.models.{manifest.spec.family}.costs")
    except ModuleNotFoundError:
        return {}
    text = StageInputs(bundle).text(resolved.prompt)
    prompt_tokens = text.llm["input_ids"].shape[1]
    # The planner counts the longest text that CLIP takes; the runtime cuts it after its end.
    spec = replace(manifest.spec, clip=replace(manifest.spec.clip, max_tokens=text.clip["clip_ids"].shape[1]))
    cropped = prompt_tokens - manifest.prompt_template.crop_start
    workload = Workload(resolved.shape, resolved.steps, cropped, prompt_tokens)
    works: Mapping[str, Planned] = getattr(costs, f"{spec.family}_work")(spec, workload)
    found = {}
    for entry in manifest.stages:
        if entry.name in works:
            shapes = {one.name: one.shape for one in entry.weights if not one.name.endswith(".scale")}
            layers = stage_layers(entry.name, shapes, manifest.recipe, None)
            found[entry.name] = (works[entry.name], layers)
    return found


def _bytes(call: Call, layers: StageLayers) -> int:
    """Return what a call reads and writes at least: as the planner's roofline counts it, attention's scores unseen."""
    from reelforge.export.planner.layers import BYTES, rows_of

    element = BYTES[layers.base]
    moved = call.passes * element
    for name, rows in rows_of(call, layers).items():
        layer = layers.layers[name]
        moved += layer.bytes + rows * (layer.shape[1] * BYTES[layer.precision] + layer.shape[0] * element)
    for one in call.attentions:
        size = BYTES[layers.attention_precision(one)]
        moved += 4 * one.count * one.heads * one.head_dim * one.tokens * size
    return moved
