"""How far to trust a profile's numbers, in sentences: spread, other load on the machine, what the profiler costs.

Knows records and summaries only.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from reelforge.tools.profiling.schema import LayerProfile, RunRecord, Summary
from reelforge.tools.profiling.schema_work import Machine

_QUIET, _LOADED = 0.1, 0.3
_STEADY, _NOISY = 0.05, 0.15
_WORTH_SAYING = 0.1


def noise_notes(
    machine: Machine, counted: Sequence[RunRecord], warm: Summary | None, layers: LayerProfile | None
) -> tuple[str, ...]:
    """Return the sentences, the most important first."""
    if warm is None:
        return ("No warm run was finished, so that nothing can be said about noise.",)
    notes = [_spread(warm)]
    loads = [record.other_load for record in counted if record.other_load is not None]
    if loads:
        notes.append(_load(statistics.median(loads), max(loads), machine.cores))
    if warm.steps is not None and warm.steps.count > 1:
        steps = warm.steps
        notes.append(
            f"The middle half of {steps.count} steps spans {steps.spread:.0%} of their median; the slowest took "
            f"{steps.max_ms / steps.median_ms:.1f} times the median."
        )
    if layers is not None and layers.layers:
        slower = [
            layers.profiled_ms[stage] / layers.plain_ms[stage]
            for stage in layers.profiled_ms
            if layers.plain_ms.get(stage, 0.0) > _WORTH_SAYING * max(layers.plain_ms.values())
        ]
        if slower:
            ends = dict.fromkeys(f"{value:.2f}" for value in (min(slower), max(slower)))
            notes.append(
                f"Layers were timed in runs of their own; their sum is {' to '.join(ends)} times a plain call, in the "
                "stages that matter. Shares are of these sums."
            )
        if layers.unnamed_share > 0.001:
            notes.append(f"{layers.unnamed_share:.1%} of the layers' time was given to a layer by position alone.")
    return tuple(notes)


def _spread(warm: Summary) -> str:
    total = warm.total
    if total.count == 1:
        return "A single warm run was counted: there is no spread, and a disturbance would not be seen."
    quality = "steady" if total.spread < _STEADY else "usable" if total.spread < _NOISY else "noisy"
    return (
        f"{total.count} warm runs took {total.min_ms:.0f} to {total.max_ms:.0f} ms; the middle half spans "
        f"{total.spread:.0%} of the median: {quality}."
    )


def _load(usual: float, most: float, cores: int) -> str:
    text = f"Other programs kept {usual:.2f} of {cores} cores busy meanwhile (at most {most:.2f})"
    if most < _QUIET:
        return f"{text}: the machine was quiet."
    if usual < _LOADED:
        return f"{text}: little, though single runs may have been disturbed."
    return f"{text}: times are too long, and the machine should be left alone for a measurement to be quoted."
