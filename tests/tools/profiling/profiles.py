"""Profiles made by hand, whose every number is known."""

from __future__ import annotations

from dataclasses import replace

from reelforge.tools.profiling.schema import (
    SCHEMA_VERSION,
    Advice,
    Kind,
    LayerProfile,
    LayerTiming,
    MemorySample,
    Peak,
    Profile,
    RunRecord,
    Span,
)
from reelforge.tools.profiling.schema_work import Comparison, Machine, Ratio, StageWork, Work
from reelforge.tools.profiling.summary import summarise

WORK = Work("my.bundle", "abc", "hunyuan_video", "cpu", {"dit": "fp32"}, "a ball", 64, 96, 9, 3, 72, 2, 0.25)
PEAK = Peak("a processor", {"fp32": 100e9, "int8": 300e9}, 10e9, measured=True, source="a measurement")


def run(
    temperature: str = "warm", bundle: str = "my.bundle", step_ms: float = 10.0, complete: bool = True
) -> RunRecord:
    """Tokenise 1 ms, load dit 5 ms, three steps with 1 ms between, one tile of 20 ms, 2 ms of encoding."""
    spans = [Span("tokenise", Kind.TOKENISE, "", 0.0, 1.0), Span("load dit", Kind.LOAD, "dit", 1.0, 5.0)]
    at = 6.0
    for number in (1, 2, 3):
        spans.append(Span(f"dit {number}", Kind.RUN, "dit", at, step_ms))
        spans.append(Span(f"step {number}", Kind.STEP, "dit", at, step_ms + 1))
        at += step_ms + 1
    spans.append(Span("vae_decoder 1", Kind.RUN, "vae_decoder", at, 20.0))
    spans.append(Span("encode frames", Kind.ENCODE, "", at + 20, 2.0))
    memory = tuple(
        MemorySample(float(at_ms), phase, own * 1_000_000, 50_000_000)
        for at_ms, phase, own in ((0, "text", 10), (10, "sampling", 30), (40, "decoding", 20))
    )
    return RunRecord(temperature, bundle, at + 23, tuple(spans), memory, 0.05, complete)


def layer(
    name: str, words: str, kind: str, call_ms: float, flops: int = 0, moved: int = 1000, **changes: object
) -> LayerTiming:
    made = LayerTiming("dit", name, words, "double.0", kind, "fp32", ("Gemm",), call_ms, 3 * call_ms, 0.1, flops, moved)
    return replace(made, **changes)  # type: ignore[arg-type]


LAYERS = LayerProfile(
    "a profiler",
    (
        layer("double.0.image.fc1", "double block 0, image MLP up-projection", "gemm", 5.0, 400_000_000, 4_000_000),
        layer("double.0.attention", "double block 0, attention", "attention", 2.0, 10_000_000, 2_000_000),
        layer("double.0.layout", "double block 0, reordering and casts", "layout", 1.0, precision=""),
    ),
    0.01,
    {"dit": 11.0},
    {"dit": 10.0},
)


def profile(complete: bool = True, **changes: object) -> Profile:
    """A whole profile: a cold run, a warm-up, two counted runs, and another bundle's."""
    runs = (run("cold", step_ms=20.0), run(), run(), run(step_ms=11.0), run(bundle="other.bundle", step_ms=5.0))
    made = Profile(
        schema_version=SCHEMA_VERSION,
        created="2026-01-02T03:04:05+00:00",
        complete=complete,
        missing=() if complete else ("warm run 2 of 2", "the layers"),
        machine=Machine("a processor", 2, 8_000_000_000, "Linux x86_64", None, {"python": "3.11"}),
        work=WORK,
        warmup=1,
        repeats=2,
        cold=summarise(runs[:1]),
        warm=summarise(runs[2:4]),
        runs=runs,
        layers=LAYERS,
        peak=PEAK,
        stage_work=(StageWork("dit", 500_000_000, 20_000_000, "fp32"),),
        advice=(Advice("dit: double.0.image.fc1", "do <this>", "it is slow & large", 12.0),),
        comparison=Comparison(
            replace(WORK, bundle="other.bundle"), 2, 0.95,
            (Ratio("video", 0.5, 0.4, 0.6, 62.0, 31.0), Ratio("step", 1.0, None, None, 1.0, 1.0)),
        ),
        noise=("quiet",),
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]
