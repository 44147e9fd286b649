"""The bundle's manifest: every file, tensor and digest of a bundle, as data (``manifest.json``).

The **content digest** names what the bundle computes and not how its files happen to be cut: it covers the spec, the
recipe, the target, the prompt template, the default step cache, the tokenizers, each graph with its weights replaced
by their digests, and the digest of each weight. Two checkpoints in different formats with equal weights therefore
give equal content digests.
The module knows the shape of the data, not how files are read or written (see ``runtime.bundle``).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from reelforge.runtime.codec import to_json
from reelforge.runtime.quality import QualityReport
from reelforge.runtime.recipe import Recipe, Target
from reelforge.runtime.spec import ModelSpec

SCHEMA_VERSION = 4


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a stage; a named dimension is a string, a fixed one a number."""

    name: str
    dtype: str  # numpy's name: "float32", "int64"
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class WeightEntry:
    """One weight that a graph references: ``length`` bytes from ``offset`` of ``file`` (relative to the bundle)."""

    name: str
    dtype: str  # safetensors' name: "BF16", "F16", "F32", "I8", "F8_E4M3"
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int
    sha256: str


@dataclass(frozen=True)
class ProfileEntry:
    """One optimisation profile of a plan: the sizes that it takes.

    Attributes:
        name: The shape bucket's, for example ``720x1280x129``; or ``default`` where one profile serves all.
        dimensions: Named dimension -> (minimum, optimum, maximum).
        activation_bytes: Device memory that the backend asks for beside weights, inputs and outputs.
    """

    name: str
    dimensions: dict[str, tuple[int, int, int]]
    activation_bytes: int


@dataclass(frozen=True)
class PlanEntry:
    """One compiled plan of a stage, or of one part of it.

    Attributes:
        path: In the bundle, ``plans/<stage>[.<part>].<architectures>.plan``.
        receipt: In the bundle, ``receipts/<the plan's file name>.json``.
        architectures: Keys of ``runtime.architectures.ARCHITECTURES`` that it serves; a stage has one plan (or one
            series of parts) per group of architectures that can share one.
        part: Index of the part, from 0; parts of one group are run one after the other.
        parts: How many parts the stage is cut into.
        inputs: Of the part; a cut adds tensors that pass from part to part.
        outputs: Likewise.
        profiles: At least one.
        weight_bytes: Constants inside the plan, as the receipt counts them.
        backend: Library and version, ``tensorrt_rtx 1.7.1.116``: a plan serves no other version.
    """

    path: str
    receipt: str
    architectures: tuple[str, ...]
    part: int
    parts: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    profiles: tuple[ProfileEntry, ...]
    weight_bytes: int
    backend: str


@dataclass(frozen=True)
class StageEntry:
    """One stage of the bundle."""

    name: str
    graph: str  # file name at the bundle's root
    graph_digest: str  # of the graph with weights replaced by their digests
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    weights: tuple[WeightEntry, ...]
    tolerance: float | None  # largest absolute difference from fp32 at output scale 1-4; None: see Manifest.quality
    parity: float | None  # largest absolute difference measured when the bundle was built; None if it was not measured
    nodes: dict[str, int]  # operator type -> count
    plans: tuple[PlanEntry, ...] = ()  # empty where the backend runs the graph itself


@dataclass(frozen=True)
class FileEntry:
    """A whole file of the bundle; ``sha256`` is None for weight files, whose referenced ranges have their own."""

    path: str
    bytes: int
    sha256: str | None


@dataclass(frozen=True)
class PromptTemplate:
    """The text around a prompt, with one ``{}`` slot, and how many leading tokens are cropped from the states."""

    text: str
    crop_start: int
    source: str  # where it came from: "checkpoint", "diffusers 0.42.1", "--prompt-template"


@dataclass(frozen=True)
class Manifest:
    """Everything a bundle says about itself."""

    schema_version: int
    spec: ModelSpec
    target: Target
    recipe: Recipe
    prompt_template: PromptTemplate
    stages: tuple[StageEntry, ...]
    files: tuple[FileEntry, ...]
    provenance: dict[str, str]  # checkpoint layout, tool and library versions; not part of the content digest
    content_digest: str
    quality: QualityReport | None = None  # what quantisation costs; None: nothing is quantised, or it was not measured
    step_cache: str | None = None  # of requests that say nothing about it, as --step-cache writes it

    def stage(self, name: str) -> StageEntry | None:
        """Return the entry of stage ``name``, or None."""
        return next((entry for entry in self.stages if entry.name == name), None)

    @property
    def parted(self) -> bool:
        """Whether the bundle has head, body and tail of ``dit``."""
        return self.stage("dit_head") is not None

    def with_content_digest(self) -> Manifest:
        """Return a copy whose ``content_digest`` is computed from the content."""
        return replace(self, content_digest=content_digest(self))


def content_digest(manifest: Manifest) -> str:
    """Return the sha256 that names what the bundle computes (see the module's docstring)."""
    tokenizers = {entry.path: entry.sha256 for entry in manifest.files if entry.path.startswith("tokenizers/")}
    content: dict[str, Any] = {
        "schema_version": manifest.schema_version,
        "spec": to_json(manifest.spec),
        "target": to_json(manifest.target),
        "recipe": to_json(manifest.recipe),
        "template": [manifest.prompt_template.text, manifest.prompt_template.crop_start],
        "tokenizers": tokenizers,
        "stages": {
            entry.name: [entry.graph_digest, {weight.name: weight.sha256 for weight in entry.weights}]
            for entry in manifest.stages
        },
        # Bundles without a default, which most are, have the digest that they had before there was one.
        **({} if manifest.step_cache is None else {"step_cache": manifest.step_cache}),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
