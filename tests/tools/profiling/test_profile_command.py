"""``reelforge profile`` as a user runs it: files, comparison, refusals, Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import pytest

from reelforge.runtime.errors import RequestError
from reelforge.tools.main import main
from reelforge.tools.profiling.files import read_profile
from reelforge.tools.profiling.schema import Kind
from tests.runtime.fake_bundle import SPEC, write_fake_bundle

COMMAND = [sys.executable, "-c", "from reelforge.tools.main import main; main()", "profile"]
SMALL = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "3", "--threads", "1"]
QUICK = [*SMALL, "--no-cold", "--no-layers", "--no-peak", "--repeats", "2"]
FILES = ["profile.json", "report.html", "trace.json"]


class Profile(Protocol):
    def __call__(self, *arguments: str | Path) -> Result: ...


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Profile:
    """The command in this process, which starts faster; in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Result:
        with pytest.raises(SystemExit) as end:
            main(["profile", *map(os.fspath, arguments)])
        assert isinstance(end.value.code, int)
        return Result(end.value.code, *capsys.readouterr())

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def other_spec(folder: Path, **changes: Any) -> Path:
    write_fake_bundle(folder, spec=replace(SPEC, **changes))
    return folder


def test_everything(profile: Profile, fake_bundle: Path, tmp_path: Path) -> None:
    result = profile(fake_bundle, "-o", "out", *SMALL, "--repeats", "2")
    assert result.returncode == 0, result.stderr
    assert "where the time goes" in result.stdout
    assert names(tmp_path / "out") == FILES
    found = read_profile(tmp_path / "out" / "profile.json")
    assert found.complete
    assert found.cold is not None
    assert found.warm is not None
    assert {"start Python", "import", "open", "tokenise", "load engines", "run engines", "encode video"} <= set(
        found.cold.parts
    )
    assert [(stage.stage, stage.calls) for stage in found.warm.stages] == [
        ("llm", 1), ("clip", 1), ("refiner", 1), ("modulation", 1), ("dit", 3), ("vae_decoder", found.work.tiles),
    ]  # fmt: skip
    assert all(stage.load is not None and stage.load.median_ms > 0 for stage in found.warm.stages)
    assert found.warm.steps is not None
    assert found.warm.steps.count == 6
    assert found.warm.step_gaps is not None
    assert found.warm.step_gaps.count == 4
    assert {memory.phase for memory in found.cold.memory} >= {
        "import", "open", "text", "conditioning", "sampling", "decoding",
    }  # fmt: skip
    assert [run.temperature for run in found.runs] == ["cold", "warm", "warm", "warm"]
    assert found.layers is not None
    assert {layer.stage for layer in found.layers.layers} == {stage.stage for stage in found.warm.stages}
    assert found.peak is not None
    assert found.peak.measured
    assert found.noise
    for run in found.runs:
        assert sum(span.kind is Kind.STEP for span in run.spans) == 3
        for span in run.spans:
            assert 0 <= span.start_ms <= span.end_ms <= run.total_ms


def test_json_on_stdout_is_the_file(profile: Profile, fake_bundle: Path, tmp_path: Path) -> None:
    result = profile(fake_bundle, *QUICK, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((tmp_path / "fake.profile" / "profile.json").read_text())


def test_comparing_a_bundle_with_its_copy(profile: Profile, fake_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(fake_bundle, tmp_path / "copy.bundle")
    result = profile(fake_bundle, "--compare", "copy.bundle", "-o", "out", *QUICK)
    assert result.returncode == 0, result.stderr
    assert "copy.bundle beside fake.bundle" in result.stdout
    found = read_profile(tmp_path / "out" / "profile.json")
    assert found.comparison is not None
    assert found.comparison.rounds == 2
    video = found.comparison.ratios[0]
    assert video.what == "video"
    assert video.low is not None
    assert video.high is not None
    assert video.low <= video.ratio <= video.high
    # The warm-up and the first round begin with one bundle, the second round with the other.
    order = [run.bundle for run in found.runs]
    assert order == ["fake.bundle", "copy.bundle"] * 2 + ["copy.bundle", "fake.bundle"]


def refused(result: Result, code: int, *words: str) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def test_another_model_is_not_compared(profile: Profile, fake_bundle: Path, tmp_path: Path) -> None:
    other = other_spec(tmp_path / "other.bundle", tiling=replace(SPEC.tiling, stride=2))
    result = profile(fake_bundle, "--compare", other, *QUICK)
    refused(result, 2, "RequestError", "different models", "other numbers in tiling", "fix:")
    assert names(tmp_path) == ["other.bundle"]


@pytest.mark.parametrize(("field", "value"), [("steps", 9), ("height", 64)])
def test_other_defaults_are_other_work(
    profile: Profile, fake_bundle: Path, tmp_path: Path, field: str, value: int
) -> None:
    defaults = replace(SPEC.defaults, **{field: value})
    other = other_spec(tmp_path / "other.bundle", defaults=defaults)
    result = profile(fake_bundle, "--compare", other, "--no-cold", "--repeats", "1")
    refused(result, 2, "RequestError", "different work", "fix: say them", "steps" if field == "steps" else "shape")
    assert names(tmp_path) == ["other.bundle"]


@pytest.mark.parametrize(("option", "value"), [("--repeats", "0"), ("--repeats", "-1"), ("--warmup", "-2")])
def test_nothing_to_repeat(profile: Profile, fake_bundle: Path, tmp_path: Path, option: str, value: str) -> None:
    result = profile(fake_bundle, *SMALL, option, value)
    refused(result, 2, "RequestError", option, f"received: {value}", "fix:")
    assert names(tmp_path) == []


def test_a_bundle_of_another_version(profile: Profile, fake_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(fake_bundle, tmp_path / "old.bundle"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["schema_version"] = 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    result = profile(copy, *QUICK)
    refused(result, 4, "BundleError", "schema version", "received: 1")
    assert names(tmp_path) == ["old.bundle"]


def test_a_folder_that_cannot_be_written(profile: Profile, fake_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = profile(fake_bundle, *QUICK, "-o", "file/out")
    refused(result, 7, "OutputError", "'file/out'", "fix: choose another folder")
    assert "warm run" not in result.stderr
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_request_that_the_bundle_does_not_serve(profile: Profile, fake_bundle: Path, tmp_path: Path) -> None:
    result = profile(fake_bundle, "--height", "33", "--no-cold")
    refused(result, 2, "RequestError", "height=33")
    assert names(tmp_path) == []


def test_ctrl_c_leaves_a_profile_that_says_so(fake_bundle: Path, tmp_path: Path) -> None:
    command = [*COMMAND, str(fake_bundle), "-o", "out", *SMALL, "--no-cold", "--no-peak", "--repeats", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("warm run 4 "):
                process.send_signal(signal.SIGINT)
                break
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "interrupted; the files hold what was measured until then" in errors
    assert "incomplete" in output
    found = read_profile(tmp_path / "out" / "profile.json")
    assert not found.complete
    assert found.warm is not None
    assert found.warm.runs >= 3
    assert found.missing[0] == f"warm runs {found.warm.runs + 1} to 100000 of 100000"
    assert len(found.missing) == 2
    assert found.missing[-1] == "the layers"
    assert "This profile is incomplete" in (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "trace.json").read_text())["otherData"]["complete"] is False
    assert names(tmp_path / "out") == FILES


def test_ctrl_c_during_the_cold_run(fake_bundle: Path, tmp_path: Path) -> None:
    command = [*COMMAND, str(fake_bundle), "-o", "out", *SMALL, "--no-peak"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("cold run"):
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    found = read_profile(tmp_path / "out" / "profile.json")
    assert not found.complete
    assert found.missing[0] == "the cold run"
    assert found.warm is None
    assert "No warm run was finished" in found.noise[0]


def test_nvtx_ranges_need_their_package(
    profile: Profile, fake_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    refused(profile(fake_bundle, *QUICK, "--nvtx"), 2, "RequestError", "pip install reelforge[profile]")


def test_profiles_of_other_versions_are_not_read(tmp_path: Path) -> None:
    for text, words in (('{"schema_version": 99}', "99"), ("{", "cannot be read"), ("[]", "None")):
        (tmp_path / "profile.json").write_text(text)
        with pytest.raises(RequestError, match=words):
            read_profile(tmp_path / "profile.json")
