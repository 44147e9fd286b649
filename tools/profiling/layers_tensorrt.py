"""Per-layer times of plans by the library's own profiler, mapped to the model's layers by the plans' receipts.

The profiler needs contexts of its own, which run without CUDA graphs: the engines that were timed are untouched.
Operations are the planner's, per layer; the roof is the GPU's document. Tested on a stand-in for the library; it has
not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.errors import RequestError
from reelforge.runtime.receipt import LayerRecord
from reelforge.runtime.request import Request
from reelforge.tools.inspect_receipts import COMPUTING_KINDS, precision_of, read_receipts
from reelforge.tools.profiling.instrument import ProfilingPipeline
from reelforge.tools.profiling.layers import NodeTime, StageLayers, stage_layers
from reelforge.tools.profiling.planned_work import planned_flops
from reelforge.tools.profiling.recorder import Recorder
from reelforge.tools.profiling.schema import Peak

SOURCE = "the TensorRT library's profiler, in a run of its own without CUDA graphs; layers by the plans' receipts"

_KINDS = {"reformat": "layout", "cast": "layout", "other": "elementwise"}
_NAMES = {
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA A100-SXM4-80GB": "A100 80GB",
    "NVIDIA A100-SXM4-40GB": "A100 40GB",
}
"""What the driver calls a GPU -> what the planner's table calls it, where one is not the other's beginning."""
Report = tuple[str, float]


def profile_plans(
    bundle: Bundle, options: EngineOptions, request: Request
) -> tuple[list[StageLayers], str | None, Peak | None]:
    """Generate once under the profiler, and return stages' layers, the GPU's name and its roof.

    Raises:
        EngineError: If an engine fails.
        BundleError: If a receipt cannot be read.
    """
    with ProfilingPipeline(bundle, replace(options, cuda_graph=False), Recorder()) as pipeline:
        pipeline.device_layers = {}
        pipeline.generate(request)
        device = pipeline.device_name
        reports = pipeline.device_layers
    receipts: dict[str, dict[str, LayerRecord]] = {}
    for item in read_receipts(bundle):
        receipts.setdefault(item.stage, {}).update({layer.name: layer for layer in item.receipt.layers})
    flops = planned_flops(bundle, request)
    stages = []
    for stage, found in reports.items():
        records = receipts.get(stage, {})
        weights = [weight.name for weight in bundle.stage(stage).weights]
        calls = calls_of(found, records, flops.get(stage, {}))
        if calls:
            stages.append(stage_layers(stage, weights, calls))
    return stages, device, None if device is None else document_peak(device)


def calls_of(
    reports: Sequence[Report], records: Mapping[str, LayerRecord], flops: Mapping[str, int]
) -> list[list[NodeTime]]:
    """Return the layers of each call of a stage: the n-th report of a layer is of its n-th call.

    Args:
        reports: Layer and milliseconds, in the order of execution.
        records: What the receipts say of layers, by the compiler's name.
        flops: Operations by the model's layers.
    """
    calls: list[list[NodeTime]] = []
    seen: dict[str, int] = {}
    for name, ms in reports:
        index = seen.get(name, 0)
        seen[name] = index + 1
        if index == len(calls):
            calls.append([])
        calls[index].append(_node(name, ms, records.get(name), flops))
    return calls


def _node(name: str, ms: float, record: LayerRecord | None, flops: Mapping[str, int]) -> NodeTime:
    if record is None:
        return NodeTime(name, "", ms, kind="other")
    return NodeTime(
        name=joined(record.nodes) or name,
        operator=record.kernel,
        ms=ms,
        flops=sum(flops.get(node, 0) for node in record.nodes),
        precision=precision_of(record).lower() if record.kind in COMPUTING_KINDS else "",
        kind=_KINDS.get(record.kind, record.kind),
        layer=joined(record.nodes) if len(record.nodes) > 1 else "",
    )


def joined(nodes: Sequence[str]) -> str:
    """Return one name for several layers in one kernel: ``double.0.image.q+k+v``."""
    if len(nodes) < 2:
        return nodes[0] if nodes else ""
    parts = [node.split(".") for node in nodes]
    length = 0
    while len({tuple(part[: length + 1]) for part in parts}) == 1 and all(len(part) > length + 1 for part in parts):
        length += 1
    return ".".join([*parts[0][:length], "+".join(".".join(part[length:]) for part in parts)])


def document_peak(device: str) -> Peak | None:
    """Return a GPU's rates by the planner's table; None if the table does not hold it."""
    from reelforge.export.planner.gpus import find_gpu

    try:
        gpu = find_gpu(_NAMES.get(device, device))
    except RequestError:
        return None
    return Peak(gpu.name, dict(gpu.rates), gpu.bandwidth, measured=False, source=gpu.source)
