"""What was measured, where, and beside what: the parts of ``profile.json`` that hold no spans (see ``schema``).

The module knows no measurement.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """Where it was measured."""

    processor: str
    cores: int
    memory_bytes: int
    system: str
    gpu: str | None
    versions: dict[str, str]


@dataclass(frozen=True)
class Work:
    """What was measured; equal works can be compared.

    Attributes:
        bundle: Name of the bundle.
        content_digest: What it computes.
        family: Of the model.
        target: Backend and architectures.
        precision: Stage -> precision.
        prompt: What was asked for.
        height: Pixels.
        width: Pixels.
        frames: Of the video.
        steps: Sampling steps.
        image_tokens: Per call of the loop's stage.
        tiles: That the decoder decodes.
        overlap: Share of what the decoder computes that is computed twice, because tiles overlap.
        guidance: Embedded guidance scale; of models that take none it has no effect.
        shift: Of the noise schedule.
        cfg_scale: Of classifier-free guidance; 1 is off, anything else evaluates the model twice per step.
        negative_prompt: What to keep away from; None without classifier-free guidance.
        step_cache: As the command line writes it, ``easycache:0.025``; None computes every step.
        attention: Which keys it leaves out, in words: ``dense``, ``radial``, ``radial, the first 5 steps dense``.
        threads: Of one operator on the CPU; None on a GPU.
        provider: What ONNX Runtime computes with on a GPU, ``cuda``; None elsewhere.
    """

    bundle: str
    content_digest: str
    family: str
    target: str
    precision: dict[str, str]
    prompt: str
    height: int
    width: int
    frames: int
    steps: int
    image_tokens: int
    tiles: int
    overlap: float
    guidance: float = 0.0
    shift: float = 0.0
    cfg_scale: float = 1.0
    negative_prompt: str | None = None
    step_cache: str | None = None
    attention: str = "dense"
    threads: int | None = None
    provider: str | None = None


@dataclass(frozen=True)
class StageWork:
    """What one call of a stage is, as the planner counts it (see ``docs/planner.md``).

    Attributes:
        stage: Its name.
        flops: Operations, a multiply-add as two; the mean over calls of different sizes.
        bytes: Read and written at least: weights, what layers take and give, norms and sums between them.
        precision: Of the stage, whose roof counts.
    """

    stage: str
    flops: int
    bytes: int
    precision: str


@dataclass(frozen=True)
class Ratio:
    """Time of the other bundle over time of this one.

    Attributes:
        what: ``video``, ``engines``, ``step`` (a computed one), ``skipped step`` or a stage.
        ratio: Geometric mean over rounds; above 1: the other is slower.
        low: Lower end of the interval; None with a single round.
        high: Upper end.
        bundle_ms: Median of this one.
        other_ms: Median of the other.
    """

    what: str
    ratio: float
    low: float | None
    high: float | None
    bundle_ms: float
    other_ms: float


@dataclass(frozen=True)
class Comparison:
    """Two bundles, run alternately.

    Attributes:
        other: The other bundle's work.
        rounds: In each of which both ran once.
        confidence: Of the intervals, for example 0.95.
        ratios: The whole video first.
        skipped_steps: Per video, by the step cache of this bundle.
        other_skipped_steps: Of the other. Where they differ, whole videos are not the same work.
    """

    other: Work
    rounds: int
    confidence: float
    ratios: tuple[Ratio, ...]
    skipped_steps: int = 0
    other_skipped_steps: int = 0
