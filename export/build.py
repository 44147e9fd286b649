"""Build: from a checkpoint to a sealed bundle.

The order is fixed: everything that can be refused is refused first (output folder, checkpoint, template, recipe,
shapes); then stages are compiled; the manifest seals the bundle. What is particular to 8-bit stages is in
``export.quantised_build``. The module knows no model: a :class:`Family` says what there is to build.
"""

from __future__ import annotations

from dataclasses import replace

from reelforge.export.build_request import BuildEvents, BuildRequest
from reelforge.export.build_source import open_source
from reelforge.export.plans import add_plans, find_compiler
from reelforge.export.quantised_build import QuantisedBuild
from reelforge.export.stage_compiler import StageCompiler
from reelforge.export.verify import measure_parity
from reelforge.runtime.bundle.write import BundleWriter
from reelforge.runtime.errors import RequestError
from reelforge.runtime.manifest import Manifest
from reelforge.runtime.step_cache.settings import OFF, StepCache

_FILES = ("ratios", "coefficients")
"""Settings of step caches that name files of measurements."""


def build_bundle(request: BuildRequest, events: BuildEvents | None = None) -> Manifest:
    """Build and seal a bundle.

    Args:
        request: What to build.
        events: Where to report.

    Returns:
        The sealed manifest.

    Raises:
        RequestError: For stages, shapes, precisions or layers that the model does not have.
        CheckpointError: If the checkpoint is incomplete, damaged, or of another family.
        CalibrationError: If 8-bit stages cannot be calibrated, or the scale file does not belong to the checkpoint.
        VerificationError: If the quantised bundle is not good enough.
        BuildError: If the output folder exists, the disk is full, a compiler is not installed or refuses a graph, or
            its plan is not what the recipe says; nothing is left of the bundle.
    """
    events = events or BuildEvents()
    step_cache = default_step_cache(request)
    with BundleWriter(request.output) as writer:
        source = open_source(request)
        chosen, recipe = source.chosen_stages(), source.recipe()
        if request.target.backend.has_plans:
            find_compiler(request.target)
        rules = source.family.quantisation(source.spec)
        attentions = {stage: found.attentions for stage, found in rules.items()}
        compiler = StageCompiler(request.target, source.resolved, events, attentions)
        source.write_tokenizers(writer)
        if recipe.calibrated:
            build = QuantisedBuild(source, request.calibration, compiler, events)
            manifest = build.run(chosen, recipe, writer)
        else:
            entries = compiler.compile(chosen, recipe, {}, writer)
            if request.target.backend.has_plans:
                entries = add_plans(source, compiler, recipe, {}, entries, writer)
            manifest = source.manifest(recipe, entries)
        if request.verify:
            manifest = measure_parity(writer.folder, manifest, chosen)
        return writer.seal(replace(manifest, step_cache=step_cache))


def default_step_cache(request: BuildRequest) -> str | None:
    """Return what the bundle's manifest says about step caching; it alters requests, and nothing that is built.

    Raises:
        RequestError: If it cannot be a bundle's default.
    """
    text = request.step_cache
    if text is None:
        return None
    if any(f"{name}=" in text for name in _FILES):
        raise RequestError(
            "a bundle's default step cache cannot refer to a file.",
            received=f"--step-cache {text}",
            expected="easycache, which needs none",
            fix="use easycache:0.025, or give magcache with each request",
        )
    cache = StepCache.parse(text)
    if cache == OFF:
        return None
    if problems := cache.problems():
        raise RequestError(
            f"the step cache {text!r} cannot be a bundle's default.",
            received="; ".join(problem.received for problem in problems),
            expected="; ".join(problem.expected for problem in problems),
            fix="; ".join(problem.fix for problem in problems),
        )
    if cache.parted and not request.parted:
        raise RequestError(
            "the default step cache needs the transformer in parts.",
            received=f"--step-cache {text}",
            expected="--partition head,body,tail beside it",
            fix="add --partition head,body,tail, or leave --step-cache out",
        )
    missing = [stage for stage in cache.stages if request.stages and stage not in request.stages]
    if missing:
        raise RequestError(
            "the default step cache needs stages that are not built.",
            received=f"--stages {','.join(request.stages)}",
            expected=f"{' and '.join(missing)} among them",
            fix="leave --stages or --step-cache out",
        )
    return text
