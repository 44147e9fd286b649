"""What ``reelforge inspect`` says about plans: their receipts, as tables and as JSON types.

Numbers are the compiler's own, read when the plans were built; no plan is loaded and no GPU is asked.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.codec import CodecError, from_json, to_json
from reelforge.runtime.errors import BundleError, RequestError
from reelforge.runtime.manifest import PlanEntry, ProfileEntry
from reelforge.runtime.receipt import RECEIPT_VERSION, LayerRecord, Receipt
from reelforge.tools import console

COMPUTING_KINDS = ("gemm", "attention", "convolution")
"""Kinds of layers whose precision matters, and is shown."""

_SHORT = {"BFloat16": "BF16", "Half": "FP16", "Float": "FP32", "Int8": "INT8", "Int32": "INT32", "Int64": "INT64"}
"""What compilers call types, and what everybody else does; a word that is not here is shown as it is."""

_REBUILD = "copy the bundle again, or rebuild it with build-engine"


@dataclass(frozen=True)
class PlanReceipt:
    """One plan of a bundle with its receipt."""

    stage: str
    plan: PlanEntry
    receipt: Receipt
    sha256: str

    @property
    def name(self) -> str:
        """The stage, and the number of the part if there are several."""
        return self.stage if self.plan.parts == 1 else f"{self.stage}.{self.plan.part}"


def read_receipts(bundle: Bundle) -> tuple[PlanReceipt, ...]:
    """Read the receipts of all plans of a bundle, in the manifest's order; none if it has no plans.

    Raises:
        BundleError: If a receipt or a plan is not among the bundle's files, or a receipt cannot be read, is of another
            version, or describes another plan.
    """
    files = {entry.path: entry for entry in bundle.manifest.files}
    found = []
    for stage in bundle.manifest.stages:
        for plan in stage.plans:
            for path in (plan.path, plan.receipt):
                if path not in files:
                    raise BundleError(
                        f"file 'manifest.json' of bundle {bundle.name!r} names {path!r} of stage {stage.name!r} "
                        "but does not list it.",
                        fix=_REBUILD,
                    )
            receipt = _read_receipt(bundle, plan.receipt)
            digest = files[plan.path].sha256 or ""
            names = (stage.name, f"{stage.name}.{plan.part}")  # a part is a stage of its own to the compiler
            if receipt.stage not in names or receipt.plan_sha256 != digest:
                raise BundleError(
                    f"receipt {plan.receipt!r} of bundle {bundle.name!r} describes another plan.",
                    received=f"stage {receipt.stage!r}, sha256 {receipt.plan_sha256}",
                    expected=f"stage {stage.name!r}, sha256 {digest}",
                    fix=_REBUILD,
                )
            found.append(PlanReceipt(stage.name, plan, receipt, digest))
    return tuple(found)


def _read_receipt(bundle: Bundle, path: str) -> Receipt:
    try:
        value: Any = json.loads((bundle.path / path).read_text(encoding="utf-8"))
        version = value.get("version") if isinstance(value, dict) else None
        if version == RECEIPT_VERSION:
            return from_json(Receipt, value)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, CodecError) as error:
        raise BundleError(
            f"receipt {path!r} of bundle {bundle.name!r} cannot be read: {error}.", fix=_REBUILD
        ) from error
    raise BundleError(
        f"receipt {path!r} of bundle {bundle.name!r} has a version that this reelforge does not read.",
        received=repr(version),
        expected=str(RECEIPT_VERSION),
        fix="rebuild the bundle with this reelforge, or install the reelforge that built it",
    )


def of_stage(bundle: Bundle, receipts: Iterable[PlanReceipt], stage: str) -> tuple[PlanReceipt, ...]:
    """Return the receipts of one stage.

    Raises:
        RequestError: If the bundle has no such stage, or the stage no plans.
    """
    chosen = tuple(each for each in receipts if each.stage == stage)
    if chosen:
        return chosen
    names = [entry.name for entry in bundle.manifest.stages]
    if stage not in names:
        raise RequestError(
            f"bundle {bundle.name!r} has no stage {stage!r}.",
            received=stage,
            expected=", ".join(names),
            fix="use one of them with --layers",
        )
    raise RequestError(
        f"stage {stage!r} of bundle {bundle.name!r} has no plans whose layers could be listed.",
        received=f"the target {bundle.manifest.target}",
        expected="a bundle that was built for rtx or trt",
        fix="leave --layers out; the graph's nodes are listed without it",
    )


def layer_counts(receipts: Iterable[Receipt]) -> dict[str, dict[str, int]]:
    """Return how many layers there are: kind -> precision -> number; of other kinds without precisions."""
    counts: dict[str, Counter[str]] = {}
    for receipt in receipts:
        for layer in receipt.layers:
            precision = precision_of(layer) if layer.kind in COMPUTING_KINDS else "all"
            counts.setdefault(layer.kind, Counter())[precision] += 1
    return {kind: dict(sorted(counts[kind].items())) for kind in sorted(counts)}


def precision_of(layer: LayerRecord) -> str:
    """Return the type of a layer's first input, in which it computes."""
    return _SHORT.get(layer.inputs[0], layer.inputs[0]) if layer.inputs else "none"


def plan_json(item: PlanReceipt, layers: bool = False) -> dict[str, Any]:
    """Return a plan as JSON types; its layers are counted, or listed too if ``layers``."""
    plan, receipt = item.plan, item.receipt
    return {
        "stage": item.stage,
        "path": plan.path,
        "sha256": item.sha256,
        "architectures": list(plan.architectures),
        "part": plan.part,
        "parts": plan.parts,
        "backend": plan.backend,
        "plan_bytes": receipt.plan_bytes,
        "weight_bytes": receipt.weight_bytes,
        "activation_bytes": dict(receipt.activation_bytes),
        "profiles": to_json(plan.profiles),
        "build_seconds": receipt.build_seconds,
        "layer_counts": layer_counts([receipt]),
        **({"layers": to_json(receipt.layers)} if layers else {}),
    }


def plan_table(receipts: Sequence[PlanReceipt]) -> Table:
    """Every plan in a row: what it computes in which precision, and what it weighs."""
    table = slim_table("plans")
    table.add_column("plan, for", no_wrap=True)
    for heading in ("GEMMs", "atten-\ntion", "conv."):
        table.add_column(heading, min_width=5, overflow="fold")
    for heading in ("reformat\n/cast", "layers", "weights", "plan", "built"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, item in enumerate(receipts):
        counts, receipt = layer_counts([item.receipt]), item.receipt
        moved = [sum(counts.get(kind, {}).values()) for kind in ("reformat", "cast")]
        table.add_row(
            f"{item.name}\n{architectures_text(item.plan.architectures)}",
            *(precisions_text(counts.get(kind, {})) for kind in COMPUTING_KINDS),
            f"{moved[0]}/{moved[1]}",
            str(len(receipt.layers)),
            console.format_bytes(receipt.weight_bytes),
            console.format_bytes(receipt.plan_bytes),
            f"{receipt.build_seconds:.1f} s",
            end_section=index == len(receipts) - 1 and len(receipts) > 1,
        )
    if len(receipts) > 1:
        every = [item.receipt for item in receipts]
        totals = (sum(each.weight_bytes for each in every), sum(each.plan_bytes for each in every))
        seconds = sum(each.build_seconds for each in every)
        sizes = (console.format_bytes(size) for size in totals)
        layers = sum(len(each.layers) for each in every)
        table.add_row("all", "", "", "", "", str(layers), *sizes, f"{seconds:.1f} s")
    return table


def profile_table(receipts: Sequence[PlanReceipt]) -> Table:
    """Every profile of every plan: the device memory it takes, and the sizes it serves."""
    table = slim_table("profiles: device memory beside weights, inputs and outputs")
    for heading in ("plan", "for", "profile", "activations"):
        table.add_column(heading, justify="right" if heading == "activations" else "left", no_wrap=True)
    table.add_column("sizes (tuned for, if not the largest)")
    for item in receipts:
        for index, profile in enumerate(item.plan.profiles):
            stated = item.receipt.activation_bytes.get(profile.name)
            table.add_row(
                "" if index else item.name,
                "" if index else architectures_text(item.plan.architectures),
                profile.name,
                "unknown" if stated is None else console.format_bytes(stated),
                Text("\n".join(_ranges(profile))),
                end_section=index == len(item.plan.profiles) - 1,
            )
    return table


def layer_table(item: PlanReceipt) -> Table:
    """Every layer of a plan, in the order of execution."""
    title = f"{item.name} for {'+'.join(item.plan.architectures)}: {len(item.receipt.layers)} layers"
    table = slim_table(title)
    table.add_column("#", justify="right", no_wrap=True)
    for heading in ("kind", "inputs", "constants", "outputs"):
        table.add_column(heading, no_wrap=True)
    table.add_column("kernel", overflow="fold", max_width=24)
    table.add_column("layer", overflow="fold")
    for index, layer in enumerate(item.receipt.layers):
        types = (Text("\n".join(words_of(names))) for names in (layer.inputs, layer.constants, layer.outputs))
        name = Text(layer.name.replace("+", "+\n"))  # what the compiler has merged, one to a line
        table.add_row(str(index), layer.kind, *types, Text(_kernel(layer)), name)
    return table


def _kernel(layer: LayerRecord) -> str:
    """Return the kernel's name where the layer's kind and name do not tell it already."""
    stem = re.sub(r"_0x[0-9a-f]+$", "", layer.kernel)
    return "" if stem == layer.kind or layer.name.startswith(stem) else stem


def slim_table(title: str) -> Table:
    """Return an empty table that leaves as much of a narrow screen as possible to its content."""
    return Table(
        header_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        title=title,
        title_style="bold italic",
        title_justify="left",
    )


def words_of(names: Sequence[str]) -> list[str]:
    """Shorten a list of types: ``FP8 x3`` for three of them in a row."""
    words: list[list[Any]] = []
    for name in (_SHORT.get(each, each) for each in names):
        if words and words[-1][0] == name:
            words[-1][1] += 1
        else:
            words.append([name, 1])
    return [name if count == 1 else f"{name} x{count}" for name, count in words]


def precisions_text(counts: dict[str, int]) -> str:
    """Show ``{"FP8": 240, "BF16": 3}`` as one line each, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return "\n".join(f"{count} {precision}" for precision, count in ordered) or "-"


def architectures_text(architectures: Sequence[str]) -> str:
    """Show architectures two to a line."""
    pairs = ["+".join(architectures[index : index + 2]) for index in range(0, len(architectures), 2)]
    return "+\n".join(pairs)


def _ranges(profile: ProfileEntry) -> list[str]:
    lines = []
    for name, (least, best, most) in profile.dimensions.items():
        sizes = f"{least}" if least == most else f"{least}..{most}"
        lines.append(f"{name} {sizes}" + (f" ({best})" if best != most else ""))
    return lines
