"""A bundle and a request as the work that was measured: shape, steps, tokens, tiles.

Knows the manifest and the tiling; it measures nothing.
"""

from __future__ import annotations

import math

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.request import Request, resolve_request
from reelforge.runtime.tiling import plan_tiles
from reelforge.tools.profiling.schema import Work


def describe_work(bundle: Bundle, request: Request) -> Work:
    """Return what a request makes of a bundle.

    Raises:
        RequestError: If the bundle does not serve the request.
    """
    manifest = bundle.manifest
    spec = manifest.spec
    resolved = resolve_request(request, manifest, bundle.name)
    shape = resolved.shape
    _, *grid = spec.latent_shape(shape.height, shape.width, shape.frames)
    latents = (grid[0], grid[1], grid[2])
    plan = plan_tiles(latents, spec.tiling)
    decoded = math.prod(sum(stop - start for start, stop in axis) for axis in (plan.windows, plan.rows, plan.columns))
    tokens = math.prod(size // patch for size, patch in zip(latents, spec.dit.patch, strict=True))
    return Work(
        bundle=bundle.name,
        content_digest=manifest.content_digest,
        family=spec.family,
        target=str(manifest.target),
        precision={stage: precision.value for stage, precision in manifest.recipe.precision.items()},
        prompt=resolved.prompt,
        height=shape.height,
        width=shape.width,
        frames=shape.frames,
        steps=resolved.steps,
        image_tokens=tokens,
        tiles=plan.tiles,
        overlap=1 - math.prod(latents) / decoded,
    )
