"""What an engine is, and the checks that every backend makes before it runs.

An engine is one loaded stage: named arrays in, named arrays out. The module knows tensors' names, types and named
dimensions; it knows no backend and not what a stage computes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from reelforge.runtime.engines.narrow_weights import Widening
from reelforge.runtime.errors import EngineError

if TYPE_CHECKING:
    from reelforge.runtime.manifest import TensorInfo

Array = NDArray[Any]


@dataclass(frozen=True)
class EngineOptions:
    """What a user may decide about execution; backends that lack a setting refuse it rather than ignore it.

    Args:
        threads: Threads of one operator; None means one per core that this process may use.
        spinning: Whether idle threads busy-wait for the next operator of a run: a little faster, and it occupies every
            core. Between runs none does.
        graph_optimization: ``"all"``, ``"extended"``, ``"basic"`` or ``"none"``.
        device: Number of the GPU, from 0.
        cuda_graph: Whether the sampling loop is recorded once and replayed, where the backend can.
        provider: What ONNX Runtime computes with on a GPU: ``"cuda"``, ``"tensorrt"`` or ``"rtx"``; None means
            ``"cuda"``.
        kernel_cache: Whether the kernels that TensorRT-RTX compiles for this GPU are kept for the next time.
        arena: Whether ONNX Runtime lays out activations in blocks of its own on the CPU, given back after each run.
        widening: When 16-bit weights of the loop's stages become float32 on the CPU.
    """

    threads: int | None = None
    spinning: bool = True
    graph_optimization: str = "all"
    device: int = 0
    cuda_graph: bool = True
    provider: str | None = None
    kernel_cache: bool = True
    arena: bool = True
    widening: Widening = Widening.AUTO

    def refuse(self, backend: str, *settings: str) -> None:
        """Refuse those of ``settings`` that are not at their default.

        Raises:
            EngineError: Naming the first that ``backend`` does not have.
        """
        for name in settings:
            if getattr(self, name) != getattr(EngineOptions(), name):
                raise EngineError(
                    f"the setting {name!r} means nothing to {backend}.",
                    received=getattr(self, name),
                    expected=f"{getattr(EngineOptions(), name)}, its default",
                    fix=f"leave {name!r} out",
                )


class Engine(Protocol):
    """A loaded stage."""

    name: str
    inputs: Mapping[str, TensorInfo]
    outputs: Mapping[str, TensorInfo]

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None] | None = None) -> dict[str, Array]:
        """Compute the outputs.

        Args:
            inputs: Exactly the stage's inputs. Contiguous arrays are read in place.
            outputs: Which outputs to return; an array is written in place, None lets the engine allocate. Without it,
                all outputs are returned in arrays of their own.

        Raises:
            EngineError: If a tensor does not fit the stage, or the backend fails.
        """
        ...

    def close(self) -> None:
        """Give back the memory of the engine; it cannot run afterwards. Closing twice is harmless."""
        ...


def thread_count(options: EngineOptions) -> int:
    """Return the number of threads that ``options`` ask for.

    Raises:
        EngineError: If it is less than one.
    """
    if options.threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if options.threads < 1:
        raise EngineError(
            "the number of threads is not usable.",
            received=options.threads,
            expected="1 or more",
            fix="use --threads 1",
        )
    return options.threads


def check_inputs(stage: str, infos: Mapping[str, TensorInfo], arrays: Mapping[str, Array]) -> dict[str, int]:
    """Check names, types, ranks and dimensions of a stage's inputs.

    Returns:
        The size of every named dimension.

    Raises:
        EngineError: Naming the tensor and dimension that does not fit, and the tensor it disagrees with.
    """
    if set(arrays) != set(infos):
        missing, unknown = sorted(set(infos) - set(arrays)), sorted(set(arrays) - set(infos))
        raise EngineError(
            f"stage {stage!r} was given other inputs than it takes.",
            received=f"missing {missing}, unknown {unknown}",
            expected=", ".join(infos),
        )
    sizes: dict[str, int] = {}
    sources: dict[str, str] = {}
    for name, info in infos.items():
        check_tensor(stage, info, arrays[name])
        for dimension, size in zip(info.shape, arrays[name].shape, strict=True):
            if isinstance(dimension, str) and sizes.setdefault(dimension, size) != size:
                raise EngineError(
                    f"inputs {sources[dimension]!r} and {name!r} of stage {stage!r} disagree about {dimension!r}.",
                    received=f"{sizes[dimension]} and {size}",
                    expected="one size",
                )
            if isinstance(dimension, str):
                sources.setdefault(dimension, name)
    return sizes


def check_tensor(stage: str, info: TensorInfo, array: Array) -> None:
    """Check type, rank and fixed dimensions of one tensor.

    Raises:
        EngineError: If one of them differs.
    """
    sizes = array.shape
    same_kind = array.dtype == dtype_of(info.dtype) and len(sizes) == len(info.shape)
    if same_kind and all(want == size or isinstance(want, str) for want, size in zip(info.shape, sizes, strict=True)):
        return
    # The message is only put together when it is needed: this runs for every tensor of every step.
    raise EngineError(
        f"tensor {info.name!r} of stage {stage!r} has another type or shape.",
        received=f"{array.dtype} {list(sizes)}",
        expected=f"{info.dtype} [{', '.join(str(size) for size in info.shape)}]",
    )


@cache
def dtype_of(name: str) -> np.dtype[Any]:
    """Return a type by its name, which numpy would parse anew each time.

    It has no bfloat16: two bytes stand for it, in tensors that pass from stage to stage and are read by no host.
    """
    return np.dtype("V2" if name == "bfloat16" else name)


def output_targets(
    stage: str,
    infos: Mapping[str, TensorInfo],
    sizes: Mapping[str, int],
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Array | None] | None,
) -> dict[str, Array | None]:
    """Return where each wanted output goes; None where its shape is only known after the run.

    Args:
        stage: The stage's name.
        infos: Its outputs.
        sizes: From :func:`check_inputs`.
        inputs: Of this call.
        outputs: As :meth:`Engine.run` has it.

    Raises:
        EngineError: If the stage has no such output, or an array cannot take it.
    """
    targets: dict[str, Array | None] = {}
    for name, target in (dict.fromkeys(infos) if outputs is None else outputs).items():
        if name not in infos:
            raise EngineError(f"stage {stage!r} has no output {name!r}.", received=name, expected=", ".join(infos))
        info = infos[name]
        shape = known_shape(info, sizes)
        if target is None:
            targets[name] = None if shape is None else np.empty(shape, dtype_of(info.dtype))
            continue
        check_tensor(stage, info, target)
        if shape is not None and target.shape != shape:
            raise EngineError(
                f"the buffer for output {name!r} of stage {stage!r} has another shape.",
                received=list(target.shape),
                expected=str(list(shape)),
            )
        if not target.flags.c_contiguous or not target.flags.writeable:
            raise EngineError(f"the buffer for output {name!r} of stage {stage!r} is not contiguous and writable.")
        if any(np.may_share_memory(target, array) for array in inputs.values()):
            raise EngineError(f"the buffer for output {name!r} of stage {stage!r} overlaps an input.")
        targets[name] = target
    return targets


def known_shape(info: TensorInfo, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    """Return an output's shape if all its dimensions are fixed or named by an input, else None."""
    shape = [size if isinstance(size, int) else sizes.get(size) for size in info.shape]
    return tuple(size for size in shape if size is not None) if None not in shape else None
