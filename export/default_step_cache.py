"""What a bundle's manifest may say about step caching: the default of requests that say nothing.

A default must serve every request to the bundle, so what it needs is in the bundle or published. The module does not
know what a step cache does.
"""

from __future__ import annotations

from reelforge.export.build_request import BuildRequest
from reelforge.runtime.errors import RequestError
from reelforge.runtime.spec import ModelSpec
from reelforge.runtime.step_cache.rescaling import PUBLISHED, published
from reelforge.runtime.step_cache.settings import OFF, StepCache

_FILES = ("ratios", "coefficients")
"""Settings of step caches that name files of measurements."""


def default_step_cache(request: BuildRequest) -> str | None:
    """Return what the bundle's manifest says about step caching; it alters requests, and nothing that is built.

    Raises:
        RequestError: If it cannot be a bundle's default.
    """
    text = request.step_cache
    if text is None:
        return None
    if any(f"{name}=" in text for name in _FILES):
        raise RequestError(
            "a bundle's default step cache cannot refer to a file.",
            received=f"--step-cache {text}",
            expected="easycache, which needs none",
            fix="use easycache:0.025, or give it with each request",
        )
    cache = StepCache.parse(text)
    if cache == OFF:
        return None
    if problems := cache.problems():
        raise RequestError(
            f"the step cache {text!r} cannot be a bundle's default.",
            received="; ".join(problem.received for problem in problems),
            expected="; ".join(problem.expected for problem in problems),
            fix="; ".join(problem.fix for problem in problems),
        )
    if cache.parted and not request.parted:
        raise RequestError(
            "the default step cache needs the transformer in parts.",
            received=f"--step-cache {text}",
            expected="--partition head,body,tail beside it",
            fix="add --partition head,body,tail, or leave --step-cache out",
        )
    missing = [stage for stage in cache.stages if request.stages and stage not in request.stages]
    if missing:
        raise RequestError(
            "the default step cache needs stages that are not built.",
            received=f"--stages {','.join(request.stages)}",
            expected=f"{' and '.join(missing)} among them",
            fix="leave --stages or --step-cache out",
        )
    return text


def require_coefficients(step_cache: str | None, spec: ModelSpec) -> None:
    """Refuse a default step cache that rests on published coefficients where there are none of the model.

    Args:
        step_cache: From :func:`default_step_cache`.
        spec: The model's numbers.

    Raises:
        RequestError: Since every request that says nothing would be refused.
    """
    if step_cache is None or not StepCache.parse(step_cache).lacks_coefficients() or published(spec) is not None:
        return
    dit = spec.dit
    raise RequestError(
        f"the step cache {step_cache!r} cannot be a bundle's default: no coefficients are published for this model.",
        received=f"{spec.family} of width {dit.width} with {dit.double_blocks}+{dit.single_blocks} blocks",
        expected="; ".join(
            f"{family} of width {width} with {double}+{single} blocks" for family, width, double, single in PUBLISHED
        ),
        fix="use easycache:0.025, which needs none, or measure them and give teacache with each request",
    )
