"""Build: from a checkpoint to a sealed bundle.

The order is fixed: everything that can be refused is refused first (output folder, checkpoint, template, shapes); then
weights are placed in a thread while parts are traced; then each graph is assembled, lowered, checked and written; the
manifest seals it. The module knows no model: a :class:`Family` says what there is to build.
"""

from __future__ import annotations

import platform
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
from tokenizers import Tokenizer

from reelforge.export.assemble import assemble_stage, capture_stage
from reelforge.export.checkpoint.component import Checkpoint
from reelforge.export.checkpoint.open import open_checkpoint
from reelforge.export.checkpoint.sources import Resolved
from reelforge.export.family import FAMILIES
from reelforge.export.graph_file import check_graph, count_nodes, graph_bytes, graph_digest
from reelforge.export.lower import lower
from reelforge.export.models.hunyuan_video.spec_from_checkpoint import Numerics
from reelforge.export.prompt_template import find_prompt_template
from reelforge.export.stage import Stage
from reelforge.export.tokenizers import tokenizer_json
from reelforge.export.verify import measure_parity
from reelforge.export.weights import WeightPlacer, converted_bytes, resolve_stages
from reelforge.runtime.bundle.write import BundleWriter
from reelforge.runtime.errors import CheckpointError, RequestError
from reelforge.runtime.manifest import SCHEMA_VERSION, Manifest, StageEntry, WeightEntry
from reelforge.runtime.recipe import Precision, Recipe, Target, VideoShape
from reelforge.runtime.spec import ModelSpec

_LIBRARIES = ("reelforge", "torch", "onnx", "onnx-ir", "onnxscript", "transformers")


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        checkpoint: Folder in diffusers' or Tencent's layout.
        output: The bundle's folder; it must not exist.
        target: Backend.
        precision: Of every stage.
        shapes: Video shapes to serve; empty for any.
        stages: Names of the stages to build; empty for all.
        batch: Largest number of videos per call of ``dit``.
        numerics: Which reference implementation's numbers to follow.
        prompt_template: File that replaces the checkpoint's template.
        verify: Whether to run each stage against its reference and store the difference.
    """

    checkpoint: Path
    output: Path
    target: Target
    precision: Precision = Precision.FP32
    shapes: tuple[VideoShape, ...] = ()
    stages: tuple[str, ...] = ()
    batch: int = 1
    numerics: Numerics = Numerics.TENCENT
    prompt_template: Path | None = None
    verify: bool = False


@dataclass
class BuildEvents:
    """Where a build tells what it does; every callable may be replaced, and none does anything by default.

    Attributes:
        weights: (stage, bytes of it done, bytes of it in all).
        stage: A stage's entry, when its graph is written.
        notice: Something that a person should know.
    """

    weights: Callable[[str, int, int], None] = lambda _stage, _done, _total: None
    stage: Callable[[StageEntry], None] = lambda _entry: None
    notice: Callable[[str], None] = lambda _text: None


class _Abandoned(BaseException):
    """Raised in the weights' thread when the build has already failed elsewhere."""


def build_bundle(request: BuildRequest, events: BuildEvents | None = None) -> Manifest:
    """Build and seal a bundle.

    Args:
        request: What to build.
        events: Where to report.

    Returns:
        The sealed manifest.

    Raises:
        RequestError: For stages or shapes that the model does not have.
        CheckpointError: If the checkpoint is incomplete, damaged, or of another family.
        BuildError: If the output folder exists or the disk is full; nothing is left of the bundle.
    """
    events = events or BuildEvents()
    with BundleWriter(request.output) as writer:
        checkpoint = open_checkpoint(request.checkpoint)
        family = FAMILIES[checkpoint.family]
        spec = family.spec(checkpoint, request.numerics)
        all_stages = family.stages(spec, request.batch)
        _check_request(request, family.stage_names, spec)
        resolved = resolve_stages(checkpoint, family.key_maps[checkpoint.layout], spec, all_stages)
        tokenizers = {role: tokenizer_json(_tokenizer(checkpoint, role), role) for role in ("llm", "clip")}
        template = find_prompt_template(
            checkpoint.path, request.prompt_template, Tokenizer.from_str(tokenizers["llm"].decode())
        )
        for role, data in tokenizers.items():
            writer.add_bytes(f"tokenizers/{role}.json", data)
        chosen = tuple(stage for stage in all_stages if not request.stages or stage.name in request.stages)
        entries = _build_stages(request, chosen, resolved, writer, events)
        recipe = Recipe.uniform(request.precision, [stage.name for stage in chosen], request.shapes, request.batch)
        provenance = {
            "checkpoint_layout": checkpoint.layout.value,
            "numerics": request.numerics.value,
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        }
        manifest = Manifest(
            SCHEMA_VERSION, spec, request.target, recipe, template, entries, (), provenance, content_digest=""
        )
        if request.verify:
            manifest = measure_parity(writer.folder, manifest, chosen)
        return writer.seal(manifest)


def _build_stages(
    request: BuildRequest,
    stages: tuple[Stage, ...],
    resolved: Mapping[str, Mapping[str, Resolved]],
    writer: BundleWriter,
    events: BuildEvents,
) -> tuple[StageEntry, ...]:
    """Place weights in threads while tracing in this one: hashing, copying and flushing release the interpreter.

    Stages with the most to convert come first, so that their files reach the disk while others are still read.
    """
    placer = WeightPlacer(writer)
    failed = threading.Event()

    def place(stage: Stage) -> dict[str, WeightEntry]:
        total = sum(weight.nbytes for weight in resolved[stage.name].values())
        done = 0

        def progress(count: int) -> None:
            nonlocal done
            if failed.is_set():
                raise _Abandoned
            done += count
            events.weights(stage.name, done, total)

        return placer.place(stage, resolved[stage.name], progress)

    by_conversion = sorted(stages, key=lambda stage: -converted_bytes(resolved[stage.name]))
    with _frequent_switches(), ThreadPoolExecutor(2) as pool:
        try:
            placed = {stage.name: pool.submit(place, stage) for stage in by_conversion}
            traces = {stage.name: capture_stage(stage, request.precision) for stage in stages}
            entries = []
            for stage in stages:
                weights = placed[stage.name].result()
                model = assemble_stage(stage, traces[stage.name], request.precision, weights)
                entries.append(_write_graph(stage, request, model, weights, writer))
                events.stage(entries[-1])
        except BaseException:
            failed.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    for name in sorted(placer.copied):
        events.notice(f"{name} was copied: the checkpoint lies on another file system, which hard links cannot cross.")
    for name, count in sorted(placer.non_finite.items()):
        events.notice(f"warning: the weight {name} holds {count} NaN or infinite elements.")
    return tuple(entries)


@contextmanager
def _frequent_switches() -> Iterator[None]:
    """Let threads that read weights have the interpreter soon, though tracing never gives it up by itself.

    At the default of 5 ms a thread waits ten times longer for each piece of a file than it then works on it.
    """
    usual = sys.getswitchinterval()
    sys.setswitchinterval(0.0003)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def _write_graph(
    stage: Stage,
    request: BuildRequest,
    model: ir.Model,
    weights: dict[str, WeightEntry],
    writer: BundleWriter,
) -> StageEntry:
    lower(model, request.target)
    data = graph_bytes(model)
    name = f"{stage.name}.onnx"
    check_graph(data, name)
    writer.add_bytes(name, data)
    return StageEntry(
        name=stage.name,
        graph=name,
        graph_digest=graph_digest(data, weights),
        inputs=stage.tensor_infos(stage.inputs),
        outputs=stage.tensor_infos(stage.outputs),
        weights=tuple(weights.values()),
        tolerance=stage.tolerance[request.precision.value],
        parity=None,
        nodes=count_nodes(model),
    )


def _check_request(request: BuildRequest, stage_names: tuple[str, ...], spec: ModelSpec) -> None:
    unknown = [name for name in request.stages if name not in stage_names]
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
