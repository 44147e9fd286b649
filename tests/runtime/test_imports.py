"""The runtime works where only numpy, tokenizers, av and onnxruntime are, and importing it costs nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import reelforge.runtime as runtime
from reelforge.runtime.engines.onnxruntime_library import TELEMETRY_SWITCH

HEAVY = ["torch", "onnx", "onnxscript", "onnx_ir", "transformers", "diffusers", "safetensors", "ml_dtypes", "scipy"]
OURS = ["reelforge.export", "reelforge.calibration", "reelforge.plugins", "reelforge.tools"]


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_generation_loads_no_compiler(fake_bundle: Path, tmp_path: Path) -> None:
    script = f"""
        import sys
        for name in {HEAVY + OURS!r}:
            sys.modules[name] = None  # an import of it would raise
        from reelforge.runtime import Pipeline, Request, VideoWriter
        frames = Pipeline.open(sys.argv[1]).generate(Request("a ball", frames=1, steps=1))
        with VideoWriter(sys.argv[2], 48, 64, 1, 24) as video:
            video.write(frames)
        loaded = [name for name in sys.modules if name.split(".")[0] == "reelforge" and sys.modules[name]]
        print(*loaded)
    """
    loaded = run(script, str(fake_bundle), str(tmp_path / "x.png")).split()
    assert loaded
    assert all(name == "reelforge" or name.startswith("reelforge.runtime") for name in loaded)


@pytest.mark.parametrize("decided", [None, "0"])
def test_onnxruntime_reports_nothing(fake_bundle: Path, tmp_path: Path, decided: str | None) -> None:
    """Unless the user decided otherwise: that it then keeps events also shows that we look in the right place."""
    script = """
        import sys
        from reelforge.runtime import Pipeline, Request
        Pipeline.open(sys.argv[1]).generate(Request("a ball", frames=1, steps=1))
    """
    inherited = {name: value for name, value in os.environ.items() if name not in ("CI", "XDG_CACHE_HOME")}
    environment = inherited | {"HOME": str(tmp_path)} | ({} if decided is None else {TELEMETRY_SWITCH: decided})
    if decided is None:
        environment.pop(TELEMETRY_SWITCH, None)
    command = [sys.executable, "-c", textwrap.dedent(script), str(fake_bundle)]
    subprocess.run(command, env=environment, check=True)
    found = [path.name for path in tmp_path.rglob("*") if "onnxruntime" in path.name]
    assert bool(found) == (decided is not None)


def test_importing_the_package_is_light() -> None:
    script = """
        import sys
        import reelforge.runtime
        print(*(name for name in ("numpy", "onnxruntime", "av", "tokenizers") if name in sys.modules))
        import reelforge.runtime.pipeline, reelforge.runtime.engines.onnxruntime_engine
        print(*(name for name in ("onnxruntime", "av") if name in sys.modules))
        print(*(name for name in sys.modules if "tensorrt" in name or "cuda" in name))
    """
    assert run(script).split() == []


def test_help_and_inspect_need_no_engine(fake_bundle: Path) -> None:
    script = """
        import sys
        sys.modules["onnxruntime"] = sys.modules["av"] = None
        from reelforge.tools.main import cli
        for arguments in (["--help"], ["inspect", sys.argv[1]]):
            cli.main(arguments, standalone_mode=False)
        print("done")
    """
    assert run(script, str(fake_bundle)).endswith("done\n")


def test_public_names() -> None:
    for name in runtime.__all__:
        assert getattr(runtime, name).__name__ == name
    assert set(runtime.__all__) <= set(dir(runtime))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = runtime.nothing


def test_every_import_is_allowed() -> None:
    allowed = {*sys.stdlib_module_names, "numpy", "tokenizers", "av", "reelforge"}
    folder = Path(runtime.__file__).parent
    files = sorted(folder.rglob("*.py"))
    assert len(files) > 15
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in allowed, f"{file} imports {name}"
                assert not name.startswith("reelforge.") or name.startswith("reelforge.runtime"), f"{file}: {name}"
