"""Bundles with plans and receipts but without a compiler: what is in them is stated here, layer by layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reelforge.runtime.bundle.write import BundleWriter
from reelforge.runtime.codec import to_json
from reelforge.runtime.manifest import (
    SCHEMA_VERSION,
    Manifest,
    PlanEntry,
    ProfileEntry,
    PromptTemplate,
    StageEntry,
    WeightEntry,
)
from reelforge.runtime.quality import QualityReport
from reelforge.runtime.receipt import RECEIPT_VERSION, LayerRecord, Receipt
from reelforge.runtime.recipe import Precision, Recipe, Target
from reelforge.runtime.spec import ModelSpec
from tests.runtime import fake_bundle

BACKEND = "tensorrt_rtx 1.7.1.116"


@dataclass(frozen=True)
class Part:
    """One plan to write: its layers, and what its receipt says besides."""

    layers: tuple[LayerRecord, ...]
    data: bytes = b"plan"
    weight_bytes: int = 12_345_678
    profiles: tuple[ProfileEntry, ...] = (ProfileEntry("default", {"batch": (1, 1, 1)}, 1_500_000_000),)
    build_seconds: float = 12.5


def gemm(node: str, precision: str = "FP8", out: str = "BFloat16") -> LayerRecord:
    return LayerRecord(f"{node}/MatMul+{node}/Add_myl0_1", "gemm", "gemm", (precision,), (out,), (precision,), (node,))


def attention(node: str, precision: str = "FP8") -> LayerRecord:
    kernel = "_gemm_mha_v2"
    return LayerRecord(f"{kernel}_{node}", "attention", kernel, (precision,) * 3, ("BFloat16",), (), (node,))


def other(kind: str, name: str = "x", *types: str) -> LayerRecord:
    return LayerRecord(name, kind, kind, types or ("BF16",), types or ("Float",), (), ())


def dit_layers(gemms: str, attentions: str, blocks: Sequence[int] = (0, 1)) -> tuple[LayerRecord, ...]:
    """Each block has three products, an attention, a cast and a norm; block 1 is followed by a product in BF16."""
    layers: list[LayerRecord] = [other("reformat", "Reformatting CopyNode for latents")] if 0 in blocks else []
    for k in blocks:
        layers += [gemm(f"double.{k}.image.{name}", gemms) for name in ("q", "k", "fc1")]
        layers += [attention(f"double.{k}.attention", attentions), other("cast"), other("other", f"norm{k}")]
    return (*layers, gemm("final.proj", "BF16")) if max(blocks) == 1 else tuple(layers)


Plans = Mapping[str, Mapping[str, Sequence[Part]]]
"""Stage -> architectures as a target has them -> parts."""


@dataclass(frozen=True)
class Written:
    """What of a bundle can differ from another's."""

    target: str = "rtx:sm89+sm120"
    plans: Plans = field(default_factory=dict)
    stages: tuple[str, ...] = ("modulation", "dit", "vae_decoder")
    spec: ModelSpec = fake_bundle.SPEC
    template: PromptTemplate = fake_bundle.TEMPLATE
    precision: Mapping[str, Precision] = field(default_factory=dict)
    quality: QualityReport | None = None
    provenance: Mapping[str, str] = field(default_factory=lambda: {"reelforge": "test"})
    recipe: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Mapping[str, tuple[str, bytes]]] = field(default_factory=dict)  # stage -> name -> type, data


def write_plan_bundle(destination: Path, what: Written) -> Manifest:
    """Write a bundle and return its manifest."""
    with BundleWriter(destination) as writer:
        entries = []
        for name in what.stages:
            entry = getattr(fake_bundle, name)().finish(writer)
            entry = _with_weights(entry, what.weights.get(name, {}), writer)
            entries.append(replace(entry, plans=_write_plans(entry, what.plans.get(name, {}), writer)))
        recipe = Recipe(
            {name: what.precision.get(name, Precision.BF16) for name in what.stages}, (), **dict(what.recipe)
        )
        manifest = Manifest(
            SCHEMA_VERSION,
            what.spec,
            Target.parse(what.target),
            recipe,
            what.template,
            tuple(entries),
            (),
            dict(what.provenance),
            "",
            what.quality,
        )
        return writer.seal(manifest)


def _with_weights(entry: StageEntry, more: Mapping[str, tuple[str, bytes]], writer: BundleWriter) -> StageEntry:
    if not more:
        return entry
    file, blob, weights = f"weights/{entry.name}.more", b"", list(entry.weights)
    for name, (dtype, data) in more.items():
        digest = hashlib.sha256(data).hexdigest()
        weights.append(WeightEntry(name, dtype, (len(data),), file, len(blob), len(data), digest))
        blob += data
    writer.add_bytes(file, blob)
    digest = hashlib.sha256(entry.graph_digest.encode() + blob).hexdigest()
    return replace(entry, weights=tuple(weights), graph_digest=digest)


def _write_plans(
    entry: StageEntry, groups: Mapping[str, Sequence[Part]], writer: BundleWriter
) -> tuple[PlanEntry, ...]:
    plans = []
    for group, parts in groups.items():
        architectures = tuple(group.split("+"))
        for number, part in enumerate(parts):
            stage = f"{entry.name}.{number}" if len(parts) > 1 else entry.name
            name = f"{stage}.{group}.plan"
            data = part.data + name.encode()
            writer.add_bytes(f"plans/{name}", data)
            receipt = Receipt(
                RECEIPT_VERSION,
                stage,
                hashlib.sha256(data).hexdigest(),
                len(data),
                BACKEND,
                architectures,
                part.layers,
                part.weight_bytes,
                {profile.name: profile.activation_bytes for profile in part.profiles},
                part.build_seconds,
            )
            writer.add_bytes(f"receipts/{name}.json", json.dumps(to_json(receipt)).encode())
            plans.append(
                PlanEntry(
                    f"plans/{name}",
                    f"receipts/{name}.json",
                    architectures,
                    number,
                    len(parts),
                    entry.inputs,
                    entry.outputs,
                    part.profiles,
                    part.weight_bytes,
                    BACKEND,
                )
            )
    return tuple(plans)
