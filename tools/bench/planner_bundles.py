"""Predictions beside what a real bundle says of itself: its plans' sizes, and what their receipts recorded.

The plan is made from the bundle's own spec, recipe and target, so the checkpoint is not needed. The module does not
know how a bundle was built.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from reelforge.export.family import FAMILIES
from reelforge.export.planner.plan import Bucket, Model, Plan, PlanOptions, make_plan
from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.codec import from_json
from reelforge.runtime.errors import RequestError
from reelforge.runtime.manifest import Manifest, StageEntry
from reelforge.runtime.receipt import Receipt
from reelforge.runtime.recipe import VideoShape


@dataclass(frozen=True)
class Comparison:
    """One figure, predicted and actual.

    Attributes:
        what: Of what.
        figure: ``plan``, ``weights``, ``activations``, ``builder memory`` (bytes) or ``builder seconds``.
        predicted: By the planner.
        actual: Measured, or stated by the compiler.
    """

    what: str
    figure: str
    predicted: float
    actual: float

    @property
    def ratio(self) -> float:
        """Predicted over actual."""
        return self.predicted / self.actual

    def shown(self, value: float) -> str:
        """Return a value with its unit."""
        return f"{value:.1f} s" if self.figure == "builder seconds" else f"{value / 1e9:.3f} GB"


def plan_of_manifest(manifest: Manifest) -> Plan:
    """Return the prediction for what a bundle was built for.

    Steps and parts are taken from the bundle's plans, since a profile holds for a largest number of steps.
    """
    family = FAMILIES[manifest.spec.family]
    names = [entry.name for entry in manifest.stages]
    every = family.stages(manifest.spec, manifest.recipe.batch, None, manifest.parted)
    stages = tuple(stage for stage in every if stage.name in names)
    steps = [
        profile.dimensions["steps"][2]
        for entry in manifest.stages
        for plan in entry.plans
        for profile in plan.profiles
        if "steps" in profile.dimensions
    ]
    parts = {entry.name: max(plan.parts for plan in entry.plans) for entry in manifest.stages if entry.plans}
    model = Model(family, manifest.spec, stages, manifest.prompt_template.crop_start)
    return make_plan(model, manifest.target, manifest.recipe, PlanOptions(steps=max(steps, default=None), parts=parts))


def compare_bundle(path: Path) -> Iterator[Comparison]:
    """Yield every figure of a bundle that the planner predicts.

    Raises:
        BundleError: If the bundle is damaged.
    """
    yield from compare(Bundle.open(path, Check.SIZES).manifest, path)


def compare(manifest: Manifest, path: Path) -> Iterator[Comparison]:
    """Yield the figures of a manifest whose plans and receipts lie below ``path``."""
    plan = plan_of_manifest(manifest)
    builds = {build.stage: build for build in plan.builds}
    for entry in manifest.stages:
        build = builds.get(entry.name)
        if build is None or not build.weight_bytes:
            continue  # a view of another stage's weights, or a few kilobytes of code
        if not entry.plans:
            actual = sum(length for _, _, length in {(one.file, one.offset, one.length) for one in entry.weights})
            yield Comparison(entry.name, "weights", build.weight_bytes, actual)
            continue
        size = sum((path / one.path).stat().st_size for one in entry.plans)
        yield Comparison(entry.name, "plan", build.plan_bytes, size)
        yield from _activations(entry, plan)
        seconds = sum(_receipt(path / one.receipt).build_seconds for one in entry.plans)
        yield Comparison(entry.name, "builder seconds", build.builder_seconds, seconds)


def _activations(entry: StageEntry, plan: Plan) -> Iterator[Comparison]:
    """Yield the activations of every profile; of a stage in parts the largest part decides."""
    stated: dict[str, int] = {}
    for one in entry.plans:
        for profile in one.profiles:
            stated[profile.name] = max(stated.get(profile.name, 0), profile.activation_bytes)
    for name, actual in stated.items():
        bucket = _bucket(plan, name)
        cost = next(stage for stage in bucket.stages if stage.stage == entry.name)
        if actual:
            yield Comparison(f"{entry.name}, {name}", "activations", cost.activation_bytes, actual)


def _bucket(plan: Plan, profile: str) -> Bucket:
    """Return the bucket that a profile is called after, or the largest for a profile that serves all."""
    try:
        shape = VideoShape.parse(profile)
    except RequestError:
        return max(plan.buckets, key=lambda bucket: bucket.shape.height * bucket.shape.width * bucket.shape.frames)
    found = [bucket for bucket in plan.buckets if bucket.shape == shape]
    if found:
        return found[0]
    return replace(plan.buckets[0], shape=shape)


def _receipt(path: Path) -> Receipt:
    return from_json(Receipt, json.loads(path.read_text(encoding="utf-8")))
