"""The import rules of docs/architecture.md: which folder may know which, and a runtime without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "runtime": {"runtime"},
    "plugins": {"runtime", "plugins"},
    "calibration": {"runtime", "calibration"},
    "export": {"runtime", "plugins", "calibration", "export"},
    "tools": {"runtime", "plugins", "calibration", "export", "tools"},
    "demo": set(),
}
PACKAGES = ("runtime", "plugins", "calibration", "export", "tools")
RUNTIME_LIBRARIES = {"av", "numpy", "onnxruntime", "tokenizers"}
COMPILER_LIBRARIES = ("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "diffusers", "safetensors", "ml_dtypes")
WITHOUT_COMPILER = (  # modules of tools/
    "main", "console", "export_triton", "generate", "inspect_bundle", "profile", "profiling.layers_tensorrt",
    "profiling.report_html", "profiling.session", "synthesize", "triton.model",
)  # fmt: skip


@dataclass(frozen=True)
class Import:
    path: Path
    line: int
    name: str
    inside_function: bool
    typing_only: bool


def imports(folder: str) -> Iterator[Import]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield from imports_of(path, ast.parse(path.read_text(encoding="utf-8")))


def imports_of(path: Path, node: ast.AST, inside: bool = False, typing_only: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(path, child.lineno, alias.name, inside, typing_only)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{path}:{child.lineno}: relative import"
            for alias in child.names:
                yield Import(path, child.lineno, f"{child.module}.{alias.name}", inside, typing_only)
        guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports_of(path, child, inside or function, typing_only or guarded)


@pytest.mark.parametrize("folder", ALLOWED)
def test_folders_import_only_what_they_may(folder: str) -> None:
    wrong = []
    for item in imports(folder):
        parts = item.name.split(".")
        measures = folder == "tools" and "bench" in item.path.parts  # works in a checkout only, like what it measures
        allowed = {
            "reelforge": len(parts) > 1 and parts[1] in ALLOWED[folder],
            "demo": folder == "demo" or measures,
            "tests": measures,
            **dict.fromkeys(PACKAGES, False),  # without the package's name
        }
        if not allowed.get(parts[0], True):
            wrong.append(f"{item.path}:{item.line}: {item.name}")
    assert not wrong, "\n".join(wrong)


def test_runtime_needs_few_libraries() -> None:
    own = RUNTIME_LIBRARIES | set(sys.stdlib_module_names) | {"reelforge"}
    wrong = [
        f"{item.path}:{item.line}: {item.name}" for item in imports("runtime") if item.name.split(".")[0] not in own
    ]
    eager = [
        f"{item.path}:{item.line}: {item.name} at module level"
        for item in imports("runtime")
        if item.name.split(".")[0] == "onnxruntime" and not item.inside_function and not item.typing_only
    ]
    assert not wrong + eager, "\n".join(wrong + eager)


def modules_below(folder: str) -> list[str]:
    names = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        relative = path.relative_to(ROOT).with_suffix("")
        parts = relative.parts[:-1] if relative.name == "__init__" else relative.parts
        names.append(".".join(("reelforge", *parts)))
    return names


def run_python(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_runtime_and_its_commands_work_where_the_compiler_is_not_installed() -> None:
    names = modules_below("runtime") + [f"reelforge.tools.{name}" for name in WITHOUT_COMPILER]
    run_python(
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({COMPILER_LIBRARIES!r}))\n"  # None makes an import fail
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "assert 'onnxruntime' not in sys.modules\n"
    )


@pytest.mark.parametrize("folder", ["plugins", "calibration"])
def test_folders_can_be_imported_alone(folder: str) -> None:
    others = [name for name in ALLOWED if name not in ALLOWED[folder]]
    run_python(
        "import importlib, sys\n"
        f"for name in {modules_below(folder)!r}:\n"
        "    importlib.import_module(name)\n"
        f"loaded = [name for name in sys.modules if name.split('.')[:2] in {[['reelforge', o] for o in others]!r}]\n"
        "assert not loaded, loaded\n"
    )


def test_the_command_line_starts_without_the_compiler() -> None:
    run_python(
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({COMPILER_LIBRARIES!r}))\n"
        "from click.testing import CliRunner\n"
        "from reelforge.tools.main import cli\n"
        "for arguments in (['--help'], ['generate', '--help'], ['inspect', '--help']):\n"
        "    result = CliRunner().invoke(cli, arguments)\n"
        "    assert result.exit_code == 0, result.output\n"
    )
