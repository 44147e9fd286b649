"""Per-node times by ONNX Runtime's own profiler, in sessions of their own: the engines that were timed are untouched.

Operations and bytes are computed from the shapes that the profiler reports: products and convolutions as two per
multiply-add; attention as two products over all pairs of query and key, of which a causal mask leaves out about half.
On a GPU provider the profiler sees launches and not kernels, so it is used on the CPU only.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.engines.engine import Array, EngineOptions, thread_count
from reelforge.runtime.engines.narrow_weights import SETTINGS, runs_once, widens_in_the_run
from reelforge.runtime.engines.onnxruntime_library import import_onnxruntime, product_settings
from reelforge.tools.profiling.layer_names import kind_of
from reelforge.tools.profiling.layers import NodeTime, StageLayers, stage_layers

SOURCE = "ONNX Runtime's profiler, in a session of its own"

_SUFFIX = "_kernel_time"
_CONTAINERS = {"Loop", "If", "Scan"}  # their bodies' nodes are reported besides
_PRECISIONS = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8", "uint8": "int8"}
_ITEM_BYTES = {"fp16": 2, "bf16": 2, "int8": 1}
_SILENT = 4

Event = Mapping[str, Any]


def profile_stage(
    bundle: Bundle, stage: str, inputs: Mapping[str, Array], options: EngineOptions, repeats: int
) -> StageLayers:
    """Return the layers of a stage.

    Args:
        bundle: Of the target ``cpu``.
        stage: Its name.
        inputs: Of a call of a real video.
        options: As the timed engines had them.
        repeats: Calls that count; one before them does not.
    """
    with tempfile.TemporaryDirectory(prefix="reelforge-profile-") as folder:
        path = _run(bundle, stage, inputs, options, repeats + 1, Path(folder) / stage)
        events: list[Event] = json.loads(path.read_text(encoding="utf-8"))
    calls = calls_of(events)[1:]
    return stage_layers(stage, [weight.name for weight in bundle.stage(stage).weights], calls)


def _run(
    bundle: Bundle, stage: str, inputs: Mapping[str, Array], options: EngineOptions, calls: int, prefix: Path
) -> Path:
    """Run a graph under the profiler, with the settings of the engines that were timed; return the profiler's file."""
    runtime = import_onnxruntime()
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = thread_count(options)
    settings.inter_op_num_threads = 1
    settings.log_severity_level = _SILENT
    settings.enable_profiling = True
    settings.profile_file_prefix = str(prefix)
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if options.spinning else "0")
    entry = bundle.stage(stage)
    widens = widens_in_the_run(entry, options.widening)
    settings.enable_cpu_mem_arena = options.arena and not (widens and runs_once(entry))
    for name, value in {**product_settings(), **(SETTINGS if widens else {})}.items():
        settings.add_session_config_entry(name, value)
    session = runtime.InferenceSession(str(bundle.graph(stage)), settings, providers=["CPUExecutionProvider"])
    for _ in range(calls):
        session.run(None, dict(inputs))
    return Path(session.end_profiling())


def calls_of(events: Sequence[Event]) -> list[list[NodeTime]]:
    """Return the nodes of each call in a profiler's file, in the order of execution."""
    runs = sorted((one["ts"], one["ts"] + one["dur"]) for one in events if one["name"] == "model_run")
    calls: list[list[NodeTime]] = [[] for _ in runs]
    nodes = [one for one in events if one["cat"] == "Node" and one["name"].endswith(_SUFFIX)]
    for event in sorted(nodes, key=lambda one: float(one["ts"])):
        if event["args"]["op_name"] in _CONTAINERS:
            continue
        index = next((i for i, (start, end) in enumerate(runs) if start <= event["ts"] <= end), None)
        if index is not None:
            calls[index].append(_node(event))
    return calls


def _node(event: Event) -> NodeTime:
    arguments: Mapping[str, Any] = event["args"]
    operator = str(arguments["op_name"])
    moved = sum(int(arguments.get(name, 0)) for name in ("activation_size", "parameter_size", "output_size"))
    inputs = [_only(entry) for entry in arguments.get("input_type_shape", ())]
    outputs = [_only(entry) for entry in arguments.get("output_type_shape", ())]
    kind, shapes, results = kind_of(operator), [shape for _, shape in inputs], [shape for _, shape in outputs]
    flops = _flops(kind, operator, shapes, results)
    precision = _precision(kind, operator, [name for name, _ in inputs])
    if kind == "gemm" and sum(len(shape) > 1 for shape in shapes) == 1:
        # The weight has been packed for the processor and is not among the inputs any more.
        moved += flops // (2 * math.prod(results[0][:-1])) * _ITEM_BYTES.get(precision, 4)
    return NodeTime(
        name=str(event["name"]).removesuffix(_SUFFIX),
        operator=operator,
        ms=float(event["dur"]) / 1e3,
        flops=flops,
        bytes=moved,
        precision=precision,
    )


def _only(entry: Mapping[str, Sequence[int]]) -> tuple[str, Sequence[int]]:
    """Return type and shape of ``{"float": [1, 2]}``."""
    return next(iter(entry.items()))


def _flops(kind: str, operator: str, inputs: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> int:
    if not inputs or not outputs:
        return 0
    result = math.prod(outputs[0])
    if kind == "gemm" and "MatMul" in operator:
        return 2 * result * inputs[0][-1]
    if kind == "gemm":  # of two dimensions, either of which may be transposed
        return 2 * result * math.prod(inputs[0]) // max(outputs[0][0], 1)
    if kind == "convolution":
        # The weight follows the input, in quantised operators after its scale and zero point.
        weight = next((shape for shape in inputs[1:] if len(shape) > 2), ())
        return 2 * result * math.prod(weight[1:])
    if kind == "attention":
        return 4 * math.prod(inputs[0]) * inputs[1][-2] if len(inputs) > 1 and len(inputs[1]) > 2 else 0
    return 0


def _precision(kind: str, operator: str, types: Sequence[str]) -> str:
    if kind not in ("gemm", "convolution", "attention"):
        return ""
    if operator.startswith("Q") or "Integer" in operator:
        return "int8"
    return _PRECISIONS.get(types[0], types[0]) if types else ""
