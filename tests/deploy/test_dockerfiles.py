"""The Dockerfiles: linted, pinned, without root and secrets, and their commands exist."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.deploy.dockerfile import Stage, stages_of

ROOT = Path(__file__).resolve().parents[2]
FILES = {name: ROOT / "deploy" / f"Dockerfile.{name}" for name in ("cpu", "cuda")}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


@pytest.fixture(params=FILES, ids=str)
def path(request: pytest.FixtureRequest) -> Path:
    return FILES[request.param]


@pytest.fixture
def stages(path: Path) -> list[Stage]:
    return stages_of(path)


def test_hadolint_has_nothing_to_say(path: Path) -> None:
    command = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if command is None:
        pytest.skip("hadolint is not installed; it comes with .[dev] on Linux with x86-64")
    result = subprocess.run(
        [command, "--failure-threshold", "style", "--no-color", str(path)], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr


def test_bases_are_pinned_and_equal(stages: list[Stage]) -> None:
    """Python in the virtual environment is that of the base: both stages must have the same."""
    assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[a-z0-9.-]+", stages[0].base)
    names = {stage.name for stage in stages if stage.name}
    assert {stage.base for stage in stages if stage.base not in names} == {stages[0].base}


def test_the_image_that_is_built_by_default(stages: list[Stage]) -> None:
    final = stages[-1]
    assert not final.name
    words = [one.word for one in final.instructions]
    user = final.one("USER").rest
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user), "by number, so that Kubernetes can see that it is not root"
    assert "RUN" not in words[words.index("USER") :]
    assert not [run for run in final.all("RUN") if "pip" in run.rest], "what is installed comes from another stage"
    assert final.one("STOPSIGNAL").rest == "SIGTERM"
    assert final.one("VOLUME").exec_form() == ["/data"]
    assert final.one("EXPOSE").rest == "8000"
    assert "/readyz" in final.one("HEALTHCHECK").exec_form()[-1]
    assert f"--uid {user.split(':')[0]}" in " ".join(run.rest for run in final.all("RUN"))


def test_nothing_secret_is_in_an_image(path: Path, stages: list[Stage]) -> None:
    set_names = [one.rest for stage in stages for word in ("ENV", "ARG") for one in stage.all(word)]
    assert not [text for text in set_names if re.search(r"KEY|TOKEN|SECRET|PASSW", text, re.IGNORECASE)]
    assert not [one for stage in stages for one in stage.all("COPY") if re.match(r"\.(/)? ", one.rest)]
    ignored = path.with_name(path.name + ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        name.rstrip("/")
        for stage in stages
        for one in stage.all("COPY")
        if not one.rest.startswith("--from=")
        for name in one.rest.split()[:-1]
    }
    assert copied <= allowed
    assert all((ROOT / name).exists() for name in copied)


def test_only_the_compiler_has_the_compiler(path: Path, stages: list[Stage]) -> None:
    by_name = {stage.name: stage for stage in stages}
    installs = {
        name: [extra for run in stage.all("RUN") for found in re.findall(r"""['"]\.\[([^\]]+)\]""", run.rest)
               for extra in found.split(",")]
        for name, stage in by_name.items()
    }  # fmt: skip
    assert "serve" in installs["build"]
    assert "export" in installs["compiler"]
    assert not {"export", "dev"} & set(installs["build"])
    default = {one.rest.partition("=")[2] for one in by_name["build"].all("ARG")}
    named = {extra for extras in installs.values() for extra in extras} - {"${BACKEND}"} | default
    assert named <= set(EXTRAS)
    assert stages[-1].all("COPY")[0].rest == "--from=build /opt/reelforge /opt/reelforge"


def test_what_the_image_runs_is_a_command_line_of_ours(stages: list[Stage]) -> None:
    from reelforge.tools.build_engine import build_engine
    from reelforge.tools.main import COMMANDS

    if "serve" not in COMMANDS:
        pytest.skip("there is no service yet")
    from reelforge.tools.serve import serve

    final = stages[-1]
    assert final.one("ENTRYPOINT").exec_form() == ["reelforge"]
    name, *arguments = final.one("CMD").exec_form()
    assert name == "serve"
    given = serve.make_context("serve", list(arguments)).params
    assert (str(given["bundle"]), str(given["data"]), given["host"], given["port"]) == (
        "/bundle",
        "/data",
        "0.0.0.0",
        8000,
    )
    compiler = next(stage for stage in stages if stage.name == "compiler")
    assert compiler.one("ENTRYPOINT").exec_form() == [build_engine.name]
