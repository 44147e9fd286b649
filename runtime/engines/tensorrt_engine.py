"""Stages on TensorRT or TensorRT-RTX: the parts of a stage run one after the other on the session's stream.

Inputs and outputs of a call are numpy arrays; what passes between parts, and the latents between steps, stays on the
device. The module does not know which stage it runs, but that a loop's stage has ``latents`` and ``next_latents``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack

import numpy as np

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.cuda.memory import DeviceBuffer
from reelforge.runtime.engines.device_registers import DeviceRegisters
from reelforge.runtime.engines.device_session import DeviceSession, contiguous
from reelforge.runtime.engines.engine import Array, EngineOptions, check_inputs, output_targets
from reelforge.runtime.engines.kernel_cache import KernelCache, kernel_file
from reelforge.runtime.engines.tensorrt_library import ITEM_BYTES
from reelforge.runtime.engines.tensorrt_loop import TensorRtLoop
from reelforge.runtime.engines.tensorrt_plan import LoadedPlan, Shape, choose_plans, load_plan
from reelforge.runtime.errors import EngineError
from reelforge.runtime.manifest import PlanEntry, StageEntry, TensorInfo
from reelforge.runtime.recipe import Backend


class TensorRtEngine:
    """One stage on the GPU. Make one with :func:`engine_from_plans`."""

    def __init__(self, session: DeviceSession, entry: StageEntry, parts: tuple[LoadedPlan, ...], capture: bool) -> None:
        self.name = entry.name
        self.inputs: Mapping[str, TensorInfo] = {info.name: info for info in entry.inputs}
        self.outputs: Mapping[str, TensorInfo] = {info.name: info for info in entry.outputs}
        self.session = session
        self.parts = parts
        self._capture = capture
        self._tensors = {info.name: info for part in parts for info in (*part.plan.inputs, *part.plan.outputs)}
        self._places = share_places(parts, {*self.inputs, *self.outputs})
        self._buffers: dict[str, DeviceBuffer] = {}
        self._loop: TensorRtLoop | None = None
        self._prepared: tuple[dict[str, Shape], dict[str, Shape]] | None = None  # inputs' shapes, and all of them
        self._closed = False
        self.arena_bytes = 0
        session.attach(self)

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None] | None = None) -> dict[str, Array]:
        """Compute the outputs (see :class:`reelforge.runtime.engines.engine.Engine`)."""
        self.require_free()
        sizes = check_inputs(self.name, self.inputs, inputs)
        targets = output_targets(self.name, self.outputs, sizes, inputs, outputs)
        sources = {name: contiguous(array) for name, array in inputs.items()}  # alive until the copies are done
        results: dict[str, Array] = {}
        with self.session.work():
            shapes = self.prepare({name: array.shape for name, array in sources.items()})
            addresses = self.bind(shapes, {})
            for name, array in sources.items():
                self.session.upload(addresses[name], array)
            self.enqueue()
            for name, target in targets.items():
                if target is None:
                    target = np.empty(shapes[name], np.dtype(self.outputs[name].dtype))
                elif target.shape != shapes[name]:
                    raise self._other_shape(name, target.shape, shapes[name])
                self.session.download(target, addresses[name])
                results[name] = target
        self.keep_kernels()
        return results

    def loop(self, latents: Array, fixed: Mapping[str, Array], per_step: Mapping[str, Array]) -> TensorRtLoop:
        """Begin a sampling loop whose latents stay on the device (see :func:`reelforge.runtime.sampling.sample`).

        Until it is closed, the engine takes no other call.

        Raises:
            EngineError: If a tensor does not fit the stage, or there is too little memory.
        """
        self.require_free()
        self._loop = loop = TensorRtLoop(self, latents, fixed, per_step, self._capture)
        try:
            loop.start()
        except BaseException:
            loop.close()
            raise
        return loop

    def registers(self) -> DeviceRegisters:
        """Return new registers on this engine's GPU, which all its session's engines compute with."""
        return DeviceRegisters(self.session)

    def prepare(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Set the inputs' shapes in every part and return the shapes of all tensors."""
        if self._prepared is not None and self._prepared[0] == shapes:
            return dict(self._prepared[1])
        self._prepared = None
        known = dict(shapes)
        for part in self.parts:
            known.update(part.prepare(known))
        self._prepared = (dict(shapes), dict(known))
        return known

    def enqueue(self) -> None:
        """Enqueue all parts, bound and prepared as they are, on the session's stream."""
        for part in self.parts:
            part.enqueue()

    def bind(self, shapes: Mapping[str, Shape], elsewhere: Mapping[str, int]) -> dict[str, int]:
        """Give every tensor a place and tell the parts, and return the places.

        Args:
            shapes: From :meth:`prepare`.
            elsewhere: Addresses of tensors that have a place already.
        """
        sizes: dict[str, int] = {}
        for name, info in self._tensors.items():
            place = self._places.get(name, name)
            if name not in elsewhere:
                sizes[place] = max(sizes.get(place, 0), math.prod(shapes[name]) * ITEM_BYTES[info.dtype])
        bases = {place: self._buffer(place, size_bytes) for place, size_bytes in sizes.items()}
        addresses = {name: bases[self._places.get(name, name)] for name in self._tensors if name not in elsewhere}
        addresses.update(elsewhere)
        self.tell(addresses)
        return addresses

    def tell(self, addresses: Mapping[str, int]) -> None:
        """Tell all parts where tensors and arena are."""
        # The largest need at once, so that the arena does not grow after a part has been told where it is.
        need = max(part.activation_bytes() for part in self.parts)
        self.arena_bytes = max(self.arena_bytes, need)
        activations = self.session.arena.reserve(self.arena_bytes, f"the activations of stage {self.name!r}")
        for part in self.parts:
            part.bind(addresses, activations)

    def keep_kernels(self) -> None:
        """Keep what the library compiled for what has just run (see ``kernel_cache``)."""
        for part in self.parts:
            part.keep_kernels()

    def end_loop(self, loop: TensorRtLoop) -> None:
        """Forget a loop that is closed."""
        if self._loop is loop:
            self._loop = None

    def require_free(self) -> None:
        """Refuse a call while a loop uses the engine, or after its end.

        Raises:
            EngineError: If it is closed, or a loop has begun and was not closed.
        """
        if self._closed:
            raise EngineError(f"stage {self.name!r} was run after its engine was closed.")
        if self._loop is not None:
            raise EngineError(
                f"stage {self.name!r} was run while a sampling loop uses it.", fix="close the loop before"
            )

    def close(self) -> None:
        """Release plans, weights and buffers."""
        if self._closed:
            return
        self._closed = True
        self.session.cuda.activate_to_close()
        if self._loop is not None:
            self._loop.close()
        for part in self.parts:
            part.close()
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers.clear()
        self.session.detach(self)

    def _buffer(self, name: str, size_bytes: int) -> int:
        """Return a place for a tensor: the one that it had, if that is large enough."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size_bytes < size_bytes:
            if buffer is not None:
                self._buffers.pop(name).close()
            self._buffers[name] = buffer = DeviceBuffer(
                self.session.cuda, size_bytes, f"{name!r} of stage {self.name!r}"
            )
        return buffer.address

    def _other_shape(self, name: str, received: Shape, expected: Shape) -> EngineError:
        return EngineError(
            f"the buffer for output {name!r} of stage {self.name!r} has another shape.",
            received=list(received),
            expected=str(list(expected)),
        )


def engine_from_plans(
    session: DeviceSession, bundle: Bundle, stage: str, options: EngineOptions | None = None
) -> TensorRtEngine:
    """Load the plans of a stage that the session's GPU runs.

    Raises:
        BundleError: If the bundle lacks the stage, or a file is not the plan that the manifest says.
        EngineError: If there is no plan for the GPU, it is of another version, or it does not fit into its memory.
    """
    entry = bundle.stage(stage)
    plans = choose_plans(entry, session.cuda.device)
    _check_chain(entry, [(plan.inputs, plan.outputs) for plan in plans])
    options = options or EngineOptions()
    session.cuda.activate()
    with ExitStack() as undo:
        parts = []
        for plan in plans:
            kernels = _kernels_of(session, bundle, plan) if options.kernel_cache else None
            parts.append(load_plan(session, stage, bundle.path / plan.path, plan, kernels))
            undo.callback(parts[-1].close)
        engine = TensorRtEngine(session, entry, tuple(parts), options.cuda_graph)
        undo.pop_all()
    return engine


def _kernels_of(session: DeviceSession, bundle: Bundle, plan: PlanEntry) -> KernelCache | None:
    """Return where a plan's kernels are kept; None where the library has none, or the plan's bytes have no digest."""
    digest = next((file.sha256 for file in bundle.manifest.files if file.path == plan.path), None)
    if session.library.backend is not Backend.RTX or digest is None:
        return None
    return KernelCache(kernel_file(digest, plan.backend, session.cuda.device))


def share_places(parts: Sequence[LoadedPlan], own: Set[str]) -> dict[str, str]:
    """Return the places of tensors that only pass between parts; those that are not needed at once share one.

    Of a diffusion transformer such a tensor is the whole stream of tokens, gigabytes at full size.

    Args:
        parts: Of the stage, in order.
        own: Tensors of the stage itself, which keep their own places.
    """
    last = {info.name: index for index, part in enumerate(parts) for info in part.plan.inputs}
    free_after: list[int] = []  # per place: the last part that reads it
    places = {}
    for index, part in enumerate(parts):
        for name in (info.name for info in part.plan.outputs if info.name not in own):
            number = next((place for place, end in enumerate(free_after) if end < index), len(free_after))
            free_after[number : number + 1] = [last.get(name, index)]
            places[name] = f"passing tensor {number}"
    return places


def _check_chain(entry: StageEntry, parts: list[tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]]) -> None:
    """Every tensor that a part takes is the stage's or of an earlier part, and all of the stage's are there."""
    known = {info.name: info.dtype for info in entry.inputs}
    taken = set()
    for inputs, outputs in parts:
        for info in inputs:
            taken.add(info.name)
            if known.get(info.name) != info.dtype:
                raise _broken(entry, f"{info.name} {info.dtype} is taken before anything gives it")
        known.update({info.name: info.dtype for info in outputs})
    lost = [info.name for info in entry.inputs if info.name not in taken]
    lost += [info.name for info in entry.outputs if known.get(info.name) != info.dtype]
    if lost:
        raise _broken(entry, f"{', '.join(lost)}: not in any part")


def _broken(entry: StageEntry, received: str) -> EngineError:
    return EngineError(
        f"the plans of stage {entry.name!r} do not fit together.",
        received=received,
        expected="parts that pass on what the stage takes and gives",
        fix="rebuild the bundle with build-engine",
    )
