"""Models in NumPy that are engines, and step caching restated in float64 from the papers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from reelforge.runtime.engines.engine import Engine
from reelforge.runtime.manifest import TensorInfo
from reelforge.runtime.registers import HostRegisters, Registers
from reelforge.runtime.sampling import StepLoop
from reelforge.runtime.step_cache.cached_step import CachedStep
from reelforge.runtime.step_cache.criteria import Criterion
from reelforge.runtime.step_cache.settings import Reuse
from reelforge.runtime.step_program import Evaluation, RegisterLoop

Velocity = Callable[[np.ndarray, int], np.ndarray]
CHANGE_INPUTS = (
    "latents", "previous_latents", "computed_latents", "velocity", "earlier_latents", "earlier_velocity",
)  # fmt: skip
REUSE_INPUTS = (
    "latents", "computed_latents", "velocity", "earlier_velocity", "residual_weight", "trend_weight", "sigma_step",
)  # fmt: skip
INPUT_INPUTS = ("latents", "previous_latents", "double_modulation", "previous_modulation")


@dataclass
class NumpyEngine:
    """A stage in NumPy. Attributes are those of an engine; ``calls`` counts."""

    name: str
    compute: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
    taken: tuple[str, ...] = ()
    calls: int = 0
    outputs: Mapping[str, TensorInfo] = field(default_factory=dict)

    @property
    def inputs(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(name, "float32", ()) for name in self.taken}

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray | None] | None = None
    ) -> dict[str, np.ndarray]:
        assert outputs is not None
        assert set(self.taken) <= set(inputs)
        self.calls += 1
        results = self.compute(inputs)
        filled = {}
        for name, target in outputs.items():
            target = np.empty(results[name].shape, np.float32) if target is None else target
            assert not any(np.shares_memory(target, array) for array in inputs.values())
            target[...] = results[name]
            filled[name] = target
        return filled

    def close(self) -> None: ...


def step_change(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    x, p, c, v, e, w = (inputs[name].astype(np.float64) for name in CHANGE_INPUTS)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.abs(v - w).mean() / np.abs(c - e).mean()
        change = rate * np.abs(x - p).mean() / np.abs(v).mean()
        ratio = (np.linalg.norm(v - c, axis=1) / np.linalg.norm(w - e, axis=1)).mean()
    return {"predicted_change": np.asarray(change), "residual_ratio": np.asarray(ratio)}


def step_reuse(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    x, c, v, w, residual, trend, sigma = (inputs[name].astype(np.float64) for name in REUSE_INPUTS)
    return {"next_latents": x + sigma * (v + residual * (x - c) + trend * (v - w))}


def input_change(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A first block that is given the latents, shifted by the mean of its modulation."""
    x, p, m, n = (inputs[name].astype(np.float64) for name in INPUT_INPUTS)
    given, before = x + m.mean(), p + n.mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        return {"input_change": np.asarray(np.abs(given - before).mean() / np.abs(before).mean())}


def input_engine() -> NumpyEngine:
    return NumpyEngine("input_change", input_change, INPUT_INPUTS)


def change_engine() -> NumpyEngine:
    return NumpyEngine("step_change", step_change, CHANGE_INPUTS)


def reuse_engine() -> NumpyEngine:
    return NumpyEngine("step_reuse", step_reuse, REUSE_INPUTS)


def model_engine(velocity: Velocity) -> NumpyEngine:
    """Return ``dit`` for a velocity; the step's number comes in as a row."""

    def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        x = inputs["latents"].astype(np.float64)
        v = velocity(x, int(inputs["step"])).astype(np.float32)
        return {"velocity": v, "next_latents": x + inputs["sigma_step"] * v}

    return NumpyEngine("dit", compute)


def random_velocity(seed: int, steps: int, shape: tuple[int, ...]) -> Velocity:
    """Return a smooth nonlinear field that drifts from step to step, now fast and now slowly."""
    random = np.random.default_rng(seed)
    pull = np.cumsum(random.standard_normal(steps) * random.choice([0.01, 0.3], steps))
    push = np.cumsum(random.standard_normal((steps, *shape)) * random.choice([0.01, 0.2], (steps, 1, 1, 1, 1, 1)), 0)
    return lambda x, step: np.sin(x + pull[step]) + push[step] + 0.3 * x


def sampled(
    velocity: Velocity, criterion: Criterion, noise: np.ndarray, sigma_steps: np.ndarray, warmup: int, how: Reuse,
    registers: Registers | None = None, dit: Engine | None = None,
) -> tuple[np.ndarray, list[bool]]:  # fmt: skip
    """Run a cached loop; returns final latents, and for each step whether it was computed."""
    rows = {"step": np.arange(len(sigma_steps), dtype=np.float32), "sigma_step": sigma_steps}
    evaluate = Evaluation(dit or model_engine(velocity), {}, rows)
    step = CachedStep(evaluate, criterion, reuse_engine(), sigma_steps, warmup, how)
    loop = RegisterLoop(registers or HostRegisters(), step, noise)
    return loop.latents() if not len(sigma_steps) else run(loop, len(sigma_steps))


def run(loop: StepLoop, steps: int) -> tuple[np.ndarray, list[bool]]:
    computed = []
    for step in range(steps):
        before = loop.skipped
        loop.advance(step)
        computed.append(loop.skipped == before)
    return loop.latents(), computed


@dataclass
class Expected:
    """What the papers' algorithms do, in float64.

    Attributes:
        latents: Final ones.
        computed: For each step.
        margins: How far each estimated error was from the threshold, relatively; a decision by less is a coin's.
    """

    latents: np.ndarray
    computed: list[bool]
    margins: list[float]


def easycache(
    velocity: Velocity, noise: np.ndarray, sigma_steps: np.ndarray, threshold: float, warmup: int, how: Reuse,
    max_skips: int | None = None,
) -> Expected:  # fmt: skip
    """Algorithm 1 of EasyCache, written down as it runs on one stream of latents."""

    def change(x: np.ndarray, history: list[tuple[int, np.ndarray, np.ndarray]], previous: np.ndarray) -> float:
        (_, earlier_x, earlier_v), (_, last_x, last_v) = history[-2:]
        rate = np.mean(np.abs(last_v - earlier_v)) / np.mean(np.abs(last_x - earlier_x))
        return float(rate * np.mean(np.abs(x - previous)) / np.mean(np.abs(last_v)))

    return _cached(velocity, noise, sigma_steps, threshold, warmup, how, max_skips, lambda *now: change(*now[1:]))


def magcache(
    velocity: Velocity, noise: np.ndarray, sigma_steps: np.ndarray, threshold: float, warmup: int, how: Reuse,
    max_skips: int | None, ratios: np.ndarray,
) -> Expected:  # fmt: skip
    """Equations 5 to 7 of MagCache: every skipped step adds the error of the product since the last computed one."""

    def error(step: int, x: object, history: list[tuple[int, np.ndarray, np.ndarray]], previous: object) -> float:
        last = history[-1][0]
        return abs(1 - float(np.prod(ratios[last + 1 : step + 1])))

    return _cached(velocity, noise, sigma_steps, threshold, warmup, how, max_skips, error)


def teacache(
    velocity: Velocity, noise: np.ndarray, sigma_steps: np.ndarray, threshold: float, warmup: int, how: Reuse,
    max_skips: int | None, shifts: np.ndarray, coefficients: Sequence[float], ends: tuple[float, float] = (0, np.inf),
) -> Expected:  # fmt: skip
    """Equations 6 to 8 of TeaCache for a first block that is given the latents plus a number per step."""

    def change(step: int, x: np.ndarray, history: object, previous: np.ndarray) -> float:
        given, before = x + shifts[step], previous + shifts[step - 1]
        moved = np.abs(given - before).mean() / np.abs(before).mean()
        return max(float(np.poly1d(coefficients)(np.clip(moved, *ends))), 0.0)

    return _cached(velocity, noise, sigma_steps, threshold, warmup, how, max_skips, change)


def _cached(
    velocity: Velocity, noise: np.ndarray, sigma_steps: np.ndarray, threshold: float, warmup: int, how: Reuse,
    max_skips: int | None, error_of: Callable[..., float],
) -> Expected:  # fmt: skip
    sigmas = np.concatenate([[1.0], 1.0 + np.cumsum(sigma_steps.astype(np.float64))])
    x, previous = noise.astype(np.float64), noise
    history: list[tuple[int, np.ndarray, np.ndarray]] = []
    made = Expected(x, [], [])
    error, skips = 0.0, 0
    for step, sigma_step in enumerate(sigma_steps.astype(np.float64)):
        skip = False
        if max(warmup, 2) <= step < len(sigma_steps) - 1:
            error += error_of(step, x, history, previous)
            skips += 1
            skip = error < threshold and (max_skips is None or skips <= max_skips)
            made.margins.append(abs(error - threshold) / max(threshold, 1e-12))
        if skip:
            (first, _, v0), (last, x1, v1) = history[-2:]
            slope = (v1 - v0) / (sigmas[last] - sigmas[first])
            v = {
                Reuse.RESIDUAL: x + (v1 - x1),
                Reuse.VELOCITY: v1,
                # sigmas fall: the line goes on for at most the distance between the two points that it goes through
                Reuse.EXTRAPOLATE: v1 + slope * max(sigmas[step] - sigmas[last], sigmas[last] - sigmas[first]),
            }[how]
        else:
            error, skips = 0.0, 0
            v = velocity(x, step)
            history.append((step, x, v))
        made.computed.append(not skip)
        previous = x
        x = x + sigma_step * v
    made.latents = x
    return made
