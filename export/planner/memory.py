"""Bytes: what plans hold, what a call needs on the GPU, and what exporting and building take on the host.

A plan is its weights and a little code. On the GPU a phase holds the weights of one stage, that stage's activations,
inputs and outputs, and what the phase before put out; stages are loaded when they are needed and leave before the next
one (the modulation, a quarter of the transformer, before the loop). The builder's figures are measured constants of
TensorRT-RTX 1.7 on a machine without a GPU. Not modelled: fragmentation, and activations of a backend that orders
kernels otherwise than TensorRT-RTX.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from reelforge.export.partition import partition
from reelforge.export.planner.kernels import Constant
from reelforge.export.planner.layers import StageLayers
from reelforge.export.planner.work import Call, Phase
from reelforge.export.stage import Stage

_ELEMENT_BYTES = {"float32": 4, "int32": 4, "int64": 8}

EXPORT_BYTES = Constant(0.53e9, "benchmarks/export.md: peak anonymous memory, fp16, weights are streamed")
CODE_BASE_BYTES = Constant(1.7e6, "plans of 1+1 and 4+4 blocks for sm89+sm120 exceed their weights by 4.3 and 11.2 MB")
CODE_BYTES_PER_LAYER = Constant(0.12e6, "slope of the same plans, 20 and 80 layers; once per profile")
ARENA_BASE_BYTES = Constant(8.4e6, "what TensorRT-RTX 1.7.1 states as activations of plans too small to need any")
BUILDER_BASE_BYTES = Constant(0.2e9, "intercept over plans of 0.36-2.7 GB: peak anonymous memory, TensorRT-RTX 1.7.1")
BUILDER_SHARE_16 = Constant(1.9, "slope of the same plans, fp16: 1.9 bytes per byte of weights")
BUILDER_SHARE_8 = Constant(1.3, "FP8, 4+4 blocks: 1.98 GB of anonymous memory for 1.36 GB of weights, likewise")
BUILDER_SECONDS_PER_LAYER = Constant(
    0.21, "plans of 12.55 GB in 286 s and of 25.0 GB in 470 s, 482 layers, two cores; once per profile"
)
BUILDER_SECONDS_PER_BYTE = Constant(14.8e-9, "slope of the same two plans")
GPU_RESERVED_BYTES = Constant(0.6e9, "an assumption: CUDA context and loaded kernels")


@dataclass(frozen=True)
class BuildCost:
    """What one stage costs to build.

    Attributes:
        stage: Its name.
        weight_bytes: Parameters in the recipe's precisions.
        plan_bytes: All of its plans or, without plans, what its graph refers to.
        parts: Into how many pieces it is cut.
        builder_bytes: Peak anonymous memory while the largest part is compiled; 0 where nothing is compiled.
        builder_seconds: Of all parts, on two cores; figures vary by a factor of two.
    """

    stage: str
    weight_bytes: int
    plan_bytes: int
    parts: int
    builder_bytes: int
    builder_seconds: float


@dataclass(frozen=True)
class PhaseMemory:
    """GPU memory of one phase, at the stage and the call where it is largest.

    Attributes:
        phase: The phase.
        stage: The stage with the largest sum.
        weight_bytes: Of that stage, all of its parts.
        activation_bytes: Of that stage; of plans, the arena.
        io_bytes: Its inputs and outputs.
        carried_bytes: What the phase before put out.
        reserved_bytes: What the driver keeps; nothing on a CPU, where the interpreter and its libraries come on top.
    """

    phase: Phase
    stage: str
    weight_bytes: int
    activation_bytes: int
    io_bytes: int
    carried_bytes: int
    reserved_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it, with what the driver keeps."""
        own = self.weight_bytes + self.activation_bytes + self.io_bytes + self.carried_bytes
        return own + self.reserved_bytes


def eight_bit_share(layers: StageLayers) -> float:
    """Return the share of a stage's weights that is stored in 8 bits, by bytes."""
    quantised = sum(layer.bytes for layer in layers.layers.values() if layer.precision.quantised)
    return quantised / layers.weight_bytes if quantised else 0.0  # a stage may have no weights


def build_cost(
    stage: Stage, layers: StageLayers, plans: int, profiles: int = 1, part_limit: int | None = None, parts: int = 1
) -> BuildCost:
    """Return the cost of building one stage.

    Args:
        stage: What is cut.
        layers: Its layers.
        plans: For how many sets of architectures it is compiled; 0 where the target compiles nothing.
        profiles: For how many sets of sizes each plan has its own code.
        part_limit: Bytes of weights that one part may hold; None means that ``parts`` says how it is cut.
        parts: Into how many it is cut at most.
    """
    weights = layers.weight_bytes
    if not plans:
        return BuildCost(layers.name, weights, weights, 1, 0, 0.0)
    pieces = _equal_parts(stage, layers, parts) if part_limit is None else partition(stage, layers.sizes, part_limit)
    largest = max(sum(layers.sizes[name] for name in piece.parameter_shapes()) for piece in pieces)
    count = len(layers.layers) * profiles
    plan = weights + int(CODE_BASE_BYTES.value * len(pieces) + CODE_BYTES_PER_LAYER.value * count)
    seconds = BUILDER_SECONDS_PER_LAYER.value * count + BUILDER_SECONDS_PER_BYTE.value * plan
    compiler = int(BUILDER_BASE_BYTES.value + _share(layers) * largest)
    return BuildCost(layers.name, weights, plan * plans, len(pieces), compiler, seconds * plans)


def joined(stage: str, links: Sequence[BuildCost]) -> BuildCost:
    """Return the cost of a stage whose plans are those of several, one after the other."""
    return BuildCost(
        stage,
        sum(one.weight_bytes for one in links),
        sum(one.plan_bytes for one in links),
        sum(one.parts for one in links),
        max(one.builder_bytes for one in links),
        sum(one.builder_seconds for one in links),
    )


def _equal_parts(stage: Stage, layers: StageLayers, parts: int) -> tuple[Stage, ...]:
    """Return at most ``parts`` parts whose largest is as small as a cut between blocks allows, to a few percent."""
    limit = -(-layers.weight_bytes // parts) or 1
    while len(pieces := partition(stage, layers.sizes, limit)) > parts:
        limit += -(-limit // 50)
    return pieces


def _share(layers: StageLayers) -> float:
    """Return the compiler's bytes per byte of weights, between those of 16 and of 8 bits."""
    fraction = eight_bit_share(layers)
    return BUILDER_SHARE_8.value * fraction + BUILDER_SHARE_16.value * (1 - fraction)


def activation_bytes(call: Call, layers: StageLayers) -> int:
    """Return the largest sum of tensors that are alive together."""
    return max((layers.moment_bytes(moment) for moment in call.moments), default=0)


def tensor_bytes(stage: Stage, names: Iterable[str], dimensions: Mapping[str, int]) -> int:
    """Return the size of inputs or outputs of a stage."""
    total = 0
    for info in stage.tensor_infos(tuple(names)):
        size = _ELEMENT_BYTES[info.dtype]
        for dimension in info.shape:
            size *= dimensions[dimension] if isinstance(dimension, str) else dimension
        total += size
    return total
