"""How close a layer comes to what the machine can do: its rate against the roofline (Williams et al., CACM 52, 2009).

The roof over a layer is the smaller of the processor's arithmetic in the layer's precision, and bandwidth times the
layer's operations per byte. Bytes are those of tensors, each read or written once: caches may save some of them, so
that a small layer can come out above the slope. The module knows numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass

from reelforge.tools.profiling.schema import LayerTiming, Peak


@dataclass(frozen=True)
class Point:
    """A layer on the roofline.

    Attributes:
        layer: The layer.
        intensity: Operations per byte.
        rate: Operations per second that it reached.
        roof: Operations per second that the machine allows at this intensity.
        bound: ``arithmetic`` or ``memory``, whichever is the lower roof.
    """

    layer: LayerTiming
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
    if peak is None or not layer.flops or not layer.bytes or layer.call_ms <= 0:
        return None
    arithmetic = peak.flops.get(layer.precision) or peak.flops.get("fp32")
    if not arithmetic or not peak.bandwidth:
        return None
    intensity = layer.flops / layer.bytes
    slope = intensity * peak.bandwidth
    rate = layer.flops / (layer.call_ms / 1e3)
    return Point(layer, intensity, rate, min(arithmetic, slope), "arithmetic" if arithmetic <= slope else "memory")
