"""What the extras install: a machine that only runs bundles needs no torch, whatever it runs them on."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
COMPILERS = {
    "torch", "triton", "transformers", "diffusers", "onnx", "onnx-ir", "onnxscript", "safetensors", "ml-dtypes",
    "matplotlib",
}  # fmt: skip


def requirements(*extras: str) -> dict[str, Requirement]:
    """Everything that ``pip install reelforge[...]`` names, by canonical name; extras of ours are followed."""
    waiting = [*map(Requirement, PROJECT["dependencies"]), *(item for extra in extras for item in EXTRAS[extra])]
    found: dict[str, Requirement] = {}
    while waiting:
        item = waiting.pop()
        if canonicalize_name(item.name) == "reelforge":
            waiting += [each for extra in item.extras for each in EXTRAS[extra]]
        else:
            found[canonicalize_name(item.name)] = item
    return found


def installed_with(name: str) -> set[str]:
    """A package and all that the installed version of it depends on, as far as that is installed here."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        items = [Requirement(line) for line in lines]
        waiting += [item.name for item in items if item.marker is None or item.marker.evaluate({"extra": ""})]
    return found


@pytest.mark.parametrize("extra", ["cpu", "cuda", "rtx", "tensorrt"])
def test_running_needs_no_compiler(extra: str) -> None:
    named = requirements(extra)
    assert not COMPILERS & set(named)
    assert not COMPILERS & {dependency for name in named for dependency in installed_with(name)}


def test_the_search_finds_what_is_there() -> None:
    assert {"torch", "onnx-ir", "onnxruntime"} <= set(requirements("export"))
    assert {"tensorrt-rtx-cu13-libs", "cuda-bindings"} <= {
        dependency for name in requirements("rtx") for dependency in installed_with(name)
    }
    assert "torch" in installed_with("accelerate")


@pytest.mark.parametrize(("extra", "library"), [("rtx", "tensorrt-rtx"), ("tensorrt", "tensorrt")])
def test_compiling_plans_takes_two_extras(extra: str, library: str) -> None:
    assert {library, "cuda-python", "torch", "onnx-ir"} <= set(requirements("export", extra))
    assert library not in requirements("export")


def test_development_has_all_that_tests_need() -> None:
    assert set(requirements("export", "rtx", "plugins")) <= set(requirements("dev"))


def test_extras_that_are_named_exist() -> None:
    """In messages, help texts and documentation."""
    pages = [path for folder in ("runtime", "export", "plugins", "calibration", "tools", "docs")
             for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")]  # fmt: skip
    named = {
        extra
        for page in [*pages, ROOT / "README.md", ROOT / "CHANGELOG.md"]
        for found in re.findall(r"reelforge\[([a-z,]+)\]", page.read_text(encoding="utf-8"))
        for extra in found.split(",")
    }
    assert {"rtx", "export"} <= named <= set(EXTRAS)


def test_plans_run_without_any_compiler(bundle_of_fakes: Path) -> None:
    script = f"""
        import sys
        for name in {sorted(name.replace("-", "_") for name in COMPILERS)!r}:
            sys.modules[name] = None  # an import of it would raise
        from pathlib import Path
        import pytest
        from reelforge.runtime import Pipeline, Request
        from reelforge.runtime.bundle.open import Bundle
        from tests.runtime.fake_cuda import FakeCuda
        from tests.runtime.fake_tensorrt import FakeTensorRt, add_plans
        cuda = FakeCuda()
        library = FakeTensorRt(cuda)
        sys.modules["cuda.bindings.runtime"], sys.modules["tensorrt_rtx"] = cuda, library
        with Pipeline(add_plans(Bundle.open(Path(sys.argv[1])), library)) as pipeline:
            frames = pipeline.generate(Request("a ball", height=32, width=48, frames=5, steps=2))
        print(len(library.executions), frames.shape[0])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(bundle_of_fakes)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    executions, frames = map(int, result.stdout.split())
    assert executions >= 6
    assert frames == 5


@pytest.fixture
def bundle_of_fakes(tmp_path: Path) -> Path:
    from tests.runtime.fake_bundle import write_fake_bundle

    path = tmp_path / "fake.bundle"
    write_fake_bundle(path)
    return path
