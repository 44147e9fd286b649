"""The gate: compiled kernels keep to their registers and use the tensor-core instructions that are meant.

Compiling all variants takes minutes, so most of it is marked slow; what is not covers one kernel of each kind.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from reelforge.plugins import compile as compiler
from reelforge.plugins import cuda_tools
from reelforge.plugins.compile import CompiledKernel, compile_kernels, load_kernels
from reelforge.plugins.ptx import embedded_paths, parameter_types
from reelforge.plugins.schema import PV_16BIT, PV_FP8, DType
from reelforge.plugins.tactics import ARCHITECTURES, Variant, variants
from reelforge.runtime.errors import BuildError


def check(kernel: CompiledKernel) -> None:
    """Assert everything that a kernel must satisfy before it ships."""
    variant, sheet = kernel.variant, kernel.sheet
    architecture = ARCHITECTURES[variant.architecture]
    name = variant.name
    assert sheet.stack_bytes == 0, name
    assert sheet.local_instructions == 0, name
    assert sheet.registers <= 255, name
    assert sheet.blocks_per_multiprocessor >= 1, name
    assert sheet.shared_bytes <= architecture.shared_limit, name
    pointers = [t for t in parameter_types(kernel.ptx) if t == "u64"]
    schema = variant.schema
    assert len(parameter_types(kernel.ptx)) == len(schema.parameters), name
    assert len(pointers) == len(schema.inputs) + len(schema.outputs), name
    assert embedded_paths(kernel.ptx) == [], name
    assert f".target {architecture.target}" in kernel.ptx, name
    assert f".reqntid {kernel.threads}" in kernel.ptx, name
    found = {instruction.split(".")[0] for instruction in sheet.tensor_core_instructions}
    pv = schema.constants.get("PV")
    if pv is None:
        assert not found, name
    elif pv == PV_16BIT:
        assert found == {architecture.score_instruction, "HMMA"}, name
    else:
        # Nothing else: fp16 products in place of fp8 ones would be a silent fallback.
        assert found == {architecture.score_instruction, architecture.fp8_instruction}, name
        accumulators = {i.split(".")[2] for i in sheet.tensor_core_instructions if i.startswith("QMMA")}
        assert accumulators <= ({"F32"} if pv == PV_FP8 else {"F16"}), name


def test_one_kernel_of_each_kind(kernel_cache: Path) -> None:
    plugins = ("int8_fp8_attention", "value_quantise")
    chosen = [next(variants(90, plugin=plugin)) for plugin in plugins]
    for kernel in compile_kernels(chosen, kernel_cache):
        check(kernel)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel(kernel_cache: Path, architecture: int) -> None:
    kernels = compile_kernels(variants(architecture), kernel_cache)
    for kernel in kernels:
        check(kernel)
    attention = [kernel for kernel in kernels if "PV" in kernel.variant.schema.constants]
    for plugin in {kernel.variant.plugin for kernel in attention}:
        assert any(k.sheet.shared_bytes <= 48 << 10 for k in attention if k.variant.plugin == plugin), plugin


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "activation", "head_dim"), [(89, DType.FLOAT16, 64), (90, DType.FLOAT16, 128)]
)
def test_other_types_and_sizes(kernel_cache: Path, architecture: int, activation: DType, head_dim: int) -> None:
    for kernel in compile_kernels(variants(architecture, activation, head_dim), kernel_cache):
        check(kernel)


def variant_for_tests() -> Variant:
    return next(variants(90, plugin="value_statistics"))


def test_the_cache_is_used_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = variant_for_tests()
    (kernel,) = compile_kernels([variant], tmp_path)
    (path,) = tmp_path.glob("*.json")
    assert path.stem == kernel.digest
    assert load_kernels(tmp_path) == [kernel]

    def never(variants: object) -> list[object]:
        raise AssertionError("compiled again")

    monkeypatch.setattr(compiler, "_compile", never)
    assert compile_kernels([variant, variant], tmp_path) == [kernel, kernel]
    other = replace(variant, head_dim=64)
    assert compiler.digest(other) != kernel.digest
    with pytest.raises(AssertionError, match="compiled again"):
        compile_kernels([other], tmp_path)

    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"ptx": stored["ptx"] + "\n// altered"}))
    with pytest.raises(BuildError, match="was altered"):
        compile_kernels([variant], tmp_path)


def test_the_digest_follows_sources_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = variant_for_tests()
    before = compiler.digest(variant)
    assert compiler.digest(variant) == before
    monkeypatch.setattr(compiler, "_sources", lambda: {"a.py": "0"})
    sources = compiler.digest(variant)
    monkeypatch.setattr(compiler, "ptxas_version", lambda: "0.0.0")
    assert len({before, sources, compiler.digest(variant)}) == 3


def test_a_kernel_that_does_not_compile_is_named() -> None:
    variant = variant_for_tests()
    with pytest.raises(BuildError, match="does not compile") as caught:
        compile_kernels([replace(variant, head_dim=96)])  # no power of two
    assert variant.plugin in str(caught.value)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(compiler, "version", missing)
    with pytest.raises(BuildError, match="without Triton") as caught:
        compile_kernels([variant_for_tests()])
    assert "pip install 'reelforge[plugins]'" in str(caught.value)


def test_a_dying_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler.sys, "executable", "/bin/false")
    with pytest.raises(BuildError, match="ended before its kernels were compiled"):
        compile_kernels([variant_for_tests()])


def test_the_assembler_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildError, match="ptxas failed"):
        cuda_tools.assemble(".version 8.4\n.target sm_90a\nnonsense", "sm_90a")
    cuda_tools.find_tool.cache_clear()
    monkeypatch.setattr(cuda_tools.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(cuda_tools.shutil, "which", lambda name: None)
    with pytest.raises(BuildError, match="ptxas was not found"):
        cuda_tools.find_tool("ptxas")
    cuda_tools.find_tool.cache_clear()


def test_a_stack_is_seen() -> None:
    """The gate's own eyes: a kernel with a local array has a stack and local instructions."""
    code = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry spill(.param .u64 p, .param .u32 i)
{
	.local .align 16 .b8 depot[256];
	.reg .b64 %rd<6>; .reg .b32 %r<6>;
	ld.param.u64 %rd1, [p]; cvta.to.global.u64 %rd4, %rd1; ld.param.u32 %r1, [i];
	mov.u64 %rd2, depot; mul.wide.u32 %rd3, %r1, 4; add.s64 %rd5, %rd2, %rd3;
	st.local.u32 [%rd5], %r1; ld.local.u32 %r2, [depot]; ld.local.u32 %r3, [depot+64];
	add.u32 %r4, %r2, %r3; st.global.u32 [%rd4], %r4;
	ret;
}
"""
    sheet = cuda_tools.inspect(cuda_tools.assemble(code, "sm_80"), 0, 32)
    assert sheet.stack_bytes >= 256
    assert sheet.local_instructions >= 2
    assert not sheet.tensor_core_instructions
