"""Runs our own quantiser on one fp32 bundle, in a child process (``our_quantiser_child``) measured as the peers' are.

It runs the bundle's whole pipeline over the prompts, observes it, chooses scales, and writes a complete bundle with an
8-bit ``dit`` from the product's own pieces; the source of the weights is the bundle itself. The last line of its output
is JSON like that of ``peer_quantiser``. Nothing is evaluated.

Only the modules that do this work are imported. The commands take all of ``export`` along, and with it transformers and
``torch.export``, which build fp32 bundles.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, cast

import onnx_ir as ir
from onnx_ir.passes import common

from reelforge.calibration.scale_file import ScaleFile
from reelforge.calibration.scale_methods import ScaleMethod
from reelforge.export.calibrate import CalibrationOptions, calibrate
from reelforge.export.checkpoint.safetensors_writer import write_converted
from reelforge.export.checkpoint.tensor_ref import TensorRef
from reelforge.export.folded_weight import FoldedWeight
from reelforge.export.graph_file import count_nodes, graph_bytes, graph_digest
from reelforge.export.models.hunyuan_video.quantisation import quantisation_rules
from reelforge.export.passes.layers import weighted_layers
from reelforge.export.passes.lower_float8 import LowerFloat8Pass
from reelforge.export.passes.quantise_layers import IntegerInputs, QuantisedLayer, QuantiseLayersPass
from reelforge.export.quantisation import NUMBER_FORMATS, StagePlan, plan_quantisation
from reelforge.export.quantised_weights import place_quantised
from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.bundle.write import BundleWriter
from reelforge.runtime.manifest import StageEntry, WeightEntry
from reelforge.runtime.recipe import Precision, VideoShape

if TYPE_CHECKING:  # importing it imports PyTorch
    from reelforge.export.stage import Stage

STAGE = "dit"
PACKAGES = {"reelforge": "reelforge", "onnxruntime": "onnxruntime", "onnx_ir": "onnx-ir", "torch": "torch"}
"""Modules whose packages are named with the result, if they were imported."""

_DTYPES = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "I8": ir.DataType.INT8,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
}


@dataclass(frozen=True)
class Job:
    """What one child process is to do.

    Attributes:
        bundle: In fp32, all stages.
        prompts: To calibrate with.
        seed: Of the first prompt's noise.
        precision: ``int8`` or ``fp8``.
        method: A value of ``ScaleMethod``.
        smoothing: SmoothQuant's alpha, or None.
        steps: Sampling steps; None means the default.
        output: The new bundle's folder.
        shape: Of the videos, ``HEIGHTxWIDTHxFRAMES``; None means the default.
    """

    bundle: str
    prompts: Sequence[str]
    seed: int
    precision: str
    method: str
    smoothing: float | None
    steps: int | None
    output: str
    shape: str | None = None


def quantise(job: Job) -> None:
    """Calibrate and write the quantised bundle."""
    bundle = Bundle.open(job.bundle, Check.SIZES)
    rules = quantisation_rules(bundle.manifest.spec)[STAGE]
    number_format = NUMBER_FORMATS[Precision(job.precision)]
    layers = [name for name in weighted_layers(ir.load(bundle.graph(STAGE)).graph) if rules.covers(name)]
    formats = {STAGE: dict.fromkeys(layers, number_format)}
    options = CalibrationOptions(
        tuple(job.prompts),
        ScaleMethod(job.method),
        smoothing=job.smoothing,
        seed=job.seed,
        steps=job.steps,
        shape=None if job.shape is None else VideoShape.parse(job.shape),
    )
    scales = ScaleFile(Path(job.output), *calibrate(bundle, formats, rules.groups, options))
    stages = {entry.name: cast("Stage", _Parameters(entry)) for entry in bundle.manifest.stages}
    plans = plan_quantisation(formats, {}, rules.groups, scales, stages)
    with BundleWriter(job.output) as writer:
        entries = tuple(
            _write_stage(bundle, entry, plans[entry.name], writer)
            if entry.name in plans
            else _link_stage(bundle, entry, writer)
            for entry in bundle.manifest.stages
        )
        for file in bundle.manifest.files:
            if file.path.startswith("tokenizers/"):
                writer.add_file(bundle.path / file.path, file.path)
        writer.seal(replace(bundle.manifest, stages=entries))


@dataclass(frozen=True)
class _Parameters:
    """What a plan asks a ``Stage`` for; making one would import transformers."""

    entry: StageEntry

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return {weight.name: weight.shape for weight in self.entry.weights}


def _link_stage(bundle: Bundle, entry: StageEntry, writer: BundleWriter) -> StageEntry:
    writer.add_bytes(entry.graph, bundle.graph(entry.name).read_bytes())
    _link_files(bundle, entry.weights, writer)
    return entry


def _link_files(bundle: Bundle, weights: Iterable[WeightEntry], writer: BundleWriter) -> None:
    for file in sorted({weight.file for weight in weights}):
        if not (writer.folder / file).exists():
            writer.link_weight_file(bundle.path / file, file)


def _write_stage(bundle: Bundle, entry: StageEntry, plan: StagePlan, writer: BundleWriter) -> StageEntry:
    """Write one stage that quantisation changes; weights that stay as they are remain in the bundle's own files."""
    stored = {
        weight.name: TensorRef(weight.name, bundle.path / weight.file, weight.offset, weight.dtype, weight.shape)
        for weight in entry.weights
    }
    how = {f"{layer}.weight": layer_plan.weight for layer, layer_plan in plan.layers.items()}
    placed = place_quantised(writer, entry.name, {name: stored[name] for name in how}, how)
    changed = {name: FoldedWeight(stored[name], affine) for name, affine in plan.folded.items()}
    folded = _write_folded(entry.name, changed, writer)
    model = ir.load(bundle.graph(entry.name))
    for name, weight in folded.items():
        value = model.graph.initializers[name]
        value.const_value = _external(weight)
        value.type = ir.TensorType(value.const_value.dtype)
    layers = {}
    for layer, layer_plan in plan.layers.items():
        codes, scale = placed[f"{layer}.weight"]
        layers[layer] = QuantisedLayer(_external(codes), _external(scale), layer_plan.activation)
    for graph_pass in (
        QuantiseLayersPass(layers, IntegerInputs.UNSIGNED),
        LowerFloat8Pass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    ):
        graph_pass(model)
    weights = {weight.name: folded.get(weight.name, weight) for weight in entry.weights if weight.name not in how}
    _link_files(bundle, weights.values(), writer)
    weights.update({weight.name: weight for pair in placed.values() for weight in pair})
    data = graph_bytes(model)
    writer.add_bytes(entry.graph, data)
    return replace(
        entry,
        graph_digest=graph_digest(data, weights),
        weights=tuple(weights.values()),
        nodes=count_nodes(model),
        tolerance=None,
    )


def _write_folded(stage: str, weights: Mapping[str, FoldedWeight], writer: BundleWriter) -> dict[str, WeightEntry]:
    if not weights:
        return {}
    file = f"weights/{stage}.folded.safetensors"
    written = write_converted(writer.path(file), weights)
    return {
        name: WeightEntry(name, one.ref.dtype, tuple(one.ref.shape), file, one.ref.offset, one.ref.nbytes, one.sha256)
        for name, one in written.items()
    }


def _external(entry: WeightEntry) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        entry.file, entry.offset, entry.length, _DTYPES[entry.dtype], shape=ir.Shape(entry.shape), name=entry.name
    )


def main(path: str) -> None:
    """Run the job in the file ``path``."""
    sys.stderr = sys.stdout  # the parent shows the error's last line
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    started = time.monotonic()
    quantise(job)
    seconds = time.monotonic() - started
    versions = {package: version(package) for module, package in PACKAGES.items() if module in sys.modules}
    print(json.dumps({"seconds": seconds, "versions": versions}))
