"""A stage run for many inputs in lockstep, in segments whose weights fit a budget of memory.

If all segments fit together they are loaded once and stay; otherwise each is loaded, run for every input, and closed
before the next one. Between segments only what crosses the cut is kept. Graphs are made in memory; nothing is written
into the bundle. The module does not know what is observed for what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from reelforge.export.cut import Limits, Timeline, find_places, fits, infer_types, segments, timeline
from reelforge.export.graph_file import graph_bytes
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.engines.engine import Array, Engine, EngineOptions
from reelforge.runtime.engines.onnxruntime_engine import engine_from_bytes
from reelforge.runtime.manifest import StageEntry, TensorInfo

OnValue = Callable[[str, Array], None]
LoadEngine = Callable[[bytes, Path, StageEntry, EngineOptions], Engine]

_DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
    ir.DataType.BOOL: "bool",
}
_OBSERVED_SHARE = 4  # observed values of one segment may take a quarter of what weights may


class SegmentedStage:
    """One stage, cut to fit ``memory_bytes``.

    Args:
        bundle: Where the stage is.
        stage: Its name.
        outputs: Which of its outputs are wanted; what only leads to others is not run.
        observed: Names of values that are shown to ``on_value``, those of one segment in this order.
        memory_bytes: What the loaded weights may take, with every float as fp32.
        bytes_of: How large an observed value is.
        options: How engines run.
        load: Loads a segment; replaced in tests.

    Attributes:
        parts: How many segments there are.
        resident: Whether all of them stay loaded.
    """

    def __init__(
        self,
        bundle: Bundle,
        stage: str,
        outputs: Sequence[str],
        observed: Sequence[str],
        memory_bytes: int,
        bytes_of: Callable[[ir.Value], int] = lambda _: 0,
        options: EngineOptions | None = None,
        load: LoadEngine = engine_from_bytes,
    ) -> None:
        self.stage, self.outputs, self.observed = stage, tuple(outputs), dict.fromkeys(observed)
        self._bundle, self._options, self._load = bundle, options or EngineOptions(), load
        limits = Limits(memory_bytes, max(1, memory_bytes // _OBSERVED_SHARE), bytes_of)
        model = ir.load(bundle.graph(stage))
        line = self._timeline(model)
        if not fits(line, limits) or any(value.type is None or value.shape is None for value in line.wanted):
            line = self._timeline(infer_types(model))
        graphs = list(segments(line, find_places(line, limits)))
        self.parts = len(graphs)
        self.resident = line.weight_bytes() <= memory_bytes
        self._segments = [_Segment(model, graph, f"{stage} part {k + 1}") for k, graph in enumerate(graphs)]
        self._given = [info.name for info in bundle.stage(stage).inputs if info.name in self.observed]
        self._engines: dict[int, Engine] = {}

    def _timeline(self, model: ir.Model) -> Timeline:
        values = ir.convenience.create_value_mapping(model.graph)
        wanted = [values[name] for name in (*self.outputs, *self.observed)]
        return timeline(model.graph, [value for value in wanted if value.producer() is not None])

    def run(
        self,
        inputs: Sequence[Mapping[str, Array]],
        on_value: OnValue = lambda _name, _array: None,
        on_part: Callable[[], None] = lambda: None,
    ) -> Iterator[dict[str, Array]]:
        """Run the stage for each of ``inputs`` and yield the wanted outputs of each, in order.

        Args:
            inputs: The stage's inputs, as often as it is to run.
            on_value: Told each observed value, by name.
            on_part: Called after each segment for each input.

        Raises:
            EngineError: If an engine fails.
        """
        # With everything loaded there is nothing to gain from lockstep, and less to keep between segments.
        for together in [[each] for each in inputs] if self.resident else [inputs]:
            yield from self._run_together(together, on_value, on_part)

    def _run_together(
        self, inputs: Sequence[Mapping[str, Array]], on_value: OnValue, on_part: Callable[[], None]
    ) -> Iterator[dict[str, Array]]:
        values: list[dict[str, Array]] = [dict(each) for each in inputs]
        results: list[dict[str, Array]] = [{} for _ in inputs]
        for own in values:
            for name in self._given:
                on_value(name, own[name])
        for index, segment in enumerate(self._segments):
            later = {name for following in self._segments[index + 1 :] for name in following.inputs}
            with self._engine(index) as engine:
                for own, result in zip(values, results, strict=True):
                    made = engine.run({name: own[name] for name in segment.inputs})
                    for name in [name for name in made if name in self.observed]:
                        on_value(name, made[name])
                    result.update((name, array) for name, array in made.items() if name in self.outputs)
                    own.update((name, array) for name, array in made.items() if name in later)
                    for name in [name for name in own if name not in later]:
                        del own[name]
                    on_part()
                    if index + 1 == self.parts:
                        yield dict(result)
                        result.clear()

    def close(self) -> None:
        """Give back the memory of all engines; a later run loads them again."""
        while self._engines:
            self._engines.popitem()[1].close()

    @contextmanager
    def _engine(self, index: int) -> Iterator[Engine]:
        segment = self._segments[index]
        engine = self._engines.get(index)
        if engine is None:
            engine = self._load(segment.data, self._bundle.path, segment.entry, self._options)
            self._engines[index] = engine
        try:
            yield engine
        finally:
            if not self.resident:
                del self._engines[index]
                engine.close()


class _Segment:
    """A serialised segment and its tensors."""

    def __init__(self, model: ir.Model, graph: ir.Graph, name: str) -> None:
        self.inputs = tuple(str(value.name) for value in graph.inputs)
        infos = [tuple(_info(value) for value in values) for values in (graph.inputs, graph.outputs)]
        self.entry = StageEntry(name, "", "", infos[0], infos[1], (), 0.0, None, {})
        self.data = graph_bytes(ir.Model(graph, ir_version=model.ir_version))


def _info(value: ir.Value) -> TensorInfo:
    if value.dtype is None or value.shape is None or value.name is None:
        raise AssertionError(f"{value.name} has the type {value.dtype} and the shape {value.shape}")
    # A dimension that is not fixed gets a name of its own: what a segment takes was made by another, not by a user.
    shape = tuple(size if isinstance(size, int) else f"{value.name}:{axis}" for axis, size in enumerate(value.shape))
    return TensorInfo(value.name, _DTYPES[value.dtype], shape)
