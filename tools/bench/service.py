"""Benchmark of the service: ``python -m reelforge.tools.bench.service -o benchmarks/service.md``.

Run it from the repository's root, on an idle machine. Sections are kept as fragments in the work folder: ``--only``
measures some of them again. What a section measures is in a module of its own.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from reelforge.tools.bench import (
    report,
    sections,
    service_contract,
    service_faults,
    service_kills,
    service_load,
)
from reelforge.tools.bench.runtime_bundles import Models

PACKAGES = ("fastapi", "starlette", "uvicorn", "prometheus-client", "httpx", "schemathesis", "onnxruntime", "numpy")
TITLES = {
    "load": "64 clients",
    "kills": "kill -9 at random moments",
    "faults": "Other faults",
    "schemathesis": "The interface against its document",
    "audit": "Dependencies",
}


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Markdown file.")
@sections.options(TITLES, "build/bench/service", "Folder for services' data and measured sections.")
@click.option("--bundle", type=click.Path(path_type=Path, exists=True), help="Instead of building the demo's in fp32.")
@click.option("--jobs", default=128, show_default=True, help="Videos of each turn of the section on load.")
@click.option("--rounds", default=3, show_default=True, help="Of turns between loop and services.")
@click.option("--pip-audit", "auditor", help="The program, in an environment of its own.")
def main(
    output: Path,
    work: Path,
    only: tuple[str, ...],
    checkpoint: Path,
    bundle: Path | None,
    jobs: int,
    rounds: int,
    auditor: str | None,
) -> None:
    """Measure the service and write a Markdown file."""
    data = work / "data"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    served = bundle or Models(checkpoint, work / "models").demo("fp32")
    measures = {
        "load": lambda: service_load.section(served, data, jobs, rounds),
        "kills": lambda: service_kills.section(served, data),
        "faults": lambda: service_faults.section(served, data),
        "schemathesis": lambda: service_contract.schemathesis_section(served, data),
        "audit": lambda: service_contract.audit_section(data, auditor),
    }
    sections.measure_all(only, TITLES, measures, f"{jobs} jobs, {rounds} rounds", _head, work, output)


def _head() -> list[str]:
    return [
        "# The service",
        "",
        *report.environment("python -m reelforge.tools.bench.service -o benchmarks/service.md", PACKAGES),
        "",
        "A goal that is missed is marked as such. The bundle is the demonstration model's in fp32, on the CPU;",
        "clients and service share the machine.",
    ]


if __name__ == "__main__":
    main()
