"""Family: what the compiler needs to know of a model family, as a table of functions.

A new family is a folder under ``export/models`` and one entry in ``FAMILIES``; nothing else asks which family it
serves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from reelforge.calibration.rules import StageRules
from reelforge.export.checkpoint.component import Checkpoint, Layout
from reelforge.export.checkpoint.match import Explained
from reelforge.export.checkpoint.sources import Source
from reelforge.export.models.hunyuan_video import keys_diffusers, keys_tencent
from reelforge.export.models.hunyuan_video.costs import hunyuan_video_work
from reelforge.export.models.hunyuan_video.quantisation import quantisation_rules
from reelforge.export.models.hunyuan_video.spec_from_checkpoint import Numerics, model_spec
from reelforge.export.models.hunyuan_video.stages import STAGE_NAMES, hunyuan_video_stages
from reelforge.export.planner.work import StageWork, Workload
from reelforge.export.stage import Stage
from reelforge.runtime.recipe import SparseAttention
from reelforge.runtime.spec import ModelSpec

StageTables = Mapping[str, Mapping[str, Mapping[str, Source]]]


@dataclass(frozen=True)
class KeyMap:
    """How one checkpoint layout names and cuts the weights.

    Attributes:
        sources: component -> stage -> parameter -> source.
        explained: component -> stored tensors that no stage needs, with the reason.
    """

    sources: Callable[[ModelSpec], StageTables]
    explained: Callable[[ModelSpec], Mapping[str, Sequence[Explained]]]


class StageList(Protocol):
    """Lists a family's stages."""

    def __call__(
        self, spec: ModelSpec, batch: int = 1, sparse: SparseAttention | None = None, parted: bool = False
    ) -> tuple[Stage, ...]:
        """Return the stages in pipeline order.

        Args:
            spec: The model's numbers.
            batch: Largest number of videos per call of ``dit``.
            sparse: How the attention of ``dit`` leaves out keys; None if it does not.
            parted: Whether there are also the stages that step caches need which look into ``dit``.
        """
        ...


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        stage_names: All stages, in pipeline order.
        spec: Reads the numbers of a checkpoint.
        stages: Lists the stages for a spec, a batch size and a kind of sparse attention.
        key_maps: By checkpoint layout.
        quantisation: Which layers of which stages may be computed in 8 bits.
        quantised_by_default: The stages that an 8-bit precision for the whole model means.
        work: What one video makes each stage do, for the planner.
    """

    stage_names: tuple[str, ...]
    spec: Callable[[Checkpoint, Numerics], ModelSpec]
    stages: StageList
    key_maps: Mapping[Layout, KeyMap]
    quantisation: Callable[[ModelSpec], Mapping[str, StageRules]]
    quantised_by_default: tuple[str, ...]
    work: Callable[[ModelSpec, Workload], Mapping[str, StageWork]]


FAMILIES: Mapping[str, Family] = {
    "hunyuan_video": Family(
        stage_names=STAGE_NAMES,
        spec=model_spec,
        stages=hunyuan_video_stages,
        key_maps={
            Layout.DIFFUSERS: KeyMap(keys_diffusers.stage_sources, keys_diffusers.explained),
            Layout.TENCENT: KeyMap(keys_tencent.stage_sources, keys_tencent.explained),
        },
        quantisation=quantisation_rules,
        quantised_by_default=("dit",),
        work=hunyuan_video_work,
    ),
}
