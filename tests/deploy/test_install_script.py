"""``deploy/install.sh``: which extras it takes on which machine, on stand-ins for Python and the driver."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from reelforge.runtime.architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/sh
echo "$@" >> "$RECORD"
if [ "$1" = -m ] && [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi
"""


def install(folder: Path, capability: str | None, **environment: str) -> tuple[subprocess.CompletedProcess[str], str]:
    programs = folder / "programs"
    programs.mkdir()
    script(programs / "python3", PYTHON)
    if capability is not None:
        script(programs / "nvidia-smi", f"#!/bin/sh\necho '{capability}'\necho '{capability}'\n")
    record = folder / "record"
    result = subprocess.run(
        ["/bin/sh", str(ROOT / "deploy" / "install.sh")],
        env={"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(folder), "RECORD": str(record), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return result, record.read_text(encoding="utf-8") if record.exists() else ""


def script(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("capability", "extras"),
    [
        (None, "export,serve,cpu"),
        ("8.9", "export,serve,rtx"),
        ("12.0", "export,serve,rtx"),
        ("9.0", "export,serve,plugins,tensorrt"),
        ("10.0", "export,serve,plugins,tensorrt"),
        ("3.5", "export,serve,cpu"),
        ("10.3", "export,serve,cpu"),
    ],
)
def test_the_gpu_decides(tmp_path: Path, capability: str | None, extras: str) -> None:
    result, record = install(tmp_path, capability)
    assert result.returncode == 0, result.stderr
    assert f"--constraint {ROOT}/constraints.txt {ROOT}[{extras}]" in record
    assert f"-m venv {tmp_path}/.local/share/reelforge" in record
    for name in ("build-engine", "reelforge"):
        assert (tmp_path / ".local" / "bin" / name).readlink() == tmp_path / ".local/share/reelforge/bin" / name
    assert "add it to your PATH" in result.stdout
    assert (f"'{capability}' is not known" in result.stderr) == (capability in ("3.5", "10.3"))
    assert "build-engine CHECKPOINT -o my.bundle --recipe NAME" in result.stdout
    assert "uninstall" not in record


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_its_compiler(tmp_path: Path, name: str) -> None:
    """TensorRT-RTX where it compiles for the GPU, TensorRT where only that does."""
    architecture = ARCHITECTURES[name]
    result, record = install(tmp_path, ".".join(map(str, architecture.capability)))
    assert result.stderr == ""
    assert record.rstrip("\n").endswith(",rtx]" if "rtx" in architecture.backends else ",plugins,tensorrt]")


def test_what_is_asked_for_wins(tmp_path: Path) -> None:
    prefix, bin_folder = str(tmp_path / "opt"), str(tmp_path / "bin")
    result, record = install(tmp_path, "9.0", BACKEND="cuda", PREFIX=prefix, BIN=bin_folder)
    assert result.returncode == 0, result.stderr
    first, *_, last = [line for line in record.splitlines() if "-m pip" in line]
    assert f"{ROOT}[export,serve,cuda]" in first
    # Both wheels of ONNX Runtime own the same files: the GPU's is what stays.
    assert "uninstall --disable-pip-version-check --yes onnxruntime\n" in record
    assert last.endswith("--force-reinstall --no-deps onnxruntime-gpu")
    assert (Path(bin_folder) / "reelforge").is_symlink()


def test_an_unknown_backend(tmp_path: Path) -> None:
    result, record = install(tmp_path, None, BACKEND="gpu")
    assert (result.returncode, record) == (2, "")
    assert "use cpu, cuda, rtx or tensorrt" in result.stderr


def test_a_python_that_is_too_old(tmp_path: Path) -> None:
    script(tmp_path / "old", "#!/bin/sh\nexit 1\n")
    result, _ = install(tmp_path, None, PYTHON=str(tmp_path / "old"))
    assert result.returncode == 1
    assert f"Python 3.11 or newer with its venv module, and {tmp_path}/old is not that" in result.stderr
    assert "PYTHON=python3.12 sh " in result.stderr
    assert not (tmp_path / ".local").exists()


def test_recipes_and_the_script_agree() -> None:
    """What the script installs on a GPU is what the recipes for that GPU compile with."""
    from reelforge.export.planner.gpus import find_gpu
    from reelforge.tools.recipe_file import find_recipe, recipe_names

    for recipe in map(find_recipe, recipe_names()):
        if recipe.content.gpu is None:
            continue
        architecture = find_gpu(recipe.content.gpu).architecture
        data_centre = architecture in ("sm90", "sm100")
        assert str(recipe.content.target).startswith("trt:" if data_centre else "rtx:")


def test_the_three_commands_of_the_page_are_command_lines() -> None:
    """Both times: what the page says to type is what the programs take, with a recipe that exists."""
    from reelforge.tools.build_engine import build_engine
    from reelforge.tools.serve import serve

    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL) if "install.sh" in block]
    assert len(blocks) == 2
    for block in blocks:
        install_it, build, run = (shlex.split(line.removeprefix("$ ")) for line in block.splitlines())
        assert install_it == ["sh", "deploy/install.sh"]
        assert (ROOT / install_it[1]).is_file()
        programs: tuple[tuple[list[str], click.Command], ...] = ((build, build_engine), (run[:1] + run[2:], serve))
        for (program, *arguments), command in programs:
            assert program.startswith("~/.local/bin/")
            command.make_context(command.name, arguments)
        assert run[1] == "serve"
        assert run[2] == build[build.index("-o") + 1], "what is served is what was built"
