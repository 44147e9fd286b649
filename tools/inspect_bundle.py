"""``reelforge inspect``: what a bundle contains, for people and for machines, and how it differs from another.

Knows the manifest and the receipts; no engine is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.codec import to_json
from reelforge.runtime.errors import RequestError
from reelforge.runtime.manifest import Manifest, StageEntry
from reelforge.runtime.request import default_shape
from reelforge.tools import console
from reelforge.tools.build_report import quality_table, whole_of
from reelforge.tools.inspect_diff import compare_bundles
from reelforge.tools.inspect_diff_tables import difference
from reelforge.tools.inspect_receipts import (
    PlanReceipt,
    layer_table,
    of_stage,
    plan_json,
    plan_table,
    profile_table,
    read_receipts,
)

_CODES = ("I8", "F8_E4M3")
_NUMBERS = {"weights", "tensors", "parity", "limit"}


@click.command(epilog=console.EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--check",
    type=click.Choice([check.value for check in Check]),
    default=Check.FULL.value,
    show_default=True,
    help="What is verified: every digest, or only presence and sizes (instant for large bundles).",
)
@click.option("--layers", metavar="STAGE", help="List every layer of the stage's plans, as the compiler names them.")
@click.option("--diff", "other", type=click.Path(path_type=Path), help="Compare BUNDLE with this one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def inspect(bundle: Path, check: str, layers: str | None, other: Path | None, as_json: bool) -> None:
    """Show what BUNDLE contains: stages, tensors, precision, weights, digests, parity and provenance.

    The bundle is checked first, so the command also answers whether a copy is intact. Of a bundle with compiled plans
    it shows what the compiler made of them: how many products and attentions in which precision, weights, memory.

    \b
    Examples:
      reelforge inspect my.bundle
      reelforge inspect my.bundle --check sizes
      reelforge inspect my.bundle --json | jq -r .content_digest
      reelforge inspect my.bundle --layers dit
      reelforge inspect bf16.bundle --diff fp8.bundle
    """  # noqa: D301 - \b is click's mark for text that it does not wrap
    if layers is not None and other is not None:
        raise RequestError(
            "--layers and --diff are given together.",
            received=f"--layers {layers} --diff {other}",
            expected="one of them",
            fix="compare with --diff, which lists the layers whose precision differs (all of them with --json)",
        )
    opened = Bundle.open(bundle, Check(check))
    if other is not None:
        found = compare_bundles(opened, Bundle.open(other, Check(check)))
        _show(to_json(found) if as_json else difference(found), as_json)
    elif layers is not None:
        receipts = of_stage(opened, read_receipts(opened), layers)
        about = {"bundle": str(opened.path), "stage": layers, "plans": [plan_json(each, True) for each in receipts]}
        for shown in [about] if as_json else [layer_table(each) for each in receipts]:
            _show(shown, as_json)
    elif as_json:
        _show(summary(opened, Check(check)), as_json)
    else:
        _print(opened, Check(check))


def _show(value: Any, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(value, ensure_ascii=False))
    else:
        Console(highlight=False).print(value)


def summary(bundle: Bundle, check: Check) -> dict[str, Any]:
    """Return everything that the command knows about a bundle, as JSON types; weights and layers are counted only."""
    manifest = bundle.manifest
    receipts = read_receipts(bundle)
    return {
        "bundle": str(bundle.path),
        "check": check.value,
        "schema_version": manifest.schema_version,
        "content_digest": manifest.content_digest,
        "target": str(manifest.target),
        "spec": to_json(manifest.spec),
        "recipe": to_json(manifest.recipe),
        "prompt_template": to_json(manifest.prompt_template),
        "files_bytes": sum(entry.bytes for entry in manifest.files),
        "stages": [_stage_summary(manifest, entry, receipts) for entry in manifest.stages],
        "files": to_json(manifest.files),
        "provenance": dict(manifest.provenance),
        "quality": to_json(manifest.quality),
    }


def _stage_summary(manifest: Manifest, entry: StageEntry, receipts: Sequence[PlanReceipt]) -> dict[str, Any]:
    return {
        "name": entry.name,
        "graph": entry.graph,
        "graph_digest": entry.graph_digest,
        "precision": _precision(manifest, entry),
        "weights_of": None if (whole := whole_of(entry, manifest.stages)) is None else whole.name,
        "inputs": to_json(entry.inputs),
        "outputs": to_json(entry.outputs),
        "weights": len(entry.weights),
        "weights_bytes": weights_bytes(entry),
        "weight_files": sorted({weight.file for weight in entry.weights}),
        "nodes": dict(entry.nodes),
        "tolerance": entry.tolerance,
        "parity": entry.parity,
        "plans": [plan_json(item) for item in receipts if item.stage == entry.name],
    }


def weights_bytes(entry: StageEntry) -> int:
    """Return how many bytes of weights a stage refers to; a range that it uses twice counts once."""
    return sum(length for _, _, length in {(weight.file, weight.offset, weight.length) for weight in entry.weights})


def _precision(manifest: Manifest, entry: StageEntry) -> str:
    """Return a stage's precision; a recipe says of a view only what it has beside the 8-bit layers of the whole."""
    whole = whole_of(entry, manifest.stages)
    in_codes = any(weight.dtype in _CODES for weight in entry.weights)
    precision = manifest.recipe.precision.get(entry.name if whole is None or not in_codes else whole.name)
    return precision.value if precision is not None else "unstated"


def _asked(manifest: Manifest) -> list[tuple[str, str]]:
    """Return what the recipe says beyond stages and shapes, and only if it says something."""
    recipe = manifest.recipe
    said = []
    if recipe.attention is not None:
        said.append(("attention", f"{recipe.attention.value}, of dit"))
    if recipe.sparse_attention is not None:
        sparse = recipe.sparse_attention
        blocks = f"{sparse.query_block} queries and {sparse.key_block} keys"
        said.append(("sparse attention", f"{sparse.kind.value}, blocks of {blocks}"))
    if recipe.quantised_stages():
        said.append(("beside 8 bits", recipe.high_precision.value))
    for stage, patterns in recipe.kept.items():
        said.append(("kept", f"{stage}: {', '.join(patterns)} in {recipe.high_precision.value}"))
    if recipe.batch > 1:
        said.append(("videos per call", str(recipe.batch)))
    if manifest.step_cache is not None:
        said.append(("step cache", f"{manifest.step_cache}, for requests that say nothing"))
    return said


def _print(bundle: Bundle, check: Check) -> None:
    manifest = bundle.manifest
    screen = Console(highlight=False)
    shapes = ", ".join(str(shape) for shape in manifest.recipe.shapes) or "every size of the model's grid"
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in (
        ("bundle", f"{bundle.path} ({console.format_bytes(sum(entry.bytes for entry in manifest.files))})"),
        ("check", "every digest fits" if check is Check.FULL else "every file is present with its size"),
        ("model", manifest.spec.family),
        ("target", str(manifest.target)),
        ("shapes", f"{shapes}; default {default_shape(manifest)} (height x width x frames)"),
        *_asked(manifest),
        ("content", manifest.content_digest),
        ("template", f"{manifest.prompt_template.source}, crops {manifest.prompt_template.crop_start} tokens"),
        *sorted(manifest.provenance.items()),
    ):
        facts.add_row(name, value)
    screen.print(facts)
    screen.print(_stage_table(manifest))
    receipts = read_receipts(bundle)
    if receipts:
        screen.print(plan_table(receipts), "", profile_table(receipts), "", sep="\n")
    if manifest.quality is not None:
        screen.print(quality_table(manifest.quality))
    screen.print(_tensor_table(manifest))
    screen.print(_node_table(manifest))


def _stage_table(manifest: Manifest) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("stage", "precision", "weights", "tensors", "parity", "limit", "digest"):
        table.add_column(column, no_wrap=True, justify="right" if column in _NUMBERS else "left")
    for entry in manifest.stages:
        whole = whole_of(entry, manifest.stages)
        size = console.format_bytes(weights_bytes(entry))
        table.add_row(
            entry.name,
            _precision(manifest, entry),
            size if whole is None else f"{size} of {whole.name}'s",
            str(len(entry.weights)),
            "unknown" if entry.parity is None else f"{entry.parity:.1e}",
            "" if entry.tolerance is None else f"{entry.tolerance:.0e}",
            entry.graph_digest[:12],
        )
    return table


def _node_table(manifest: Manifest) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage")
    table.add_column("nodes", justify="right")
    table.add_column("by type")
    for entry in manifest.stages:
        kinds = sorted(entry.nodes.items(), key=lambda item: (-item[1], item[0]))
        row = ", ".join(f"{count} {kind}" for kind, count in kinds)
        table.add_row(entry.name, str(sum(entry.nodes.values())), row)
    return table


def _tensor_table(manifest: Manifest) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("stage", "", "tensor", "type", "shape"):
        table.add_column(column, overflow="fold")
    for entry in manifest.stages:
        tensors = [("in", info) for info in entry.inputs] + [("out", info) for info in entry.outputs]
        for index, (direction, info) in enumerate(tensors):
            shape = Text(f"[{', '.join(str(size) for size in info.shape)}]")
            last = index == len(tensors) - 1
            table.add_row("" if index else entry.name, direction, info.name, info.dtype, shape, end_section=last)
    return table
