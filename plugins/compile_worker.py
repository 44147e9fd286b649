"""The process in which Triton compiles: ``python -m reelforge.plugins.compile_worker JOBS RESULTS``, both JSON files.

A process of its own, since Triton reads its settings from the environment when it is imported, and because an internal
error of a compiler must not end the program that asked. Knows kernels and Triton; not what the results are for.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def main(arguments: list[str]) -> None:
    """Compile every job of a JSON list and write a list of ``{"ptx", "shared_bytes"}`` or ``{"error"}``."""
    jobs = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    results = [_attempt(job) for job in jobs]
    Path(arguments[1]).write_text(json.dumps(results), encoding="utf-8")


def _attempt(job: dict[str, Any]) -> dict[str, Any]:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        return _compile(job)
    except (CompilationError, OutOfResources, PTXASError, RuntimeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}".strip()[:2000]}


def _compile(job: dict[str, Any]) -> dict[str, Any]:
    """Compile one job: kernel, signature, constants, arch, ptx_version, warps, stages."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = job["kernel"]
    kernel = getattr(importlib.import_module(f"reelforge.plugins.kernels.{module}"), function)
    signature = {name: job["signature"].get(name, "constexpr") for name in kernel.arg_names}
    # Every tensor starts at a multiple of 16 bytes; without this promise loads are 4 bytes wide.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    options = {
        "num_warps": job["warps"],
        "num_stages": job["stages"],
        "ptx_version": job["ptx_version"],
        "enable_fp_fusion": True,
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, job["constants"], aligned),
        target=GPUTarget("cuda", job["arch"], 32),
        options=options,
    )
    return {"ptx": compiled.asm["ptx"], "shared_bytes": int(compiled.metadata.shared)}


if __name__ == "__main__":
    main(sys.argv[1:])
