"""Modules loaded at first use: nothing is lost, and what never uses them does not pay for them."""

from __future__ import annotations

import subprocess
import sys


def output_of(program: str) -> list[str]:
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return run.stdout.splitlines()


def test_graphs_with_named_dimensions_do_without_sympy_and_arithmetic_gets_it() -> None:
    program = """
import sys
from reelforge.tools.deferred import defer
defer()
defer()
import onnx_ir as ir
value = ir.Value(name="x", shape=ir.Shape(["tokens", 4]), type=ir.TensorType(ir.DataType.FLOAT))
model = ir.Model(ir.Graph([value], [value], nodes=[], opset_imports={"": 21}), ir_version=10)
print(ir.from_proto(ir.to_proto(model)).graph.inputs[0].shape, "sympy.core" in sys.modules)
print(value.shape[0] + 1, "sympy.core" in sys.modules)
import sympy
print(sympy.sqrt(16))
"""
    assert output_of(program) == ["[tokens,4] False", "tokens + 1 True", "4"]


def test_a_module_that_is_not_there_is_missed_as_usual() -> None:
    program = """
from reelforge.tools.deferred import defer
defer(["reelforge_has_no_such_module"])
try:
    import reelforge_has_no_such_module
except ModuleNotFoundError as error:
    print(error)
"""
    assert output_of(program) == ["No module named 'reelforge_has_no_such_module'"]


def test_modules_that_are_loaded_already_stay() -> None:
    program = """
import sympy
before = sympy
from reelforge.tools.deferred import defer
defer()
import sympy
print(sympy is before, type(sympy).__name__)
"""
    assert output_of(program) == ["True module"]
