"""Work: what one video makes each stage do, as data that a model family fills in.

A family says how many rows pass through which layers, which attentions there are, how much memory-bound work lies
between them, and which tensors are alive together. Everything else (operations, bytes, seconds) follows from that, from
the stages' own parameters and from the recipe. The module holds no numbers and knows no family.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from reelforge.runtime.recipe import VideoShape


class Phase(enum.Enum):
    """Parts of a generation, in order; what a phase puts out stays in memory until the next one has ended."""

    TEXT = "text"
    CONDITIONING = "conditioning"
    LOOP = "loop"
    DECODE = "decode"


@dataclass(frozen=True)
class Workload:
    """One call of the pipeline.

    Attributes:
        shape: Of the video.
        steps: Sampling steps.
        text_tokens: Of the prompt, after the template's prefix is cropped.
        prompt_tokens: With the template.
        batch: Videos per call of the loop's stage.
        prompts: Prompts per call of the text encoders.
    """

    shape: VideoShape
    steps: int
    text_tokens: int
    prompt_tokens: int
    batch: int = 1
    prompts: int = 1


@dataclass(frozen=True)
class Rows:
    """How many rows (tokens, positions) one call sends through each layer whose name fits ``pattern``.

    Zero is for tables that are looked up and not multiplied with.
    """

    pattern: str
    rows: int


@dataclass(frozen=True)
class Attention:
    """Attentions of equal shape.

    Attributes:
        count: How many one call computes.
        heads: Of the queries.
        head_dim: Width of a head.
        tokens: Queries, and as many keys.
        pairs: Query-key pairs of one head that are visible; ``tokens ** 2`` without a mask.
        quantisable: Whether a recipe's attention precision covers them.
    """

    count: int
    heads: int
    head_dim: int
    tokens: int
    pairs: int
    quantisable: bool = False


@dataclass(frozen=True)
class Live:
    """A tensor that is alive at some moment; it has the stage's precision unless something else is said.

    Attributes:
        elements: Its size.
        read_by: The layer that reads it: if that is in 8 bits, so is the tensor.
        attended: Whether it is an operand of a quantisable attention, and in that attention's precision.
        fp32: Whether it is fp32 in any recipe.
    """

    elements: int
    read_by: str = ""
    attended: bool = False
    fp32: bool = False


@dataclass(frozen=True)
class Moment:
    """Tensors that are alive together.

    Attributes:
        live: The tensors.
        layer: The moment exists only if this layer is in 8 bits, or only if it is not; empty: in any recipe.
        eight_bit: Which of the two.
    """

    live: tuple[Live, ...]
    layer: str = ""
    eight_bit: bool = False


@dataclass(frozen=True)
class Call:
    """One call of a stage.

    Attributes:
        times: How often it is made for one video.
        rows: Patterns in order; the first that fits a layer counts.
        attentions: What is computed between them.
        passes: Elements that norms, activations and residual sums read and write, once per read or write.
        moments: The largest that exists decides.
        dimensions: Size of every named dimension of the stage's inputs and outputs.
    """

    times: int
    rows: tuple[Rows, ...]
    attentions: tuple[Attention, ...]
    passes: int
    moments: tuple[Moment, ...]
    dimensions: Mapping[str, int]


@dataclass(frozen=True)
class StageWork:
    """What one video makes of a stage: its phase and its calls."""

    phase: Phase
    calls: tuple[Call, ...]
