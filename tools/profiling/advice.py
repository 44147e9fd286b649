"""What would make the largest layers faster: rules as data, each with the reason and the measurement behind it.

A rule names the layers that it is for; its texts are filled in with the layer's numbers. What it saves at most follows
from ratios that were measured or are a document's; where there are none, nothing is promised. The module changes
nothing and knows no bundle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from reelforge.runtime.request import NO_GUIDANCE
from reelforge.tools.profiling.layers import TOP
from reelforge.tools.profiling.roofline import point, share_of_roof
from reelforge.tools.profiling.schema import Advice, LayerProfile, LayerTiming, Peak, Summary
from reelforge.tools.profiling.schema_work import Work
from reelforge.tools.profiling.summary import LOOP, is_loop
from reelforge.tools.profiling.work import DENSE_ATTENTION

_MANY_TOKENS = 4096  # 32 blocks of 128 queries: below that there is little to leave out
_POOR, _WORTH_SAYING = 0.25, 0.1


@dataclass(frozen=True)
class Facts:
    """What rules may look at besides the layer."""

    work: Work
    peak: Peak | None
    warm: Summary
    cold: Summary | None

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


_ALL, _GPU = ("cpu", "cuda", "rtx", "trt"), ("rtx", "trt")


def _reaches_little(facts: Facts, layer: LayerTiming) -> bool:
    place = point(layer, facts.peak)
    return place is not None and place.efficiency < _POOR


RULES: tuple[Rule, ...] = (
    Rule(
        ("cpu",), ("dit", "llm"), ("gemm",), ("fp32", "fp16"), "int8",
        "precision: build with --precision {stage}=int8",
        "it computes in {precision}; products in int8 run at {gain} of fp32's rate on this processor",
        # Where 8 bits are not faster, as on processors without instructions for them, this is no advice.
        lambda facts, _: (facts.gain("fp32", "int8") or 2.0) > 1.2,
    ),
    Rule(
        _GPU, ("dit", "llm"), ("gemm",), ("bf16", "fp16"), "fp8",
        "precision: build with --precision {stage}=fp8",
        "it computes in {precision}; FP8 has {gain} of its rate by the GPU's documents",
    ),
    Rule(
        _GPU, ("dit",), ("attention",), ("bf16", "fp16"), "fp8",
        "attention kind: build with --attention fp8",
        "queries, keys and values are in {precision}; FP8 has {gain} of its rate by the GPU's documents",
    ),
    Rule(
        _ALL, ("dit",), ("attention",), (), "",
        "attention kind: leave out keys, where docs/sparse_attention.md says that this backend gains by it",
        "its time grows with the square of the {tokens} image tokens, of which most pairs matter little",
        lambda facts, _: facts.work.image_tokens >= _MANY_TOKENS and facts.work.attention == DENSE_ATTENTION,
    ),
    Rule(
        _ALL, ("dit",), (), (), "",
        "step cache: evaluate the model less often, with generate --step-cache or fewer --steps",
        "it runs {calls} times per video; each evaluation that is left out saves {call_ms} of this layer alone",
        lambda facts, _: facts.work.step_cache is None,
    ),
    Rule(
        _ALL, ("dit",), (), (), "",
        "step cache: a higher threshold than that of {step_cache}, or fewer --steps",
        "it still runs {calls} times per video, {skips} of {steps} steps being skipped; each evaluation that is left "
        "out saves {call_ms} of this layer alone",
        lambda facts, _: facts.work.step_cache is not None,
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
        "bucket: give it more to do at once, by a larger shape or more videos per call",
        "it reaches {efficiency} of what this processor allows at {intensity} operations per byte: it is too small",
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
    if gain is not None and gain > 1:
        share = 1 - 1 / gain
    place = point(layer, facts.peak)
    calls = next((stage.calls for stage in facts.warm.stages if stage.stage == layer.stage), 1)
    words = {
        "stage": _whole_stage(layer.stage),
        "precision": layer.precision or "high precision",
        "gain": "another multiple" if gain is None else f"{gain:.1f} times",
        "tokens": f"{facts.work.image_tokens:,}",
        "calls": calls,
        "call_ms": f"{layer.call_ms:.3g} ms",
        "step_cache": facts.work.step_cache,
        "skips": facts.warm.skips,
        "steps": facts.work.steps,
        "overlap": f"{facts.work.overlap:.0%}",
        "efficiency": "an unknown share" if place is None else share_of_roof(place),
        "intensity": "unknown" if place is None else f"{place.intensity:.3g}",
        "bytes": f"{layer.bytes / 1e6:.3g} MB",
    }
    saves = None if share is None else layer.per_video_ms * share
    return Advice(f"{layer.stage}: {layer.name}", rule.action.format(**words), rule.reason.format(**words), saves)


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
    loop_ms = sum(stage.run.median_ms for stage in facts.warm.stages if is_loop(stage.stage))
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
