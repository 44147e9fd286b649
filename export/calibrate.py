"""Calibrate: run a bundle's own pipeline over prompts and all timesteps, and choose scales from what is observed.

The reference is the bundle as it is, in high precision. With smoothing, a first pass takes the channel extremes that
the factors need, and a second one observes the smoothed tensors; for the scale method ``max`` the first pass is enough,
since a division keeps the order of a channel's values. The work is cut into units (text, each step, decoding) after
each of which the state is saved. The module knows the pipeline's stages by name and no model.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reelforge.calibration.errors import CalibrationError
from reelforge.calibration.fingerprint import bundle_fingerprint
from reelforge.calibration.number_formats import INT8, NumberFormat
from reelforge.calibration.observe import ChannelExtremes, Observer
from reelforge.calibration.prompts import prompts_sha256
from reelforge.calibration.rules import Formats, SmoothingGroup
from reelforge.calibration.scale_file import Provenance, ScaleKind, format_text, tensor_name
from reelforge.calibration.scale_methods import DEFAULT_PERCENTILE, ScaleMethod, activation_range, activation_scale
from reelforge.calibration.state import CalibrationState
from reelforge.calibration.statistics import TensorStatistics
from reelforge.export.calibration_plan import CalibrationPlan, format_names, plan_calibration
from reelforge.export.lockstep import TEXT_STAGES, Lockstep, OnProgress
from reelforge.export.observed import ObservedValue
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.events import FloatArray
from reelforge.runtime.noise import gaussian_noise
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.recipe import VideoShape
from reelforge.runtime.request import Request, ResolvedRequest

_LATENTS = "latents"
_TEXT, _DECODE = -1, -2  # units of work beside the steps, which are numbered from 0


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        prompts: What to generate while observing.
        method: How a scale is chosen.
        percentile: For that method, in percent.
        smoothing: SmoothQuant's alpha; None smooths nothing.
        seed: Of the first prompt's noise; each following prompt has the next one.
        steps: Sampling steps, all of which are observed; None means the bundle's default.
        shape: Of the videos; None means the bundle's default.
        state: A folder in which an interrupted calibration continues; None keeps the state until the end only.
        memory_bytes: What the loaded weights of a stage may take as fp32; larger stages are run in segments.
        threads: Threads of one operator; None means one per core.
    """

    prompts: tuple[str, ...]
    method: ScaleMethod = ScaleMethod.MAX
    percentile: float = DEFAULT_PERCENTILE
    smoothing: float | None = None
    seed: int = 0
    steps: int | None = None
    shape: VideoShape | None = None
    state: Path | None = None
    memory_bytes: int = 8 << 30
    threads: int | None = None


@dataclass(frozen=True)
class Observations:
    """What was observed, from which scales of any method can be chosen.

    Attributes:
        plan: What was to be observed.
        statistics: By tensor; of smoothed tensors after the division.
        factors: Smoothing factors by group, in the plan's order.
    """

    plan: CalibrationPlan
    statistics: Mapping[str, TensorStatistics]
    factors: tuple[FloatArray, ...]

    def scales(
        self,
        formats: Formats,
        attention: Formats,
        method: ScaleMethod,
        percentile: float = DEFAULT_PERCENTILE,
    ) -> dict[str, NDArray[np.float32]]:
        """Return every scale and factor by its name in a scale file.

        Raises:
            CalibrationError: If the percentile is not possible.
        """
        tensors: dict[str, NDArray[np.float32]] = {}
        for value in self.plan.values():
            stage, kind = value.tensor.stage, value.tensor.kind
            source = formats if kind is ScaleKind.ACTIVATION else attention
            statistics = self.statistics[value.tensor.name]
            chosen: dict[str, dict[ScaleKind, NDArray[np.float32]]] = {}
            for layer in value.outputs_of:
                if formats[stage].get(layer) is not INT8:
                    continue
                limits = activation_range(statistics, activation_scale(statistics, INT8, method, percentile), method)
                tensors[tensor_name(stage, layer, ScaleKind.OUTPUT)] = limits
            for layer in value.layers:
                number_format = source[stage][layer]
                if number_format.name not in chosen:
                    chosen[number_format.name] = _chosen(statistics, kind, number_format, method, percentile)
                for own, array in chosen[number_format.name].items():
                    tensors[tensor_name(stage, layer, own)] = array
        for planned, factors in zip(self.plan.groups, self.factors, strict=True):
            for layer in planned.group.layers:
                tensors[tensor_name(planned.group.stage, layer, ScaleKind.SMOOTHING)] = factors
        return tensors


def calibrate(
    bundle: Bundle,
    formats: Formats,
    groups: Sequence[SmoothingGroup],
    options: CalibrationOptions,
    on_progress: OnProgress = lambda _what, _done, _total: None,
    attention: Formats | None = None,
) -> tuple[Provenance, dict[str, NDArray[np.float32]]]:
    """Return what :func:`~reelforge.calibration.scale_file.write_scale_file` takes.

    Equal bundles, options and libraries give equal results, whether or not the work was interrupted, and however much
    memory it had.

    Args:
        bundle: All stages, in high precision.
        formats: The layers to quantise.
        groups: Where smoothing may be applied; only those count whose layers are all quantised.
        options: How.
        on_progress: Told (stage, units done, units in all).
        attention: Attentions whose operands are quantised, by the names of ``export.observed.attention_nodes``.

    Raises:
        CalibrationError: If a layer is missing, a value is not finite, or the state cannot be used or written.
        BundleError: If the bundle lacks a stage or a weight.
        RequestError: If the bundle does not serve the shape, the steps or the seed.
        EngineError: If an engine fails.
    """
    enough = options.method is ScaleMethod.MAX
    observations = observe(bundle, formats, groups, options, on_progress, attention, extremes_suffice=enough)
    tensors = observations.scales(formats, attention or {}, options.method, options.percentile)
    return provenance(bundle, formats, options, attention), tensors


def observe(
    bundle: Bundle,
    formats: Formats,
    groups: Sequence[SmoothingGroup],
    options: CalibrationOptions,
    on_progress: OnProgress = lambda _what, _done, _total: None,
    attention: Formats | None = None,
    extremes_suffice: bool = False,
) -> Observations:
    """Observe, without choosing scales: one observation serves every method.

    Args:
        bundle: As for :func:`calibrate`, which also says what is raised.
        formats: Likewise.
        groups: Likewise.
        options: Likewise; the method and the percentile do not matter.
        on_progress: Likewise.
        attention: Likewise.
        extremes_suffice: Leave the second pass out: scales of the method ``max`` only.
    """
    if not options.prompts:
        raise CalibrationError(
            "there are no prompts to calibrate with.",
            received="0 prompts",
            expected="at least one",
            fix="give 8 to 32 prompts of the kind that the model will be asked for",
        )
    plan = plan_calibration(bundle, formats, attention or {}, groups if options.smoothing is not None else ())
    pipeline = Pipeline(bundle, EngineOptions(threads=options.threads))
    requests = [
        pipeline.resolve(_request(prompt, options.seed + index, options))
        for index, prompt in enumerate(options.prompts)
    ]
    with _state(options.state, _identity(bundle, plan, requests, options)) as state:
        return _Run(pipeline, plan, requests, options, state, on_progress).observe(extremes_suffice)


def provenance(
    bundle: Bundle, formats: Formats, options: CalibrationOptions, attention: Formats | None = None
) -> Provenance:
    """Return where scales made with ``options`` come from."""
    method = options.method.value
    if options.method is ScaleMethod.PERCENTILE:
        method += f" {options.percentile:g}"
    if options.smoothing is not None:
        method += f" + smoothing {options.smoothing:g}"
    first = Pipeline(bundle).resolve(_request(options.prompts[0], options.seed, options))
    return Provenance(
        checkpoint=bundle_fingerprint(bundle),
        prompts_sha256=prompts_sha256(options.prompts),
        seed=options.seed,
        method=method,
        format=format_text(format_names(formats, attention or {})),
        versions=_versions(),
        sampling=f"{len(options.prompts)} prompts, {first.steps} steps of {first.shape}",
    )


@dataclass(frozen=True)
class _Pass:
    """One pass over all prompts: its observer, what it observes, and its units of work."""

    observer: Observer
    observed: Mapping[str, tuple[ObservedValue, ...]]
    text: tuple[str, ...]
    sampled: bool
    decoded: bool

    @classmethod
    def over(cls, observer: Observer, observed: Mapping[str, tuple[ObservedValue, ...]], first: bool) -> _Pass:
        decoded = "vae_decoder" in observed
        sampled = decoded or "dit" in observed
        needed = TEXT_STAGES if sampled and first else [stage for stage in TEXT_STAGES if stage in observed]
        text = TEXT_STAGES[: TEXT_STAGES.index(needed[-1]) + 1] if needed else ()
        return cls(observer, observed, text, sampled, decoded)

    def units(self, steps: int) -> list[int]:
        """Return the units of work in order."""
        return [*([_TEXT] if self.text else []), *range(steps if self.sampled else 0), *([_DECODE] * self.decoded)]


class _Run:
    def __init__(
        self,
        pipeline: Pipeline,
        plan: CalibrationPlan,
        requests: Sequence[ResolvedRequest],
        options: CalibrationOptions,
        state: CalibrationState,
        on_progress: OnProgress,
    ) -> None:
        self.pipeline, self.plan, self.requests, self.options = pipeline, plan, requests, options
        self.state, self.on_progress = state, on_progress
        self.done, self.saved = state.load()  # units of all passes, and the arrays after them
        self.passed = 0  # units of the passes before the present one
        self.kept: dict[str, NDArray[Any]] = {}  # their arrays

    def observe(self, extremes_suffice: bool) -> Observations:
        """Run what is not done yet, and return everything that was observed."""
        divided = self.plan.divided()
        # A state that is kept serves every method afterwards, so it has the histograms of what is not divided.
        few = self.plan.tensors() if extremes_suffice and self.state.temporary else ()
        extremes_only = {*divided, *(tensor.name for tensor in few)}
        first = _Pass.over(Observer(self.plan.tensors(), extremes_only), self.plan.observed, first=True)
        self._run(first, "0:", "")
        extremes = first.observer.extremes
        factors = self._factors(extremes)
        divisors = {
            name: own for planned, own in zip(self.plan.groups, factors, strict=True) for name in planned.divided
        }
        if extremes_suffice or not divided:
            smoothed = {name: _statistics_of_extremes(own, divisors.get(name)) for name, own in extremes.items()}
        else:
            tensors = [tensor for tensor in self.plan.tensors() if tensor.name in divided]
            second = _Pass.over(Observer(tensors, (), divisors), self.plan.only(divided), first=False)
            self._run(second, "1:", " (smoothed)")
            smoothed = second.observer.statistics
        return Observations(self.plan, {**first.observer.statistics, **smoothed}, factors)

    def _factors(self, extremes: Mapping[str, ChannelExtremes]) -> tuple[FloatArray, ...]:
        values = {name: each.magnitudes for name, each in extremes.items()}
        alpha = self.options.smoothing or 0.0
        return tuple(planned.factors(self.pipeline.bundle, values, alpha) for planned in self.plan.groups)

    def _run(self, own: _Pass, prefix: str, remark: str) -> None:
        """Do the units of one pass, but for those that the state says are done."""
        units = own.units(self.requests[0].steps)
        done = min(max(self.done - self.passed, 0), len(units))
        latents = self._noise()
        if done:
            arrays = {name: array for name, array in self.saved.items() if name.startswith(prefix)}
            own.observer.load_arrays({name.removeprefix(prefix): array for name, array in arrays.items()})
            latents = list(self.saved[_LATENTS])
        lockstep = Lockstep(
            self.pipeline,
            self.requests,
            self.state,
            own.observed,
            self.options.memory_bytes,
            own.observer.update,
            lambda stage, finished, total: self.on_progress(stage + remark, finished, total),
        )
        with closing(lockstep):
            for index, unit in enumerate(units[done:], done):
                if unit == _TEXT:
                    lockstep.text(own.text)
                elif unit == _DECODE:
                    lockstep.decode(latents)
                else:
                    latents = lockstep.step(unit, latents)
                arrays = {**self.kept, **_prefixed(own.observer, prefix), _LATENTS: np.stack(latents)}
                self.state.save(self.passed + index + 1, arrays)
        self.passed += len(units)
        self.kept.update(_prefixed(own.observer, prefix))

    def _noise(self) -> list[FloatArray]:
        shape = self.requests[0].shape
        size = (1, *self.pipeline.spec.latent_shape(shape.height, shape.width, shape.frames))
        return [gaussian_noise(size, request.seed) for request in self.requests]


def _prefixed(observer: Observer, prefix: str) -> dict[str, NDArray[Any]]:
    return {prefix + name: array for name, array in observer.to_arrays().items()}


def _statistics_of_extremes(extremes: ChannelExtremes, divisors: FloatArray | None) -> TensorStatistics:
    """Return statistics with the tensor's largest magnitudes and its range with zero; the rest is not true.

    ``divisors`` are the smoothing's, if the tensor is smoothed.
    """
    statistics = TensorStatistics(len(extremes.lowest))
    if extremes.count:
        rows = np.stack([extremes.lowest, extremes.highest])
        statistics.update(rows if divisors is None else rows / divisors)
    return statistics


def _chosen(
    statistics: TensorStatistics, kind: ScaleKind, number_format: NumberFormat, method: ScaleMethod, percentile: float
) -> dict[ScaleKind, NDArray[np.float32]]:
    scale = activation_scale(statistics, number_format, method, percentile)
    if kind is not ScaleKind.ACTIVATION or number_format is not INT8:
        return {kind: np.asarray(scale)}
    return {kind: np.asarray(scale), ScaleKind.RANGE: activation_range(statistics, scale, method)}


def _request(prompt: str, seed: int, options: CalibrationOptions) -> Request:
    shape = options.shape
    height, width, frames = (None, None, None) if shape is None else (shape.height, shape.width, shape.frames)
    return Request(prompt, height, width, frames, options.steps, seed)


@contextmanager
def _state(folder: Path | None, identity: Mapping[str, Any]) -> Iterator[CalibrationState]:
    """Open the state in ``folder``, or in a folder that is removed afterwards."""
    if folder is not None:
        with closing(CalibrationState(folder, identity)) as state:
            yield state
        return
    with (
        tempfile.TemporaryDirectory(prefix="reelforge-calibration-") as temporary,
        closing(CalibrationState(Path(temporary), identity, temporary=True)) as state,
    ):
        yield state


def _identity(
    bundle: Bundle, plan: CalibrationPlan, requests: Sequence[ResolvedRequest], options: CalibrationOptions
) -> dict[str, Any]:
    """Everything that observations depend on. Neither the method nor memory: they change nothing that is observed."""
    tensors = [[value.tensor.name, *value.layers, *value.outputs_of] for value in plan.values()]
    groups = [[planned.group.stage, *planned.group.layers] for planned in plan.groups]
    return {
        "state": 3,
        "bundle": bundle.manifest.content_digest,
        "prompts": prompts_sha256(options.prompts),
        "seed": options.seed,
        "shape": str(requests[0].shape),
        "steps": requests[0].steps,
        "smoothing": options.smoothing,
        "layers": hashlib.sha256(json.dumps([tensors, groups]).encode()).hexdigest(),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("reelforge", "numpy", "onnxruntime")}
