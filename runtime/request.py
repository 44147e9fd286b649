"""A request for one video, and its check against a bundle: everything that is wrong with it is said at once.

Knows the manifest; not engines, and not how a prompt is tokenised.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from reelforge.runtime.attention.table import DENSE, AttentionTable, Pattern, checked
from reelforge.runtime.attention.table import problems as table_problems
from reelforge.runtime.errors import RequestError
from reelforge.runtime.noise import MAX_SEED
from reelforge.runtime.recipe import VideoShape
from reelforge.runtime.step_cache.rescaling import published
from reelforge.runtime.step_cache.settings import OFF, PARTED_STAGES, StepCache
from reelforge.runtime.tokenize import clean_prompt

if TYPE_CHECKING:
    from reelforge.runtime.manifest import Manifest, ProfileEntry

Number = TypeVar("Number", int, float)

MAX_SIDE = 16_384
MAX_FRAMES = 4_097
MAX_STEPS = 1_000_000
"""Sizes where a bundle states none. Beyond these a number is a mistake; what a machine can hold is less."""

MAX_SCALE = 1e6
"""Of guidance and shift: far above any use, far below where float32 overflows."""

NO_GUIDANCE = 1.0
"""The ``cfg_scale`` with which a negative prompt has no effect."""

GUIDANCE_STAGE = "guidance"

_SIZES = ("height", "width", "frames")


@dataclass(frozen=True)
class Request:
    """What to generate. None means the bundle's default.

    Args:
        prompt: Any Unicode text; it may be empty.
        height: Pixels.
        width: Pixels.
        frames: Pixel frames, ``4 k + 1`` (the VAE's temporal compression); 1 is an image.
        steps: Sampling steps.
        seed: Seed of the initial noise (see ``runtime.noise``).
        guidance: Embedded guidance scale; only for models that take one.
        cfg_scale: Classifier-free guidance with this scale: two evaluations of the model per step. 1 is off. For
            checkpoints that are not guidance-distilled; see ``runtime.guidance``.
        negative_prompt: What to keep away from; only with a ``cfg_scale`` above 1. None means an empty prompt.
        shift: Shift of the flow-matching schedule.
        attention: What the attention of ``dit`` leaves out; only for bundles built for that.
        step_cache: Which steps may reuse the velocity of earlier ones (see ``runtime.step_cache``). Most bundles have
            no default, which computes all; ``OFF`` does so with any bundle.
    """

    prompt: str
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    seed: int = 0
    guidance: float | None = None
    shift: float | None = None
    attention: AttentionTable | None = None
    cfg_scale: float | None = None
    negative_prompt: str | None = None
    step_cache: StepCache | None = None


@dataclass(frozen=True)
class ResolvedRequest:
    """A request that a bundle can serve: checked, with every default filled in.

    ``negative_prompt`` is None where there is no classifier-free guidance.
    """

    prompt: str
    shape: VideoShape
    steps: int
    seed: int
    guidance: float
    shift: float
    attention: AttentionTable = DENSE
    cfg_scale: float = NO_GUIDANCE
    negative_prompt: str | None = None
    step_cache: StepCache | None = None


_SHOWN_BITS = 128
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 40


@dataclass
class _Problem:
    received: str
    expected: str
    fix: str


def resolve_request(request: Request, manifest: Manifest, bundle_name: str) -> ResolvedRequest:
    """Check a request against a bundle and fill in its defaults.

    Raises:
        RequestError: Listing all settings that the bundle does not support.
    """
    prompt, problems = _clean(request.prompt)
    default = default_shape(manifest)
    sizes: dict[str, int] = {name: _default(getattr(request, name), getattr(default, name)) for name in _SIZES}
    defaults = manifest.spec.defaults
    steps = _default(request.steps, defaults.steps)
    guidance = _default(request.guidance, defaults.guidance)
    shift = _default(request.shift, defaults.shift)
    size_problems = [problem for name in _SIZES if (problem := _size_problem(name, sizes[name], manifest))]
    step_problems = _integer_problems("steps", steps, 1, MAX_STEPS, defaults.steps)
    problems += size_problems + step_problems
    problems += _integer_problems("seed", request.seed, 0, MAX_SEED, 0)
    problems += _number_problems("guidance", guidance, defaults.guidance)
    problems += _number_problems("shift", shift, defaults.shift)
    if request.guidance is not None and not manifest.spec.dit.guidance_embedding:
        said = f"guidance={_shown(guidance)}"
        problems.append(_Problem(said, "no guidance: this model takes none", "leave guidance out"))
    negative, guidance_problems = _cfg(request, manifest)
    problems += guidance_problems
    step_cache = _step_cache(request, manifest)
    problems += _step_cache_problems(step_cache, manifest)
    # What a number that is wrong by itself would mean for plans and tables is not asked; everything else is.
    usable_shape = None if size_problems else VideoShape(**sizes)
    usable_steps = None if step_problems else steps
    if manifest.target.backend.has_plans:
        problems += _plan_problems(usable_shape, usable_steps, manifest)
    if request.attention is not None:
        problems += _attention_problems(request.attention, usable_shape, usable_steps, manifest)
    if problems:
        names = ", ".join(problem.received for problem in problems)
        raise RequestError(
            f"{names} {'is' if len(problems) == 1 else 'are'} not supported by bundle {bundle_name!r}.",
            received=names.partition("=")[2] if len(problems) == 1 else names,
            expected="; ".join(problem.expected for problem in problems),
            fix="; ".join(problem.fix for problem in problems),
        )
    shape, attention = VideoShape(**sizes), request.attention or DENSE
    cfg_scale = float(_default(request.cfg_scale, NO_GUIDANCE))
    return ResolvedRequest(
        prompt,
        shape,
        steps,
        request.seed,
        float(guidance),
        float(shift),
        attention,
        cfg_scale,
        negative,
        None if step_cache is None else _completed(step_cache, manifest),
    )


def default_shape(manifest: Manifest) -> VideoShape:
    """Return the shape of a request that names none: the model's own if the bundle serves it, else its first shape."""
    defaults = manifest.spec.defaults
    shape = VideoShape(defaults.height, defaults.width, defaults.frames)
    if any(_size_problem(name, getattr(shape, name), manifest) for name in _SIZES):
        return manifest.recipe.shapes[0] if manifest.recipe.shapes else shape
    return shape


def _default(value: Number | None, default: Number) -> Number:
    return default if value is None else value


def _step_cache(request: Request, manifest: Manifest) -> StepCache | None:
    if request.step_cache is None:
        return None if manifest.step_cache is None else StepCache.parse(manifest.step_cache)
    is_off = isinstance(request.step_cache, StepCache) and request.step_cache == OFF
    return None if is_off else request.step_cache


def _step_cache_problems(cache: object, manifest: Manifest) -> list[_Problem]:
    if cache is None:
        return []
    if not isinstance(cache, StepCache):
        example = "StepCache.parse('easycache:0.025')"
        return [_Problem(f"step_cache={_shown(cache)}", "step_cache a StepCache", f"use {example}, or leave it out")]
    problems = [_Problem(f"step_cache {one.received}", one.expected, one.fix) for one in cache.problems()]
    if not problems and _completed(cache, manifest).lacks_coefficients():
        fix = "write coefficients=FILE with a file from reelforge measure-coefficients"
        expected = "teacache with the coefficients of the checkpoint: none are published for a model of this size"
        problems.append(_Problem("step_cache teacache without coefficients", expected, fix))
    missing = [] if problems else [stage for stage in cache.stages if manifest.stage(stage) is None]
    if missing:
        expected = f"no step_cache: the bundle has no stage {' and no '.join(map(repr, missing))}"
        option = " --partition head,body,tail" if set(missing) & set(PARTED_STAGES) else ""
        fix = f"leave it out, or rebuild with build-engine{option}"
        problems.append(_Problem(f"step_cache={cache.method.value}", expected, fix))
    return problems


def _completed(cache: StepCache, manifest: Manifest) -> StepCache:
    """Return a step cache with what is published of the model where nothing was measured."""
    return replace(cache, coefficients=published(manifest.spec)) if cache.lacks_coefficients() else cache


def _cfg(request: Request, manifest: Manifest) -> tuple[str | None, list[_Problem]]:
    """Return the negative prompt, None without classifier-free guidance, and what is wrong with either setting."""
    scale = _default(request.cfg_scale, NO_GUIDANCE)
    problems = _number_problems("cfg_scale", scale, NO_GUIDANCE)
    said = f"cfg_scale={_shown(scale)}"
    unguided = not problems and scale == NO_GUIDANCE
    if not problems and scale < NO_GUIDANCE:
        problems.append(_Problem(said, "cfg_scale of at least 1", "use cfg_scale=1, or leave it out"))
    guided = not problems and not unguided
    if guided and manifest.stage(GUIDANCE_STAGE) is None:
        expected = "no cfg_scale: the bundle has no stage 'guidance'"
        problems.append(_Problem(said, expected, "leave it out, or rebuild the bundle"))
    negative, said_wrong = _clean("" if request.negative_prompt is None else request.negative_prompt)
    problems += [replace(one, received=f"negative_{one.received}") for one in said_wrong]
    if request.negative_prompt is not None and unguided:
        problems.append(
            _Problem(
                f"negative_prompt={_shown(request.negative_prompt)}",
                "no negative_prompt without a cfg_scale above 1, since it would have no effect",
                "use for example cfg_scale=6, or leave negative_prompt out",
            )
        )
    return (negative if guided else None), problems


def _clean(prompt: object) -> tuple[str, list[_Problem]]:
    if not isinstance(prompt, str):
        return "", [_Problem(f"prompt={_shown(prompt)}", "prompt a string", "pass text, which may be empty")]
    try:
        return clean_prompt(prompt), []
    except RequestError as error:
        what = error.where.removeprefix("the prompt is ").removesuffix(".")
        return "", [_Problem(f"prompt={error.received}", f"prompt {error.expected} (it is {what})", error.fix)]


def _shown(value: object) -> str:
    """Return a value for a message: short, and whatever it is. Python refuses to write very long integers out."""
    if isinstance(value, int) and value.bit_length() > _SHOWN_BITS:
        return f"<an integer of {value.bit_length()} bits>"
    return ascii(value) if isinstance(value, (int, float, type(None))) else _SHORT.repr(value)


def _size_problem(name: str, value: object, manifest: Manifest) -> _Problem | None:
    """Check one of height, width and frames against the model's grid and the range that the bundle's shapes span."""
    if name == "frames":
        step, offset = manifest.spec.vae.temporal_compression, 1
        grid = f"{step}k+1"
    else:
        step, offset = manifest.spec.pixel_multiple, 0
        grid = f"a multiple of {step}"
    smallest = offset or step
    served = [int(getattr(shape, name)) for shape in manifest.recipe.shapes]
    limit = ((MAX_FRAMES if name == "frames" else MAX_SIDE) - offset) // step * step + offset
    low, high = (min(served), max(served)) if served else (smallest, limit)
    span = f" in {low}..{high}" if low != high else f", here {low}"
    expected = f"{name} {grid}{span}" + (" or 1" if name == "frames" and low > 1 else "")
    if type(value) is not int:
        return _Problem(f"{name}={_shown(value)}", expected, f"use {name}={low}")
    inside = low <= value <= high
    if name == "frames" and value == 1:
        return None
    if inside and value % step == offset % step:
        return None
    nearest = min(max((value - offset + step // 2) // step * step + offset, low), high)
    hint = f"use {name}={nearest}"
    if not inside and smallest <= value <= limit and value % step == offset % step:
        hint += ", or rebuild with a shape that covers it"
    return _Problem(f"{name}={_shown(value)}", expected, hint)


def _plan_problems(shape: VideoShape | None, steps: int | None, manifest: Manifest) -> list[_Problem]:
    """Plans are compiled for single shapes, not for the range that these span, and for so many steps at most."""
    profiles = [profile for stage in manifest.stages for plan in stage.plans for profile in plan.profiles]
    problems = [] if shape is None else _plan_shape_problems(shape, profiles, manifest)
    limits = [profile.dimensions["steps"][2] for profile in profiles if "steps" in profile.dimensions]
    if steps is not None and limits and steps > min(limits):
        problems.append(_Problem(f"steps={steps}", f"steps up to {min(limits)}", f"use steps={min(limits)}"))
    return problems


def _plan_shape_problems(shape: VideoShape, profiles: Sequence[ProfileEntry], manifest: Manifest) -> list[_Problem]:
    _, frames, height, width = manifest.spec.latent_shape(shape.height, shape.width, shape.frames)
    wanted = {"latent_frames": frames, "latent_height": height, "latent_width": width}
    videos = {profile.name: profile for profile in profiles if set(wanted) <= set(profile.dimensions)}
    if any(_takes(profile, wanted) for profile in videos.values()):
        return []
    named = ",".join(str(one) for one in manifest.recipe.shapes)
    fix = f"use one of them, or rebuild with --shapes {named},{shape}"
    return [_Problem(f"shape={shape}", f"shape one of {', '.join(videos)}", fix)]


def _takes(profile: ProfileEntry, sizes: Mapping[str, int]) -> bool:
    ranges = profile.dimensions
    return all(ranges[name][0] <= size <= ranges[name][2] for name, size in sizes.items())


def _attention_problems(
    table: object, shape: VideoShape | None, steps: int | None, manifest: Manifest
) -> list[_Problem]:
    if not isinstance(table, AttentionTable) or not isinstance(table.pattern, Pattern):
        fix = "use for example usual_table(Pattern.RADIAL), or leave it out"
        return [_Problem(f"attention={_shown(table)}", "attention an AttentionTable with a Pattern", fix)]
    try:
        checked(table)
    except RequestError as error:
        what = error.where.removeprefix("the attention table has ").removesuffix(" that cannot be used.")
        return [_Problem(f"attention with {what}={error.received}", f"{what} {error.expected}", error.fix)]
    grid = None if shape is None else manifest.spec.token_grid(shape.height, shape.width, shape.frames)
    found = table_problems(table, manifest.recipe.sparse_attention, grid, manifest.spec.dit.heads, steps)
    return [_Problem(problem.received, problem.expected, problem.fix) for problem in found]


def _integer_problems(name: str, value: object, low: int, high: int, default: int) -> list[_Problem]:
    if type(value) is int and low <= value <= high:
        return []
    expected = f"{name} a whole number in {low}..{high}"
    return [_Problem(f"{name}={_shown(value)}", expected, f"use for example {name}={default}")]


def _number_problems(name: str, value: object, default: float) -> list[_Problem]:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_SCALE:
        return []  # NaN compares false
    expected = f"{name} a number above 0, at most {MAX_SCALE:g}"
    return [_Problem(f"{name}={_shown(value)}", expected, f"use for example {name}={default:g}")]
