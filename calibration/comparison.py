"""Holds candidates against a reference run: same prompts, same noise, stage by stage.

A candidate's stage that is the reference's, and gets the same inputs, is not run again. There is never more than one
``dit`` in memory. The module does not know what makes a candidate different, nor which numbers are good enough.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from reelforge.calibration.quality import cosine, psnr, relative_error, ssim
from reelforge.calibration.reference_run import (
    CONDITION_STAGES,
    TEXT_STAGES,
    HeldPipeline,
    ReferenceRun,
    ignore_progress,
    not_finite,
    require_finite,
    run_step,
    stage_identity,
)
from reelforge.runtime.decode import DecodingError
from reelforge.runtime.errors import NotFiniteError, RequestError
from reelforge.runtime.events import FloatArray, Progress
from reelforge.runtime.pipeline import OnProgress, Pipeline
from reelforge.runtime.stage_inputs import Conditions
from reelforge.runtime.stages import STAGES


@dataclass(frozen=True)
class Checks:
    """What of a candidate is measured.

    Attributes:
        steps: The steps of the reference's trajectory on which ``dit`` is run; None means all.
        loop: Whether the candidate also samples on its own, from the same noise.
        video: Whether its videos are decoded and compared; needs ``loop``.
    """

    steps: tuple[int, ...] | None = None
    loop: bool = True
    video: bool = True

    def __post_init__(self) -> None:
        if self.video and not self.loop:
            raise ValueError("there is no video without the loop that makes it")


@dataclass(frozen=True)
class Loss:
    """How far one output is from the reference's."""

    cosine: float
    relative_error: float


@dataclass(frozen=True)
class Comparison:
    """A candidate's losses; lists have one item per prompt, in it one per step where there are steps.

    Attributes:
        stages: Stage -> losses on the reference's inputs, all prompts and steps in one list.
        velocity: On the reference's trajectory, with the candidate's own text and conditions.
        drift: Relative error of the latents after each step; empty without the loop.
        psnr_db: Of the final videos, infinite if equal; empty without them.
        ssim: Of the final videos; empty without them.
    """

    stages: dict[str, list[Loss]]
    velocity: list[list[Loss]]
    drift: list[list[float]]
    psnr_db: list[float]
    ssim: list[float]


def compare(
    run: ReferenceRun, candidate: Pipeline, checks: Checks | None = None, on_progress: OnProgress | None = None
) -> Comparison:
    """Hold a candidate against a reference run.

    Args:
        run: The reference.
        candidate: A pipeline of the same model.
        checks: What is measured; None means everything.
        on_progress: Told about finished steps and videos.

    Raises:
        RequestError: If the candidate is of another model.
        VerificationError: If the candidate gives numbers that are not finite.
        EngineError: If an engine fails.
    """
    checks = checks or Checks()
    report = on_progress or ignore_progress
    if candidate.spec != run.pipeline.spec:
        raise RequestError(
            f"bundles {candidate.bundle.name!r} and {run.pipeline.bundle.name!r} are of different models.",
            expected="two bundles of one checkpoint",
            fix="build the reference from the same checkpoint, with the same numerics",
        )
    changed = changed_stages(run.pipeline, candidate)
    held = HeldPipeline(candidate, run.memory)
    result = Comparison({}, [], [], [], [])
    isolated, own = _condition(run, held, changed, result)
    final = [video.latents[-1] for video in run.videos]
    if changed - {"vae_decoder"}:
        final = _sample(run, held, changed, checks, isolated, own, result, report)
    if checks.video or "vae_decoder" in changed:
        _decode(run, held, changed, checks, final, result, report)
    return result


def changed_stages(reference: Pipeline, candidate: Pipeline) -> frozenset[str]:
    """Return the stages whose graph or weights differ."""
    return frozenset(
        name
        for name in STAGES
        if stage_identity(reference.bundle.stage(name)) != stage_identity(candidate.bundle.stage(name))
    )


def _condition(
    run: ReferenceRun, held: HeldPipeline, changed: frozenset[str], result: Comparison
) -> tuple[list[Conditions], list[Conditions]]:
    """Run the stages before ``dit``; return its conditions from the reference's text states, and from the candidate's.

    The modulation vectors are the candidate's in both: smoothing may have moved factors between them and ``dit``.
    """
    texts = [video.text for video in run.videos]
    if changed & TEXT_STAGES:
        with held.phase():
            texts = [held.encode_text(video.request.prompt) for video in run.videos]
        for stage, field in (("llm", "states"), ("clip", "pooled")):
            if stage in changed:
                pairs = [(getattr(a, field), getattr(b.text, field)) for a, b in zip(texts, run.videos, strict=True)]
                result.stages[stage] = [_loss(*pair, stage) for pair in pairs]
    reference = [video.conditions for video in run.videos]
    if not changed & (TEXT_STAGES | CONDITION_STAGES):
        return reference, reference
    with held.phase():
        isolated = [held.condition(video.request, video.text) for video in run.videos]
        own = [held.condition(video.request, text) for video, text in zip(run.videos, texts, strict=True)]
    if "refiner" in changed:
        result.stages["refiner"] = [
            _loss(a.per_step["text"], b.per_step["text"], "refiner") for a, b in zip(isolated, reference, strict=True)
        ]
    with_text = [
        replace(a, per_step={**a.per_step, "text": b.per_step["text"]})
        for a, b in zip(isolated, reference, strict=True)
    ]
    return with_text, own


def _sample(
    run: ReferenceRun,
    held: HeldPipeline,
    changed: frozenset[str],
    checks: Checks,
    isolated: list[Conditions],
    own: list[Conditions],
    result: Comparison,
    report: OnProgress,
) -> list[FloatArray]:
    """Run ``dit`` on the reference's trajectory and on its own; return the final latents."""
    separate = bool(changed & (TEXT_STAGES | {"refiner"}))
    losses: list[Loss] = []
    final = []
    steps = checks.steps if checks.steps is not None else tuple(range(run.videos[0].request.steps))
    total = len(run.videos) * (len(steps) + (run.videos[0].request.steps if checks.loop else 0))
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        report(Progress("comparing steps", done, total))

    with held.phase(), held.engine("dit") as dit:
        for video, alone, whole in zip(run.videos, isolated, own, strict=True):
            velocity_losses = []
            for step in steps:
                source, expected = video.latents[step], video.velocities[step]
                (velocity,) = run_step(dit, source, whole, step, ("velocity",))
                velocity_losses.append(_loss(velocity, expected, "dit"))
                if changed & {"dit", "modulation"}:
                    if separate:
                        (velocity,) = run_step(dit, source, alone, step, ("velocity",))
                        losses.append(_loss(velocity, expected, "dit"))
                    else:
                        losses.append(velocity_losses[-1])
                count()
            result.velocity.append(velocity_losses)
            if checks.loop:
                latents, drift = video.latents[0], []
                for step, expected in enumerate(video.latents[1:]):
                    (latents,) = run_step(dit, latents, whole, step, ("next_latents",))
                    drift.append(relative_error(latents, expected))
                    count()
                result.drift.append(drift)
                final.append(latents)
    if losses:
        result.stages["dit"] = losses
    return final


def _decode(
    run: ReferenceRun,
    held: HeldPipeline,
    changed: frozenset[str],
    checks: Checks,
    final: list[FloatArray],
    result: Comparison,
    report: OnProgress,
) -> None:
    """Decode prompt by prompt with both decoders loaded: two small engines take less memory than all videos."""
    reference = HeldPipeline(run.pipeline, run.memory)
    decoder_changed = "vae_decoder" in changed
    with reference.phase(), held.phase():
        own = held if decoder_changed else reference
        for number, video in enumerate(run.videos):
            expected = _frames(reference, video.latents[-1])
            received = expected
            if decoder_changed:
                received = _frames(own, video.latents[-1])
                result.stages.setdefault("vae_decoder", []).append(
                    _loss(received * 2 - 1, expected * 2 - 1, "vae_decoder")
                )
            if checks.video:
                if final[number] is not video.latents[-1]:
                    received = _frames(own, final[number])
                result.psnr_db.append(psnr(received, expected))
                result.ssim.append(ssim(received, expected))
            report(Progress("comparing videos", number + 1, len(run.videos)))


def _frames(pipeline: Pipeline, latents: FloatArray) -> FloatArray:
    try:
        return np.concatenate(list(pipeline.decode(latents)))
    except DecodingError as error:
        if not isinstance(error.__cause__, NotFiniteError):
            raise
        raise not_finite("the video of stage 'vae_decoder'", error.received) from error


def _loss(received: FloatArray, expected: FloatArray, what: str) -> Loss:
    require_finite(received, f"the output of stage {what!r}")
    return Loss(cosine(received, expected), relative_error(received, expected))
