"""Hidden parameters come off only if nothing uses them; what cannot be read is refused."""

from __future__ import annotations

import pytest

from reelforge.plugins.ptx import embedded_paths, entry_name, parameter_types, strip_hidden_parameters
from reelforge.runtime.errors import BuildError

CODE = """//
.version 8.4
.target sm_90a
.address_size 64
.visible .entry kernel(
	.param .u64 .ptr .global .align 16 kernel_param_0,
	.param .u32 kernel_param_1,
	.param .u64 .ptr .global .align 1 kernel_param_2,
	.param .u64 .ptr .global .align 1 kernel_param_3
)
.reqntid 128
{
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b32 	%r1, [kernel_param_1];
	ret;
}
"""


def test_parameters() -> None:
    assert entry_name(CODE) == "kernel"
    assert parameter_types(CODE) == ["u64", "u32", "u64", "u64"]
    stripped = strip_hidden_parameters(CODE, 2)
    assert parameter_types(stripped) == ["u64", "u32"]
    assert stripped.split("{")[1] == CODE.split("{")[1]
    assert strip_hidden_parameters(stripped, 2) == stripped


def test_used_hidden_parameters_are_refused() -> None:
    with pytest.raises(BuildError, match="uses Triton's hidden parameter kernel_param_1") as caught:
        strip_hidden_parameters(CODE, 1)
    assert "scratch" in str(caught.value)


def test_missing_parameters_are_refused() -> None:
    with pytest.raises(BuildError, match="fewer parameters than its schema"):
        strip_hidden_parameters(CODE, 5)


def test_what_is_not_one_kernel_is_refused() -> None:
    for text in ("", CODE + CODE.replace(" kernel(", " other(")):
        with pytest.raises(BuildError, match="exactly one kernel"):
            entry_name(text)


def test_unreadable_parameters_are_refused() -> None:
    with pytest.raises(BuildError, match="parameter cannot be read"):
        parameter_types(CODE.replace(".param .u32 kernel_param_1", "u32 ???"))


def test_paths_are_found() -> None:
    assert embedded_paths(CODE) == []
    assert embedded_paths(CODE + '.file 1 "/home/someone/plugins/kernels/int8_attention.py"\n') == [
        "/home/someone/plugins/kernels/int8_attention.py"
    ]
