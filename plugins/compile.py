"""Compiles kernels ahead of time, for GPUs that need not be here: variant in, PTX and resource sheet out.

PTX is what TensorRT takes and what the driver turns into machine code on the GPU at hand. The sheet is read off
machine code that the assembler makes of the very PTX that is shipped. Results are cached by a digest of everything they
depend on. The module does not know what plugins compute, nor how TensorRT is told about them.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from reelforge.plugins import ptx as ptx_text
from reelforge.plugins.cuda_tools import ResourceSheet, assemble, inspect, ptxas_version
from reelforge.plugins.schema import DType
from reelforge.plugins.tactics import ARCHITECTURES, Tactic, Variant
from reelforge.runtime.errors import BuildError

_FOLDER = Path(__file__).parent
_FORMAT = 1  # of cached files


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel ready to be launched.

    Attributes:
        variant: What was compiled.
        ptx: The code, with the schema's parameters and no others.
        entry: The kernel's name in it.
        sheet: What it takes of a multiprocessor.
        digest: Of everything it was made from.
    """

    variant: Variant
    ptx: str
    entry: str
    sheet: ResourceSheet
    digest: str

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.variant.tactic.warps


def compile_kernels(variants: Iterable[Variant], cache_folder: Path | None = None) -> list[CompiledKernel]:
    """Compile ``variants``, or take them from the cache; results are in the same order.

    Args:
        variants: What to compile; a few seconds each.
        cache_folder: Where results are kept; None keeps none.

    Raises:
        BuildError: If Triton is missing, or a kernel does not compile or uses hidden parameters.
    """
    wanted = list(variants)
    digests = [digest(variant) for variant in wanted]
    kernels = {key: _cached(variant, key, cache_folder) for variant, key in zip(wanted, digests, strict=True)}
    missing = {key: variant for variant, key in zip(wanted, digests, strict=True) if kernels[key] is None}
    if missing:
        for (key, variant), result in zip(missing.items(), _compile(list(missing.values())), strict=True):
            kernels[key] = _finish(variant, result, key)
            _keep(kernels[key], cache_folder)
    return [kernel for key in digests if (kernel := kernels[key]) is not None]


def load_kernels(folder: Path) -> list[CompiledKernel]:
    """Return all kernels of a cache folder, sorted by name: for machines that have a GPU and no Triton.

    Raises:
        BuildError: If a file was altered.
    """
    kernels = []
    for path in sorted(folder.glob("*.json")):
        stored = json.loads(path.read_text(encoding="utf-8"))
        fields = stored["variant"]
        tactic = Tactic(fields["tactic"]["warps"], fields["tactic"]["stages"], fields["tactic"]["tiles"])
        attributes = tuple((name, value) for name, value in fields["attributes"])
        variant = Variant(
            fields["plugin"],
            fields["architecture"],
            tactic,
            DType[fields["activation"]],
            fields["head_dim"],
            attributes,
        )
        kernel = _cached(variant, path.stem, folder)
        kernels += [] if kernel is None else [kernel]
    return sorted(kernels, key=lambda kernel: kernel.variant.name)


def digest(variant: Variant) -> str:
    """Return what a compiled variant depends on, as a digest: kernel sources, tiles, constants, versions."""
    parts = {
        "format": _FORMAT,
        "sources": _sources(),
        "variant": _job(variant),
        "target": ARCHITECTURES[variant.architecture].target,
        "triton": triton_version(),
        "ptxas": ptxas_version(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def toolchain_digest() -> str:
    """Return a digest of everything that all kernels depend on: their sources, and the versions of what compiles them.

    Raises:
        BuildError: If Triton or the assembler is not installed.
    """
    parts = {"format": _FORMAT, "sources": _sources(), "triton": triton_version(), "ptxas": ptxas_version()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def triton_version() -> str:
    """Return Triton's version.

    Raises:
        BuildError: If it is not installed.
    """
    try:
        return version("triton")
    except PackageNotFoundError as error:
        raise BuildError(
            "attention kernels cannot be compiled without Triton.",
            expected="the package triton",
            fix="pip install 'reelforge[plugins]'",
        ) from error


@cache
def _sources() -> dict[str, str]:
    """Digests of all files that compiled code depends on; few enough to take all kernels for each."""
    paths = [*(_FOLDER / "kernels").glob("*.py"), _FOLDER / "compile_worker.py", _FOLDER / "ptx.py"]
    paths = [path for path in paths if not path.name.endswith("_reference.py")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def _job(variant: Variant) -> dict[str, Any]:
    schema = variant.schema
    return {
        "kernel": [schema.kernel, schema.function],
        "signature": schema.signature(variant.activation),
        "constants": variant.constants(),
        "arch": variant.architecture,
        "ptx_version": ARCHITECTURES[variant.architecture].ptx_version,
        "warps": variant.tactic.warps,
        "stages": variant.tactic.stages,
    }


def _compile(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    triton_version()
    with tempfile.TemporaryDirectory() as folder:
        jobs, results = Path(folder) / "jobs.json", Path(folder) / "results.json"
        jobs.write_text(json.dumps([_job(variant) for variant in variants]), encoding="utf-8")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
        environment["TRITON_CACHE_DIR"] = str(Path(folder) / "cache")
        environment["TRITON_DISABLE_LINE_INFO"] = "1"  # source paths would get into the code
        command = [sys.executable, "-m", "reelforge.plugins.compile_worker", str(jobs), str(results)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            last = (run.stderr.strip().splitlines() or ["no message"])[-1]
            raise BuildError(
                "Triton's process ended before its kernels were compiled.",
                received=f"exit code {run.returncode}: {last}",
                fix="use the version of Triton that reelforge is tested with (constraints.txt)",
            )
        return list(json.loads(results.read_text(encoding="utf-8")))


def _finish(variant: Variant, result: dict[str, Any], key: str) -> CompiledKernel:
    if "error" in result:
        raise BuildError(
            f"the kernel {variant.name} does not compile.",
            received=result["error"],
            fix="use the version of Triton that reelforge is tested with (constraints.txt)",
        )
    code = ptx_text.strip_hidden_parameters(result["ptx"], len(variant.schema.parameters))
    cubin = assemble(code, ARCHITECTURES[variant.architecture].target)
    sheet = inspect(cubin, result["shared_bytes"], 32 * variant.tactic.warps)
    return CompiledKernel(variant, code, ptx_text.entry_name(code), sheet, key)


def _cached(variant: Variant, key: str, folder: Path | None) -> CompiledKernel | None:
    path = None if folder is None else folder / f"{key}.json"
    if path is None or not path.is_file():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored["ptx_sha256"] != hashlib.sha256(stored["ptx"].encode()).hexdigest():
        raise BuildError(
            f"the cached kernel {path.name} was altered.",
            expected="the code whose digest is stored beside it",
            fix=f"delete {path}",
        )
    return CompiledKernel(variant, stored["ptx"], stored["entry"], ResourceSheet(**stored["sheet"]), key)


def _keep(kernel: CompiledKernel | None, folder: Path | None) -> None:
    if folder is None or kernel is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        "variant": {
            "plugin": kernel.variant.plugin,
            "architecture": kernel.variant.architecture,
            "tactic": {
                "warps": kernel.variant.tactic.warps,
                "stages": kernel.variant.tactic.stages,
                "tiles": dict(kernel.variant.tactic.tiles),
            },
            "activation": kernel.variant.activation.name,
            "head_dim": kernel.variant.head_dim,
            "attributes": kernel.variant.attributes,
        },
        "triton": triton_version(),
        "ptx": kernel.ptx,
        "ptx_sha256": hashlib.sha256(kernel.ptx.encode()).hexdigest(),
        "entry": kernel.entry,
        "sheet": asdict(kernel.sheet),
    }
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False, encoding="utf-8") as file:
        json.dump(stored, file)
    Path(file.name).replace(folder / f"{kernel.digest}.json")
