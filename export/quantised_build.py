"""The build of a bundle with 8-bit stages: reference, scales, codes, gate.

A reference bundle in fp32 is built inside the unfinished bundle, where a build that is given up takes it along. It is
what scales are calibrated on and what the result is measured against; stages that quantisation does not change are
linked from it. With a scale file and without a gate there is nothing to refer to, and no reference is built.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from reelforge.calibration.gate import measure_quality, meets, require_quality
from reelforge.calibration.prompts import DEFAULT_PROMPTS, read_prompts, split_prompts
from reelforge.calibration.rules import Formats, SmoothingGroup
from reelforge.calibration.scale_file import ScaleFile, read_scale_file, write_scale_file
from reelforge.export.build_request import BuildEvents, CalibrationRequest
from reelforge.export.build_source import BuildSource
from reelforge.export.calibrate import CalibrationOptions, calibrate
from reelforge.export.calibration_plan import format_names
from reelforge.export.graph_file import graph_bytes
from reelforge.export.passes.lower_float8 import LowerFloat8Pass
from reelforge.export.plans import add_plans
from reelforge.export.quantisation import (
    StagePlan,
    applicable_groups,
    attention_formats,
    plan_quantisation,
    quantised_formats,
    required_scales,
)
from reelforge.export.sensitivity import worst_layers
from reelforge.export.stage import Stage
from reelforge.export.stage_compiler import StageCompiler, link_stage
from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.bundle.write import BundleWriter
from reelforge.runtime.errors import RequestError
from reelforge.runtime.manifest import Manifest, StageEntry, WeightEntry
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.quality import QualityThresholds
from reelforge.runtime.recipe import Backend, Precision, Recipe, Target

SCALES_NAME = "scales.safetensors"
_REFERENCE = "reference"
_EXECUTABLE = "executable"
CPU = Target(Backend.CPU)


@dataclass(frozen=True)
class QuantisedBuild:
    """One build with 8-bit stages.

    Attributes:
        source: The checkpoint.
        request: Where scales come from, and the gate.
        compiler: Compiles stages.
        events: Where to report.
    """

    source: BuildSource
    request: CalibrationRequest
    compiler: StageCompiler
    events: BuildEvents

    def run(self, chosen: Sequence[Stage], recipe: Recipe, writer: BundleWriter) -> Manifest:
        """Write the bundle of ``chosen`` and return its manifest, not yet sealed.

        Raises:
            RequestError: If stages or layers cannot be quantised, or only some stages are built without a scale file.
            CalibrationError: See :func:`reelforge.export.calibrate.calibrate` and ``calibration.scale_file``.
            VerificationError: If the gate is not passed.
        """
        request = self.request
        rules = self.source.family.quantisation(self.source.spec)
        stages = {stage.name: stage for stage in self.source.stages}
        formats = quantised_formats(recipe, rules, stages)
        work = _Work(
            recipe,
            formats,
            attention_formats(recipe, rules),
            applicable_groups(rules, formats),
            DEFAULT_PROMPTS if request.prompts is None else read_prompts(request.prompts),
        )
        self._require_all_stages(chosen)
        if request.scales is not None and request.smoothing is not None:
            raise RequestError(
                "smoothing is asked for together with a scale file.",
                received=f"--smoothing {request.smoothing:g} and --scales {request.scales}",
                expected="one of them: a scale file holds the smoothing that it was calibrated with",
                fix="leave --smoothing out, or calibrate again with it",
            )
        scales = None if request.scales is None else self._read_scales(request.scales, work)
        if scales is not None and not request.gated:
            manifest, plans = self._write(chosen, work, scales, None, writer)
            return self._compiled(manifest, plans, work, writer)
        with self._reference(writer) as reference:
            if scales is None:
                scales = self._calibrate(reference, work, writer)
            manifest, plans = self._write(chosen, work, scales, reference, writer)
            if request.gated:
                with self._executable(reference, manifest, plans, writer) as bundle:
                    manifest = self._gated(reference, bundle, manifest, work, scales)
        return self._compiled(manifest, plans, work, writer)

    def _require_all_stages(self, chosen: Sequence[Stage]) -> None:
        if len(chosen) == len(self.source.stages) or (self.request.scales is not None and not self.request.gated):
            return
        raise RequestError(
            "only some stages are to be built in 8 bits.",
            received=", ".join(stage.name for stage in chosen),
            expected="all stages, whose pipeline is run to calibrate and to measure the result",
            fix="leave --stages out, or give --scales FILE and --no-gate",
        )

    @contextmanager
    def _reference(self, writer: BundleWriter) -> Iterator[Bundle]:
        """Build the fp32 bundle, and remove it when it is not needed any more."""
        folder = writer.folder / _REFERENCE
        names = [stage.name for stage in self.source.stages]
        recipe = Recipe.uniform(Precision.FP32, names, batch=self.source.request.batch)
        with BundleWriter(folder) as reference_writer:
            self.source.write_tokenizers(reference_writer)
            quiet = replace(self.compiler, target=CPU, events=replace(self.events, stage=BuildEvents().stage))
            entries = quiet.compile(self.source.stages, recipe, {}, reference_writer)
            reference_writer.seal(replace(self.source.manifest(recipe, entries), target=CPU))
        try:
            yield Bundle.open(folder, Check.SIZES)
        finally:
            shutil.rmtree(folder)

    def _read_scales(self, path: Path, work: _Work) -> ScaleFile:
        stages = {stage.name: stage for stage in self.source.stages}
        required = required_scales(work.formats, work.attentions, stages)
        names = format_names(work.formats, work.attentions)
        return read_scale_file(path, self.source.fingerprint(), required, names)

    def _calibrate(self, reference: Bundle, work: _Work, writer: BundleWriter) -> ScaleFile:
        request = self.request
        state = writer.destination.with_name(f"{writer.destination.name}.calibration")
        options = CalibrationOptions(
            prompts=split_prompts(work.prompts)[0],
            method=request.method,
            percentile=request.percentile,
            smoothing=request.smoothing,
            seed=request.seed,
            steps=request.steps,
            shape=request.shape,
            state=state,
            memory_bytes=request.memory_bytes,
        )

        def on_progress(stage: str, done: int, total: int) -> None:
            self.events.work(f"observing {stage}", done, total)

        provenance, tensors = calibrate(reference, work.formats, work.groups, options, on_progress, work.attentions)
        path = writer.path(SCALES_NAME)
        write_scale_file(path, provenance, tensors)
        shutil.rmtree(state)
        return read_scale_file(path)

    def _write(
        self,
        chosen: Sequence[Stage],
        work: _Work,
        scales: ScaleFile,
        reference: Bundle | None,
        writer: BundleWriter,
    ) -> tuple[Manifest, Mapping[str, StagePlan]]:
        """Make graphs of what the recipe changes, take everything else from the reference; also return the plans."""
        stages = {stage.name: stage for stage in self.source.stages}
        rules = self.source.family.quantisation(self.source.spec)
        groups = tuple(group for stage in work.formats for group in rules[stage].groups)
        plans = plan_quantisation(work.formats, work.attentions, groups, scales, stages)
        if scales.path.parent != writer.folder:
            writer.add_file(scales.path, SCALES_NAME)
        precision = work.recipe.precision
        entries: dict[str, StageEntry] = {}
        for stage in chosen:
            same = self.compiler.target == CPU and precision[stage.name] is Precision.FP32
            same = same and stage.origin not in plans
            if reference is not None and same:
                entries[stage.name] = link_stage(reference.stage(stage.name), reference.path, writer)
                self.events.stage(entries[stage.name])
        changed = [stage for stage in chosen if stage.name not in entries]
        compiled = self.compiler.compile(changed, work.recipe, plans, writer)
        entries.update({entry.name: entry for entry in compiled})
        about = scales.provenance
        provenance = {
            "calibration": f"{about.format} by {about.method}, {about.sampling}, seed {about.seed}",
            "calibration_prompts": about.prompts_sha256,
        }
        return self.source.manifest(work.recipe, tuple(entries[stage.name] for stage in chosen), provenance), plans

    def _compiled(
        self, manifest: Manifest, plans: Mapping[str, StagePlan], work: _Work, writer: BundleWriter
    ) -> Manifest:
        """Add the plans, if the target has such."""
        if not self.compiler.target.backend.has_plans:
            return manifest
        entries = add_plans(self.source, self.compiler, work.recipe, plans, manifest.stages, writer)
        return replace(manifest, stages=entries)

    @contextmanager
    def _executable(
        self,
        reference: Bundle,
        manifest: Manifest,
        plans: Mapping[str, StagePlan],
        writer: BundleWriter,
    ) -> Iterator[Bundle]:
        """Yield the unfinished bundle in a form that runs here.

        Plans run on GPUs only. In their place stand graphs with the same 8-bit weights and scales and, beside these,
        fp32: what they show is the cost of quantisation, and not that of bf16 or fp16 elsewhere. Attention that a
        target's plugins compute is executed through their ONNX functions.
        """
        # Files are listed when a bundle is sealed; until then the tokenizers are found as the reference's.
        files = reference.manifest.files
        if self.compiler.target == CPU:
            yield Bundle(writer.folder, replace(manifest, files=files))
            return
        folder = writer.folder / _EXECUTABLE
        folder.mkdir()
        try:
            gpu_numbers = replace(self.compiler, target=Target(Backend.CUDA))  # signed codes of int8 activations
            stages = {stage.name: stage for stage in self.source.stages}
            entries = []
            for entry in manifest.stages:
                weights = {weight.name: weight for weight in entry.weights}
                plan = plans.get(entry.name, StagePlan())
                model = self._plugin_graph(stages[entry.name], plan, weights)
                if model is None and entry.name in plans:
                    model = gpu_numbers.graph(stages[entry.name], Precision.FP32, plan, weights)
                if model is not None:
                    source, used, data = writer.folder, entry, graph_bytes(model)
                else:
                    source, used = reference.path, reference.stage(entry.name)
                    data = (source / used.graph).read_bytes()
                (folder / used.graph).write_bytes(data)
                # Equal names are equal files: a stage's own are named after it, others are the checkpoint's.
                for file in {weight.file for weight in used.weights}:
                    (folder / file).parent.mkdir(exist_ok=True)
                    if not (folder / file).exists():
                        (folder / file).hardlink_to(source / file)
                entries.append(used)
            shutil.copytree(reference.path / "tokenizers", folder / "tokenizers")
            yield Bundle(folder, replace(manifest, target=CPU, stages=tuple(entries), files=files))
        finally:
            shutil.rmtree(folder)

    def _plugin_graph(self, stage: Stage, plan: StagePlan, weights: Mapping[str, WeightEntry]) -> ir.Model | None:
        """Return the graph of a stage whose attention plugins compute, with their functions; None for other stages.

        It is the target's own graph in fp32: attention costs what it costs there, also beside layers in high precision.
        """
        if self.compiler.target.backend is not Backend.TRT or not self.compiler.attentions.get(stage.name):
            return None
        model = self.compiler.graph(stage, Precision.FP32, plan, weights)
        if not model.functions:
            return None
        LowerFloat8Pass()(model)
        return model

    def _gated(self, reference: Bundle, bundle: Bundle, manifest: Manifest, work: _Work, scales: ScaleFile) -> Manifest:
        """Measure ``bundle`` against its reference, and refuse it if it is not good enough."""
        request = self.request
        usual = QualityThresholds.for_precisions(work.words())
        least = usual.psnr_db if request.min_psnr_db is None else request.min_psnr_db
        thresholds = QualityThresholds(least, request.min_cosine)
        calibration, held_out = split_prompts(work.prompts)
        report = measure_quality(
            Pipeline(reference),
            Pipeline(bundle),
            held_out,
            request.seed + len(calibration),
            request.steps,
            request.shape,
            lambda progress: self.events.work(progress.phase, progress.step, progress.total),
        )
        if not meets(report, thresholds):
            prompt, seed = held_out[:1], request.seed + len(calibration)
            worst = worst_layers(Pipeline(reference), scales, work.formats, prompt, seed, request.steps, request.shape)
            require_quality(report, thresholds, worst)
        return replace(manifest, quality=report)


@dataclass(frozen=True)
class _Work:
    """What the recipe means for this model."""

    recipe: Recipe
    formats: Formats
    attentions: Formats
    groups: tuple[SmoothingGroup, ...]
    prompts: tuple[str, ...]

    def words(self) -> list[str]:
        """The 8-bit precisions in use, as the command line calls them."""
        used = {self.recipe.precision[stage] for stage in self.formats}
        return [precision.value for precision in Precision if precision in used or precision is self.recipe.attention]
