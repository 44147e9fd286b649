"""Operations of each layer as the planner counts them, for backends that do not report shapes.

Needs the family's cost model in ``export``, which needs neither torch nor onnx. Where there is none for a family,
nothing is counted. The module measures nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.request import Request, resolve_request


def planned_flops(bundle: Bundle, request: Request) -> Mapping[str, Mapping[str, int]]:
    """Return stage -> layer -> operations of one call, the largest one; a multiply-add is two.

    Raises:
        RequestError: If the bundle does not serve the request.
    """
    from reelforge.export.planner.flops import layer_flops
    from reelforge.export.planner.layers import rows_of, stage_layers
    from reelforge.export.planner.work import StageWork, Workload

    manifest = bundle.manifest
    spec, recipe = manifest.spec, manifest.recipe
    try:
        costs = importlib.import_module(f"reelforge.export.models.{spec.family}.costs")
    except ModuleNotFoundError:
        return {}
    resolved = resolve_request(request, manifest, bundle.name)
    text = spec.llm.max_text_tokens
    workload = Workload(resolved.shape, resolved.steps, text, text + manifest.prompt_template.crop_start)
    works: Mapping[str, StageWork] = getattr(costs, f"{spec.family}_work")(spec, workload)
    found: dict[str, dict[str, int]] = {}
    for entry in manifest.stages:
        if entry.name not in works:
            continue
        shapes = {one.name: one.shape for one in entry.weights if not one.name.endswith(".scale")}
        layers = stage_layers(entry.name, shapes, recipe, None)
        rows = rows_of(works[entry.name].calls[0], layers)
        found[entry.name] = {name: layer_flops(layers.layers[name].shape, count) for name, count in rows.items()}
    return found
