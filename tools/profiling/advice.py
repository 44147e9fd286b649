"""What would make the largest layers faster: rules as data, each with the reason and the measurement behind it.

A rule names the layers that it is for; its texts are filled in with the layer's numbers. What it saves at most follows
from ratios that were measured or are a document's; where there are none, nothing is promised. The module changes
nothing and knows no bundle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from reelforge.runtime.architectures import ARCHITECTURES
from reelforge.runtime.request import NO_GUIDANCE
from reelforge.tools.profiling.layers import TOP
from reelforge.tools.profiling.roofline import point, share_of_roof
from reelforge.tools.profiling.schema import Advice, LayerProfile, LayerTiming, Peak, Summary
from reelforge.tools.profiling.schema_work import Work
from reelforge.tools.profiling.summary import LOOP, is_loop
from reelforge.tools.profiling.work import DENSE_ATTENTION

_MANY_TOKENS = 1024  # INT8 attention was faster with 2060 tokens (docs/runtime_benchmark.md); with few it is not
_POOR, _WORTH_SAYING = 0.25, 0.1


@dataclass(frozen=True)
class Facts:
    """What rules may look at besides the layer; ``cores`` are those that the process may use."""

    work: Work
    peak: Peak | None
    warm: Summary
    cold: Summary | None
    cores: int = 1

    @property
    def backend(self) -> str:
        """``cpu``, ``cuda``, ``rtx`` or ``trt``."""
        return self.work.target.partition(":")[0]

    def gain(self, slow: str, fast: str) -> float | None:
        """Return how much higher the processor's rate is in another precision; None if it is not known."""
        rates = self.peak.flops if self.peak else {}
        return rates[fast] / rates[slow] if rates.get(slow) and rates.get(fast) else None


@dataclass(frozen=True)
class Rule:
    """One way to make layers faster.

    Attributes:
        backends: It works on.
        stages: It is for; empty: all.
        kinds: Of layers; empty: all.
        precisions: Of layers that it would change; empty: all.
        faster: Precision that it changes to; empty if it changes none.
        action: What to do.
        reason: Why.
        applies: A further condition.
        saved_share: Of the layer's time, at most; None: from ``faster``, or unknown.
    """

    backends: tuple[str, ...]
    stages: tuple[str, ...]
    kinds: tuple[str, ...]
    precisions: tuple[str, ...]
    faster: str
    action: str
    reason: str
    applies: Callable[[Facts, LayerTiming], bool] = lambda _facts, _layer: True
    saved_share: Callable[[Facts, LayerTiming], float | None] | None = None


_ALL, _PLANS = ("cpu", "cuda", "rtx", "trt"), ("rtx", "trt")


def _reaches_little(facts: Facts, layer: LayerTiming) -> bool:
    place = point(layer, facts.peak)
    return place is not None and place.efficiency < _POOR


def _has_8_bits(facts: Facts, kind: str) -> bool:
    """Tell whether every architecture that plans were compiled for has tensor cores for fp8, or int8."""
    names = facts.work.target.partition(":")[2].split("+")
    known = [ARCHITECTURES[name] for name in names if name in ARCHITECTURES]
    return bool(known) and all(getattr(architecture, kind) for architecture in known)


RULES: tuple[Rule, ...] = (
    Rule(
        ("cpu",), ("dit", "llm"), ("gemm",), ("fp32", "fp16"), "int8",
        "precision: build with --precision {stage}=int8",
        "it computes in {precision}; products in int8 run at {gain} of fp32's rate on this processor",
        # Where 8 bits are not faster, as on processors without instructions for them, this is no advice.
        lambda facts, _: (facts.gain("fp32", "int8") or 2.0) > 1.2,
    ),
    Rule(
        ("cpu",), ("dit",), ("attention",), ("fp32",), "int8",
        "attention kind: build with --precision dit=int8 --attention int8",
        "its two products over {tokens} image tokens are in fp32; in int8 products run at {gain} of that rate on this "
        "processor, the softmax between them as before",
        # Rounding to 8 bits and back takes longer than it saves where there is little to multiply.
        lambda facts, _: facts.work.image_tokens >= _MANY_TOKENS
        and facts.work.attention == DENSE_ATTENTION
        and (facts.gain("fp32", "int8") or 2.0) > 1.2,
        lambda _facts, _layer: None,
    ),
    Rule(
        _PLANS, ("dit", "llm"), ("gemm",), ("bf16", "fp16"), "fp8",
        "precision: build with --precision {stage}=fp8",
        "it computes in {precision}; FP8 has {gain} of its rate by the GPU's documents",
        lambda facts, _: _has_8_bits(facts, "fp8"),
    ),
    Rule(
        _PLANS, ("dit", "llm"), ("gemm",), ("bf16", "fp16"), "int8",
        "precision: build with --precision {stage}=int8",
        "it computes in {precision}; INT8 has {gain} of its rate by the GPU's documents, and there is no FP8 on "
        "{target}",
        lambda facts, _: _has_8_bits(facts, "int8") and not _has_8_bits(facts, "fp8"),
    ),
    Rule(
        _PLANS, ("dit",), ("attention",), ("bf16", "fp16"), "fp8",
        "attention kind: build with --attention fp8",
        "queries, keys and values are in {precision}; FP8 has {gain} of its rate by the GPU's documents",
        lambda facts, _: _has_8_bits(facts, "fp8"),
    ),
    Rule(
        _ALL, ("vae_decoder",), (), (), "",
        "bucket: choose a size that the decoder's tiles cover with less overlap",
        "{overlap} of what the decoder computes is computed twice, where tiles overlap",
        lambda facts, _: facts.work.overlap > _WORTH_SAYING,
        lambda facts, _: facts.work.overlap,
    ),
    Rule(
        _ALL, (), ("gemm", "attention", "convolution"), (), "",
        "bucket: a larger shape uses the processor better",
        "it reaches {efficiency} of what this processor allows at {intensity} operations per byte: it is too small, or "
        "its kernel is slow for this shape",
        _reaches_little,
    ),
    Rule(
        ("cpu",), (), ("elementwise", "layout", "norm", "quantise"), (), "",
        "nothing on this backend; on a GPU, compile it: --target rtx:... or trt:...",
        "it moves {bytes} per call and multiplies nothing; TensorRT fuses such layers, ONNX Runtime does not",
    ),
    Rule(
        _ALL, ("vae_decoder",), ("convolution",), (), "",
        "bucket: fewer pixels or frames",
        "it reaches {efficiency} of what this processor allows; its time is proportional to the video's size",
        lambda facts, layer: not _reaches_little(facts, layer),
    ),
)  # fmt: skip


def advise(layers: LayerProfile | None, facts: Facts) -> tuple[Advice, ...]:
    """Return what would speed up the largest layers, and the run as a whole, in the order of the layers."""
    found = list(_of_the_run(facts))
    for layer in (layers.layers if layers else ())[:TOP]:
        found += [_advice(rule, facts, layer) for rule in RULES if _fits(rule, facts, layer)]
    return tuple(found)


def _fits(rule: Rule, facts: Facts, layer: LayerTiming) -> bool:
    return (
        facts.backend in rule.backends
        and (not rule.stages or _whole_stage(layer.stage) in rule.stages)
        and (not rule.kinds or layer.kind in rule.kinds)
        and (not rule.precisions or layer.precision in rule.precisions)
        and rule.applies(facts, layer)
    )


def _whole_stage(stage: str) -> str:
    """Return the stage that a part of it belongs to: what is built and asked for is the whole."""
    return LOOP if is_loop(stage) else stage


def _advice(rule: Rule, facts: Facts, layer: LayerTiming) -> Advice:
    gain = facts.gain(layer.precision, rule.faster) if rule.faster else None
    share = rule.saved_share(facts, layer) if rule.saved_share else None
    if gain is not None and gain > 1 and rule.saved_share is None:
        share = 1 - 1 / gain
    place = point(layer, facts.peak)
    words = {
        "stage": _whole_stage(layer.stage),
        "precision": layer.precision or "high precision",
        "gain": "another multiple" if gain is None else f"{gain:.1f} times",
        "tokens": f"{facts.work.image_tokens:,}",
        "target": facts.work.target,
        "overlap": f"{facts.work.overlap:.0%}",
        "efficiency": "an unknown share" if place is None else share_of_roof(place),
        "intensity": "unknown" if place is None else f"{place.intensity:.3g}",
        "bytes": f"{layer.bytes / 1e6:.3g} MB",
    }
    saves = None if share is None else layer.per_video_ms * share
    return Advice(f"{layer.stage}: {layer.name}", rule.action.format(**words), rule.reason.format(**words), saves)


def _step_cache(facts: Facts) -> Advice:
    """Return how the model is evaluated less often: it concerns all of the loop's layers alike."""
    work, steps = facts.work, facts.warm.steps
    assert steps is not None
    saves = (
        f"each further step that is skipped saves up to {steps.median_ms:.3g} ms of {facts.warm.total.median_ms:.3g}"
    )
    if work.step_cache is not None:
        return Advice(
            "step cache",
            f"a higher threshold than that of {work.step_cache}, or fewer --steps",
            f"{facts.warm.skips} of {work.steps} steps are skipped; {saves}",
            None,
        )
    if "step_change" not in work.precision:
        action = "fewer --steps; a bundle that build-engine makes anew can also skip some"
    else:
        parts = "" if f"{LOOP}_head" in work.precision else " after build-engine --partition head,body,tail"
        action = f"generate with --step-cache easycache:0.025, or fbcache:0.08{parts}, or fewer --steps"
    return Advice("step cache", action, f"all {work.steps} steps are computed; {saves}", None)


def _of_the_run(facts: Facts) -> list[Advice]:
    """Return what concerns no single layer."""
    found = []
    total, load = facts.warm.total.median_ms, facts.warm.parts.get("load engines")
    if load is not None and load.median_ms > _WORTH_SAYING * total:
        found.append(
            Advice(
                "loading",
                "keep the engines of all stages in memory between videos: a larger --memory-budget",
                f"warm runs spend {load.median_ms / total:.0%} of their time on loading engines again",
                load.median_ms,
            )
        )
    threads = facts.work.threads
    if threads is not None and threads < facts.cores:
        found.append(
            Advice(
                "threads",
                f"use more of the processor: --threads {facts.cores}, or leave it out",
                f"engines compute on {threads} of {facts.cores} cores that this process may use",
                None,
            )
        )
    loop_ms = sum(stage.run.median_ms for stage in facts.warm.stages if is_loop(stage.stage))
    if facts.warm.steps is not None:
        found.append(_step_cache(facts))
    if facts.backend == "cuda" and facts.work.precision.get(LOOP) == "fp32":
        gain = facts.gain("fp32", "fp16")
        words = "another multiple" if gain is None else f"{gain:.1f} times"
        found.append(
            Advice(
                "precision",
                "build with --precision fp16",
                f"the transformer computes in fp32; products in fp16 run at {words} of its rate on this GPU",
                loop_ms * (1 - 1 / gain) if gain is not None and gain > 1 else None,
            )
        )
    if facts.work.cfg_scale != NO_GUIDANCE and loop_ms:
        found.append(
            Advice(
                "guidance",
                "do without --cfg-scale, where the checkpoint is guidance-distilled",
                "classifier-free guidance evaluates the model twice per step",
                loop_ms / 2,
            )
        )
    opening = facts.cold.parts.get("open") if facts.cold else None
    first = facts.cold.total.median_ms if facts.cold else 0.0
    if opening is not None and opening.median_ms > _WORTH_SAYING * first:
        found.append(
            Advice(
                "opening",
                "open a bundle that was checked before with --check sizes",
                f"a cold run spends {opening.median_ms / first:.0%} of its time on digests",
                opening.median_ms,
            )
        )
    return found
