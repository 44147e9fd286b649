"""Compile one ONNX graph to one plan, in this process, through the module object of either compiler.

The network is strongly typed: the graph says every type, and the compiler changes none. Classic TensorRT differs in one
place, that it compiles for the GPU it runs on and not for named architectures. ``compile.compile_plan`` runs this in a
child process, because the libraries abort and die for want of memory; nothing here survives that.

What the compiler must be told beyond the graph concerns attention. The probabilities' format lies inside the node: with
``normalization_quantize_to_type`` and a scale the kernel takes FP8, provided that every profile has at least 32 tokens.
An attention that no kernel covers (head dim 512) is refused unless it is marked ``decomposable``.

What a build of TensorRT-RTX 1.7 holds in anonymous memory, measured with 0.45 to 2.3 GB of weights: 0.3 GB and the
weights once; twice where it merges products that share their input (q, k and v; not those with Q/DQ). The mapped graph
is file-backed, and the plan leaves in pieces of 64 MiB. More profiles cost neither weights nor memory, but some hundred
kilobytes of plan each.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reelforge.export.engines.graph_names import GraphNames, check_expected, read_graph_names
from reelforge.export.engines.layer_information import PlanInformation, read_log, worth_keeping
from reelforge.export.engines.module import Message, Module, backend_name, make_logger, make_monitor, make_writer
from reelforge.export.engines.plan_inputs import input_shapes
from reelforge.export.engines.plan_writer import PlanWriter
from reelforge.export.engines.plugin_graph import registered
from reelforge.export.engines.request import PlanRequest
from reelforge.export.passes.quantise_attention import SOFTMAX_SCALE
from reelforge.runtime.errors import BuildError
from reelforge.runtime.recipe import Backend, Precision

_LAST_MESSAGES = 4
_NO_DRIVER = "cudaError 35"  # said at the end of any failed build on a machine without a GPU; never the cause
_NO_KERNEL = "not supported by a dedicated kernel"


@dataclass(frozen=True)
class BuiltPlan:
    """A plan on the disk, under its partial name until ``writer`` finishes it.

    Attributes:
        writer: Holds the bytes.
        information: What the compiler said about the plan.
        stored_bytes: Tensors stored in the graph.
        seconds: Of the compiler's call.
    """

    writer: PlanWriter
    information: PlanInformation
    stored_bytes: int
    seconds: float


def build_plan(
    module: Module,
    request: PlanRequest,
    on_message: Callable[[Message], None] = lambda _: None,
    on_step: Callable[[str, int, int], None] = lambda *_: None,
) -> BuiltPlan:
    """Compile ``request``.

    Args:
        module: Of ``request.target.backend``.
        request: What to compile; its receipt is not written here.
        on_message: Is called with every message of the compiler, verbose ones too.
        on_step: Is called with phase, steps done and steps in all.

    Raises:
        BuildError: For a graph or profile that the compiler would not take, what it refuses (with its last messages),
            or a disk that is full.
    """
    names = read_graph_names(Path(request.graph), request.target.backend)
    check_expected(names, request.expected)
    try:
        with registered(module, request.target, names.plugin_types):
            return _compile(module, request, names, on_message, on_step)
    except BaseException as error:
        # A traceback keeps its frames' variables alive. The library takes a lock when a builder is destroyed, and while
        # it calls us back: a collection of garbage in there that found an earlier builder would wait for ever.
        traceback.clear_frames(error.__traceback__)
        raise


def _compile(
    module: Module,
    request: PlanRequest,
    names: GraphNames,
    on_message: Callable[[Message], None],
    on_step: Callable[[str, int, int], None],
) -> BuiltPlan:
    kept: list[Message] = []
    errors: list[str] = []

    def receive(message: Message) -> None:
        if worth_keeping(message):
            kept.append(message)
        if message.is_error and _NO_DRIVER not in message.text:
            errors.append(message.text)
        on_message(message)

    logger = make_logger(module, receive)
    builder = module.Builder(logger)
    network = builder.create_network(_network_flags(module))
    parser = module.OnnxParser(network, logger)
    if not parser.parse_from_file(request.graph):
        said = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise _compiler_error(request, "parse", said or errors)
    constants = _mark_attentions(module, network, request, names)
    config = builder.create_builder_config()
    _configure(module, config, request)
    for profile in _profiles(builder, network, request):
        if config.add_optimization_profile(profile) < 0:
            raise _compiler_error(request, "take the shapes of", errors)
    config.progress_monitor = monitor = make_monitor(module, on_step)
    writer = PlanWriter(Path(request.plan))
    try:
        started = time.monotonic()
        stream = make_writer(module, writer.write)
        done = builder.build_serialized_network_to_stream(network, config, stream)
        seconds = time.monotonic() - started
        writer.raise_failure()
        if not done or writer.bytes == 0:
            raise _compiler_error(request, "compile", errors)
    except BaseException:
        writer.discard()
        raise
    del constants, monitor  # the compiler reads these arrays and calls this object until here
    return BuiltPlan(writer, read_log(kept, names.by_node()), names.stored_bytes, seconds)


def _network_flags(module: Module) -> int:
    """Return the flag of strongly typed networks; since TensorRT 11 there are no others, and no flag."""
    flag = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _configure(module: Module, config: Any, request: PlanRequest) -> None:
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED  # without it the log names no layers
    # What runs in parallel shares no memory: with helper streams one step of 720x1280x129 wants 11.1 GB, without 6.7.
    config.max_aux_streams = 0
    if request.target.backend is Backend.RTX:
        config.num_compute_capabilities = len(request.target.architectures)
        for index, name in enumerate(request.target.architectures):
            config.set_compute_capability(getattr(module.ComputeCapability, name.upper()), index)
        # With it no execution allocates memory, however large the tensors, so that a step can be recorded in a CUDA
        # graph; the runtime gives all activation memory anyway. A graph that would have to allocate is refused.
        flag = getattr(module.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)  # since TensorRT-RTX 1.7
        if flag is not None:
            config.set_flag(flag)


def _profiles(builder: Any, network: Any, request: PlanRequest) -> list[Any]:
    """Return the request's profiles as the compiler's; inputs of a fixed shape have no place in them."""
    parsed = [network.get_input(index).name for index in range(network.num_inputs)]
    stated = [info.name for info in request.inputs]
    if set(parsed) != set(stated):
        raise BuildError(
            f"the graph of stage {request.stage!r} has other inputs than were stated for it.",
            received=", ".join(parsed),
            expected=", ".join(stated),
        )
    profiles = []
    for profile in request.profiles:
        shapes = input_shapes(request.inputs, profile)
        made = builder.create_optimization_profile()
        for info in request.inputs:
            if any(isinstance(size, str) for size in info.shape):
                shape = shapes[info.name]
                made.set_shape(info.name, shape.minimum, shape.optimum, shape.maximum)
        profiles.append(made)
    return profiles


def _mark_attentions(module: Module, network: Any, request: PlanRequest, names: GraphNames) -> list[Any]:
    """Say of each attention what the graph cannot say; return arrays that must live as long as the build."""
    expected = request.expected
    eight_bits = {names.attentions[name] for name, kind in expected.attentions.items() if kind is Precision.FP8}
    decomposed = {names.attentions[name] for name in expected.decomposed}
    arrays: list[Any] = []
    if not eight_bits | decomposed:
        return arrays
    if not hasattr(module, "IAttentionInputLayer"):
        raise BuildError(
            "this version of the compiler has no attention, and the recipe says how attentions are computed.",
            received=backend_name(module),
            expected="TensorRT-RTX 1.7, or TensorRT 10.14, or newer",
            fix="upgrade it, or compute attention in fp16 or bf16",
        )
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type != module.LayerType.ATTENTION_INPUT:
            continue
        layer.__class__ = module.IAttentionInputLayer  # the binding's way of casting a layer
        attention = layer.attention
        if attention.name in eight_bits:
            scale = np.array([SOFTMAX_SCALE], np.float32)
            arrays.append(scale)
            constant = network.add_constant((), module.Weights(module.DataType.FLOAT, scale.ctypes.data, 1))
            attention.normalization_quantize_scale = constant.get_output(0)
            attention.normalization_quantize_to_type = module.DataType.FP8
        if attention.name in decomposed:
            attention.decomposable = True
    return arrays


def _parser_error(error: Any) -> str:
    return f"{error.node_operator()} {error.node_name()}: {error.desc()}"


def _compiler_error(request: PlanRequest, verb: str, messages: Sequence[str]) -> BuildError:
    last = " | ".join(message.strip()[:600] for message in messages[-_LAST_MESSAGES:])
    fixes = {
        _NO_KERNEL: "compute attention in fp16 or bf16 with heads of 64, 96, 128 or 256; FP8 needs 32 tokens or more "
        "in every profile; an attention with other heads has to be decomposed",
    }
    return BuildError(
        f"the compiler did not {verb} the graph of stage {request.stage!r} for {request.target}.",
        received=last or "no message",
        expected="a graph that the compiler takes",
        fix=next((fix for words, fix in fixes.items() if words in last), ""),
    )
