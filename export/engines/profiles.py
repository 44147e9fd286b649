"""Optimisation profiles: the sizes that a stage's plan must take, from the recipe's shapes and the model's numbers.

Every named dimension of a stage's inputs has one range of sizes; the ranges are those of what the runtime feeds
(``runtime.pipeline``). Dimensions that follow from a video's shape are fixed per shape: a profile for each, and one for
a single frame of each size. Other stages have one profile. The module does not know stages by name, nor compilers.
"""

from __future__ import annotations

from collections.abc import Sequence

from reelforge.export.engines.request import Profile
from reelforge.export.stage import Stage
from reelforge.runtime.errors import RequestError
from reelforge.runtime.manifest import PromptTemplate
from reelforge.runtime.recipe import Precision, Recipe, VideoShape
from reelforge.runtime.spec import ModelSpec
from reelforge.runtime.tiling import TilePlan, plan_tiles

Range = tuple[int, int, int]

MAX_STEPS = 100
"""Sampling steps that a plan takes at once where stages run for all steps together."""

TYPICAL_TEXT_TOKENS = 64
"""Of a prompt, after the template's prefix: what kernels are chosen for."""

FP8_ATTENTION_TOKENS = 32
"""TensorRT-RTX 1.7 fuses FP8 attention only if every profile has at least so many tokens (measured)."""

_VIDEO = ("latent_frames", "latent_height", "latent_width", "image_tokens", "joint_tokens")


def profiles_for(stage: Stage, spec: ModelSpec, recipe: Recipe, template: PromptTemplate) -> tuple[Profile, ...]:
    """Return the optimisation profiles of a stage, or of a part of one.

    A single frame of a named size is left out where FP8 attention would see too few tokens for its kernel: such a
    bundle makes no images of that size.

    Args:
        stage: Names the dimensions.
        spec: The model's numbers.
        recipe: Its shapes (the model's default where it has none), batch and attention.
        template: The text around a prompt: its cropped prefix counts among the language model's tokens.

    Returns:
        At least one profile; their names differ.

    Raises:
        RequestError: If a shape of the recipe is too small for FP8 attention.
    """
    infos = stage.tensor_infos(stage.inputs)
    names = list(dict.fromkeys(size for info in infos for size in info.shape if isinstance(size, str)))
    common = _ranges(spec, recipe, template)
    if not any(name in _VIDEO for name in names):
        return (Profile("default", {name: common[name] for name in names}),)
    profiles = []
    for shape in served_shapes(spec, recipe):
        ranges = {**common, **_video_ranges(shape, spec, common["text_tokens"])}
        if recipe.attention is Precision.FP8 and ranges["joint_tokens"][0] < FP8_ATTENTION_TOKENS:
            if shape in named_shapes(spec, recipe):
                raise _too_small(shape, ranges["joint_tokens"][0])
            continue
        profiles.append(Profile(str(shape), {name: ranges[name] for name in names}))
    return tuple(profiles)


def named_shapes(spec: ModelSpec, recipe: Recipe) -> tuple[VideoShape, ...]:
    """Return the recipe's shapes, or the model's default shape where it has none."""
    defaults = spec.defaults
    shapes = recipe.shapes or (VideoShape(defaults.height, defaults.width, defaults.frames),)
    return tuple(dict.fromkeys(shapes))


def served_shapes(spec: ModelSpec, recipe: Recipe) -> tuple[VideoShape, ...]:
    """Return the named shapes and then a single frame of each of their sizes, every shape once."""
    named = named_shapes(spec, recipe)
    return tuple(dict.fromkeys([*named, *(VideoShape(shape.height, shape.width, 1) for shape in named)]))


def _ranges(spec: ModelSpec, recipe: Recipe, template: PromptTemplate) -> dict[str, Range]:
    """Return the ranges of all dimensions that are the same for every video shape."""
    text = spec.llm.max_text_tokens
    prompt = template.crop_start + text
    tiles = _tiles(spec, recipe)
    return {
        # Two at least: TensorRT-RTX drops the axis of a batch that is always one, and then has no kernel for the
        # attention of an encoder with a single head.
        "batch": (1, recipe.batch, max(2, recipe.batch)),
        "prompt_tokens": (1, min(template.crop_start + TYPICAL_TEXT_TOKENS, prompt), prompt),
        "clip_tokens": (1, min(TYPICAL_TEXT_TOKENS, spec.clip.max_tokens), spec.clip.max_tokens),
        "text_tokens": (1, min(TYPICAL_TEXT_TOKENS, text), text),
        "steps": (1, min(spec.defaults.steps, MAX_STEPS), MAX_STEPS),
        "tile_frames": _spanned([window for plan in tiles for window in plan.windows]),
        "tile_height": _spanned([row for plan in tiles for row in plan.rows]),
        "tile_width": _spanned([column for plan in tiles for column in plan.columns]),
    }


def _video_ranges(shape: VideoShape, spec: ModelSpec, text: Range) -> dict[str, Range]:
    """Return the ranges of the dimensions that one shape fixes."""
    _, frames, height, width = spec.latent_shape(shape.height, shape.width, shape.frames)
    patch = spec.dit.patch
    tokens = (frames // patch[0]) * (height // patch[1]) * (width // patch[2])
    return {
        "latent_frames": (frames, frames, frames),
        "latent_height": (height, height, height),
        "latent_width": (width, width, width),
        "image_tokens": (tokens, tokens, tokens),
        "joint_tokens": (tokens + text[0], tokens + text[1], tokens + text[2]),
    }


def _tiles(spec: ModelSpec, recipe: Recipe) -> list[TilePlan]:
    latents = [spec.latent_shape(shape.height, shape.width, shape.frames) for shape in served_shapes(spec, recipe)]
    return [plan_tiles((frames, height, width), spec.tiling) for _, frames, height, width in latents]


def _spanned(spans: Sequence[tuple[int, int]]) -> Range:
    """Return the range of the lengths of ``spans``; most tiles of a large video are the longest."""
    lengths = [stop - start for start, stop in spans]
    return min(lengths), max(lengths), max(lengths)


def _too_small(shape: VideoShape, tokens: int) -> RequestError:
    return RequestError(
        f"the shape {shape} is too small for attention in fp8.",
        received=f"{tokens} tokens with a prompt of one token",
        expected=f"at least {FP8_ATTENTION_TOKENS} tokens",
        fix="name a larger shape, or leave --attention fp8 out",
    )
