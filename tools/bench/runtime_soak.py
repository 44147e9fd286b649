"""Many requests of mixed sizes on one pipeline: do memory, file descriptors or threads grow?

One of eight requests is cancelled, one of sixteen fails (its latents are not finite), some show previews, some only
decode; sizes, steps and prompts are drawn anew each time. After every request the process is looked at (``/proc``,
Linux), and what is seen goes into arrays that are there from the start, since notes would be growth, too.

Before that, and uncounted, comes a warm-up: each size once, each prompt with each number of steps, each way to end.
ONNX Runtime keeps a memory plan for every set of input shapes that a session has seen. They are small, but new ones
come as long as new sizes do; without them a step is a fifth slower or more (docs/runtime_benchmark.md).

Growth is the slope of a straight line through the medians of :data:`BLOCKS` blocks of consecutive requests, by least
squares; of blocks, because what the process holds after a request is much like what it held after the one before. A
quantity grows if the slope's 99 % interval (Student's t) lies above zero; there is no tolerance. The interval's width
says what growth would have been missed.

    python -m reelforge.tools.bench.runtime_soak demo.bundle --requests 200
"""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from reelforge.runtime import Check, Frames, Notice, Pipeline, Progress, Request, Stop
from reelforge.runtime.decode import DecodingError
from reelforge.runtime.errors import CancelledError
from reelforge.runtime.sampling import SamplingError
from reelforge.tools.bench.memory import status_fields

BLOCKS = 10
MEMO_BYTES = 500_000  # a third of what is asked of the demonstration model, so that it forgets all the time
_T_99 = 3.355  # of Student's distribution with BLOCKS - 2 degrees of freedom, two-sided
_STEPS = range(1, 5)
_SIDES = (32, 48, 64, 96, 128)
_FRAMES = (1, 5, 9, 13)
_KEPT = ("seconds", "loaded", "anonymous_bytes", "file_bytes", "descriptors", "threads")
_OUTCOMES = ("cancelled", "decoded", "failed", "finished")
_PROMPTS = tuple(f"a {colour} {thing}" for colour in ("red", "blue", "green") for thing in ("circle", "square"))


@dataclass(frozen=True)
class Sample:
    """The process after a request; ``loaded`` stages are in it."""

    seconds: float
    loaded: int
    what: str
    anonymous_bytes: int
    file_bytes: int
    descriptors: int
    threads: int


@dataclass(frozen=True)
class Trend:
    """A straight line through one quantity.

    Attributes:
        mean: Of the samples that count.
        slope: Per request.
        low: Lower end of the slope's 99 % interval.
        high: Upper end.
    """

    mean: float
    slope: float
    low: float
    high: float

    @property
    def grows(self) -> bool:
        """Whether the interval lies above zero."""
        return self.low > 0


@dataclass(frozen=True)
class Soak:
    """What :func:`soak` returns.

    Attributes:
        samples: After each request that counts.
        trends: Of each quantity.
        outcomes: How often requests ended how.
        warm_up: Requests before the first that counts.
        loads: How often stages were loaded, warm-up included.
        memo_hits: How often a stage's answer was known, warm-up included.
    """

    samples: tuple[Sample, ...]
    trends: dict[str, Trend]
    outcomes: dict[str, int]
    warm_up: int
    loads: int
    memo_hits: int

    @property
    def passed(self) -> bool:
        """Whether nothing grows."""
        return not any(trend.grows for trend in self.trends.values())


def soak(bundle: Path, requests: int = 200, memory_budget: str | None = None, seed: int = 0) -> Soak:
    """Make requests, and look at the process after each.

    Args:
        bundle: Served as it is; the demonstration model takes a few minutes.
        requests: At least 40, or intervals mean nothing.
        memory_budget: Of the pipeline; ``"least"`` loads every stage for every request.
        seed: Of sizes, prompts and what is cancelled.
    """
    draw = random.Random(seed)
    notes = np.full((requests, len(_KEPT)), -1.0)
    ends = np.full(requests, -1)
    with Pipeline.open(bundle, check=Check.SIZES, memory_budget=memory_budget, memo_bytes=MEMO_BYTES) as pipeline:
        warm_up = _warm_up(pipeline)
        started = time.monotonic()
        gc.freeze()  # so that looking takes no longer where a program has loaded much
        try:
            for number in range(requests):
                ends[number] = _OUTCOMES.index(_one(pipeline, draw))
                notes[number] = _look(time.monotonic() - started, len(pipeline.statistics().resident_bytes))
        finally:
            gc.unfreeze()
        counts = pipeline.statistics()
    samples = tuple(
        Sample(round(row[0], 3), int(row[1]), _OUTCOMES[end], *(int(value) for value in row[2:]))
        for row, end in zip(notes.tolist(), ends.tolist(), strict=True)
    )
    # While a stage is not loaded, what is in the process is something else.
    most = max(sample.loaded for sample in samples)
    counted = [sample for sample in samples if sample.loaded == most]
    trends = {name: trend_of([getattr(sample, name) for sample in counted]) for name in _KEPT[2:]}
    outcomes = {what: count for what in _OUTCOMES if (count := sum(sample.what == what for sample in samples))}
    return Soak(samples, trends, outcomes, warm_up, counts.loads, counts.memo_hits)


def trend_of(values: Sequence[float]) -> Trend:
    """Fit a line through the medians of :data:`BLOCKS` blocks of values at 0, 1, 2, ...; at least two per block."""
    blocks = np.array_split(np.asarray(values, np.float64), BLOCKS)
    ends = np.cumsum([len(block) for block in blocks])
    x = np.array([end - (len(block) + 1) / 2 for end, block in zip(ends, blocks, strict=True)])
    y = np.array([np.median(block) for block in blocks])
    x -= x.mean()
    y -= y[0]  # so that equal values give exactly 0
    slope = float(x @ y / (x @ x))
    rest = y - y.mean() - slope * x
    error = _T_99 * float(np.sqrt(rest @ rest / (BLOCKS - 2) / (x @ x)))
    return Trend(float(np.mean(values)), slope, slope - error, slope + error)


def _warm_up(pipeline: Pipeline) -> int:
    """Visit everything once that is bounded and kept, and return how many requests that took."""
    of_length = {pipeline.encode_text(prompt).states.shape[1]: prompt for prompt in _PROMPTS}
    sizes = [
        Request(prompt, height, width, frames, steps=2)
        for prompt, height, width, frames in product(of_length.values(), _SIDES, _SIDES, _FRAMES)
    ]
    for request in sizes:
        for _ in pipeline.stream(request, previews=True):
            pass
    texts = [Request(prompt, 32, 32, 1, steps) for prompt, steps in product(_PROMPTS, _STEPS)]
    for request in texts:
        pipeline.generate(request)
    largest = sizes[-1]
    latents = np.zeros(pipeline.inputs.latent_shape(pipeline.resolve(largest).shape), np.float32)
    for _ in pipeline.decode(latents):
        pass
    ended = [_ended(pipeline, largest, cancelled_after=cut) for cut in (3, 6)]
    ended.append(_ended(pipeline, largest, latents=latents))
    return len(sizes) + len(texts) + 1 + len(ended)


def _one(pipeline: Pipeline, draw: random.Random) -> str:
    """Make one request, and say how it ended."""
    request = Request(
        draw.choice(_PROMPTS),
        height=draw.choice(_SIDES),
        width=draw.choice(_SIDES),
        frames=draw.choice(_FRAMES),
        steps=draw.choice(_STEPS),
        seed=draw.randrange(1000),
    )
    kind = draw.random()
    latents = None
    if kind > 15 / 16:
        resolved = pipeline.resolve(request)
        latents = np.zeros(pipeline.inputs.latent_shape(resolved.shape), np.float32)
    if 14 / 16 < kind <= 15 / 16:
        resolved = pipeline.resolve(request)
        for _ in pipeline.decode(np.zeros(pipeline.inputs.latent_shape(resolved.shape), np.float32)):
            pass
        return "decoded"
    cancelled_after = draw.randint(1, 8) if kind < 1 / 8 else None
    return _ended(pipeline, request, latents, cancelled_after, previews=kind < 1 / 2)


def _ended(
    pipeline: Pipeline,
    request: Request,
    latents: NDArray[np.float32] | None = None,
    cancelled_after: int | None = None,
    previews: bool = False,
) -> str:
    """Make one video, and say how it ended.

    Args:
        pipeline: Makes it.
        request: What to make.
        latents: The noise, which fails: it is made to be none.
        cancelled_after: The event at which it is stopped.
        previews: Whether to show them.
    """
    stop = Stop()
    try:
        for number, event in enumerate(pipeline.stream(request, latents, stop=stop, previews=previews)):
            assert isinstance(event, Progress | Notice | Frames)
            if number == cancelled_after:
                stop.set()
            if latents is not None:
                latents.fill(np.nan)  # only now, before the first step: a request is checked when it is made
    except CancelledError:
        return "cancelled"
    except (SamplingError, DecodingError):
        return "failed"
    return "finished"


def _look(seconds: float, loaded: int) -> tuple[float, ...]:
    """Return what :data:`_KEPT` names.

    What CPython keeps for itself is given back first: lists of free objects, and a cache of attributes with 4096 places
    by the address of a name, which C code that makes a new name for each look fills for a thousand requests, to a
    quarter of a megabyte and no further.
    """
    gc.collect()
    sys._clear_type_cache()
    fields = status_fields(Path("/proc/self/status"))
    return (
        seconds,
        loaded,
        fields.get("RssAnon", 0),
        fields.get("RssFile", 0) + fields.get("RssShmem", 0),
        _count(Path("/proc/self/fd")),
        _count(Path("/proc/self/task")),
    )


def _count(folder: Path) -> int:
    return sum(1 for _ in folder.iterdir())


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--requests", type=click.IntRange(min=40), default=200, show_default=True)
@click.option("--memory-budget", help="Of the pipeline, such as 200MB; 'least' loads stages anew.  [default: a share]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def main(bundle: Path, requests: int, memory_budget: str | None, seed: int, as_json: bool) -> None:
    """Make many requests of BUNDLE; the exit code is 1 if anything grows."""
    result = soak(bundle, requests, memory_budget, seed)
    if as_json:
        trends = {name: {**asdict(trend), "grows": trend.grows} for name, trend in result.trends.items()}
        click.echo(json.dumps({**asdict(result), "trends": trends, "passed": result.passed}))
    else:
        ends = ", ".join(f"{count} {what}" for what, count in sorted(result.outcomes.items()))
        seconds = result.samples[-1].seconds
        click.echo(f"{requests} requests after {result.warm_up}, in {seconds:.0f} s: {ends}; {result.loads} loads")
        for name, trend in result.trends.items():
            unit, scale = ("MB", 1e6) if name.endswith("bytes") else ("", 1.0)
            interval = f"{trend.low / scale:+.5f} to {trend.high / scale:+.5f}"
            verdict = "grows" if trend.grows else "does not grow"
            click.echo(f"{name}: mean {trend.mean / scale:.1f} {unit}, {interval} {unit} per request: {verdict}")
    raise SystemExit(0 if result.passed else 1)


if __name__ == "__main__":
    main()
