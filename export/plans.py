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

from reelforge.export.build_request import BuildEvents
from reelforge.export.build_source import BuildSource
from reelforge.export.cache import PlanCache, PlanKey
from reelforge.export.engines.channel import Progress
from reelforge.export.engines.compile import compile_plan
from reelforge.export.engines.expected import expected_of
from reelforge.export.engines.module import backend_name, load_module
from reelforge.export.engines.profiles import profiles_for
from reelforge.export.engines.request import Expected, PlanRequest, Profile
from reelforge.export.engines.requirements import compatible_groups
from reelforge.export.graph_file import graph_bytes, graph_digest
from reelforge.export.partition import partition
from reelforge.export.quantisation import StagePlan
from reelforge.export.stage import Stage
from reelforge.export.stage_compiler import StageCompiler
from reelforge.runtime.bundle.write import BundleWriter
from reelforge.runtime.codec import from_json
from reelforge.runtime.manifest import PlanEntry, ProfileEntry, StageEntry, TensorInfo, WeightEntry
from reelforge.runtime.receipt import Receipt
from reelforge.runtime.recipe import Backend, Precision, Recipe, Target

BUILDER_RATIO = 1.6
"""Anonymous memory of a compiler at its peak over the bytes of weights in the plan that it streams to the disk.

Measured with TensorRT-RTX 1.7.1.116, and rounded up.
"""

_MODULES = {Backend.RTX: "tensorrt_rtx", Backend.TRT: "tensorrt"}
_DTYPES = {Precision.FP32: "float32", Precision.BF16: "bfloat16", Precision.FP16: "float16"}


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
    installed_backend(compiler.target.backend)
    maker = PlanMaker(
        target=compiler.target,
        writer=writer,
        cache=None if request.cache is None else PlanCache(request.cache, request.cache_bytes, compiler.events.notice),
        memory_bytes=request.memory_bytes or machine_memory_bytes() // 2,
        events=compiler.events,
    )
    stages = {stage.name: stage for stage in source.stages}
    planned = []
    for entry in entries:
        stage, base = stages[entry.name], recipe.base(entry.name)
        weights = {weight.name: weight for weight in entry.weights}
        plan = quantisation.get(entry.name, StagePlan())
        parts = maker.parts(stage, weights, base)

        def graph_of(
            part: Stage,
            base: Precision = base,
            plan: StagePlan = plan,
            weights: Mapping[str, WeightEntry] = weights,
        ) -> StageGraph:
            model = compiler.graph(part, base, plan, weights)
            data = graph_bytes(model)
            return StageGraph(
                data,
                graph_digest(data, weights),
                expected_of(model, plan),
                profiles_for(part, source.spec, recipe, source.template),
            )

        groups = compatible_groups(compiler.target, source.computed_in(recipe, entry.name))
        planned.append(maker.add_plans(entry, parts, base, groups, graph_of))
    return tuple(planned)


def machine_memory_bytes() -> int:
    """Return the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class StageGraph:
    """One graph to compile: a stage's, or that of a part of it.

    Attributes:
        data: The ONNX model; its weights lie in the unfinished bundle.
        digest: With weights replaced by their digests.
        expected: What must be found in the plan.
        profiles: The sizes that it must take.
    """

    data: bytes
    digest: str
    expected: Expected
    profiles: tuple[Profile, ...]


@dataclass(frozen=True)
class PlanMaker:
    """Compiles the plans of one build.

    Attributes:
        target: Backend and architectures.
        writer: The bundle.
        cache: Plans of earlier builds; None compiles all.
        memory_bytes: What a compiler may occupy; a stage that needs more is cut into parts.
        events: Where to report.
    """

    target: Target
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
        return partition(stage, plan_sizes(stage, weights, base), max(1, int(self.memory_bytes / BUILDER_RATIO)))

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
            tensors = part.tensor_infos(part.inputs, _DTYPES[base]), part.tensor_infos(part.outputs, _DTYPES[base])
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

        backend = installed_backend(group.backend)
        if self.cache is None:
            build(Path(request.plan), Path(request.receipt))
        else:
            key = PlanKey(request, graph.digest, backend)
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
        name: math.prod(shape) * (1 if weights[name].dtype in ("I8", "F8_E4M3") else each)
        for name, shape in stage.parameter_shapes().items()
    }


def installed_backend(backend: Backend) -> str:
    """Return library and version of an installed compiler, ``tensorrt_rtx 1.7.1.116``, without importing it.

    Raises:
        BuildError: If it is not installed.
    """
    name = _MODULES[backend]
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:  # installed without a package's data, or not at all
        return backend_name(load_module(backend))
