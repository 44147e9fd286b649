"""StageCompiler: places weights in threads while parts are traced, then assembles, lowers, checks and writes graphs.

One compiler serves a whole build: what it has traced for a reference bundle, the final one needs not trace again. It
knows no model, and not where recipes and plans come from.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir

from reelforge.export.assemble import EIGHT_BIT_DTYPES, STORED_DTYPES, assemble_stage
from reelforge.export.build_request import BuildEvents
from reelforge.export.capture import Trace, capture_part
from reelforge.export.checkpoint.sources import Resolved
from reelforge.export.graph_file import check_graph, count_nodes, graph_bytes, graph_digest
from reelforge.export.lower import EightBit, PluginAttentions, lower
from reelforge.export.passes.quantise_layers import QuantisedLayer
from reelforge.export.quantisation import StagePlan
from reelforge.export.stage import Part, Stage, Value
from reelforge.export.weights import WeightPlacer, converted_bytes
from reelforge.runtime.bundle.write import BundleWriter
from reelforge.runtime.manifest import StageEntry, WeightEntry
from reelforge.runtime.recipe import Precision, Recipe, Target

BASE_DTYPES = {Precision.FP32: "float32", Precision.BF16: "bfloat16", Precision.FP16: "float16"}
"""What is called ``compute`` in a stage's description, as a manifest calls it."""


class _Abandoned(BaseException):
    """Raised in the weights' thread when the build has already failed elsewhere."""


_Kind = tuple[Part, tuple[Value, ...], Precision]
"""What a trace depends on: a part without its repeats, what it reads, and the precision."""


@dataclass
class StageCompiler:
    """Compiles stages of one checkpoint for one target.

    Attributes:
        target: What will execute the graphs.
        resolved: stage -> parameter -> where it lies in the checkpoint.
        events: Where to report.
        attentions: stage -> names of the attentions that a target may compute by plugins.
    """

    target: Target
    resolved: Mapping[str, Mapping[str, Resolved]]
    events: BuildEvents
    attentions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    _traces: dict[_Kind, Trace] = field(default_factory=dict)

    def compile(
        self, stages: Sequence[Stage], recipe: Recipe, plans: Mapping[str, StagePlan], writer: BundleWriter
    ) -> tuple[StageEntry, ...]:
        """Write graphs and weights of ``stages`` into a bundle and return their entries.

        Args:
            stages: What to compile, in pipeline order.
            recipe: Gives each stage's precision.
            plans: What quantisation changes, by stage.
            writer: The bundle.

        Raises:
            CheckpointError: If a file ends before its tensor does.
            CalibrationError: If a weight cannot be quantised.
            BuildError: If the disk is full, or a graph is not valid.
        """
        placer = WeightPlacer(writer)
        failed = threading.Event()

        def place(stage: Stage) -> dict[str, WeightEntry]:
            total = sum(weight.nbytes for weight in self.resolved[stage.name].values())
            done = 0

            def progress(count: int) -> None:
                nonlocal done
                if failed.is_set():
                    raise _Abandoned
                done += count
                self.events.weights(stage.name, min(done, total), total)

            return placer.place(stage, self.resolved[stage.name], plans.get(stage.name), progress)

        owners = {stage.name for stage in stages}
        # Stages with the most to convert come first, so that their files reach the disk while others are still read.
        by_conversion = sorted(stages, key=lambda stage: -converted_bytes(self.resolved[stage.name]))
        with _frequent_switches(), ThreadPoolExecutor(2) as pool:
            try:
                placed = {
                    stage.name: pool.submit(place, stage) for stage in by_conversion if stage.weights_of not in owners
                }
                for stage in stages:
                    self._trace(stage, recipe.base(stage.name))
                entries = []
                for stage in stages:
                    shared = stage.weights_of in owners
                    weights = placed[stage.weights_of if shared else stage.name].result()
                    weights = _own(stage, weights) if shared else weights
                    plan = plans.get(stage.origin if shared else stage.name, StagePlan())
                    entries.append(self._finish(stage, recipe, plan, weights, writer))
                    self.events.stage(entries[-1])
            except BaseException:
                failed.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        for name in sorted(placer.copied):
            self.events.notice(
                f"{name} was copied: the checkpoint lies on another file system, which hard links cannot cross."
            )
        for name, count in sorted(placer.non_finite.items()):
            self.events.notice(f"warning: the weight {name} holds {count} NaN or infinite elements.")
        return tuple(entries)

    def graph(
        self, stage: Stage, base: Precision, plan: StagePlan | None, weights: Mapping[str, WeightEntry]
    ) -> ir.Model:
        """Return the graph of a stage, or of a part of one, as the target takes it.

        Args:
            stage: What to assemble.
            base: Precision of what is not in 8 bits.
            plan: What quantisation changes in the whole stage.
            weights: Where each parameter lies, by name; more than the stage's may be given.
        """
        model = assemble_stage(stage, self._trace(stage, base), base, weights)
        own = set(stage.parameter_shapes())
        prefixes = tuple(prefix for part in stage.parts for prefix in part.prefixes() if prefix)
        plan = plan or StagePlan()
        layers = {layer: _quantised(layer, plan, weights) for layer in plan.layers if f"{layer}.weight" in own}
        attentions = {name: scales for name, scales in plan.attentions.items() if name.startswith(prefixes)}
        names = tuple(name for name in self.attentions.get(stage.origin, ()) if name.startswith(prefixes))
        # The inputs of a later part are called otherwise, and those of a view may be what another view makes: the whole
        # stage's graph has shown what they are.
        trusted = {*stage.aliases, *(stage.inputs if stage.weights_of else ())}
        return lower(model, self.target, EightBit(layers, attentions), PluginAttentions(names, trusted))

    def _trace(self, stage: Stage, precision: Precision) -> tuple[Trace, ...]:
        traces = []
        for part in stage.parts:
            read = tuple(stage.values[port.value] for port in part.input_ports)
            kind = (replace(part, first=0, repeat=1), read, precision)
            if kind not in self._traces:
                self._traces[kind] = capture_part(part, stage.values, precision)
            traces.append(self._traces[kind])
        return tuple(traces)

    def _finish(
        self,
        stage: Stage,
        recipe: Recipe,
        plan: StagePlan,
        weights: dict[str, WeightEntry],
        writer: BundleWriter,
    ) -> StageEntry:
        precision = recipe.precision[stage.name]
        model = self.graph(stage, recipe.base(stage.name), plan, weights)
        data = graph_bytes(model)
        name = f"{stage.name}.onnx"
        check_graph(data, name)
        writer.add_bytes(name, data)
        return StageEntry(
            name=stage.name,
            graph=name,
            graph_digest=graph_digest(data, weights),
            inputs=stage.tensor_infos(stage.inputs, BASE_DTYPES[recipe.base(stage.name)]),
            outputs=stage.tensor_infos(stage.outputs, BASE_DTYPES[recipe.base(stage.name)]),
            weights=tuple(weights.values()),
            tolerance=None if plan.layers or plan.attentions else stage.tolerance.get(precision.value),
            parity=None,
            nodes=count_nodes(model),
        )


def _own(stage: Stage, weights: Mapping[str, WeightEntry]) -> dict[str, WeightEntry]:
    """Return those of another stage's weights that ``stage`` shares, with the scales of codes."""
    own = set(stage.parameter_shapes())
    return {name: entry for name, entry in weights.items() if name.removesuffix(".scale") in own}


def link_stage(entry: StageEntry, folder: Path, writer: BundleWriter) -> StageEntry:
    """Bring a finished stage of the bundle in ``folder`` into another one, unchanged.

    Args:
        entry: The stage in the other bundle.
        folder: That bundle's folder, on the same file system.
        writer: The new bundle.
    """
    writer.add_bytes(entry.graph, (folder / entry.graph).read_bytes())
    for file in sorted({weight.file for weight in entry.weights}):
        if not (writer.folder / file).exists():
            writer.link_weight_file(folder / file, file)
    return entry


def _quantised(layer: str, plan: StagePlan, weights: Mapping[str, WeightEntry]) -> QuantisedLayer:
    codes = weights[f"{layer}.weight"]
    scale, planned = weights[f"{codes.name}.scale"], plan.layers[layer]
    return QuantisedLayer(_external(codes), _external(scale), planned.activation, planned.output_range)


def _external(entry: WeightEntry) -> ir.ExternalTensor:
    dtype = {**STORED_DTYPES, **EIGHT_BIT_DTYPES}[entry.dtype]
    shape = ir.Shape(entry.shape)
    return ir.ExternalTensor(entry.file, entry.offset, entry.length, dtype, shape=shape, name=entry.name)


@contextmanager
def _frequent_switches() -> Iterator[None]:
    """Let threads that read weights have the interpreter soon, though tracing never gives it up by itself.

    At the default of 5 ms a thread waits ten times longer for each piece of a file than it then works on it.
    """
    usual = sys.getswitchinterval()
    sys.setswitchinterval(0.0003)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)
