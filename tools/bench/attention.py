"""Benchmark of the attention kernels: ``python -m reelforge.tools.bench.attention -o benchmarks/attention.md``.

Numerics, resource sheets and models need no GPU. What was measured on one is in a JSON file that
``reelforge.tools.bench.attention_measure`` writes on a machine that has one; ``--kernels FOLDER`` compiles the kernels
that it is to measure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from reelforge.plugins.compile import CompiledKernel, compile_kernels, digest
from reelforge.plugins.cuda_tools import ptxas_version
from reelforge.plugins.tactics import ARCHITECTURES, variants
from reelforge.tools.bench import attention_model, attention_numerics, report

PACKAGES = ("triton", "numpy", "ml_dtypes", "torch")
COMMAND = "python -m reelforge.tools.bench.attention -o benchmarks/attention.md"


def resources(cache: Path | None) -> list[str]:
    """Return the resource sheets of every architecture and tactic."""
    kernels = [kernel for number in ARCHITECTURES for kernel in compile_kernels(variants(number), cache)]
    headings = ("kernel", "architecture", "tactic", "registers", "stack B", "shared B", "blocks per SM", "tensor-core")
    return [
        f"Read off the machine code that ptxas {ptxas_version()} makes of the PTX that ships, bf16 and heads of 128.",
        "*Blocks per SM* is what the registers allow. Tensor-core instructions are counted in the code, not in time:",
        "IMMA and IGMMA are int8, QMMA and QGMMA fp8, HMMA 16-bit.",
        "",
        *report.table(headings, (_sheet(kernel) for kernel in kernels)),
    ]


def _sheet(kernel: CompiledKernel) -> tuple[str, ...]:
    variant, sheet = kernel.variant, kernel.sheet
    attributes = "".join(f", {name} {value:g}" for name, value in variant.attributes)
    instructions = ", ".join(f"{name} x{count}" for name, count in sheet.tensor_core_instructions.items())
    return (
        f"`{variant.plugin}`{attributes}",
        f"sm_{variant.architecture}",
        variant.tactic.name,
        str(sheet.registers),
        str(sheet.stack_bytes),
        f"{sheet.shared_bytes:,}",
        str(sheet.blocks_per_multiprocessor),
        instructions or "-",
    )


def measured(path: Path) -> list[str]:
    """Return the lines on what a run on a GPU measured."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    machine, records = result["machine"], result["records"]
    architecture = int(result["architecture"])
    current = {variant.name: digest(variant) for variant in variants(architecture)}
    same = all(current.get(name) == kernel["digest"] for name, kernel in result["kernels"].items())
    ceilings = result["ceilings"]
    return [
        "**Measured on the GPU named here; the only section of which that is true.** One attention of 24 heads of 128,",
        "batch 1, 256 text tokens. Median of launches between CUDA events after warming up (smallest-largest, number);",
        "clocks as found. *TOPS* counts the two products of the visited blocks. Errors are against float64 attention",
        "of the same inputs before quantisation, over 48 queries spread over the sequence; values have a mean. PyTorch",
        "is given q and k already normalised, rotated and in its own order, which is in none of its times.",
        "",
        *(f"- {name}: {value}" for name, value in machine.items()),
        f"- kernels compiled with Triton {next(iter(result['kernels'].values()))['triton']}, "
        + ("the same as this repository's" if same else "**not the same as this repository's: measure again**"),
        f"- for comparison: a plain copy {ceilings['copy_gb_per_s']:,.0f} GB/s, PyTorch's products of 8192 x 8192 "
        f"{ceilings['torch_int8_tops']:,.0f} TOPS (int8) and {ceilings['torch_fp8_tops']:,.0f} TOPS (fp8)",
        "",
        "### Dense attention",
        "",
        *report.table(("tokens", "kernel", "ms", "TOPS", "cosine", "relative L1"), _dense_rows(records)),
        "",
        "### Block-sparse attention",
        "",
        "*Random blocks*: every query block visits a random choice of key blocks. *Window*: sliding tiles of (3, 5, 8)",
        "tokens over a video of 720x1280 and 129 frames in tile-major order, padded to 128: 126,976 tokens.",
        "",
        *report.table(("tokens", "kernel", "density", "ms", "TOPS", "cosine"), _sparse_rows(records)),
        "",
        "### Before the attention",
        "",
        *report.table(("tokens", "kernel", "ms", "GB", "GB/s"), _preparing_rows(records)),
        "",
        *_shares(records),
    ]


def _dense_rows(records: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for record in (r for r in records if r["kind"] in ("dense", "torch")):
        yield (
            f"{record['tokens']:,}",
            record["name"],
            _times(record),
            f"{record['tops']:.0f}",
            f"{record['cosine']:.6f}",
            f"{record['relative_l1']:.5f}",
        )


def _sparse_rows(records: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for record in (r for r in records if r["kind"] in ("sparse", "tiles")):
        yield (
            f"{record['tokens']:,}",
            record["name"],
            f"{record['density']:.3f}",
            _times(record),
            f"{record['tops']:.0f}",
            f"{record['cosine']:.6f}" if "cosine" in record else "-",
        )


def _preparing_rows(records: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for record in (r for r in records if r["kind"] == "prepare"):
        rate = record["gb"] / record["median_ms"] * 1e3
        yield (f"{record['tokens']:,}", record["name"], _times(record), f"{record['gb']:.2f}", f"{rate:,.0f}")


def _shares(records: list[dict[str, Any]]) -> list[str]:
    """Return what the fastest kernels before the attention take of the fastest attention, per length."""
    lines = []
    for tokens in sorted({record["tokens"] for record in records if record["kind"] == "dense"}):
        dense = min(r["median_ms"] for r in records if r["kind"] == "dense" and r["tokens"] == tokens)
        fastest: dict[str, float] = {}
        for record in (r for r in records if r["kind"] == "prepare" and r["tokens"] == tokens):
            fastest[record["plugin"]] = min(record["median_ms"], fastest.get(record["plugin"], float("inf")))
        flash, cudnn = (
            min(r["median_ms"] for r in records if r["tokens"] == tokens and r["name"] == f"PyTorch {name} bf16")
            for name in ("flash", "cudnn")
        )
        both = dense + sum(fastest.values())
        lines.append(
            f"- {tokens:,} tokens: {sum(fastest.values()):.2f} ms before {dense:.1f} ms of attention "
            f"({100 * sum(fastest.values()) / dense:.1f} %). Both together are {flash / both:.2f} times as fast as "
            f"PyTorch's flash attention in bf16 in the same run, and {cudnn / both:.2f} times as fast as cuDNN's."
        )
    return lines


def _times(record: dict[str, Any]) -> str:
    return f"{record['median_ms']:.3f} ({record['least_ms']:.3f}-{record['most_ms']:.3f}, {record['repeats']})"


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Markdown file to write.")
@click.option("--kernels", type=click.Path(path_type=Path), help="Only compile sm_90's kernels into this folder.")
@click.option(
    "--measured",
    "measurements",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/attention_h100.json"),
    show_default=True,
    help="What attention_measure wrote on a GPU; without the file, the section says so.",
)
@click.option("--cache", type=click.Path(path_type=Path), help="Folder that keeps compiled kernels.")
def main(output: Path | None, kernels: Path | None, measurements: Path, cache: Path | None) -> None:
    """Write benchmarks/attention.md."""
    if kernels is not None:
        for kernel in compile_kernels(variants(90), kernels):
            click.echo(kernel.variant.name)
    if output is None:
        return
    found = measured(measurements) if measurements.is_file() else ["Not measured: there is no file of measurements."]
    lines = [
        "# Attention kernels",
        "",
        *report.environment(COMMAND, PACKAGES),
        "",
        "That machine has no GPU. Sections 1 and 2 are of its CPU and compilers, 3 and 4 are models, and 5 alone was",
        "measured, on another machine, which it names.",
        "",
        "## 1. Numerics (CPU interpreter)",
        "",
        *attention_numerics.section(),
        "",
        "## 2. Resources (compiler)",
        "",
        *resources(cache),
        "",
        "## 3. Roofline (model)",
        "",
        *attention_model.section(),
        "",
        "## 4. Cost before the attention (model)",
        "",
        *attention_model.preparing_section(),
        "",
        "## 5. Times on a GPU (measured)",
        "",
        *found,
    ]
    report.write(output, lines)


if __name__ == "__main__":
    main()
