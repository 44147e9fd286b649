"""From what a caller sent to a request that this service carries out: all limits, before any work.

The module knows the settings, the bundle's facts and the runtime's requests; it knows neither HTTP nor the store.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass
from typing import Any

from reelforge.runtime.errors import RequestError
from reelforge.runtime.request import Request
from reelforge.runtime.step_cache.settings import StepCache
from reelforge.tools.service.backend import Backend, Facts, work_of
from reelforge.tools.service.problems import invalid
from reelforge.tools.service.schema import Defaults, FrameLimits, LimitsAnswer, VideoRequest
from reelforge.tools.service.settings import Limits, Settings

_LARGER, _LONGER = 4, 2
"""What a bundle without shapes is asked for at most, in times of its default pixels and frames."""


@dataclass(frozen=True)
class Admitted:
    """A request that can be carried out.

    Attributes:
        said: Everything that was asked for, defaults filled in, as the store keeps it and callers see it.
        work: In steps times pixels.
        priority: Higher goes first.
        deadline_s: From now; None if it has none.
    """

    said: dict[str, Any]
    work: float
    priority: int
    deadline_s: float | None


def admit(body: VideoRequest, limits: Limits, facts: Facts, backend: Backend) -> Admitted:
    """Check a request and fill in what it leaves out.

    Raises:
        ServiceError: 422, listing everything that is wrong.
    """
    allowed = allowed_by(limits, facts)
    problems = _problems(body, limits, allowed)
    cache = None
    if body.step_cache is not None:
        try:
            cache = StepCache.parse(body.step_cache, files=False)
        except RequestError as error:
            problems.append(f"step_cache: {sentence(error)}")
    if problems:
        raise invalid(problems)
    width, height = _size(body.size)
    seed = secrets.randbits(31) if body.seed is None else body.seed
    request = Request(
        body.prompt,
        height,
        width,
        body.frames,
        body.steps,
        seed,
        body.guidance,
        cfg_scale=body.cfg_scale,
        negative_prompt=body.negative_prompt,
        step_cache=cache,
    )
    try:
        resolved = backend.check(request)
    except RequestError as error:
        raise invalid([sentence(error)]) from error
    shape = resolved.shape
    if (shape.width * shape.height) > allowed.max_pixels or shape.frames > allowed.frames.max:
        raise invalid([f"the default size {shape} is more than this service allows: name size and frames"])
    if resolved.steps > limits.steps:
        raise invalid([f"the default of {resolved.steps} steps is more than {limits.steps}: name steps"])
    said = {
        "prompt": body.prompt,
        "negative_prompt": body.negative_prompt,
        "size": f"{shape.width}x{shape.height}",
        "frames": shape.frames,
        "steps": resolved.steps,
        "seed": seed,
        "guidance": resolved.guidance if facts.guidance else None,
        "cfg_scale": body.cfg_scale,
        "step_cache": body.step_cache,
        "priority": body.priority or 0,
        "deadline_s": body.deadline_s,
    }
    return Admitted(said, work_of(resolved), body.priority or 0, body.deadline_s)


def request_of(said: dict[str, Any]) -> Request:
    """Return the runtime's request for what the store has.

    Raises:
        RequestError: If it was written by a version that knew other settings.
    """
    width, height = _size(said["size"])
    cache = said["step_cache"]
    return Request(
        said["prompt"],
        height,
        width,
        said["frames"],
        said["steps"],
        said["seed"],
        said["guidance"],
        cfg_scale=said["cfg_scale"],
        negative_prompt=said["negative_prompt"],
        step_cache=None if cache is None else StepCache.parse(cache),
    )


def digest_of_body(body: VideoRequest) -> str:
    """Return what tells two requests apart, for idempotency: names and values that were given, in any order."""
    given = json.dumps(body.model_dump(exclude_unset=True), sort_keys=True)
    return hashlib.sha256(given.encode()).hexdigest()


def allowed_by(limits: Limits, facts: Facts) -> LimitsAnswer:
    """Return what requests may ask for; ``needs_key`` is left to :func:`limits_answer`."""
    bounded = facts.sizes is not None or facts.largest[0] * facts.largest[1] <= _LARGER * facts.width * facts.height
    pixels = facts.largest[0] * facts.largest[1] if bounded else _LARGER * facts.width * facts.height
    frames = min(facts.frames[1], max(_LONGER * facts.default_frames, facts.frames[0]))
    frames = limits.frames if limits.frames is not None else frames
    frames = min(frames, facts.frames[1])
    frames -= (frames - facts.frames_offset) % facts.frames_multiple
    return LimitsAnswer(
        sizes=None if facts.sizes is None else list(facts.sizes),
        min_size=facts.smallest,
        max_size=facts.largest,
        max_pixels=pixels if limits.pixels is None else min(limits.pixels, facts.largest[0] * facts.largest[1]),
        size_multiple=facts.multiple,
        frames=FrameLimits(
            min=facts.frames[0], max=max(frames, 1), multiple=facts.frames_multiple, offset=facts.frames_offset
        ),
        max_steps=limits.steps,
        max_prompt_characters=limits.prompt_characters,
        max_priority=limits.priority,
        frames_per_second=facts.frames_per_second,
        guidance=facts.guidance,
        cfg=facts.cfg,
        step_cache=facts.step_cache,
        defaults=Defaults(
            width=facts.width, height=facts.height, frames=facts.default_frames, steps=min(facts.steps, limits.steps)
        ),
        needs_key=False,
        model=facts.model,
    )


def limits_answer(settings: Settings, facts: Facts) -> LimitsAnswer:
    """Return the answer of ``GET /v1/limits``."""
    return allowed_by(settings.limits, facts).model_copy(update={"needs_key": bool(settings.keys)})


def sentence(error: RequestError) -> str:
    """Return an error as one line."""
    parts = [error.where]
    if error.expected:
        parts.append(f"expected: {error.expected}")
    if error.fix:
        parts.append(f"fix: {error.fix}")
    return " ".join(" ".join(parts).split())


def _problems(body: VideoRequest, limits: Limits, allowed: LimitsAnswer) -> list[str]:
    problems = []
    for name in ("prompt", "negative_prompt"):
        text = getattr(body, name)
        if text is not None and len(text) > limits.prompt_characters:
            problems.append(f"{name}: {len(text)} characters are more than {limits.prompt_characters}")
    width, height = _size(body.size)
    if width is not None and height is not None and width * height > allowed.max_pixels:
        problems.append(f"size: {width * height} pixels are more than {allowed.max_pixels}")
    if body.frames is not None and body.frames > allowed.frames.max:
        problems.append(f"frames: {body.frames} are more than {allowed.frames.max}")
    if body.steps is not None and body.steps > limits.steps:
        problems.append(f"steps: {body.steps} are more than {limits.steps}")
    if body.priority is not None and abs(body.priority) > limits.priority:
        problems.append(f"priority: {body.priority} is not in -{limits.priority}..{limits.priority}")
    if body.deadline_s is not None and body.deadline_s > limits.deadline_s:
        problems.append(f"deadline_s: {body.deadline_s:g} is more than {limits.deadline_s:g}")
    return problems


def _size(size: str | None) -> tuple[int | None, int | None]:
    if size is None:
        return None, None
    width, _, height = size.partition("x")
    return int(width), int(height)
