"""Workbench: an fp32 bundle of one checkpoint, and quantised variants of it from scales that are at hand.

Everything is traced once: what the fp32 bundle needed, its variants need not trace again. A variant is built by the
product's own build, without a gate. The module does not know what is measured with any of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from reelforge.calibration.rules import Formats, StageRules
from reelforge.calibration.scale_file import write_scale_file
from reelforge.calibration.scale_methods import ScaleMethod
from reelforge.export.build_request import BuildEvents, BuildRequest, CalibrationRequest
from reelforge.export.build_source import BuildSource, open_source
from reelforge.export.calibrate import CalibrationOptions, Observations, observe, provenance
from reelforge.export.quantisation import attention_formats, quantised_formats
from reelforge.export.quantised_build import QuantisedBuild
from reelforge.export.stage_compiler import StageCompiler
from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.bundle.write import BundleWriter
from reelforge.runtime.manifest import Manifest
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.recipe import Precision, Recipe, Target

STAGE = "dit"
CHANGED_STAGES = ("modulation", STAGE)  # smoothing folds into the modulation


@dataclass(frozen=True)
class Variant:
    """How ``dit`` is quantised.

    Attributes:
        precision: INT8 or FP8.
        scales: A scale file, made for that format.
        kept: Layers that stay in fp32.
        attention: Arithmetic of attention; None for fp32.
    """

    precision: Precision
    scales: Path
    kept: tuple[str, ...] = ()
    attention: Precision | None = None


@dataclass(frozen=True)
class Observed:
    """What one calibration saw: scales of any method and of both formats come from it."""

    observations: Observations
    options: CalibrationOptions


@dataclass
class Workbench:
    """One checkpoint's bundles, all below one folder. Make one with :meth:`open`.

    Attributes:
        folder: Where bundles and scale files go.
        source: The checkpoint.
        compiler: Compiles its stages, and remembers traces.
        reference: The fp32 bundle.
    """

    folder: Path
    source: BuildSource
    compiler: StageCompiler
    reference: Bundle
    _scale_files: int = field(default=0)

    @classmethod
    def open(cls, checkpoint: Path, folder: Path) -> Workbench:
        """Build the fp32 bundle of ``checkpoint`` in the new folder ``folder``."""
        folder.mkdir(parents=True)
        path = folder / "fp32.bundle"
        source = open_source(BuildRequest(checkpoint, path, Target.parse("cpu")))
        compiler = StageCompiler(source.request.target, source.resolved, BuildEvents())
        recipe = Recipe.uniform(Precision.FP32, [stage.name for stage in source.stages])
        with BundleWriter(path) as writer:
            source.write_tokenizers(writer)
            entries = compiler.compile(source.stages, recipe, {}, writer)
            writer.seal(source.manifest(recipe, entries))
        return cls(folder, source, compiler, Bundle.open(path, Check.SIZES))

    @property
    def rules(self) -> Mapping[str, StageRules]:
        """The family's rules of quantisation."""
        return self.source.family.quantisation(self.source.spec)

    def formats(self, precision: Precision) -> Formats:
        """Return the layers of ``dit`` that the family lets go, all in one format."""
        stages = {stage.name: stage for stage in self.source.stages}
        return quantised_formats(Recipe({STAGE: precision}), self.rules, stages)

    def attention(self) -> Formats:
        """Return the attentions that can be in FP8."""
        return attention_formats(Recipe({STAGE: Precision.FP32}, attention=Precision.FP8), self.rules)

    def observe(self, prompts: Sequence[str], seed: int, smoothing: float | None, steps: int | None = None) -> Observed:
        """Run the fp32 bundle over ``prompts`` and observe what layers and attentions read.

        Args:
            prompts: To generate.
            seed: Of the first prompt's noise; then counted up.
            smoothing: SmoothQuant's alpha, or None.
            steps: Sampling steps; None means the default.
        """
        options = CalibrationOptions(tuple(prompts), smoothing=smoothing, seed=seed, steps=steps)
        groups = self.rules[STAGE].groups
        formats = self.formats(Precision.INT8)  # statistics do not depend on the format
        return Observed(observe(self.reference, formats, groups, options, attention=self.attention()), options)

    def scales(self, observed: Observed, precision: Precision, method: ScaleMethod) -> Path:
        """Write the scale file of one format and method and return its path."""
        options = replace(observed.options, method=method)
        formats, attention = self.formats(precision), self.attention()
        tensors = observed.observations.scales(formats, attention, method, options.percentile)
        self._scale_files += 1
        path = self.folder / f"{self._scale_files:03d}.scales"
        write_scale_file(path, provenance(self.reference, formats, options, attention), tensors)
        return path

    def build(self, variant: Variant, path: Path, stages: Sequence[str]) -> Bundle:
        """Build the bundle of a variant with only ``stages``."""
        with BundleWriter(path) as writer:
            writer.seal(self._write(variant, writer, stages))
        return Bundle.open(path, Check.SIZES)

    @contextmanager
    def candidate(self, variant: Variant) -> Iterator[Pipeline]:
        """Build a variant for the duration of a ``with`` block.

        The pipeline can be compared with the reference's: other stages than ``CHANGED_STAGES`` are stated to be the
        reference's, whose results the comparison remembers; they are not there to be run.
        """
        path = self.folder / "candidate.bundle"
        bundle = self.build(variant, path, CHANGED_STAGES)
        own = {entry.name: entry for entry in bundle.manifest.stages}
        stated = tuple(own.get(entry.name, entry) for entry in self.reference.manifest.stages)
        try:
            yield Pipeline(Bundle(path, replace(self.reference.manifest, stages=stated)))
        finally:
            shutil.rmtree(path)

    def _write(self, variant: Variant, writer: BundleWriter, stages: Sequence[str]) -> Manifest:
        calibration = CalibrationRequest(scales=variant.scales, gated=False)
        request = replace(
            self.source.request,
            output=writer.destination,
            precision={STAGE: variant.precision},
            kept={STAGE: variant.kept} if variant.kept else {},
            attention=variant.attention,
            stages=tuple(stages),
            calibration=calibration,
        )
        source = replace(self.source, request=request)
        self.source.write_tokenizers(writer)
        build = QuantisedBuild(source, calibration, self.compiler, BuildEvents())
        return build.run(source.chosen_stages(), source.recipe(), writer)
