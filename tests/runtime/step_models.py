"""Models in NumPy that are engines, and step caching restated in float64 from the papers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from reelforge.runtime.dit_parts import DitParts, PartedEvaluation
from reelforge.runtime.engines.engine import Engine
from reelforge.runtime.manifest import TensorInfo
from reelforge.runtime.registers import HostRegisters, Registers
from reelforge.runtime.sampling import StepLoop
from reelforge.runtime.step_cache.cached_step import CachedStep
from reelforge.runtime.step_cache.criteria import Criterion
from reelforge.runtime.step_cache.settings import Reuse
from reelforge.runtime.step_program import Evaluation, RegisterLoop, StepFunction

Velocity = Callable[[np.ndarray, int], np.ndarray]
CHANGE_INPUTS = (
    "latents", "previous_latents", "computed_latents", "velocity", "earlier_latents", "earlier_velocity",
)  # fmt: skip
REUSE_INPUTS = (
    "latents", "computed_latents", "velocity", "earlier_velocity", "residual_weight", "trend_weight", "sigma_step",
)  # fmt: skip
HEAD_INPUTS = ("latents", "computed_latents", "head_image", "computed_head_image")
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
    registers: Registers | None = None, dit: Engine | DitParts | None = None,
) -> tuple[np.ndarray, list[bool]]:  # fmt: skip
    """Run a cached loop; returns final latents, and for each step whether it was computed."""
    rows = {"step": np.arange(len(sigma_steps), dtype=np.float32), "sigma_step": sigma_steps}
    evaluate: StepFunction
    if isinstance(dit, DitParts):
        evaluate = PartedEvaluation(dit, {}, rows)
    else:
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


class Halves:
    """A model in two layers, in NumPy, as head, body and tail: tokens are the latents' values.

    ``velocity = tail(body(head(x)))`` with a head that adds a bounded function of the latents, and a body that adds one
    of what it is given; both drift from step to step.
    """

    def __init__(self, seed: int, steps: int) -> None:
        random = np.random.default_rng(seed)
        self.near = np.cumsum(random.standard_normal(steps) * random.choice([0.01, 0.5], steps))
        self.far = np.cumsum(random.standard_normal(steps) * random.choice([0.01, 0.5], steps))

    def head(self, x: np.ndarray, step: int) -> np.ndarray:
        return x + np.sin(x + self.near[step]) + 0.2

    def body(self, image: np.ndarray, step: int) -> np.ndarray:
        return image + np.cos(2 * image + self.far[step])

    def velocity(self, x: np.ndarray, step: int) -> np.ndarray:
        return 0.5 * self.body(self.head(x, step), step)

    def parts(self) -> DitParts:
        def head(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"head_image": self.head(inputs["latents"], int(inputs["step"]))}

        def body(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"tokens": self.body(inputs["head_image"], int(inputs["step"]))}

        def tail(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            velocity = 0.5 * inputs["tokens"]
            return {"velocity": velocity, "next_latents": inputs["latents"] + inputs["sigma_step"] * velocity}

        outputs = {"head_image": TensorInfo("head_image", "float32", ())}
        return DitParts(
            NumpyEngine("dit_head", head, ("latents", "step"), outputs=outputs),
            NumpyEngine("dit_body", body, ("head_image", "step")),
            NumpyEngine("dit_tail", tail, ("tokens", "latents", "sigma_step")),
            NumpyEngine("token_reuse", token_reuse, ("tokens", "head_image", "computed_head_image")),
        )


def token_reuse(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"reused_tokens": inputs["tokens"] + (inputs["head_image"] - inputs["computed_head_image"])}


def head_change(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the head adds to latents that are their own tokens."""
    x, c, image, computed = (inputs[name].astype(np.float64) for name in HEAD_INPUTS)
    with np.errstate(divide="ignore", invalid="ignore"):
        added, before = image - x, computed - c
        return {"head_change": np.asarray(np.abs(added - before).mean() / np.abs(before).mean())}


def head_engine() -> NumpyEngine:
    return NumpyEngine("head_change", head_change, HEAD_INPUTS)


def fbcache(
    model: Halves, noise: np.ndarray, sigma_steps: np.ndarray, threshold: float, warmup: int, how: Reuse,
    max_skips: int | None,
) -> Expected:  # fmt: skip
    """ParaAttention's first-block cache, written down with residuals as it keeps them, in float64."""
    sigmas = np.concatenate([[1.0], 1.0 + np.cumsum(sigma_steps.astype(np.float64))])
    x = noise.astype(np.float64)
    made = Expected(x, [], [])
    first = rest = np.zeros_like(x)  # what first block and remaining blocks added in the last computed step
    history: list[tuple[int, np.ndarray, np.ndarray]] = []
    skips = 0
    for step, sigma_step in enumerate(sigma_steps.astype(np.float64)):
        image = model.head(x, step)
        added, skip = image - x, False
        if max(warmup, 2) <= step < len(sigma_steps) - 1:
            change = np.mean(np.abs(added - first)) / np.mean(np.abs(first))
            skips += 1
            skip = bool(change < threshold) and (max_skips is None or skips <= max_skips)
            made.margins.append(abs(change - threshold) / max(threshold, 1e-12))
        if skip and how is Reuse.TOKENS:
            v = 0.5 * (image + rest)
        elif skip:
            (before, _, v0), (last, x1, v1) = history[-2:]
            slope = (v1 - v0) / (sigmas[last] - sigmas[before])
            v = {
                Reuse.RESIDUAL: x + (v1 - x1),
                Reuse.VELOCITY: v1,
                Reuse.EXTRAPOLATE: v1 + slope * max(sigmas[step] - sigmas[last], sigmas[last] - sigmas[before]),
            }[how]
        else:
            skips, first, rest = 0, added, model.body(image, step) - image
            v = 0.5 * (image + rest)
            history.append((step, x, v))
        made.computed.append(not skip)
        x = x + sigma_step * v
    made.latents = x
    return made
