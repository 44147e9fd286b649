"""The shapes of a plan's inputs under its optimisation profiles.

The module turns named dimensions into numbers and checks them; it does not know what the dimensions mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reelforge.export.engines.request import Profile
from reelforge.runtime.errors import BuildError
from reelforge.runtime.manifest import TensorInfo


@dataclass(frozen=True)
class ShapeRange:
    """Shapes of one input under one profile."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]

    @property
    def fixed(self) -> bool:
        """Whether there is only one shape."""
        return self.minimum == self.maximum


def input_shapes(inputs: Sequence[TensorInfo], profile: Profile) -> dict[str, ShapeRange]:
    """Return the shapes of every input under ``profile``, by the input's name.

    Raises:
        BuildError: For a dimension without sizes, or sizes that are not positive and ascending.
    """
    for name, sizes in profile.dimensions.items():
        if not 0 < sizes[0] <= sizes[1] <= sizes[2]:
            raise BuildError(
                f"profile {profile.name!r} has unusable sizes for dimension {name!r}.",
                received=", ".join(str(size) for size in sizes),
                expected="minimum <= optimum <= maximum, all positive",
            )
    named = dict.fromkeys(size for info in inputs for size in info.shape if isinstance(size, str))
    missing = [name for name in named if name not in profile.dimensions]
    if missing:
        raise BuildError(
            f"profile {profile.name!r} does not say the sizes of {', '.join(missing)}.",
            received=", ".join(profile.dimensions) or "no dimensions",
            expected=", ".join(named),
        )
    return {info.name: ShapeRange(*(_shape(info, profile, which) for which in range(3))) for info in inputs}


def _shape(info: TensorInfo, profile: Profile, which: int) -> tuple[int, ...]:
    return tuple(profile.dimensions[size][which] if isinstance(size, str) else size for size in info.shape)
