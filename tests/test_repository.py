"""Rules about files: their length, their imports, and that nothing tells where they were written."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("runtime", "plugins", "calibration", "export", "tools", "demo", "tests", "benchmarks")
PYTHON_FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MAX_LINES = 400


def relative(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_there_is_something_to_check() -> None:
    assert len(PYTHON_FILES) > 30


def test_files_stay_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PYTHON_FILES}
    assert not relative([path for path, length in lengths.items() if length > MAX_LINES])


def test_no_relative_imports() -> None:
    pattern = re.compile(r"^\s*from\s+\.", re.MULTILINE)
    assert not relative([path for path in PYTHON_FILES if pattern.search(path.read_text(encoding="utf-8"))])


def test_modules_say_what_they_are() -> None:
    silent = []
    for path in (path for path in PYTHON_FILES if path.name != "conftest.py"):
        text = path.read_text(encoding="utf-8")
        if text.strip() and not text.lstrip().startswith(('"""', 'r"""')):
            silent.append(path)
    assert not relative(silent)


def test_what_is_avoided_is_absent() -> None:
    # The words are put together here, so that this file does not contain them.
    shell, swallow = "shell=" + "True", re.compile(r"except " + r"Exception:?.*:\s*\n\s*(return None|pass)\b")
    product = [path for path in PYTHON_FILES if path.relative_to(ROOT).parts[0] != "tests"]
    assert not relative([path for path in PYTHON_FILES if shell in path.read_text(encoding="utf-8")])
    assert not relative([path for path in product if swallow.search(path.read_text(encoding="utf-8"))])


def test_constraints_pin_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line) for line in lines)
    pinned = {normalised(line.split("==")[0]) for line in lines}
    extras = project["optional-dependencies"]
    installed = ["dev"]  # and what it names; the extras for hardware that is not here cannot be tested, nor pinned
    for extra in installed:
        installed += [name for item in extras[extra] for name in re.findall(r"^reelforge\[(\w+)\]", item)]
    assert {"cpu", "export", "rtx"} <= set(installed)
    requirements = [*project["dependencies"], *(item for extra in installed for item in extras[extra])]
    needed = {normalised(re.split(r"[\[<>=!~; ]", item)[0]) for item in requirements} - {"reelforge"}
    assert needed <= pinned


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_makefile_and_readme_agree() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    assert {"env", "demo", "test", "lint", "train-demo", "clean", "help"} <= targets
    named = set(re.findall(r"`make ([a-z-]+)`", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named <= targets


PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    broken = [
        target for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text) if not (page.parent / target).exists()
    ]
    assert not broken


def test_paths_named_in_the_documentation_exist() -> None:
    missing = []
    for page in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]:
        for name in re.findall(
            r"`((?:runtime|export|tools|plugins|calibration|tests|demo)/[\w/.-]*)`", page.read_text()
        ):
            if not (ROOT / name).exists() and not name.startswith("demo/"):  # that folder is optional
                missing.append(f"{page.name}: {name}")
    assert not missing


def test_generated_files_are_not_committed() -> None:
    result = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip("not a git checkout")
    files = result.stdout.splitlines()
    assert not [name for name in files if name.startswith((".typing/", ".venv/", "out/")) or "__pycache__" in name]
