"""BuildSource: an opened checkpoint and everything that is known before any weight is read."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer

from reelforge.calibration.fingerprint import HEAD_BYTES, StoredTensor, fingerprint
from reelforge.export.build_request import BuildRequest
from reelforge.export.checkpoint.component import Checkpoint
from reelforge.export.checkpoint.open import open_checkpoint
from reelforge.export.checkpoint.sources import Resolved
from reelforge.export.engines.profiles import named_shapes, profiles_for
from reelforge.export.engines.requirements import compatible_groups, stage_precisions
from reelforge.export.family import FAMILIES, Family
from reelforge.export.prompt_template import find_prompt_template
from reelforge.export.quantisation import attention_formats, layers_of
from reelforge.export.stage import Stage
from reelforge.export.target_rules import check_bases, check_sparse_attention, default_base, stage_bases
from reelforge.export.tokenizers import tokenizer_json
from reelforge.export.weights import resolve_stages
from reelforge.runtime.bundle.write import BundleWriter
from reelforge.runtime.errors import CheckpointError, RequestError
from reelforge.runtime.manifest import SCHEMA_VERSION, Manifest, PromptTemplate, StageEntry
from reelforge.runtime.quality import QualityReport
from reelforge.runtime.recipe import EVERY_STAGE, Backend, Precision, Recipe, VideoShape, resolve_precisions
from reelforge.runtime.spec import ModelSpec

_LIBRARIES = ("reelforge", "torch", "onnx", "onnx-ir", "onnxscript", "transformers")


@dataclass(frozen=True)
class BuildSource:
    """An opened checkpoint and all that is known of it before any weight is read.

    Attributes:
        request: What was asked for.
        family: The model family.
        spec: Its numbers.
        stages: All of the family's stages.
        resolved: stage -> parameter -> where it lies.
        tokenizers: Role -> content of its file.
        template: The text around a prompt.
        layout: The checkpoint's layout.
    """

    request: BuildRequest
    family: Family
    spec: ModelSpec
    stages: tuple[Stage, ...]
    resolved: Mapping[str, Mapping[str, Resolved]]
    tokenizers: Mapping[str, bytes]
    template: PromptTemplate
    layout: str

    def write_tokenizers(self, writer: BundleWriter) -> None:
        """Add the tokenizers to a bundle."""
        for role, data in self.tokenizers.items():
            writer.add_bytes(f"tokenizers/{role}.json", data)

    def chosen_stages(self) -> tuple[Stage, ...]:
        """Return the stages to build, in pipeline order."""
        names = self.request.stages
        return tuple(stage for stage in self.stages if not names or stage.name in names)

    def fingerprint(self) -> str:
        """Return the checkpoint's identity for scale files; reads the first bytes of every weight."""
        views = {stage.name for stage in self.stages if stage.weights_of}
        return fingerprint(
            StoredTensor(stage, name, weight.dtype, tuple(weight.shape), _head(weight))
            for stage, weights in self.resolved.items()
            if stage not in views
            for name, weight in weights.items()
        )

    def recipe(self) -> Recipe:
        """Return the recipe of the stages to build.

        Raises:
            RequestError: For a stage that the model does not have, layers kept in one that is not in 8 bits, 8 bits
                that no stage to build would have, or precisions that the target does not compute in.
        """
        request, target = self.request, self.request.target
        own = stage_bases(target, request.precision)
        names = [stage.name for stage in self.stages if not stage.weights_of]
        known = {stage: base for stage, base in own.items() if stage in names}
        precision = resolve_precisions(
            {**known, **request.precision},
            names,
            self.family.quantised_by_default,
            default_base(target),
        )
        high = request.high_precision or default_base(target, beside_8_bit=True)
        for stage in self.stages:
            if stage.weights_of:  # what of it is in 8 bits, the other stage says
                whole = precision[stage.weights_of]
                precision[stage.name] = high if whole.quantised else whole
        recipe = Recipe(
            {stage.name: precision[stage.name] for stage in self.chosen_stages()},
            request.shapes,
            request.batch,
            high,
            {stage: tuple(sorted(patterns)) for stage, patterns in sorted(request.kept.items())},
            request.attention,
            request.sparse_attention,
        )
        self._require_8_bits(recipe, precision)
        idle = sorted(set(recipe.kept) - set(recipe.quantised_stages()))
        if idle:
            raise RequestError(
                "layers are kept in high precision in stages that are not in 8 bits.",
                received=", ".join(f"{stage}={pattern}" for stage in idle for pattern in recipe.kept[stage]),
                expected="stages among "
                + (", ".join(recipe.quantised_stages()) or "those with --precision int8 or fp8"),
                fix=f"add --precision {idle[0]}=int8, or leave the pattern out",
            )
        check_bases(recipe, target)
        check_sparse_attention(recipe, target)
        if not target.backend.has_plans:
            return recipe
        recipe = replace(recipe, shapes=named_shapes(self.spec, recipe))
        for stage in self.chosen_stages():
            compatible_groups(target, self.computed_in(recipe, stage.name))
            profiles_for(stage, self.spec, recipe, self.template)
        return recipe

    def _require_8_bits(self, recipe: Recipe, precision: Mapping[str, Precision]) -> None:
        """Refuse 8 bits that are asked for and would be left out because of ``--stages``.

        Args:
            recipe: Of the stages to build.
            precision: Of all stages.
        """
        rules = self.family.quantisation(self.spec)
        views = [
            stage
            for stage in self.chosen_stages()
            if stage.weights_of not in recipe.precision
            and precision.get(stage.weights_of, Precision.FP32).quantised
            and any(rules[stage.weights_of].covers(layer) for layer in layers_of(stage))
        ]
        if views:
            whole, names = views[0].weights_of, ",".join(stage.name for stage in views)
            raise RequestError(
                f"stages are parts of {whole!r}, whose layers are to be in 8 bits, and {whole!r} is not built.",
                received=f"--stages {','.join(self.request.stages)} with {whole}={precision[whole].value}",
                expected=f"{whole} beside {names}: they share its 8-bit weights",
                fix=f"add {whole} to --stages, or build without 8 bits",
            )
        general = self.request.precision.get(EVERY_STAGE)
        if general is not None and general.quantised and not recipe.quantised_stages():
            default = self.family.quantised_by_default
            raise RequestError(
                "8 bits are asked for, and no stage that is built would have any.",
                received=f"--stages {','.join(self.request.stages)} with --precision {general.value}",
                expected=f"{' or '.join(default)} among them: an 8-bit precision without a stage means its layers",
                fix=f"add {default[0]} to --stages, or say which of them, as in --precision llm={general.value}",
            )

    def computed_in(self, recipe: Recipe, stage: str) -> frozenset[Precision]:
        """Return what the products and attentions of a stage are computed in."""
        rules = self.family.quantisation(self.spec)
        return stage_precisions(recipe, stage, has_attention=stage in attention_formats(recipe, rules))

    def manifest(
        self,
        recipe: Recipe,
        entries: tuple[StageEntry, ...],
        provenance: Mapping[str, str] | None = None,
        quality: QualityReport | None = None,
    ) -> Manifest:
        """Return the manifest of a bundle with these stages, before it is sealed."""
        stated = {
            "checkpoint_layout": self.layout,
            "numerics": self.request.numerics.value,
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
            **(provenance or {}),
        }
        return Manifest(
            SCHEMA_VERSION,
            self.spec,
            self.request.target,
            recipe,
            self.template,
            entries,
            files=(),
            provenance=stated,
            content_digest="",
            quality=quality,
        )


def open_source(request: BuildRequest) -> BuildSource:
    """Open the checkpoint and check the request against it; no weight is read.

    Raises:
        RequestError: For stages, shapes, precisions or layers that the model does not have.
        CheckpointError: If the checkpoint is incomplete, damaged, or of another family.
    """
    checkpoint = open_checkpoint(request.checkpoint)
    family = FAMILIES[checkpoint.family]
    spec = family.spec(checkpoint, request.numerics)
    if request.parted and request.sparse_attention is not None:
        raise RequestError(
            "sparse attention has no head, body and tail.",
            received="--partition and --sparse-attention",
            expected="one of them: step caches look at tokens in their own order",
            fix="leave one of them out",
        )
    stages = family.stages(spec, request.batch, request.sparse_attention, request.parted)
    _check_request(request, tuple(stage.name for stage in stages), spec)
    resolved = resolve_stages(checkpoint, family.key_maps[checkpoint.layout], spec, stages)
    tokenizers = {role: tokenizer_json(_tokenizer(checkpoint, role), role) for role in ("llm", "clip")}
    template = find_prompt_template(
        checkpoint.path, request.prompt_template, Tokenizer.from_str(tokenizers["llm"].decode())
    )
    return BuildSource(request, family, spec, stages, resolved, tokenizers, template, checkpoint.layout.value)


def _check_request(request: BuildRequest, stage_names: tuple[str, ...], spec: ModelSpec) -> None:
    if request.verify and request.target.backend is not Backend.CPU:
        raise RequestError(
            f"the numbers of a bundle for {request.target} cannot be verified where it is built.",
            received=f"--verify with --target {request.target}",
            expected="--verify with --target cpu, whose graphs run on this machine",
            fix="leave --verify out; receipts say what a plan is made of",
        )
    unknown = [name for name in (*request.stages, *request.kept) if name not in stage_names]
    if unknown:
        raise RequestError(
            "the model has no such stages.",
            received=", ".join(unknown),
            expected=", ".join(stage_names),
            fix="leave --stages out to build all of them",
        )
    for shape in request.shapes:
        step, period = spec.pixel_multiple, spec.vae.temporal_compression
        if shape.height % step or shape.width % step or shape.frames % period != 1:
            raise RequestError(
                f"the model has no videos of the shape {shape}.",
                received=str(shape),
                expected=f"height and width multiples of {step}, frames {period}k+1",
                fix=f"use {_nearest(shape, step, period)}",
            )


def _nearest(shape: VideoShape, step: int, period: int) -> VideoShape:
    return VideoShape(
        -(-shape.height // step) * step,
        -(-shape.width // step) * step,
        -(-(shape.frames - 1) // period) * period + 1,
    )


def _tokenizer(checkpoint: Checkpoint, role: str) -> Path:
    folder = checkpoint.tokenizers.get(role)
    if folder is None:
        raise CheckpointError(
            f"the checkpoint {checkpoint.path} has no tokenizer for {role}.",
            expected="a folder with tokenizer.json",
            fix="download the tokenizer's folder next to the weights",
        )
    return folder


def _head(weight: Resolved) -> bytes:
    """The first bytes of a weight, as many as a fingerprint looks at."""
    head = b""
    for piece in weight.pieces(HEAD_BYTES):  # at least a row, which may be less
        head += piece.tobytes()
        if len(head) >= HEAD_BYTES:
            break
    return head[:HEAD_BYTES]
