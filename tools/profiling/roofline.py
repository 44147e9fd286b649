"""How close a layer comes to what the machine can do: its rate against the roofline (Williams et al., CACM 52, 2009).

The roof over a layer is the smaller of the processor's arithmetic in the layer's precision, and bandwidth times the
layer's operations per byte. Bytes are those of tensors, each read or written once: caches may save some of them, so
that a small layer can come out above the slope. Of whole stages operations and bytes are the planner's. The module
knows numbers only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from reelforge.tools.profiling.schema import LayerTiming, Peak, StageTiming
from reelforge.tools.profiling.schema_work import StageWork


@dataclass(frozen=True)
class Point:
    """A layer, or a stage, on the roofline.

    Attributes:
        words: What it is called.
        kind: Of a layer, as :class:`LayerTiming` has it; of a stage its name.
        precision: In which it computes.
        flops: Operations of one call.
        intensity: Operations per byte.
        rate: Operations per second that it reached.
        roof: Operations per second that the machine allows at this intensity.
        bound: ``arithmetic`` or ``memory``, whichever is the lower roof.
    """

    words: str
    kind: str
    precision: str
    flops: int
    intensity: float
    rate: float
    roof: float
    bound: str

    @property
    def efficiency(self) -> float:
        """Share of the roof that was reached; above 1 if caches helped, or the peak was measured under load."""
        return self.rate / self.roof


def share_of_roof(place: Point) -> str:
    """Return a point's efficiency in words."""
    return f"{place.efficiency:.0%}" if place.efficiency <= 1 else "all and more"


def point(layer: LayerTiming, peak: Peak | None) -> Point | None:
    """Return where a layer lies; None if it has no operations worth counting, or no peak is known."""
    return _place(layer.words, layer.kind, layer.precision, layer.flops, layer.bytes, layer.call_ms, peak)


def stage_points(stages: Iterable[StageTiming], works: Iterable[StageWork], peak: Peak | None) -> list[Point]:
    """Return where stages lie, by the mean over their calls of the median video."""
    known = {work.stage: work for work in works}
    found = []
    for stage in stages:
        work = known.get(stage.stage)
        if work is not None:
            call_ms = stage.run.median_ms / stage.calls
            found.append(_place(stage.stage, stage.stage, work.precision, work.flops, work.bytes, call_ms, peak))
    return [place for place in found if place is not None]


def _place(
    words: str, kind: str, precision: str, flops: int, moved: int, call_ms: float, peak: Peak | None
) -> Point | None:
    if peak is None or not flops or not moved or call_ms <= 0:
        return None
    arithmetic = peak.flops.get(precision) or peak.flops.get("fp32")
    if not arithmetic or not peak.bandwidth:
        return None
    intensity = flops / moved
    slope = intensity * peak.bandwidth
    bound = "arithmetic" if arithmetic <= slope else "memory"
    return Point(words, kind, precision, flops, intensity, flops / (call_ms / 1e3), min(arithmetic, slope), bound)
