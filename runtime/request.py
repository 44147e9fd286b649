"""A request for one video, and its check against a bundle: everything that is wrong with it is said at once.

Knows the manifest; not engines, and not how a prompt is tokenised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from reelforge.runtime.errors import RequestError
from reelforge.runtime.manifest import Manifest, ProfileEntry
from reelforge.runtime.noise import MAX_SEED
from reelforge.runtime.recipe import VideoShape
from reelforge.runtime.tokenize import clean_prompt

Number = TypeVar("Number", int, float)

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
        shift: Shift of the flow-matching schedule.
    """

    prompt: str
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    seed: int = 0
    guidance: float | None = None
    shift: float | None = None


@dataclass(frozen=True)
class ResolvedRequest:
    """A request that a bundle can serve: checked, with every default filled in."""

    prompt: str
    shape: VideoShape
    steps: int
    seed: int
    guidance: float
    shift: float


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
    prompt = clean_prompt(request.prompt)
    default = default_shape(manifest)
    sizes: dict[str, int] = {name: _default(getattr(request, name), getattr(default, name)) for name in _SIZES}
    defaults = manifest.spec.defaults
    steps = _default(request.steps, defaults.steps)
    guidance = _default(request.guidance, defaults.guidance)
    shift = _default(request.shift, defaults.shift)
    problems = [problem for name in _SIZES if (problem := _size_problem(name, sizes[name], manifest))]
    problems += _integer_problems("steps", steps, 1, None, defaults.steps)
    problems += _integer_problems("seed", request.seed, 0, MAX_SEED, 0)
    problems += _number_problems("guidance", guidance, defaults.guidance)
    problems += _number_problems("shift", shift, defaults.shift)
    if request.guidance is not None and not manifest.spec.dit.guidance_embedding:
        problems.append(_Problem(f"guidance={guidance!r}", "no guidance: this model takes none", "leave guidance out"))
    if manifest.target.backend.has_plans and not problems:
        problems += _plan_problems(VideoShape(**sizes), steps, manifest)
    if problems:
        names = ", ".join(problem.received for problem in problems)
        raise RequestError(
            f"{names} {'is' if len(problems) == 1 else 'are'} not supported by bundle {bundle_name!r}.",
            received=names.partition("=")[2] if len(problems) == 1 else names,
            expected="; ".join(problem.expected for problem in problems),
            fix="; ".join(problem.fix for problem in problems),
        )
    return ResolvedRequest(prompt, VideoShape(**sizes), steps, request.seed, float(guidance), float(shift))


def default_shape(manifest: Manifest) -> VideoShape:
    """Return the shape of a request that names none: the model's own if the bundle serves it, else its first shape."""
    defaults = manifest.spec.defaults
    shape = VideoShape(defaults.height, defaults.width, defaults.frames)
    if any(_size_problem(name, getattr(shape, name), manifest) for name in _SIZES):
        return manifest.recipe.shapes[0] if manifest.recipe.shapes else shape
    return shape


def _default(value: Number | None, default: Number) -> Number:
    return default if value is None else value


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
    low, high = (min(served), max(served)) if served else (smallest, None)
    span = f" of at least {low}" if high is None else f" in {low}..{high}" if low != high else f", here {low}"
    expected = f"{name} {grid}{span}" + (" or 1" if name == "frames" and low > 1 else "")
    if type(value) is not int:
        return _Problem(f"{name}={value!r}", expected, f"use {name}={low}")
    inside = low <= value and (high is None or value <= high)
    if name == "frames" and value == 1:
        return None
    if inside and value % step == offset % step:
        return None
    nearest = max(round((value - offset) / step) * step + offset, low)
    nearest = nearest if high is None else min(nearest, high)
    hint = f"use {name}={nearest}"
    if not inside and value >= smallest and value % step == offset % step:
        hint += ", or rebuild with a shape that covers it"
    return _Problem(f"{name}={value}", expected, hint)


def _plan_problems(shape: VideoShape, steps: int, manifest: Manifest) -> list[_Problem]:
    """Plans are compiled for single shapes, not for the range that these span, and for so many steps at most."""
    problems = []
    profiles = [profile for stage in manifest.stages for plan in stage.plans for profile in plan.profiles]
    _, frames, height, width = manifest.spec.latent_shape(shape.height, shape.width, shape.frames)
    wanted = {"latent_frames": frames, "latent_height": height, "latent_width": width}
    videos = {profile.name: profile for profile in profiles if set(wanted) <= set(profile.dimensions)}
    if not any(_takes(profile, wanted) for profile in videos.values()):
        listed = ", ".join(videos)
        named = ",".join(str(one) for one in manifest.recipe.shapes)
        problems.append(
            _Problem(
                f"shape={shape}",
                f"shape one of {listed}",
                f"use one of them, or rebuild with --shapes {named},{shape}",
            )
        )
    limits = [profile.dimensions["steps"][2] for profile in profiles if "steps" in profile.dimensions]
    if limits and steps > min(limits):
        problems.append(_Problem(f"steps={steps}", f"steps up to {min(limits)}", f"use steps={min(limits)}"))
    return problems


def _takes(profile: ProfileEntry, sizes: Mapping[str, int]) -> bool:
    ranges = profile.dimensions
    return all(ranges[name][0] <= size <= ranges[name][2] for name, size in sizes.items())


def _integer_problems(name: str, value: object, low: int, high: int | None, default: int) -> list[_Problem]:
    if type(value) is int and value >= low and (high is None or value <= high):
        return []
    expected = f"{name} a whole number of at least {low}" if high is None else f"{name} a whole number in {low}..{high}"
    return [_Problem(f"{name}={value!r}", expected, f"use for example {name}={default}")]


def _number_problems(name: str, value: object, default: float) -> list[_Problem]:
    if type(value) in (int, float) and math.isfinite(float(str(value))) and float(str(value)) > 0:
        return []
    return [_Problem(f"{name}={value!r}", f"{name} a finite number above 0", f"use for example {name}={default:g}")]
