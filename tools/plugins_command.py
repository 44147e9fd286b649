"""``reelforge plugins``: which attention kernels there are, compiling them without a GPU, and what they take.

Knows the plugins' schemas and tactics; it runs no kernel.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from reelforge.runtime.errors import RequestError
from reelforge.tools import console
from reelforge.tools.inspect_receipts import slim_table

if TYPE_CHECKING:
    from reelforge.plugins.compile import CompiledKernel
    from reelforge.plugins.tactics import Variant

_CONTEXT = {"help_option_names": ["-h", "--help"]}
_ARCHITECTURE = click.option("--arch", help="One architecture, such as sm90; by default all.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


@click.group("plugins", epilog=console.EXIT_CODES, context_settings=_CONTEXT)
def plugins() -> None:
    """Show and compile the attention kernels for TensorRT; needs no GPU.

    \b
    Examples:
      reelforge plugins list --arch sm90
      reelforge plugins compile --arch sm90 -o kernels
      reelforge plugins inspect kernels
    """  # noqa: D301 - \b is click's mark for text that it does not wrap


@plugins.command("list", context_settings=_CONTEXT)
@_ARCHITECTURE
@_JSON
def list_(arch: str | None, as_json: bool) -> None:
    """List plugins with their inputs, outputs and attributes, and their kernels' tactics by architecture."""
    from reelforge.plugins.schema import NAMESPACE, PLUGINS
    from reelforge.plugins.tactics import tactics

    numbers = _architectures(arch)
    found: dict[str, dict[str, Any]] = {
        schema.name: {
            "inputs": [tensor.name for tensor in schema.inputs],
            "outputs": [tensor.name for tensor in schema.outputs],
            "attributes": {attribute.name: attribute.default for attribute in schema.attributes},
            "tactics": {
                f"sm{n}": [t.name for t in tactics(schema.name, n)] for n in numbers if tactics(schema.name, n)
            },
        }
        for schema in PLUGINS.values()
    }
    if as_json:
        click.echo(json.dumps({"namespace": NAMESPACE, "plugins": found}))
        return
    table = slim_table("")
    for heading in ("plugin", "inputs -> outputs", "attributes", "kernels for"):
        table.add_column(heading, no_wrap=heading == "plugin")
    for name, about in found.items():
        signature = f"{', '.join(about['inputs'])} -> {', '.join(about['outputs'])}"
        attributes = ", ".join(f"{key}={value:g}" for key, value in about["attributes"].items())
        table.add_row(name, signature, attributes, ", ".join(about["tactics"]) or "none of these")
    Console(highlight=False).print(table)


@plugins.command("compile", context_settings=_CONTEXT)
@_ARCHITECTURE
@click.option("--plugin", help="Only this one.")
@click.option("--type", "activation", type=click.Choice(["bf16", "fp16"]), default="bf16", show_default=True)
@click.option("--head-dim", type=int, default=128, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the compiled kernels.")
@_JSON
def compile_(arch: str | None, plugin: str | None, activation: str, head_dim: int, output: Path, as_json: bool) -> None:
    """Compile kernels to PTX and show what they take; what the folder has already is not compiled again."""
    from reelforge.plugins.compile import compile_kernels
    from reelforge.plugins.schema import HEAD_DIMS, PLUGINS, DType
    from reelforge.plugins.tactics import variants

    if plugin is not None and plugin not in PLUGINS:
        raise RequestError(
            f"there is no plugin {plugin!r}.",
            received=plugin,
            expected=", ".join(PLUGINS),
            fix="see `reelforge plugins list`",
        )
    if head_dim not in HEAD_DIMS:
        raise RequestError(
            f"there are no kernels for heads of {head_dim}.",
            received=head_dim,
            expected=" or ".join(map(str, HEAD_DIMS)),
            fix="choose one of these",
        )
    dtype = DType.BFLOAT16 if activation == "bf16" else DType.FLOAT16
    wanted = [variant for number in _architectures(arch) for variant in variants(number, dtype, head_dim, plugin)]
    _print(compile_kernels(wanted, output), as_json)


@plugins.command("inspect", context_settings=_CONTEXT)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--ptx", metavar="KERNEL", help="Print this kernel's PTX instead.")
@_JSON
def inspect_(folder: Path, ptx: str | None, as_json: bool) -> None:
    """Show what the compiled kernels in FOLDER take of a GPU, after checking that none was altered."""
    from reelforge.plugins.compile import load_kernels

    kernels = load_kernels(folder)
    if not kernels:
        raise RequestError(
            f"there are no compiled kernels in {folder}.",
            received=str(folder),
            expected="a folder that `reelforge plugins compile` filled",
            fix=f"reelforge plugins compile -o {folder}",
        )
    if ptx is None:
        _print(kernels, as_json)
        return
    found = [kernel for kernel in kernels if kernel.variant.name == ptx]
    if not found:
        raise RequestError(
            f"there is no kernel {ptx!r} in {folder}.",
            received=ptx,
            expected=", ".join(kernel.variant.name for kernel in kernels),
            fix="choose one of these",
        )
    click.echo(found[0].ptx, nl=False)


def _architectures(name: str | None) -> list[int]:
    from reelforge.plugins.tactics import ARCHITECTURES

    if name is None:
        return list(ARCHITECTURES)
    digits = name.lower().removeprefix("sm").removeprefix("_")
    if not digits.isdecimal() or int(digits) not in ARCHITECTURES:
        raise RequestError(
            f"there are no kernels for {name!r}.",
            received=name,
            expected=", ".join(f"sm{number}" for number in ARCHITECTURES),
            fix="choose one of these",
        )
    return [int(digits)]


def _as_json(kernel: CompiledKernel) -> dict[str, Any]:
    sheet = kernel.sheet
    return {
        "name": kernel.variant.name,
        "plugin": kernel.variant.plugin,
        "architecture": f"sm{kernel.variant.architecture}",
        "entry": kernel.entry,
        "digest": kernel.digest,
        "registers": sheet.registers,
        "stack_bytes": sheet.stack_bytes,
        "shared_bytes": sheet.shared_bytes,
        "threads": sheet.threads,
        "tensor_core_instructions": dict(sheet.tensor_core_instructions),
        "ptxas": sheet.ptxas,
    }


def _print(kernels: list[CompiledKernel], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"kernels": [_as_json(kernel) for kernel in kernels]}))
        return
    table = slim_table("")
    for heading in ("kernel", "arch", "tactic", "registers", "stack", "shared", "tensor cores"):
        numbers = heading in ("registers", "stack", "shared")
        table.add_column(heading, justify="right" if numbers else "left", no_wrap=heading != "tensor cores")
    for kernel in kernels:
        sheet = kernel.sheet
        table.add_row(
            _title(kernel.variant),
            f"sm{kernel.variant.architecture}",
            kernel.variant.tactic.name,
            str(sheet.registers),
            str(sheet.stack_bytes),
            f"{sheet.shared_bytes:,}",
            ", ".join(sheet.tensor_core_instructions) or "-",
        )
    Console(highlight=False).print(table)


def _title(variant: Variant) -> str:
    return " ".join((variant.plugin, *(f"{name}={value:g}" for name, value in variant.attributes)))
