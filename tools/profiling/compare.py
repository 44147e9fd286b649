"""Two bundles, run alternately: whether they do the same work, and the ratio of their times.

Knows works and records; it runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from reelforge.runtime.errors import RequestError
from reelforge.runtime.request import ResolvedRequest
from reelforge.runtime.spec import ModelSpec
from reelforge.tools.profiling.schema import Kind, RunRecord
from reelforge.tools.profiling.schema_work import Comparison, Ratio, Work
from reelforge.tools.profiling.statistics import CONFIDENCE, paired_ratio, timing
from reelforge.tools.profiling.summary import of_kind, stage_ms

_NOT_WORK = ("defaults",)
"""Fields of a spec that say what is asked for where nothing is said; requests are compared themselves."""


def require_same_work(
    bundle: str, spec: ModelSpec, request: ResolvedRequest, other: str, other_spec: ModelSpec, asked: ResolvedRequest
) -> None:
    """Refuse to compare different work.

    Args:
        bundle: Name of the first bundle.
        spec: Its model.
        request: What it is asked for.
        other: Name of the other bundle.
        other_spec: Its model.
        asked: What that one is asked for.

    Raises:
        RequestError: If models or requests differ, naming what does.
    """
    names = [field.name for field in fields(ModelSpec) if field.name not in _NOT_WORK]
    models = [name for name in names if getattr(spec, name) != getattr(other_spec, name)]
    if models:
        raise RequestError(
            f"bundles {bundle!r} and {other!r} are not comparable: they hold different models.",
            received=f"other numbers in {', '.join(models)}",
            expected="the same model, for example in another precision or for another target",
            fix="compare bundles that were built from the same checkpoint, with the same --numerics",
        )
    differing = [one.name for one in fields(ResolvedRequest) if getattr(request, one.name) != getattr(asked, one.name)]
    if differing:
        ours = ", ".join(f"{name}={getattr(request, name)}" for name in differing)
        theirs = ", ".join(f"{name}={getattr(asked, name)}" for name in differing)
        raise RequestError(
            f"bundles {bundle!r} and {other!r} would do different work, since their defaults differ.",
            received=f"{ours} and {theirs}",
            expected="the same shape, steps and guidance",
            fix="say them: --height, --width, --frames, --steps, --guidance, --shift",
        )


def compare(ours: Sequence[RunRecord], theirs: Sequence[RunRecord], other: Work) -> Comparison:
    """Return the ratios of two bundles' times.

    Args:
        ours: Complete warm runs of the first bundle, one per round.
        theirs: Of the other, of the same rounds.
        other: What the other bundle did.
    """
    measures = {
        "video": ([record.total_ms for record in ours], [record.total_ms for record in theirs]),
        "engines": (
            [_engines_ms(record) for record in ours],
            [_engines_ms(record) for record in theirs],
        ),
        "step": ([_step_ms(record, Kind.STEP) for record in ours], [_step_ms(record, Kind.STEP) for record in theirs]),
        "skipped step": (
            [_step_ms(record, Kind.SKIPPED_STEP) for record in ours],
            [_step_ms(record, Kind.SKIPPED_STEP) for record in theirs],
        ),
    }
    for stage in dict.fromkeys(span.stage for span in of_kind(ours[0], Kind.RUN)):
        measures[stage] = (
            [stage_ms(record, stage) for record in ours],
            [stage_ms(record, stage) for record in theirs],
        )
    ratios = []
    for what, (first, second) in measures.items():
        if min(*first, *second) > 0:
            ratio, low, high = paired_ratio(first, second)
            medians = (timing(first).median_ms, timing(second).median_ms)
            ratios.append(Ratio(what, ratio, low, high, *medians))
    skips = [len(of_kind(records[0], Kind.SKIPPED_STEP)) for records in (ours, theirs)]
    return Comparison(other, len(ours), CONFIDENCE, tuple(ratios), *skips)


def unequal_work(comparison: Comparison, bundle: str) -> str:
    """Return what makes two bundles' whole videos different work all the same; an empty text if nothing does.

    A step cache decides while a video is made, so that this cannot be refused beforehand.
    """
    if comparison.skipped_steps == comparison.other_skipped_steps:
        return ""
    steps = comparison.other.steps
    return (
        f"The step cache skipped {comparison.skipped_steps} of {steps} steps of {bundle}, and "
        f"{comparison.other_skipped_steps} of {comparison.other.bundle}: only their single steps did the same work."
    )


def _engines_ms(record: RunRecord) -> float:
    return sum(span.duration_ms for span in of_kind(record, Kind.RUN))


def _step_ms(record: RunRecord, kind: Kind) -> float:
    """Return the run's median step: one disturbed step does not move it."""
    steps = [span.duration_ms for span in of_kind(record, kind)]
    return timing(steps).median_ms if steps else 0.0
