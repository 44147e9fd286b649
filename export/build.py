"""Build: from a checkpoint to a sealed bundle.

The order is fixed: everything that can be refused is refused first (output folder, checkpoint, template, recipe,
shapes); then stages are compiled; the manifest seals the bundle. What is particular to 8-bit stages is in
``export.quantised_build``. The module knows no model: a :class:`Family` says what there is to build.
"""

from __future__ import annotations

from dataclasses import replace

from reelforge.export.build_request import BuildEvents, BuildRequest
from reelforge.export.build_source import open_source
from reelforge.export.default_step_cache import default_step_cache, require_coefficients
from reelforge.export.plans import add_plans, find_compiler
from reelforge.export.quantised_build import QuantisedBuild
from reelforge.export.stage_compiler import StageCompiler
from reelforge.export.verify import measure_parity
from reelforge.runtime.bundle.write import BundleWriter
from reelforge.runtime.manifest import Manifest


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
        require_coefficients(step_cache, source.spec)
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
