"""PTX as text: Triton's hidden parameters come off, and what must not be in shipped code is looked for."""

from __future__ import annotations

import re

from reelforge.runtime.errors import BuildError

_ENTRY = re.compile(r"\.visible\s+\.entry\s+(?P<name>\w+)\s*\((?P<parameters>[^)]*)\)")
_PARAMETER = re.compile(r"\.param\s+\.(?P<type>\w+)\b[^,]*?(?P<name>\w+)\s*$")
_PATH = re.compile(r"[\w./-]+/[\w.-]+\.(?:py|cu|cpp)\b")


def entry_name(ptx: str) -> str:
    """Return the name of the only kernel in ``ptx``."""
    return _entry(ptx)["name"]


def parameter_types(ptx: str) -> list[str]:
    """Return the PTX types of the kernel's parameters, such as ``u64``."""
    return [_parameter(line)["type"] for line in _lines(_entry(ptx)["parameters"])]


def strip_hidden_parameters(ptx: str, count: int) -> str:
    """Return ``ptx`` with the first ``count`` parameters only.

    Triton adds pointers for its scratch memory and its profiler behind a kernel's own parameters, whether or not the
    kernel uses them. Who launches a kernel from its own signature, as TensorRT does, would have to pass them.

    Raises:
        BuildError: If the code reads one of the others, or there are fewer than ``count``.
    """
    entry = _entry(ptx)
    lines = _lines(entry["parameters"])
    if len(lines) < count:
        raise BuildError(
            f"the kernel {entry['name']} has fewer parameters than its schema.",
            received=len(lines),
            expected=f"at least {count}",
            fix="this is a bug in the plugin's schema; please report it",
        )
    body = ptx[entry.end() :]
    for line in lines[count:]:
        hidden = _parameter(line)["name"]
        if re.search(rf"\b{re.escape(hidden)}\b", body):
            raise BuildError(
                f"the kernel {entry['name']} uses Triton's hidden parameter {hidden}.",
                received="code that needs scratch memory or Triton's profiler",
                expected="code that reads its own parameters only",
                fix="compile without profiling; kernels here must not need scratch memory",
            )
    start, end = entry.span("parameters")
    return ptx[:start] + "\n" + ",\n".join(lines[:count]) + "\n" + ptx[end:]


def embedded_paths(ptx: str) -> list[str]:
    """Return names of source files in ``ptx``; there should be none."""
    return sorted(set(_PATH.findall(ptx)))


def _entry(ptx: str) -> re.Match[str]:
    entries = list(_ENTRY.finditer(ptx))
    if len(entries) != 1:
        raise BuildError(
            "PTX does not hold exactly one kernel.",
            received=len(entries),
            expected="1",
            fix="use a version of Triton that reelforge is tested with (constraints.txt)",
        )
    return entries[0]


def _lines(parameters: str) -> list[str]:
    return [line.rstrip() for line in parameters.strip("\n").split(",\n") if line.strip()]


def _parameter(line: str) -> re.Match[str]:
    match = _PARAMETER.search(line.strip())
    if match is None:
        raise BuildError(
            "a PTX parameter cannot be read.",
            received=line.strip(),
            expected=".param .type ... name",
            fix="use a version of Triton that reelforge is tested with (constraints.txt)",
        )
    return match
