"""How two bundles differ, as data: manifests, graphs and weights by stage, plans, and the layers' precisions.

Knows manifests and receipts; graphs are compared by digest and by their nodes, and nothing is run. How it is shown is
the matter of ``inspect_diff_tables``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.codec import to_json
from reelforge.runtime.manifest import StageEntry
from reelforge.runtime.quality import QualityReport
from reelforge.tools.inspect_receipts import COMPUTING_KINDS, PlanReceipt, layer_counts, precision_of, read_receipts

GRAPH_EQUAL = "equal"
GRAPH_NODES = "other nodes"
GRAPH_FILE = "other content"


@dataclass(frozen=True)
class Change:
    """One thing that two bundles say differently; None where one says nothing."""

    name: str
    first: Any
    second: Any


@dataclass(frozen=True)
class StageDifference:
    """One stage of two bundles.

    Attributes:
        name: The stage.
        only_in: ``first`` or ``second`` if the other bundle lacks the stage; None if both have it.
        graph: ``equal``; ``other nodes`` if their number, their types or the stage's tensors differ; ``other content``
            if constants, names, wiring, or places in weight files do.
        nodes: Operators whose number differs.
        weights_equal: Weights of the same name and content.
        weights_changed: Of the same name and type, but with other content.
        weights_retyped: Of the same name but another type: what a change of precision does.
        weights_only_first: Names.
        weights_only_second: Names.
    """

    name: str
    only_in: str | None
    graph: str
    nodes: tuple[Change, ...]
    weights_equal: int
    weights_changed: tuple[str, ...]
    weights_retyped: tuple[Change, ...]
    weights_only_first: tuple[str, ...]
    weights_only_second: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether the stage computes the same from the same weights."""
        changed = self.weights_changed or self.weights_retyped or self.weights_only_first or self.weights_only_second
        return self.only_in is None and self.graph == GRAPH_EQUAL and not changed


@dataclass(frozen=True)
class PlanSummary:
    """The plans of one stage for one group of architectures; several if the stage is cut into parts."""

    architectures: tuple[str, ...]
    parts: int
    backend: str
    sha256: tuple[str, ...]
    plan_bytes: int
    weight_bytes: int
    activation_bytes: dict[str, int]  # profile -> the largest of the parts, which run one after the other
    build_seconds: float
    layer_counts: dict[str, dict[str, int]]


@dataclass(frozen=True)
class PlanDifference:
    """The plans of one stage in two bundles; None where a bundle has none.

    Attributes:
        stage: The stage.
        first: Plans of the first bundle.
        second: Plans of the second bundle, for the same architectures if it has such.
        precisions: Graph layers and attentions that are computed in another precision, or in one of the two only.
    """

    stage: str
    first: PlanSummary | None
    second: PlanSummary | None
    precisions: tuple[Change, ...]

    @property
    def equal(self) -> bool:
        """Whether the plans are the same bytes."""
        return self.first is not None and self.second is not None and self.first.sha256 == self.second.sha256


@dataclass(frozen=True)
class BundleDifference:
    """Everything in which two bundles differ.

    Attributes:
        first: Path of the first bundle.
        second: Path of the second.
        same_content: Whether the content digests are equal: both compute the same.
        equal: Whether nothing at all differs but where files lie.
        manifest: Differences of model, target, recipe and template; each list and number by its path.
        provenance: Differences of versions and sources, which do not enter the content.
        quality: What the build's gate measured, where either bundle states it; equal numbers are listed too.
        stages: All stages of both.
        plans: All groups of plans of both.
    """

    first: str
    second: str
    same_content: bool
    equal: bool
    manifest: tuple[Change, ...]
    provenance: tuple[Change, ...]
    quality: tuple[Change, ...]
    stages: tuple[StageDifference, ...]
    plans: tuple[PlanDifference, ...]


def compare_bundles(first: Bundle, second: Bundle) -> BundleDifference:
    """Compare two opened bundles.

    Raises:
        BundleError: If a receipt cannot be read.
    """
    ours, theirs = first.manifest, second.manifest
    manifest = (
        *_changes("spec", to_json(ours.spec), to_json(theirs.spec)),
        *_changes("target", str(ours.target), str(theirs.target)),
        *_changes("recipe", _recipe(first), _recipe(second)),
        *_changes("prompt_template", to_json(ours.prompt_template), to_json(theirs.prompt_template)),
        *_changes("tokenizers", _tokenizers(first), _tokenizers(second)),
    )
    provenance = _changes("", dict(ours.provenance), dict(theirs.provenance))
    quality = _quality(ours.quality, theirs.quality)
    stages = tuple(_stages(first, second))
    plans = tuple(_plans(first, second))
    same_quality = all(change.first == change.second for change in quality)
    equal = not manifest and not provenance and same_quality
    equal = equal and all(stage.equal for stage in stages) and all(plan.equal for plan in plans)
    same_content = ours.content_digest == theirs.content_digest
    return BundleDifference(
        str(first.path), str(second.path), same_content, equal, manifest, provenance, quality, stages, plans
    )


def _recipe(bundle: Bundle) -> dict[str, Any]:
    value = to_json(bundle.manifest.recipe)
    return {**value, "shapes": [str(shape) for shape in bundle.manifest.recipe.shapes]}


def _tokenizers(bundle: Bundle) -> dict[str, Any]:
    files = bundle.manifest.files
    return {file.path.rsplit("/")[-1]: file.sha256 for file in files if file.path.startswith("tokenizers/")}


def _changes(name: str, first: Any, second: Any) -> tuple[Change, ...]:
    """Compare two JSON values, objects member by member."""
    if isinstance(first, dict) and isinstance(second, dict):
        prefix = f"{name}." if name else ""
        members = [*first, *(key for key in second if key not in first)]
        return tuple(
            change for key in members for change in _changes(f"{prefix}{key}", first.get(key), second.get(key))
        )
    return () if first == second else (Change(name, first, second),)


# Stages.


def _stages(first: Bundle, second: Bundle) -> Iterator[StageDifference]:
    theirs = {entry.name: entry for entry in second.manifest.stages}
    ours = {entry.name: entry for entry in first.manifest.stages}
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if name not in theirs or name not in ours:
            only_in = "first" if name in ours else "second"
            yield StageDifference(name, only_in, GRAPH_NODES, (), 0, (), (), (), ())
        else:
            yield _stage(first, ours[name], second, theirs[name])


def _stage(first: Bundle, ours: StageEntry, second: Bundle, theirs: StageEntry) -> StageDifference:
    weights = {weight.name: weight for weight in ours.weights}
    others = {weight.name: weight for weight in theirs.weights}
    both = [name for name in weights if name in others]
    retyped = tuple(
        Change(name, weights[name].dtype, others[name].dtype)
        for name in both
        if weights[name].dtype != others[name].dtype
    )
    named = {change.name for change in retyped}
    changed = tuple(name for name in both if name not in named and weights[name].sha256 != others[name].sha256)
    nodes = tuple(
        Change(operator, ours.nodes.get(operator, 0), theirs.nodes.get(operator, 0))
        for operator in sorted({*ours.nodes, *theirs.nodes})
        if ours.nodes.get(operator, 0) != theirs.nodes.get(operator, 0)
    )
    same_file = _digest(first, ours.graph) == _digest(second, theirs.graph)
    if ours.graph_digest == theirs.graph_digest or same_file:
        graph = GRAPH_EQUAL
    elif nodes or (ours.inputs, ours.outputs) != (theirs.inputs, theirs.outputs):
        graph = GRAPH_NODES
    else:
        graph = GRAPH_FILE
    return StageDifference(
        ours.name,
        None,
        graph,
        nodes,
        len(both) - len(retyped) - len(changed),
        changed,
        retyped,
        tuple(name for name in weights if name not in others),
        tuple(name for name in others if name not in weights),
    )


def _digest(bundle: Bundle, path: str) -> str | None:
    return next((entry.sha256 for entry in bundle.manifest.files if entry.path == path), None)


# Plans.


Group = Sequence[PlanReceipt]


def _plans(first: Bundle, second: Bundle) -> Iterator[PlanDifference]:
    ours, theirs = _groups(first), _groups(second)
    for stage in dict.fromkeys(entry.name for bundle in (first, second) for entry in bundle.manifest.stages):
        for group, other in _matched(_of(ours, stage), _of(theirs, stage)):
            precisions = _changed_precisions(_precisions(group), _precisions(other)) if group and other else ()
            yield PlanDifference(stage, _summary(group), _summary(other), precisions)


def _groups(bundle: Bundle) -> dict[tuple[str, tuple[str, ...]], list[PlanReceipt]]:
    groups: dict[tuple[str, tuple[str, ...]], list[PlanReceipt]] = {}
    for item in read_receipts(bundle):
        groups.setdefault((item.stage, item.plan.architectures), []).append(item)
    return groups


def _of(
    groups: Mapping[tuple[str, tuple[str, ...]], list[PlanReceipt]], stage: str
) -> dict[tuple[str, ...], list[PlanReceipt]]:
    return {architectures: group for (name, architectures), group in groups.items() if name == stage}


def _matched(
    ours: Mapping[tuple[str, ...], Group], theirs: Mapping[tuple[str, ...], Group]
) -> Iterator[tuple[Group, Group]]:
    """Pair groups for the same architectures; what is left, which only a change of target leaves, in order."""
    same = [architectures for architectures in ours if architectures in theirs]
    for architectures in same:
        yield ours[architectures], theirs[architectures]
    rest = [group for architectures, group in ours.items() if architectures not in same]
    others = [group for architectures, group in theirs.items() if architectures not in same]
    for index in range(max(len(rest), len(others))):
        yield (rest[index] if index < len(rest) else ()), (others[index] if index < len(others) else ())


def _summary(group: Group) -> PlanSummary | None:
    if not group:
        return None
    activations: dict[str, int] = {}
    for item in group:
        for profile, size in item.receipt.activation_bytes.items():
            activations[profile] = max(size, activations.get(profile, 0))
    return PlanSummary(
        group[0].plan.architectures,
        len(group),
        group[0].receipt.backend,
        tuple(item.sha256 for item in group),
        sum(item.receipt.plan_bytes for item in group),
        sum(item.receipt.weight_bytes for item in group),
        activations,
        sum(item.receipt.build_seconds for item in group),
        layer_counts(item.receipt for item in group),
    )


def _precisions(group: Group) -> dict[str, str]:
    """Return in which precision each layer and attention of the graph is computed."""
    found: dict[str, set[str]] = {}
    for item in group:
        for layer in item.receipt.layers:
            if layer.kind in COMPUTING_KINDS:
                for node in layer.nodes:
                    found.setdefault(node, set()).add(precision_of(layer))
    return {node: "+".join(sorted(words)) for node, words in found.items()}


def _changed_precisions(first: Mapping[str, str], second: Mapping[str, str]) -> tuple[Change, ...]:
    names = [*first, *(name for name in second if name not in first)]
    changes = (Change(name, first.get(name), second.get(name)) for name in names)
    return tuple(change for change in changes if change.first != change.second)


# Quality.


def _quality(first: QualityReport | None, second: QualityReport | None) -> tuple[Change, ...]:
    if first is None and second is None:
        return ()
    ours, theirs = _measures(first), _measures(second)
    names = [*ours, *(name for name in theirs if name not in ours)]
    return tuple(Change(name, ours.get(name), theirs.get(name)) for name in names)


def _measures(report: QualityReport | None) -> dict[str, Any]:
    """Return the numbers of a report by name; videos that equal the reference's have the PSNR "equal"."""
    if report is None:
        return {}
    stages = {
        f"{name}: {what}": value
        for name, stage in report.stages.items()
        for what, value in (("worst cosine", stage.cosine_min), ("worst relative error", stage.relative_error_max))
    }
    return {
        "measured on": f"{len(report.prompts)} of {report.shape}, {report.steps} steps, seed {report.seed}",
        "prompts": json.dumps(report.prompts, ensure_ascii=False),
        "PSNR in dB, median": _finite(report.psnr_median_db),
        "PSNR in dB, worst": _finite(report.psnr_worst_db),
        "SSIM, median": report.ssim_median,
        "SSIM, worst": report.ssim_worst,
        "velocity cosine, worst": report.velocity_cosine_worst,
        "latent drift, worst": max(report.latent_drift),
        **stages,
    }


def _finite(value: float) -> float | str:
    return "equal" if math.isinf(value) else value
