"""Weights: from a checkpoint's tensors to the entries of a bundle, without a second copy where none is needed.

A parameter that lies contiguously in the checkpoint is referenced there (the file is hard-linked into the bundle); one
that needs another order of rows or columns, or takes in a smoothing, is streamed into ``weights/<stage>.safetensors``,
and the codes of 8-bit layers into files of their own. Every byte is read once,
for its digest, its NaN count and its conversion together. The module knows no graphs and no models.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from reelforge.export.checkpoint.component import Checkpoint
from reelforge.export.checkpoint.digest import digest
from reelforge.export.checkpoint.match import match_component
from reelforge.export.checkpoint.safetensors_writer import write_converted
from reelforge.export.checkpoint.sources import Conversion, Resolved, WeightSource
from reelforge.export.checkpoint.tensor_ref import TensorRef
from reelforge.export.family import KeyMap
from reelforge.export.folded_weight import FoldedWeight
from reelforge.export.quantisation import StagePlan
from reelforge.export.quantised_weights import place_quantised
from reelforge.export.stage import Stage
from reelforge.runtime.bundle.write import BundleWriter, Placement
from reelforge.runtime.manifest import WeightEntry
from reelforge.runtime.spec import ModelSpec

Progress = Callable[[int], None]


def resolve_stages(
    checkpoint: Checkpoint, key_map: KeyMap, spec: ModelSpec, stages: tuple[Stage, ...]
) -> dict[str, dict[str, Resolved]]:
    """Find every parameter of ``stages`` in the checkpoint, strictly both ways.

    Args:
        checkpoint: Headers only are read.
        key_map: Of the checkpoint's layout.
        spec: The model's numbers.
        stages: All stages of the family: a component is matched whole, whichever stages are built.

    Returns:
        stage -> parameter -> where it comes from.

    Raises:
        CheckpointError: Listing what differs.
    """
    shapes = {stage.name: stage.parameter_shapes() for stage in stages if not stage.weights_of}
    explained = key_map.explained(spec)
    resolved: dict[str, dict[str, Resolved]] = {name: {} for name, wanted in shapes.items() if not wanted}
    for component, tables in key_map.sources(spec).items():
        wanted = {name: shapes[name] for name in tables}
        resolved.update(match_component(checkpoint.component(component), tables, wanted, explained.get(component, ())))
    for stage in stages:
        if stage.weights_of:
            resolved[stage.name] = {name: resolved[stage.weights_of][name] for name in stage.parameter_shapes()}
    return resolved


def converted_bytes(weights: Mapping[str, Resolved]) -> int:
    """Return how many bytes of ``weights`` must be written anew."""
    return sum(weight.nbytes for weight in weights.values() if isinstance(weight, Conversion))


@dataclass
class WeightPlacer:
    """Brings resolved weights into a bundle that is being written; stages may be placed from several threads.

    Attributes:
        writer: The bundle.
        copied: Files that had to be copied because the bundle lies on another file system.
        non_finite: Weights with NaN or infinite elements, ``stage.parameter`` -> how many.
    """

    writer: BundleWriter
    copied: list[str] = field(default_factory=list)
    non_finite: dict[str, int] = field(default_factory=dict)
    _linked: dict[Path, str] = field(default_factory=dict)
    _linking: threading.Lock = field(default_factory=threading.Lock)

    def place(
        self,
        stage: Stage,
        resolved: Mapping[str, Resolved],
        plan: StagePlan | None = None,
        progress: Progress | None = None,
    ) -> dict[str, WeightEntry]:
        """Quantise, convert or link the weights of one stage.

        A stage with 8-bit layers refers to no file of the checkpoint: what is left of it in high precision is small,
        and would otherwise keep the float weights in the bundle.

        Args:
            stage: Gives the parameters' shapes in the graph.
            resolved: Where each parameter comes from.
            plan: What quantisation changes; None changes nothing.
            progress: Called with bytes of the checkpoint done; an exception raised in it stops the work.

        Returns:
            The entries by name, in the stage's order. The entry of an 8-bit weight is that of its codes, and one named
            ``<weight>.scale`` follows.
        """
        plan = plan or StagePlan()
        eight_bit = {f"{layer}.weight": layer_plan.weight for layer, layer_plan in plan.layers.items()}
        rest = {
            name: FoldedWeight(weight, plan.folded[name]) if name in plan.folded else weight
            for name, weight in resolved.items()
            if name not in eight_bit
        }
        in_place = {} if eight_bit else {name: weight for name, weight in rest.items() if isinstance(weight, TensorRef)}
        written = {name: weight for name, weight in rest.items() if name not in in_place}
        entries: dict[str, WeightEntry] = {}
        if eight_bit:
            sources = {name: resolved[name] for name in eight_bit}
            for codes, scale in place_quantised(self.writer, stage.name, sources, eight_bit, progress).values():
                entries.update({codes.name: codes, scale.name: scale})
        if written:
            entries.update(self._write(stage, written, progress))
        for name, (sha256, non_finite) in digest(in_place, progress).items():
            ref = in_place[name]
            file = self._link(stage.component, ref.path)
            entries[name] = WeightEntry(name, ref.dtype, tuple(ref.shape), file, ref.offset, ref.nbytes, sha256)
            self._count(stage, name, non_finite)
        order = [name for parameter in resolved for name in (parameter, f"{parameter}.scale") if name in entries]
        return {name: entries[name] for name in order}

    def _write(
        self, stage: Stage, weights: Mapping[str, WeightSource], progress: Progress | None
    ) -> Mapping[str, WeightEntry]:
        file = f"weights/{stage.name}.safetensors"
        self.writer.require_space(sum(weight.nbytes for weight in weights.values()))
        entries = {}
        for name, written in write_converted(self.writer.path(file), weights, progress).items():
            ref = written.ref
            shape = tuple(weights[name].shape)
            entries[name] = WeightEntry(name, ref.dtype, shape, file, ref.offset, ref.nbytes, written.sha256)
            self._count(stage, name, written.non_finite)
        return entries

    def _count(self, stage: Stage, name: str, non_finite: int) -> None:
        if non_finite:
            self.non_finite[f"{stage.name}.{name}"] = non_finite

    def _link(self, component: str, source: Path) -> str:
        with self._linking:  # stages of one component share files
            if source not in self._linked:
                name = f"weights/{component}.{source.name}"
                present = (self.writer.folder / name).exists()  # a stage that came from the reference uses it too
                if not present and self.writer.link_weight_file(source, name) is Placement.COPIED:
                    self.copied.append(name)
                self._linked[source] = name
            return self._linked[source]
