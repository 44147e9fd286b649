"""``deploy/install.sh``: which extras it takes on which machine, on stand-ins for Python and the driver."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

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
    assert ("'3.5' is not known" in result.stderr) == (capability == "3.5")


def test_what_is_asked_for_wins(tmp_path: Path) -> None:
    prefix, bin_folder = str(tmp_path / "opt"), str(tmp_path / "bin")
    result, record = install(tmp_path, "9.0", BACKEND="cuda", PREFIX=prefix, BIN=bin_folder)
    assert result.returncode == 0, result.stderr
    assert f"{ROOT}[export,serve,cuda]" in record
    assert (Path(bin_folder) / "reelforge").is_symlink()


def test_an_unknown_backend(tmp_path: Path) -> None:
    result, record = install(tmp_path, None, BACKEND="gpu")
    assert (result.returncode, record) == (2, "")
    assert "use cpu, cuda, rtx or tensorrt" in result.stderr


def test_a_python_that_is_too_old(tmp_path: Path) -> None:
    script(tmp_path / "old", "#!/bin/sh\nexit 1\n")
    result, _ = install(tmp_path, None, PYTHON=str(tmp_path / "old"))
    assert result.returncode == 1
    assert "Python 3.11 or newer" in result.stderr
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
