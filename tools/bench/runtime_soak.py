"""Many requests of mixed sizes on one pipeline: do memory, file descriptors or threads grow?

One of eight requests is cancelled, one of sixteen fails (its latents are not finite), some show previews, some only
decode; sizes, steps and prompts are drawn anew each time. After every request the process is looked at (``/proc``,
Linux). The first quarter warms caches up and is not counted, nor is the process while a stage is not loaded. Growth
is the slope of a straight line through the rest, by least squares. A quantity grows if the slope's 95 % interval lies
above zero and its upper end would add more than :data:`TOLERANCE` of the mean over the requests that count; its width
says what growth would have been missed. Intervals suppose that requests are independent of each other, which the order
at random makes likely and nothing makes sure.

    python -m reelforge.tools.bench.runtime_soak demo.bundle --requests 200
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np

from reelforge.runtime import Check, Frames, Notice, Pipeline, Progress, Request, Stop
from reelforge.runtime.decode import DecodingError
from reelforge.runtime.errors import CancelledError
from reelforge.runtime.sampling import SamplingError
from reelforge.tools.bench.memory import status_fields

TOLERANCE = 0.02
MEMO_BYTES = 2_000_000  # little enough that it forgets all the time
WARM_SHARE = 0.25
_T_95 = 1.96  # of the normal distribution: there are more than a hundred points
_SIDES = (32, 48, 64, 96, 128)
_FRAMES = (1, 5, 9, 13)
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
        low: Lower end of the slope's 95 % interval.
        high: Upper end.
        grows: Whether the interval lies above zero and matters.
    """

    mean: float
    slope: float
    low: float
    high: float
    grows: bool


@dataclass(frozen=True)
class Soak:
    """What :func:`soak` returns; ``outcomes`` counts how requests ended."""

    samples: tuple[Sample, ...]
    trends: dict[str, Trend]
    outcomes: dict[str, int]
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
    samples = []
    outcomes: dict[str, int] = {}
    started = time.monotonic()
    with Pipeline.open(bundle, check=Check.SIZES, memory_budget=memory_budget, memo_bytes=MEMO_BYTES) as pipeline:
        for _ in range(requests):
            what = _one(pipeline, draw)
            outcomes[what] = outcomes.get(what, 0) + 1
            samples.append(_look(time.monotonic() - started, len(pipeline.statistics().resident_bytes), what))
        counts = pipeline.statistics()
    # A failed request closes the transformer: what is in the process then is something else.
    most = max(sample.loaded for sample in samples)
    counted = [sample for sample in samples[int(len(samples) * WARM_SHARE) :] if sample.loaded == most]
    names = ("anonymous_bytes", "file_bytes", "descriptors", "threads")
    trends = {name: trend_of([getattr(sample, name) for sample in counted]) for name in names}
    return Soak(tuple(samples), trends, outcomes, counts.loads, counts.memo_hits)


def trend_of(values: Sequence[float]) -> Trend:
    """Fit a line through at least three values at 0, 1, 2, ..."""
    x = np.arange(len(values)) - (len(values) - 1) / 2
    y = np.asarray(values, np.float64)
    slope = float(x @ y / (x @ x))
    rest = y - y.mean() - slope * x
    error = _T_95 * float(np.sqrt(rest @ rest / (len(values) - 2) / (x @ x)))
    matters = (slope + error) * len(values) > TOLERANCE * float(y.mean())
    return Trend(float(y.mean()), slope, slope - error, slope + error, slope - error > 0 and matters)


def _one(pipeline: Pipeline, draw: random.Random) -> str:
    """Make one request, and say how it ended."""
    request = Request(
        draw.choice(_PROMPTS),
        height=draw.choice(_SIDES),
        width=draw.choice(_SIDES),
        frames=draw.choice(_FRAMES),
        steps=draw.randint(1, 4),
        seed=draw.randrange(1000),
    )
    kind = draw.random()
    stop, latents = Stop(), None
    if kind > 15 / 16:
        resolved = pipeline.resolve(request)
        latents = np.zeros(pipeline.inputs.latent_shape(resolved.shape), np.float32)
    if 14 / 16 < kind <= 15 / 16:
        resolved = pipeline.resolve(request)
        for _ in pipeline.decode(np.zeros(pipeline.inputs.latent_shape(resolved.shape), np.float32)):
            pass
        return "decoded"
    cancelled_after = draw.randint(1, 8) if kind < 1 / 8 else None
    try:
        for number, event in enumerate(pipeline.stream(request, latents, stop=stop, previews=kind < 1 / 2)):
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


def _look(seconds: float, loaded: int, what: str) -> Sample:
    fields = status_fields(Path("/proc/self/status"))
    return Sample(
        round(seconds, 3),
        loaded,
        what,
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
        click.echo(json.dumps({**asdict(result), "passed": result.passed}))
    else:
        ends = ", ".join(f"{count} {what}" for what, count in sorted(result.outcomes.items()))
        click.echo(f"{requests} requests in {result.samples[-1].seconds:.0f} s: {ends}; {result.loads} loads")
        for name, trend in result.trends.items():
            unit, scale = ("MB", 1e6) if name.endswith("bytes") else ("", 1.0)
            interval = f"{trend.low / scale:+.5f} to {trend.high / scale:+.5f}"
            verdict = "grows" if trend.grows else "does not grow"
            click.echo(f"{name}: mean {trend.mean / scale:.1f} {unit}, {interval} {unit} per request: {verdict}")
    raise SystemExit(0 if result.passed else 1)


if __name__ == "__main__":
    main()
