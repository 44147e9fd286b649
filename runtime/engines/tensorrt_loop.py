"""The sampling loop on the device: latents stay there, and a step is one launch of a CUDA graph.

The graph holds the copy of the step's rows from page-locked memory, the parts of the stage, and the copy of the new
latents over the old ones. One set of addresses is enough that way, and one graph per context is what TensorRT allows.
The module does not know what the stage computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from reelforge.runtime.cuda.driver import Copy
from reelforge.runtime.cuda.graph import CudaGraph, capture
from reelforge.runtime.cuda.memory import DeviceBuffer, PinnedBuffer, aligned
from reelforge.runtime.engines.device_session import contiguous
from reelforge.runtime.engines.engine import Array, check_inputs
from reelforge.runtime.errors import EngineError

if TYPE_CHECKING:
    from reelforge.runtime.engines.tensorrt_engine import TensorRtEngine


class TensorRtLoop:
    """A loop that has begun. Make one with :meth:`TensorRtEngine.loop`.

    Attributes:
        skipped: None ever are (see :class:`reelforge.runtime.sampling.StepLoop`).
        graph_refusal: Why steps are not replayed from a graph; empty if they are, or none was recorded yet.
    """

    def __init__(
        self,
        engine: TensorRtEngine,
        latents: Array,
        fixed: Mapping[str, Array],
        per_step: Mapping[str, Array],
        captured: bool,
    ) -> None:
        self.skipped = 0
        self.graph_refusal = "" if captured else "cuda_graph is off"
        self._engine = engine
        self._session = engine.session
        self._latents = contiguous(latents)
        self._fixed = {name: contiguous(array) for name, array in fixed.items()}
        self._per_step = dict(per_step)
        self._slots: dict[str, int] = {}  # where a step's row of each tensor lies in the two blocks
        self._block: DeviceBuffer | None = None
        self._staging: PinnedBuffer | None = None
        self._graph: CudaGraph | None = None
        self._generation = -1
        self._addresses: dict[str, int] = {}
        self._launched = 0
        self._closed = False

    def start(self) -> None:
        """Check the tensors, give them places and upload what all steps share."""
        rows = {name: array[0, ...] for name, array in self._per_step.items()}
        inputs = {"latents": self._latents, **self._fixed, **rows}
        check_inputs(self._engine.name, self._engine.inputs, inputs)
        total = 0
        for name, row in rows.items():
            self._slots[name] = total
            total += aligned(row.nbytes)
        self._block = DeviceBuffer(self._session.cuda, total, f"a step's inputs of stage {self._engine.name!r}")
        self._staging = PinnedBuffer(self._session.cuda, total)
        with self._session.work():
            shapes = self._engine.prepare({name: array.shape for name, array in inputs.items()})
            slots = {name: self._block.address + offset for name, offset in self._slots.items()}
            self._addresses = self._engine.bind(shapes, slots)
            for name, array in {"latents": self._latents, **self._fixed}.items():
                self._session.upload(self._addresses[name], array)
        self._generation = self._session.arena.generation

    def advance(self, step: int) -> None:
        """Run one step, to its end.

        Raises:
            EngineError: If the library or the GPU fails.
        """
        if self._closed:
            raise EngineError(f"the sampling loop of stage {self._engine.name!r} was continued after its end.")
        self._write_rows(step)
        with self._session.work():
            if self._generation != self._session.arena.generation:
                self._move_to_new_arena()
            # The first step runs as it is: TensorRT finishes its own preparations in it, which no graph may hold.
            if self._launched and self._graph is None and not self.graph_refusal:
                self._record()
            if self._graph is None:
                self._enqueue()
            else:
                self._graph.launch(self._session.stream)
        if not self._launched:
            self._engine.keep_kernels()
        self._launched += 1

    def latents(self) -> Array:
        """Return a copy of the latents as they are now, ``[batch, C, T, H, W]``."""
        result = np.empty_like(self._latents)
        with self._session.work():
            self._session.download(result, self._addresses["latents"])
        return result

    def close(self) -> None:
        """Give back the graph and the loop's buffers. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        self._session.cuda.activate_to_close()
        if self._graph is not None:
            self._graph.close()
        for buffer in (self._block, self._staging):
            if buffer is not None:
                buffer.close()
        self._engine.end_loop(self)

    def _write_rows(self, step: int) -> None:
        """Put a step's rows where the copy to the device begins; the step before has been waited for."""
        assert self._staging is not None
        block = self._staging.bytes
        for name, offset in self._slots.items():
            row = self._per_step[name][step, ...]
            block[offset : offset + row.nbytes].view(row.dtype).reshape(row.shape)[...] = row

    def _enqueue(self) -> None:
        assert self._block is not None
        assert self._staging is not None
        cuda, stream = self._session.cuda, self._session.stream
        cuda.copy(self._block.address, self._staging.address, self._block.size_bytes, Copy.TO_DEVICE, stream)
        self._engine.enqueue()
        old, new = self._addresses["latents"], self._addresses["next_latents"]
        cuda.copy(old, new, self._latents.nbytes, Copy.ON_DEVICE, stream)

    def _record(self) -> None:
        """Record a step, or remember why that cannot be done; the steps then run one by one, with equal results."""
        if not all(part.can_be_captured() for part in self._engine.parts):
            self.graph_refusal = f"{self._session.library.name} says that the plan cannot be captured"
            return
        try:
            self._graph = capture(self._session.cuda, self._session.stream, self._enqueue)
        except EngineError as error:
            self.graph_refusal = str(error)

    def _move_to_new_arena(self) -> None:
        """Another stage has made the arena grow since: nothing may use its old address, which the graph holds."""
        if self._graph is not None:
            self._graph.close()
            self._graph = None
        self._engine.tell(self._addresses)
        self._generation = self._session.arena.generation
        self._launched = 0
