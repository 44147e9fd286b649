"""Bytes that kernels move, counted in the PTX that ships, against what their modules' docstrings state.

Every load and store of global memory is followed back to the kernel's parameter that its address comes from. Threads
times width times instructions is what a block moves if every predicate holds; instructions of a loop count once, for
the tokens of one iteration. What caches make of it is not counted.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import pytest

from reelforge.plugins import kernels
from reelforge.plugins.compile import CompiledKernel, compile_kernels
from reelforge.plugins.schema import PAD
from reelforge.plugins.tactics import variants

ACCESS = re.compile(
    r"\b(?P<kind>ld|st)\.global(?:\.\w+)*?(?:\.v(?P<vector>\d))?\.[a-z](?P<bits>\d+)\b(?P<operands>[^;]*);"
)
ADDRESS = re.compile(r"\[\s*(%rd\d+)")
PARAMETER = re.compile(r"ld\.param\.\w+\s+(%\w+),\s*\[\w+?_param_(\d+)\]")
WIDE = re.compile(r"%rd\d+")
HEAD_DIM = 128
LARGE = ("q", "k", "v", "query", "key", "value")


def traffic(kernel: CompiledKernel) -> dict[tuple[str, str], int]:
    """Return bytes by (``ld`` or ``st``, parameter) that one block moves."""
    origins: dict[str, set[str]] = defaultdict(set)
    names = kernel.variant.schema.parameters
    moved: dict[tuple[str, str], int] = defaultdict(int)
    lines = kernel.ptx.split("\n")
    for _ in range(2):  # a loop's pointers come from behind
        moved.clear()
        for line in lines:
            parameter, access = PARAMETER.search(line), ACCESS.search(line)
            if parameter is not None:
                origins[parameter[1]].add(names[int(parameter[2])])
            elif access is not None:
                pointer = ADDRESS.search(access["operands"])
                assert pointer is not None, line
                pointers = {name for name in origins[pointer[1]] if name not in ("tokens", "image_tokens")}
                assert len(pointers) == 1, (line, pointers)
                width = int(access["bits"]) // 8 * int(access["vector"] or 1)
                moved[access["kind"], pointers.pop()] += width * kernel.threads
            else:
                registers = WIDE.findall(line)
                for source in registers[1:]:
                    origins[registers[0]] |= origins[source]
    return dict(moved)


def stated(module: str) -> tuple[list[int], list[int]]:
    """Return the numbers of "Bytes per element ...: 2 + 2 read and 1 written"."""
    source = Path(str(kernels.__file__)).with_name(f"{module}.py").read_text(encoding="utf-8")
    words = " ".join((ast.get_docstring(ast.parse(source)) or "").split())
    match = re.search(r"Bytes per element[^:]*: ([\d +]+) read and ([\d +]+) written", words)
    assert match is not None
    read, written = ([int(number) for number in group.split("+")] for group in match.groups())
    return read, written


@pytest.fixture(scope="module", params=[pytest.param(89, marks=pytest.mark.slow), 90])
def moved(request: pytest.FixtureRequest, kernel_cache: Path) -> dict[str, dict[tuple[str, str], Fraction]]:
    """Plugin -> bytes per element of one tensor [tokens, HEAD_DIM], for every tactic alike."""
    found: dict[str, dict[tuple[str, str], Fraction]] = {}
    for plugin in ("key_statistics", "rotary_qk_norm_quantise", "value_statistics", "value_quantise"):
        for kernel in compile_kernels(variants(request.param, plugin=plugin), kernel_cache):
            tokens = int(kernel.variant.tactic.tiles.get("ROWS", PAD))
            bytes_of = {key: Fraction(count, tokens * HEAD_DIM) for key, count in traffic(kernel).items()}
            large = {
                key: value for key, value in bytes_of.items() if key[1] in ["q", "k", "v", "query", "key", "value"]
            }
            assert found.setdefault(plugin, large) == large, kernel.variant.name
    return found


def test_queries_and_keys(moved: dict[str, dict[tuple[str, str], Fraction]]) -> None:
    read, written = stated("rotary_quantise")
    assert moved["key_statistics"] == {("ld", "k"): 2}
    assert moved["rotary_qk_norm_quantise"] == {
        ("ld", "q"): 2, ("ld", "k"): 2, ("st", "query"): 1, ("st", "key"): 1,
    }  # fmt: skip
    both = [*moved["key_statistics"].items(), *moved["rotary_qk_norm_quantise"].items()]
    assert [count for (kind, _), count in both if kind == "ld"] == read
    assert [count for (kind, _), count in both if kind == "st"] == written


def test_values(moved: dict[str, dict[tuple[str, str], Fraction]]) -> None:
    read, written = stated("value_quantise")
    assert moved["value_statistics"] == {("ld", "v"): 2}
    assert moved["value_quantise"] == {("ld", "v"): 2, ("st", "value"): 1}
    assert (read, written) == ([2, 2], [1])


def test_tables_and_scales(kernel_cache: Path) -> None:
    """What "tables aside" leaves out: tables are read for q and for k again, and everything else is small."""
    (kernel,) = compile_kernels([next(variants(90, plugin="rotary_qk_norm_quantise"))], kernel_cache)
    per_element = {key: count / (PAD * HEAD_DIM) for key, count in traffic(kernel).items()}
    tables = per_element["ld", "rope_cos"] + per_element["ld", "rope_sin"]
    assert tables == 8
    source = " ".join((Path(str(kernels.__file__)).with_name("rotary_quantise.py").read_text(encoding="utf-8")).split())
    assert "8 bytes of tables" in source
    assert per_element["st", "query_scale"] < 1
    assert per_element["st", "key_scale"] < 1
