"""Plans: a finished stage's graph compiled for every group of architectures, cut into parts where it must be.

Each plan comes from the cache, or from a compiler in a child process, one after the other: a compiler holds more memory
than everything else in a build. The module knows neither compilers nor models.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from reelforge.export.assemble import EIGHT_BIT_DTYPES
from reelforge.export.build_request import BuildEvents
from reelforge.export.build_source import BuildSource
from reelforge.export.cache import PlanCache, PlanKey
from reelforge.export.engines.builder_memory import weights_that_fit
from reelforge.export.engines.channel import Progress
from reelforge.export.engines.compile import compile_plan
from reelforge.export.engines.expected import expected_of
from reelforge.export.engines.module import backend_name, load_module
from reelforge.export.engines.plugin_graph import parser_graph, plugin_types, with_kernels
from reelforge.export.engines.profiles import profiles_for
from reelforge.export.engines.request import Expected, PlanRequest, Profile
from reelforge.export.engines.requirements import compatible_groups
from reelforge.export.graph_file import graph_bytes, graph_digest
from reelforge.export.partition import partition
from reelforge.export.quantisation import StagePlan
from reelforge.export.stage import Stage
from reelforge.export.stage_compiler import BASE_DTYPES, StageCompiler
from reelforge.runtime.bundle.write import BundleWriter
from reelforge.runtime.codec import from_json
from reelforge.runtime.cuda.driver import open_cuda
from reelforge.runtime.errors import BuildError, EngineError
from reelforge.runtime.manifest import PlanEntry, ProfileEntry, StageEntry, TensorInfo, WeightEntry
from reelforge.runtime.receipt import Receipt
from reelforge.runtime.recipe import Backend, Precision, Recipe, Target

_WHOLE, _PARTS = "dit", ("dit_head", "dit_body", "dit_tail")
_MODULES = {Backend.RTX: "tensorrt_rtx", Backend.TRT: "tensorrt"}


def add_plans(
    source: BuildSource,
    compiler: StageCompiler,
    recipe: Recipe,
    quantisation: Mapping[str, StagePlan],
    entries: Sequence[StageEntry],
    writer: BundleWriter,
) -> tuple[StageEntry, ...]:
    """Compile the plans of finished stages.

    Args:
        source: The checkpoint, and how plans are compiled.
        compiler: Made the stages' graphs, and makes those of parts.
        recipe: Gives each stage's precision.
        quantisation: What it changed, by stage.
        entries: The stages, whose graphs and weights are in the bundle.
        writer: The bundle.

    Returns:
        The entries with their plans.

    Raises:
        BuildError: If a compiler is not installed, refuses a graph, or its plan is not what the recipe says.
    """
    request = source.request.compilation
    maker = PlanMaker(
        library=find_compiler(compiler.target),
        writer=writer,
        cache=None if request.cache is None else PlanCache(request.cache, request.cache_bytes, compiler.events.notice),
        memory_bytes=request.memory_bytes or machine_memory_bytes() // 2,
        events=compiler.events,
    )
    stages = {stage.name: stage for stage in source.stages}
    planned = []
    parted = [stage.name for stage in source.stages if stage.name in _PARTS]
    for entry in entries:
        if entry.name == _WHOLE and parted and set(parted) <= {other.name for other in entries}:
            planned.append(entry)  # its weights are those of the parts, whose plans are chained below
            continue
        stage, base = stages[entry.name], recipe.base(entry.name)
        weights = {weight.name: weight for weight in entry.weights}
        plan = quantisation.get(stage.origin, StagePlan())
        parts = maker.parts(stage, weights, base)

        def graph_of(
            part: Stage,
            base: Precision = base,
            plan: StagePlan = plan,
            weights: Mapping[str, WeightEntry] = weights,
        ) -> StageGraph:
            model = parser_graph(compiler.graph(part, base, plan, weights))
            data = graph_bytes(model)
            return StageGraph(
                data,
                with_kernels(graph_digest(data, weights), plugin_types(model.graph)),
                expected_of(model, plan),
                profiles_for(part, source.spec, recipe, source.template),
            )

        groups = compatible_groups(compiler.target, source.computed_in(recipe, entry.name))
        planned.append(maker.add_plans(entry, parts, base, groups, graph_of))
    return tuple(replace(entry, plans=chained(planned)) if not entry.plans else entry for entry in planned)


def chained(entries: Sequence[StageEntry]) -> tuple[PlanEntry, ...]:
    """Return the plans of head, body and tail as the parts of the whole, for every group of architectures.

    Args:
        entries: The stages with their plans, in pipeline order.
    """
    series: dict[tuple[str, ...], list[PlanEntry]] = {}
    for entry in entries:
        for plan in entry.plans if entry.name in _PARTS else ():
            series.setdefault(plan.architectures, []).append(plan)
    return tuple(
        replace(plan, part=number, parts=len(plans)) for plans in series.values() for number, plan in enumerate(plans)
    )


def machine_memory_bytes() -> int:
    """Return the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class StageGraph:
    """One graph to compile: a stage's, or that of a part of it.

    Attributes:
        data: The ONNX model; its weights lie in the unfinished bundle.
        digest: With weights replaced by their digests, and with that of the kernels that plugins bring.
        expected: What must be found in the plan.
        profiles: The sizes that it must take.
    """

    data: bytes
    digest: str
    expected: Expected
    profiles: tuple[Profile, ...]


@dataclass(frozen=True)
class Library:
    """A compiler on this machine.

    Attributes:
        name: Library and version, ``tensorrt_rtx 1.7.1.116``.
        gpu: Name of the GPU that it compiles for; empty where it needs none.
    """

    name: str
    gpu: str = ""


@dataclass(frozen=True)
class PlanMaker:
    """Compiles the plans of one build.

    Attributes:
        library: What compiles.
        writer: The bundle.
        cache: Plans of earlier builds; None compiles all.
        memory_bytes: What a compiler may occupy; a stage that needs more is cut into parts.
        events: Where to report.
    """

    library: Library
    writer: BundleWriter
    cache: PlanCache | None
    memory_bytes: int
    events: BuildEvents

    def parts(self, stage: Stage, weights: Mapping[str, WeightEntry], base: Precision) -> tuple[Stage, ...]:
        """Return the stage, cut so that compiling a part keeps to ``memory_bytes``.

        Args:
            stage: What is to be compiled.
            weights: Its entries, by name; those of 8-bit weights are their codes.
            base: What everything else becomes in the plan.
        """
        sizes = plan_sizes(stage, weights, base)
        if not sizes:  # a stage of arithmetic only
            return (stage,)
        eight_bit = sum(size for name, size in sizes.items() if weights[name].dtype in EIGHT_BIT_DTYPES)
        return partition(stage, sizes, weights_that_fit(self.memory_bytes, eight_bit / sum(sizes.values())))

    def add_plans(
        self,
        entry: StageEntry,
        parts: tuple[Stage, ...],
        base: Precision,
        groups: Sequence[Target],
        graph_of: Callable[[Stage], StageGraph],
    ) -> StageEntry:
        """Compile a stage's parts for every group of architectures and return its entry with the plans.

        Args:
            entry: Of the stage, whose graph is written.
            parts: From :meth:`parts`.
            base: Precision of what crosses a cut.
            groups: Architectures that share a plan.
            graph_of: Makes the graph of a part.

        Raises:
            BuildError: If a compiler refuses a graph, or its plan is not what the recipe says.
        """
        plans = []
        for index, part in enumerate(parts):
            graph = graph_of(part)
            tensors = (
                part.tensor_infos(part.inputs, BASE_DTYPES[base]),
                part.tensor_infos(part.outputs, BASE_DTYPES[base]),
            )
            with self._written(graph.data) as path:
                for group in groups:
                    plans.append(self._plan(part.name, graph, path, group, *tensors, index, len(parts)))
        return replace(entry, plans=tuple(plans))

    @contextmanager
    def _written(self, graph: bytes) -> Iterator[Path]:
        """Write a graph where its weights are found: at the bundle's root, for as long as it is compiled."""
        path = self.writer.add_bytes("compiled.onnx", graph)
        try:
            yield path
        finally:
            path.unlink()

    def _plan(
        self,
        name: str,
        graph: StageGraph,
        path: Path,
        group: Target,
        inputs: tuple[TensorInfo, ...],
        outputs: tuple[TensorInfo, ...],
        part: int,
        parts: int,
    ) -> PlanEntry:
        file = f"{name}.{'+'.join(group.architectures)}.plan"
        plan, receipt = f"plans/{file}", f"receipts/{file}.json"
        request = PlanRequest(
            stage=name,
            graph=str(path),
            inputs=inputs,
            outputs=outputs,
            target=group,
            profiles=graph.profiles,
            expected=graph.expected,
            plan=str(self.writer.path(plan)),
            receipt=str(self.writer.path(receipt)),
            scratch=str(self.writer.folder.parent),
        )

        def build(plan_path: Path, receipt_path: Path) -> None:
            def report(progress: Progress) -> None:
                self.events.work(f"compiling {name}", progress.done, progress.steps)

            compile_plan(
                replace(request, plan=str(plan_path), receipt=str(receipt_path)),
                report,
                lambda pid: self.events.plan(name, pid),
            )

        if self.cache is None:
            build(Path(request.plan), Path(request.receipt))
        else:
            key = PlanKey(request, graph.digest, self.library.name, self.library.gpu)
            self.cache.fetch_or_build(key, build, Path(request.plan), Path(request.receipt))
        made = from_json(Receipt, json.loads(Path(request.receipt).read_text(encoding="utf-8")))
        return PlanEntry(
            path=plan,
            receipt=receipt,
            architectures=group.architectures,
            part=part,
            parts=parts,
            inputs=inputs,
            outputs=outputs,
            profiles=tuple(
                ProfileEntry(profile.name, profile.dimensions, made.activation_bytes.get(profile.name, 0))
                for profile in graph.profiles
            ),
            weight_bytes=made.weight_bytes,
            backend=made.backend,
        )


def plan_sizes(stage: Stage, weights: Mapping[str, WeightEntry], base: Precision) -> dict[str, int]:
    """Return how many bytes each parameter of ``stage`` takes in a plan, by name.

    Args:
        stage: Names the parameters.
        weights: Where each lies, and in which type.
        base: What a parameter that is not in 8 bits is cast to.
    """
    each = 4 if base is Precision.FP32 else 2
    return {
        name: math.prod(shape) * (1 if weights[name].dtype in EIGHT_BIT_DTYPES else each)
        for name, shape in stage.parameter_shapes().items()
    }


def find_compiler(target: Target) -> Library:
    """Return what compiles plans of ``target`` on this machine.

    Raises:
        BuildError: If it is not installed, or needs a GPU that is not here.
    """
    name = _MODULES[target.backend]
    try:
        library = f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:  # installed without a package's data, or not at all
        library = backend_name(load_module(target.backend))
    return Library(library, _gpu(target) if target.backend is Backend.TRT else "")


def _gpu(target: Target) -> str:
    """Return the name of the GPU that TensorRT compiles for: the first of this machine."""
    try:
        gpu = open_cuda().device
    except EngineError as error:
        raise BuildError(
            f"TensorRT compiles for the GPU that it runs on, and there is none for {target}.",
            received=str(error).splitlines()[0],
            expected=f"a GPU of architecture {'+'.join(target.architectures)}",
            fix="build on a machine with that GPU; plans for rtx need none",
        ) from error
    if target.architectures != (gpu.architecture,):
        raise BuildError(
            "TensorRT compiles for the GPU that it runs on, which is another one.",
            received=f"{gpu.name}, {gpu.architecture}",
            expected=f"a GPU of architecture {'+'.join(target.architectures)}, and a target of one architecture",
            fix=f"use --target trt:{gpu.architecture}, or another machine",
        )
    return gpu.name
