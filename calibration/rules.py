"""What a model family says about quantising its stages, as data: which layers may, and where smoothing folds.

Layers are named as in the stage's graph, without ``.weight``. The module holds no numbers and no graphs; a family
fills it in, the compiler reads it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from reelforge.calibration.number_formats import NumberFormat

Formats = Mapping[str, Mapping[str, NumberFormat]]
"""Stage -> layer (or attention) -> the 8-bit format that it gets."""


class FoldKind(enum.Enum):
    """What takes in the division by the smoothing factors ``s``; see ``calibration.smoothing`` for the arithmetic."""

    AFFINE = "affine"  # a norm's weight and bias [C], or a linear's output rows: divided by s
    MODULATION = "modulation"  # a modulation linear with rows of shift and of scale: (1 + scale) and shift divided by s


@dataclass(frozen=True)
class Fold:
    """One operation before a layer that takes in ``1 / s``.

    Attributes:
        kind: How.
        stage: The stage whose weights change; a modulation is computed in a stage of its own.
        layer: The parameters ``<layer>.weight`` and, if there is one, ``<layer>.bias``.
        shift_rows: First and last-plus-one row that feeds the input: of an AFFINE all its rows, of a MODULATION the
            shift. None means every row.
        scale_rows: Of a MODULATION, the rows of the scale.
    """

    kind: FoldKind
    stage: str
    layer: str
    shift_rows: tuple[int, int] | None = None
    scale_rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class SmoothingGroup:
    """Layers whose inputs are produced by the same operations, and which therefore share one vector ``s``.

    Attributes:
        stage: The layers' stage.
        layers: The layers whose columns are multiplied by ``s``. A group applies only if all of them are quantised.
        folds: What is divided by ``s``.
    """

    stage: str
    layers: tuple[str, ...]
    folds: tuple[Fold, ...]


@dataclass(frozen=True)
class StageRules:
    """How one stage is quantised unless a recipe says otherwise.

    Attributes:
        quantised: Patterns (``fnmatch``) of layers that an 8-bit precision covers; all others stay in high precision.
        groups: Where smoothing may be applied.
        attentions: Attentions whose operands may be in 8 bits, by name (``double.3.attention``).
    """

    quantised: tuple[str, ...]
    groups: tuple[SmoothingGroup, ...] = ()
    attentions: tuple[str, ...] = ()

    def covers(self, layer: str) -> bool:
        """Whether an 8-bit precision of the stage covers ``layer``."""
        return matches(layer, self.quantised)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether ``name`` fits one of the patterns, in which ``*`` stands for any characters."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
