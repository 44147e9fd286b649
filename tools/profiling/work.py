"""A bundle and a request as the work that was measured: shape, steps, tokens, tiles, options; also in words.

Knows the manifest and the tiling; it measures nothing.
"""

from __future__ import annotations

import math

from reelforge.runtime.attention.table import AttentionTable, Pattern
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.engines.engine import EngineOptions, thread_count
from reelforge.runtime.recipe import Backend
from reelforge.runtime.request import NO_GUIDANCE, Request, resolve_request
from reelforge.runtime.step_cache.settings import Reuse, StepCache
from reelforge.runtime.tiling import plan_tiles
from reelforge.tools.console import format_bytes
from reelforge.tools.profiling.schema_work import Machine, Work

DENSE_ATTENTION = "dense"


def describe_work(bundle: Bundle, request: Request, options: EngineOptions) -> Work:
    """Return what a request makes of a bundle, with engines executed as ``options`` say.

    Raises:
        RequestError: If the bundle does not serve the request.
    """
    manifest = bundle.manifest
    spec, backend = manifest.spec, manifest.target.backend
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
        guidance=resolved.guidance,
        shift=resolved.shift,
        cfg_scale=resolved.cfg_scale,
        negative_prompt=resolved.negative_prompt,
        step_cache=None if resolved.step_cache is None else step_cache_words(resolved.step_cache),
        attention=attention_words(resolved.attention),
        threads=thread_count(options) if backend is Backend.CPU else None,
        provider=(options.provider or "cuda") if backend is Backend.CUDA else None,
    )


def step_cache_words(cache: StepCache) -> str:
    """Return a step cache as the command line writes it; a file of ratios is not named, since nobody knows its name."""
    words = f"{cache.method.value}:{cache.threshold:g}"
    if cache.reuse is not Reuse.EXTRAPOLATE:
        words += f",reuse={cache.reuse.value}"
    for name, value in (("warmup", cache.warmup), ("max-skips", cache.max_skips)):
        words += "" if value is None else f",{name}={value}"
    return words


def attention_words(table: AttentionTable) -> str:
    """Return which keys attention leaves out."""
    if table.pattern is Pattern.DENSE:
        return DENSE_ATTENTION
    first = f", the first {table.dense_steps} steps dense" if table.dense_steps else ""
    return f"{table.pattern.value}{first}"


def machine_words(machine: Machine, work: Work) -> str:
    """Return a machine for people, the GPU first if there is one, and how much of its cores was used if not all."""
    memory = f", {format_bytes(machine.memory_bytes)}" if machine.memory_bytes else ""
    used = "" if work.threads in (None, machine.cores) else f" ({work.threads} used)"
    host = f"{machine.processor}, {machine.cores} core{'s' if machine.cores > 1 else ''}{used}{memory}"
    return f"{machine.gpu}; {host}" if machine.gpu else host


def options_words(work: Work) -> list[str]:
    """Return what the request asked for besides shape and steps, for people; an empty list if nothing."""
    words = [f"step cache {work.step_cache}"] if work.step_cache else []
    if work.cfg_scale != NO_GUIDANCE:
        against = f" against {work.negative_prompt!r}" if work.negative_prompt else ""
        words.append(f"classifier-free guidance {work.cfg_scale:g}{against}")
    if work.attention != DENSE_ATTENTION:
        words.append(f"attention {work.attention}")
    if work.provider not in (None, "cuda"):
        words.append(f"ONNX Runtime's provider {work.provider}")
    return words
