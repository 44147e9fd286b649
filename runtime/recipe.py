"""Recipe and Target: what a build was asked for, as data.

A :class:`Recipe` says the precision of each stage and the video shapes to serve; a :class:`Target` names the backend
and its GPU architectures. Neither knows how a backend reaches them.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass

from reelforge.runtime.errors import RequestError


class Precision(enum.Enum):
    """Arithmetic of a stage's matrix products and convolutions; norms, softmax and latents stay in fp32."""

    FP32 = "fp32"
    FP16 = "fp16"


class Backend(enum.Enum):
    """What executes the engines."""

    CPU = "cpu"


@dataclass(frozen=True)
class VideoShape:
    """A video's size: ``height`` and ``width`` in pixels, ``frames`` in pixel frames."""

    height: int
    width: int
    frames: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.frames}"

    @classmethod
    def parse(cls, text: str) -> VideoShape:
        """Read ``HEIGHTxWIDTHxFRAMES``, for example ``720x1280x129``.

        Raises:
            RequestError: If the text has another form or a number is zero.
        """
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.strip())
        if match is None or any(int(number) == 0 for number in match.groups()):
            raise RequestError(
                f"the shape {text!r} cannot be read.",
                received=text,
                expected="HEIGHTxWIDTHxFRAMES in pixels and frames",
                fix="write for example 720x1280x129",
            )
        return cls(*(int(number) for number in match.groups()))


@dataclass(frozen=True)
class Target:
    """Backend and architectures, written ``cpu`` (later ``rtx:sm89+sm120``)."""

    backend: Backend
    architectures: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ":".join([self.backend.value, *(["+".join(self.architectures)] if self.architectures else [])])

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read a target as the command line writes it.

        Raises:
            RequestError: For an unknown backend, or architectures where the backend has none.
        """
        name, _, architectures = text.partition(":")
        if name not in {backend.value for backend in Backend} or architectures:
            raise RequestError(
                f"the target {text!r} is not known.",
                received=text,
                expected=" or ".join(backend.value for backend in Backend),
                fix="use --target cpu",
            )
        return cls(Backend(name))


@dataclass(frozen=True)
class Recipe:
    """Precision per stage and the video shapes that the bundle serves.

    ``shapes`` empty means every size that the model's grid allows; otherwise requests must lie in the range that the
    shapes span, per dimension, or be a single frame of such a size. ``batch`` is the largest number of videos per call
    of ``dit``; above one the graph takes ``text_lengths`` and masks the keys of shorter prompts.
    """

    precision: dict[str, Precision]
    shapes: tuple[VideoShape, ...] = ()
    batch: int = 1

    @classmethod
    def uniform(
        cls, precision: Precision, stages: Sequence[str], shapes: Sequence[VideoShape] = (), batch: int = 1
    ) -> Recipe:
        """Return a recipe with one precision for all ``stages``."""
        return cls(dict.fromkeys(stages, precision), tuple(shapes), batch)
