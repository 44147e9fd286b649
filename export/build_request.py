"""What a build is asked for and whom it tells what it does, as data; nothing here does any work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from reelforge.calibration.scale_methods import DEFAULT_PERCENTILE, ScaleMethod
from reelforge.export.cache import DEFAULT_LIMIT_BYTES
from reelforge.export.models.hunyuan_video.spec_from_checkpoint import Numerics
from reelforge.runtime.manifest import StageEntry
from reelforge.runtime.recipe import Precision, SparseAttention, Target, VideoShape


@dataclass(frozen=True)
class CalibrationRequest:
    """Where the scales of a quantised build come from, and how its result is judged.

    Attributes:
        scales: A scale file to use; None observes the model's own pipeline.
        prompts: A file of prompts, one per line; None takes the built-in ones.
        method: How an activation's scale is chosen.
        percentile: For that method.
        smoothing: Migration strength between 0 and 1; None does not smooth.
        seed: Of the first prompt's noise.
        steps: Sampling steps; None means the model's default.
        shape: Of the videos; None means the model's default.
        memory_bytes: What the weights of one observed piece of a stage may occupy.
        min_psnr_db: Median PSNR that the finished bundle's videos must reach; None means the precisions' default.
        min_cosine: What the cosine of every step's velocity must reach.
        gated: Whether the finished bundle is measured against its reference at all.
    """

    scales: Path | None = None
    prompts: Path | None = None
    method: ScaleMethod = ScaleMethod.MAX
    percentile: float = DEFAULT_PERCENTILE
    smoothing: float | None = None
    seed: int = 0
    steps: int | None = None
    shape: VideoShape | None = None
    memory_bytes: int = 8 << 30
    min_psnr_db: float | None = None
    min_cosine: float = 0.0
    gated: bool = True


@dataclass(frozen=True)
class CompilationRequest:
    """How plans are compiled.

    Attributes:
        cache: Folder of plans of earlier builds; None keeps and takes none.
        cache_bytes: How large it may become.
        memory_bytes: What a compiler may occupy; a stage that needs more is cut into parts. None means half of the
            machine's memory.
    """

    cache: Path | None = None
    cache_bytes: int = DEFAULT_LIMIT_BYTES
    memory_bytes: int | None = None


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        checkpoint: Folder in diffusers' or Tencent's layout.
        output: The bundle's folder; it must not exist.
        target: Backend and architectures.
        precision: By stage, and for the model under ``"*"`` (see ``runtime.recipe.resolve_precisions``); what is left
            out has the target's default (``export.target_rules``).
        high_precision: Of what is not in 8 bits in a quantised stage; None means the target's default.
        kept: Layers that stay in high precision although their stage is quantised: stage -> patterns.
        attention: Arithmetic of attention; None means the high precision.
        sparse_attention: How the attention of ``dit`` can leave out keys; None if it never does.
        shapes: Video shapes to serve; empty for any.
        stages: Names of the stages to build; empty for all.
        parted: Whether ``dit`` is also cut into head, body and tail, for step caches that look into it.
        batch: Largest number of videos per call of ``dit``.
        step_cache: What the bundle's requests get that say nothing about it, as ``--step-cache`` writes it; None and
            ``off`` compute every step.
        numerics: Which reference implementation's numbers to follow.
        prompt_template: File that replaces the checkpoint's template.
        verify: Whether to run each stage against its reference and store the difference.
        calibration: For quantised stages.
        compilation: For targets with plans.
    """

    checkpoint: Path
    output: Path
    target: Target
    precision: Mapping[str, Precision] = field(default_factory=dict)
    high_precision: Precision | None = None
    kept: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    attention: Precision | None = None
    sparse_attention: SparseAttention | None = None
    shapes: tuple[VideoShape, ...] = ()
    stages: tuple[str, ...] = ()
    parted: bool = False
    batch: int = 1
    step_cache: str | None = None
    numerics: Numerics = Numerics.TENCENT
    prompt_template: Path | None = None
    verify: bool = False
    calibration: CalibrationRequest = field(default_factory=CalibrationRequest)
    compilation: CompilationRequest = field(default_factory=CompilationRequest)


@dataclass
class BuildEvents:
    """Where a build tells what it does; every callable may be replaced, and none does anything by default.

    Attributes:
        weights: (stage, bytes of it done, bytes of it in all).
        work: (what is being done, units done, units in all): calibration and the gate.
        stage: A stage's entry, when its graph is written.
        plan: Name of a stage or part, and the process id of its compiler, when that begins.
        notice: Something that a person should know.
    """

    weights: Callable[[str, int, int], None] = lambda _stage, _done, _total: None
    work: Callable[[str, int, int], None] = lambda _what, _done, _total: None
    stage: Callable[[StageEntry], None] = lambda _entry: None
    plan: Callable[[str, int], None] = lambda _name, _pid: None
    notice: Callable[[str], None] = lambda _text: None
