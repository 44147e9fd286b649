"""Per-layer times: single nodes of a backend, put together to the model's layers.

The module knows stages' weights and what a node's time is; which backend measured it is the caller's affair.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from reelforge.tools.profiling.layer_names import LayerNames, Place, kind_of
from reelforge.tools.profiling.model_words import block_of, words_for
from reelforge.tools.profiling.schema import LayerProfile, LayerTiming

_COMPUTING = ("attention", "convolution", "gemm")
"""What a layer is called after if it has it, whatever else it does besides."""

TOP = 10
"""Layers that a report explains one by one."""


@dataclass(frozen=True)
class NodeTime:
    """One node of a stage in one call.

    Attributes:
        name: The backend's.
        operator: The backend's word for what it does.
        ms: How long it took.
        flops: Of it; 0 if it has none worth counting.
        bytes: Read and written at least.
        precision: In which it computes; empty if it is not known.
        kind: As :class:`LayerTiming` has it; empty: from the operator.
        layer: The layer's canonical name where it is known; empty: from the node's name.
    """

    name: str
    operator: str
    ms: float
    flops: int = 0
    bytes: int = 0
    precision: str = ""
    kind: str = ""
    layer: str = ""


@dataclass
class _Layer:
    """One layer of one stage, under construction."""

    by_call: list[float]
    kind_ms: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    precision_ms: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    operators: dict[str, None] = field(default_factory=dict)
    flops: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class StageLayers:
    """A stage's layers over one call.

    Attributes:
        stage: Its name.
        layers: Without shares and times per video, which the other stages decide.
        unnamed_ms: Of one call, given to layers by position alone.
        call_ms: All layers of one call.
    """

    stage: str
    layers: tuple[LayerTiming, ...]
    unnamed_ms: float
    call_ms: float


def stage_layers(stage: str, weights: Iterable[str], calls: Sequence[Sequence[NodeTime]]) -> StageLayers:
    """Put the nodes of several equal calls together to layers; a layer's time is the median over the calls.

    Args:
        stage: Its name.
        weights: Their names, as the manifest has them.
        calls: The nodes of each call, in the order of execution; at least one call.
    """
    names = LayerNames(weights)
    found: dict[str, _Layer] = {}
    unnamed: list[float] = []
    for index, nodes in enumerate(calls):
        unnamed.append(0.0)
        for node in nodes:
            kind = node.kind or kind_of(node.operator)
            place = Place(node.layer, certain=True) if node.layer else names.place(node.name, kind)
            if not place.certain:
                unnamed[-1] += node.ms
            layer = found.setdefault(place.layer, _Layer([0.0] * len(calls)))
            layer.by_call[index] += node.ms
            layer.kind_ms[kind] += node.ms
            layer.operators[node.operator] = None
            if index == 0:
                layer.flops += node.flops
                layer.bytes += node.bytes
            if node.precision:
                layer.precision_ms[node.precision] += node.ms
    layers = tuple(_timing(stage, name, layer) for name, layer in found.items())
    return StageLayers(stage, layers, statistics.median(unnamed), sum(layer.call_ms for layer in layers))


def _timing(stage: str, name: str, layer: _Layer) -> LayerTiming:
    return LayerTiming(
        stage=stage,
        name=name,
        words=words_for(name),
        block=block_of(name),
        kind=next((kind for kind in _COMPUTING if kind in layer.kind_ms), _largest(layer.kind_ms)),
        precision=_largest(layer.precision_ms),
        kernels=tuple(layer.operators),
        call_ms=statistics.median(layer.by_call),
        per_video_ms=0.0,
        share=0.0,
        flops=layer.flops,
        bytes=layer.bytes,
    )


def _largest(times: Mapping[str, float]) -> str:
    return max(times, key=lambda name: times[name]) if times else ""


def layer_profile(
    source: str, stages: Sequence[StageLayers], calls: Mapping[str, int], plain_ms: Mapping[str, float]
) -> LayerProfile:
    """Return all stages' layers with their shares of a video, the most expensive first.

    Args:
        source: What measured them.
        stages: Those that were measured.
        calls: Stage -> calls per video.
        plain_ms: Stage -> one call without a profiler.
    """
    total = sum(stage.call_ms * calls.get(stage.stage, 1) for stage in stages) or 1.0
    unnamed = sum(stage.unnamed_ms * calls.get(stage.stage, 1) for stage in stages)
    layers = [
        replace(
            layer,
            per_video_ms=layer.call_ms * calls.get(layer.stage, 1),
            share=layer.call_ms * calls.get(layer.stage, 1) / total,
        )
        for stage in stages
        for layer in stage.layers
    ]
    layers.sort(key=lambda layer: -layer.per_video_ms)
    profiled = {stage.stage: stage.call_ms for stage in stages}
    return LayerProfile(source, tuple(layers), unnamed / total, profiled, dict(plain_ms))


def no_layers(reason: str) -> LayerProfile:
    """Return a profile without layers, which says why."""
    return LayerProfile(reason, (), 0.0, {}, {})
