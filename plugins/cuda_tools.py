"""NVIDIA's assembler and disassembler, which need no GPU: what a kernel takes, and which instructions it is made of."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from reelforge.runtime.errors import BuildError

_TENSOR_CORES = frozenset({"IMMA", "HMMA", "QMMA", "IGMMA", "HGMMA", "QGMMA", "UTCIMMA", "UTCHMMA", "UTCQMMA"})
_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)", re.MULTILINE
)
_RESOURCES = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+)")


@dataclass(frozen=True)
class ResourceSheet:
    """What one compiled kernel takes, read off the machine code.

    Attributes:
        registers: Per thread.
        stack_bytes: Per thread; more than 0 means that registers were spilled to memory.
        shared_bytes: Dynamic shared memory of a block.
        threads: Of a block.
        tensor_core_instructions: Each with how often it stands in the code.
        local_instructions: Loads from and stores to local memory.
        ptxas: The assembler's version.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    tensor_core_instructions: Mapping[str, int]
    local_instructions: int
    ptxas: str

    @property
    def blocks_per_multiprocessor(self) -> int:
        """How many blocks the register file of a multiprocessor has room for."""
        per_warp = -(-self.registers * 32 // 256) * 256
        return 65536 // (per_warp * (self.threads // 32))


@cache
def find_tool(name: str) -> Path:
    """Return the path of ``ptxas`` or ``cuobjdump``: NVIDIA's pip packages, the PATH, or Triton's own, in this order.

    Raises:
        BuildError: If there is none.
    """
    packages = Path(sysconfig.get_path("purelib"))
    on_path = shutil.which(name)
    candidates = [packages / "nvidia" / "cu13" / "bin" / name]
    candidates += [] if on_path is None else [Path(on_path)]
    candidates += [packages / "triton" / "backends" / "nvidia" / "bin" / name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise BuildError(
        f"{name} was not found.",
        expected="NVIDIA's CUDA tools, or Triton, whose package holds them",
        fix="pip install 'reelforge[plugins]'",
    )


def ptxas_version() -> str:
    """Return the version of the assembler in use, such as ``13.0.88``.

    Raises:
        BuildError: If there is no assembler.
    """
    found = re.search(r"V(\d+\.\d+\.\d+)", _output([str(find_tool("ptxas")), "--version"]))
    return found[1] if found else "unknown"


def assemble(ptx: str, target: str) -> bytes:
    """Return the machine code for ``target``, such as ``sm_90a``.

    Raises:
        BuildError: If the assembler refuses the code; its first complaint is in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx, encoding="utf-8")
        _output([str(find_tool("ptxas")), f"--gpu-name={target}", str(source), "-o", str(binary)])
        return binary.read_bytes()


def inspect(cubin: bytes, shared_bytes: int, threads: int) -> ResourceSheet:
    """Return what the kernel in ``cubin`` takes; shared memory and threads are those it is launched with."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _RESOURCES.search(_output([str(find_tool("cuobjdump")), "--dump-resource-usage", str(path)]))
        sass = _output([str(find_tool("cuobjdump")), "--dump-sass", str(path)])
    if usage is None:
        raise BuildError("cuobjdump shows no resources of a kernel.", fix="update NVIDIA's CUDA tools")
    names = Counter(match["name"] for match in _INSTRUCTION.finditer(sass))
    tensor = {name: count for name, count in sorted(names.items()) if name.split(".")[0] in _TENSOR_CORES}
    local = sum(count for name, count in names.items() if name.split(".")[0] in {"LDL", "STL"})
    return ResourceSheet(
        int(usage["registers"]), int(usage["stack"]), shared_bytes, threads, tensor, local, ptxas_version()
    )


def _output(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        complaint = next((line for line in (result.stderr + result.stdout).splitlines() if line.strip()), "nothing")
        raise BuildError(
            f"{Path(command[0]).name} failed.",
            received=re.sub(r"^ptxas \S+, ", "", complaint),
            expected="code that it accepts",
            fix="use versions of Triton and of NVIDIA's CUDA tools that reelforge is tested with (constraints.txt)",
        )
    return result.stdout
