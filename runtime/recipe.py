"""Recipe and Target: what a build was asked for, as data.

A :class:`Recipe` says the precision of each stage and the video shapes to serve; a :class:`Target` names the backend
and its GPU architectures. Neither knows how a backend reaches them.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from reelforge.runtime.architectures import ARCHITECTURES
from reelforge.runtime.errors import RequestError


class Precision(enum.Enum):
    """Arithmetic of a stage's matrix products and convolutions; norms, softmax and latents stay in fp32."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"  # symmetric, a scale per output channel of the weight and one per activation tensor
    FP8 = "fp8"  # E4M3, likewise

    @property
    def quantised(self) -> bool:
        """Whether weights and activations are stored in 8 bits with calibrated scales."""
        return self in (Precision.INT8, Precision.FP8)


class Backend(enum.Enum):
    """What executes the engines."""

    CPU = "cpu"  # ONNX Runtime
    CUDA = "cuda"  # ONNX Runtime on an NVIDIA GPU
    RTX = "rtx"  # TensorRT-RTX
    TRT = "trt"  # TensorRT

    @property
    def has_plans(self) -> bool:
        """Whether stages become plans: compiled for named GPU architectures when the bundle is built."""
        return self in (Backend.RTX, Backend.TRT)


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
    """Backend and GPU architectures, written ``cpu``, ``cuda``, ``rtx:sm89+sm120`` or ``trt:sm90``.

    Attributes:
        backend: What executes the engines.
        architectures: Keys of ``runtime.architectures.ARCHITECTURES`` in ascending order; empty where the backend
            compiles when it loads.
    """

    backend: Backend
    architectures: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ":".join([self.backend.value, *(["+".join(self.architectures)] if self.architectures else [])])

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read a target as the command line writes it.

        Raises:
            RequestError: For an unknown backend, architectures that it does not compile for, none where it needs them,
                or some where it has none.
        """
        name, _, rest = text.partition(":")
        backend = next((member for member in Backend if member.value == name), None)
        if backend is None:
            raise _unknown_target(text, " or ".join(member.value for member in Backend), "cpu")
        words = [word.strip() for word in rest.split("+")] if rest else []
        if not backend.has_plans:
            if words:
                raise _unknown_target(text, f"{name}, without architectures", name)
            return cls(backend)
        known = [key for key, one in ARCHITECTURES.items() if name in one.backends]
        if not words or len(set(words)) != len(words) or not set(words) <= set(known):
            raise _unknown_target(
                text, f"{name}: and some of {', '.join(known)}, joined by +, each once", f"{name}:{known[-1]}"
            )
        return cls(backend, tuple(key for key in known if key in words))


def _unknown_target(text: str, expected: str, example: str) -> RequestError:
    return RequestError(
        f"the target {text!r} is not known.", received=text, expected=expected, fix=f"use --target {example}"
    )


class SparseKind(enum.Enum):
    """Who decides which key blocks a query block of ``dit`` visits."""

    LISTS = "lists"  # the runtime: patterns of positions, as inputs of the stage
    TOP_K = "topk"  # the stage itself, by the products of mean queries and mean keys


@dataclass(frozen=True)
class SparseAttention:
    """How the attention of ``dit`` leaves out keys; how many is said by every request.

    Attributes:
        kind: Who decides.
        query_block: Queries that share a decision; a multiple of ``key_block``.
        key_block: Keys that are visited or left out together.
    """

    kind: SparseKind
    query_block: int = 128
    key_block: int = 64


@dataclass(frozen=True)
class Recipe:
    """Precision per stage and the video shapes that the bundle serves.

    Attributes:
        precision: Of each stage. In a quantised stage it is the precision of the layers that the family lets go.
        shapes: Empty means every size that the model's grid allows; otherwise requests must lie in the range that the
            shapes span, per dimension, or be a single frame of such a size.
        batch: The largest number of videos per call of ``dit``; above one the graph takes ``text_lengths`` and masks
            the keys of shorter prompts.
        high_precision: Of everything in a quantised stage that is not in 8 bits.
        kept: Layers of a quantised stage that stay in high precision beyond what the family keeps: stage -> patterns in
            which ``*`` stands for any characters.
        attention: Arithmetic of the ``dit`` stage's attention; None means the high precision.
        sparse_attention: How the ``dit`` stage's attention leaves out keys; None means that it never does.
    """

    precision: dict[str, Precision]
    shapes: tuple[VideoShape, ...] = ()
    batch: int = 1
    high_precision: Precision = Precision.FP32
    kept: dict[str, tuple[str, ...]] = field(default_factory=dict)
    attention: Precision | None = None
    sparse_attention: SparseAttention | None = None

    @classmethod
    def uniform(
        cls, precision: Precision, stages: Sequence[str], shapes: Sequence[VideoShape] = (), batch: int = 1
    ) -> Recipe:
        """Return a recipe with one precision for all ``stages``, none of it in 8 bits."""
        return cls(dict.fromkeys(stages, precision), tuple(shapes), batch)

    def quantised_stages(self) -> tuple[str, ...]:
        """Return the stages with layers in 8 bits."""
        return tuple(stage for stage, precision in self.precision.items() if precision.quantised)

    @property
    def calibrated(self) -> bool:
        """Whether anything needs scales: layers or attention."""
        return bool(self.quantised_stages()) or self.attention is not None

    def base(self, stage: str) -> Precision:
        """Return the precision that ``stage`` has where it is not in 8 bits."""
        precision = self.precision[stage]
        return self.high_precision if precision.quantised else precision


@dataclass(frozen=True)
class QuantisationRecipe:
    """The part of a recipe that a sensitivity analysis decides, and writes to a file.

    Attributes:
        precision: By stage, or ``"*"``.
        kept: stage -> layers that stay in high precision.
    """

    precision: dict[str, Precision]
    kept: dict[str, tuple[str, ...]]


EVERY_STAGE = "*"


def parse_precisions(text: str) -> dict[str, Precision]:
    """Read what ``--precision`` says: one word for the model, or ``stage=word`` separated by commas, or both.

    Args:
        text: For example ``fp16``, ``int8`` or ``fp16,dit=fp8,llm=int8``.

    Returns:
        Precision by stage; the word for the model has the key ``"*"``.

    Raises:
        RequestError: For an unknown precision, or a stage that is named twice.
    """
    result: dict[str, Precision] = {}
    for item in text.split(","):
        stage, separator, word = (part.strip() for part in item.rpartition("="))
        precision = next((member for member in Precision if member.value == word), None)
        name = stage if separator else EVERY_STAGE
        if precision is None or name in result or not name:
            raise RequestError(
                f"the precision {item.strip()!r} cannot be read.",
                received=text,
                expected=f"{', '.join(member.value for member in Precision)}; or stage=precision, each stage once",
                fix="write for example int8, or dit=fp8,llm=int8",
            )
        result[name] = precision
    return result


def resolve_precisions(
    chosen: Mapping[str, Precision],
    stages: Sequence[str],
    quantised_by_default: Sequence[str],
    base: Precision = Precision.FP32,
) -> dict[str, Precision]:
    """Return the precision of every stage.

    An 8-bit precision for the model (``"*"``) means the stages of ``quantised_by_default``; the others, and what
    nothing is said about, have the precision ``base``.

    Args:
        chosen: From :func:`parse_precisions`.
        stages: The model's stages; the result has their order.
        quantised_by_default: Those that an 8-bit precision for the model covers.
        base: Of everything else.

    Raises:
        RequestError: For a stage that the model does not have.
    """
    unknown = [name for name in chosen if name not in stages and name != EVERY_STAGE]
    if unknown:
        raise RequestError(
            "the precision names stages that the model does not have.",
            received=", ".join(unknown),
            expected=", ".join(stages),
            fix="write for example dit=int8,llm=fp16",
        )
    general = chosen.get(EVERY_STAGE, base)
    result = {}
    for stage in stages:
        fallback = base if general.quantised and stage not in quantised_by_default else general
        result[stage] = chosen.get(stage, fallback)
    return result
