"""Weights: from a checkpoint's tensors to the entries of a bundle, without a second copy where none is needed.

A parameter that lies contiguously in the checkpoint is referenced there (the file is hard-linked into the bundle); one
that needs another order of rows or columns is streamed into ``weights/<stage>.safetensors``. Every byte is read once,
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
from reelforge.export.checkpoint.sources import Conversion, Resolved
from reelforge.export.checkpoint.tensor_ref import TensorRef
from reelforge.export.family import KeyMap
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
    shapes = {stage.name: stage.parameter_shapes() for stage in stages}
    explained = key_map.explained(spec)
    resolved: dict[str, dict[str, Resolved]] = {}
    for component, tables in key_map.sources(spec).items():
        wanted = {name: shapes[name] for name in tables}
        resolved.update(match_component(checkpoint.component(component), tables, wanted, explained.get(component, ())))
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
        self, stage: Stage, resolved: Mapping[str, Resolved], progress: Progress | None = None
    ) -> dict[str, WeightEntry]:
        """Link or convert the weights of one stage.

        Args:
            stage: Gives the parameters' shapes in the graph.
            resolved: Where each parameter comes from.
            progress: Called with bytes done; an exception raised in it stops the work.

        Returns:
            The entries by parameter name, in the stage's order.
        """
        conversions = {name: weight for name, weight in resolved.items() if isinstance(weight, Conversion)}
        in_place = {name: weight for name, weight in resolved.items() if isinstance(weight, TensorRef)}
        entries: dict[str, WeightEntry] = {}
        if conversions:
            file = f"weights/{stage.name}.safetensors"
            self.writer.require_space(converted_bytes(resolved))
            for name, written in write_converted(self.writer.path(file), conversions, progress).items():
                ref = written.ref
                shape = tuple(conversions[name].shape)
                entries[name] = WeightEntry(name, ref.dtype, shape, file, ref.offset, ref.nbytes, written.sha256)
                self._count(stage, name, written.non_finite)
        for name, (sha256, non_finite) in digest(in_place, progress).items():
            ref = in_place[name]
            file = self._link(stage.component, ref.path)
            entries[name] = WeightEntry(name, ref.dtype, tuple(ref.shape), file, ref.offset, ref.nbytes, sha256)
            self._count(stage, name, non_finite)
        return {name: entries[name] for name in resolved}

    def _count(self, stage: Stage, name: str, non_finite: int) -> None:
        if non_finite:
            self.non_finite[f"{stage.name}.{name}"] = non_finite

    def _link(self, component: str, source: Path) -> str:
        with self._linking:  # stages of one component share files
            if source not in self._linked:
                name = f"weights/{component}.{source.name}"
                if self.writer.link_weight_file(source, name) is Placement.COPIED:
                    self.copied.append(name)
                self._linked[source] = name
            return self._linked[source]
