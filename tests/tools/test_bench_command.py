"""``reelforge bench``: the list, the command it runs, exit codes passed on, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from reelforge.runtime.errors import RequestError
from reelforge.tools import bench_command
from reelforge.tools.bench.registry import BENCHMARKS, Benchmark

ROOT = Path(__file__).resolve().parents[2]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(bench_command.bench, list(arguments))


@pytest.mark.parametrize("arguments", [(), ("--list",)])
def test_the_list_has_every_benchmark(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    result = invoke(*arguments)
    assert result.exit_code == 0
    assert not [one.name for one in BENCHMARKS if f"\n{one.name} " not in result.output]
    assert "benchmarks/parity.md" in result.output


def test_the_list_as_json() -> None:
    listed = json.loads(invoke("--json").output)["benchmarks"]
    assert [one["name"] for one in listed] == [one.name for one in BENCHMARKS]
    assert set(listed[0]) >= {"name", "shows", "takes", "needs", "output"}


def test_the_command_has_the_users_options_last() -> None:
    result = invoke("quantisation", "--show", "--", "--only", "weights", "-o", "other.md")
    assert result.output.splitlines() == [
        "python -m reelforge.tools.bench.quantisation -o benchmarks/quantisation.md --only weights -o other.md"
    ]


def test_a_benchmark_runs_as_its_module_and_its_exit_code_is_ours(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    helped = invoke("soak", "--", "--help")
    assert helped.exit_code == 0
    assert "Make many requests of BUNDLE" in capfd.readouterr().out
    assert invoke("soak", "--", "--requests", "0").exit_code == 2
    assert "--requests" in capfd.readouterr().err


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    error = invoke("step_cach").exception
    assert isinstance(error, RequestError)
    assert str(error).startswith(
        "RequestError: no benchmark is called 'step_cach'.\n  received: step_cach   expected: one"
    )
    assert str(error).endswith("fix: reelforge bench step-cache")
    assert str(invoke("xyz").exception).endswith("fix: see `reelforge bench --list`")


def test_only_a_checkout_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = invoke("parity").exception
    assert isinstance(error, RequestError)
    assert "RequestError: benchmark 'parity' cannot run here." in str(error)
    assert f"received: {tmp_path}" in str(error)
    assert "expected: the root of a checkout of reelforge, with the folder benchmarks/" in str(error)
    assert "fix: git clone the project" in str(error)


def test_missing_packages_are_named() -> None:
    lacking = Benchmark("x", "parity", "", "", imports=("click", "not_installed_at_all"))
    with pytest.raises(RequestError) as caught:
        bench_command.check(lacking, ROOT)
    assert "benchmark 'x' needs packages that are not installed." in str(caught.value)
    assert "received: without not_installed_at_all" in str(caught.value)
    assert "expected: an environment with click, not_installed_at_all" in str(caught.value)
    assert "fix: `make env`" in str(caught.value)


@pytest.mark.parametrize("arguments", [("parity", "--list"), ("--show",), ("parity", "--json")])
def test_options_that_contradict(arguments: tuple[str, ...]) -> None:
    assert invoke(*arguments).exit_code == 2


def test_listing_loads_nothing_that_measures() -> None:
    program = (
        "import sys; from reelforge.tools.main import main\ntry: main(['bench', '--list'])\nexcept SystemExit: pass\n"
    )
    program += "print([n for n in ('torch', 'onnx', 'onnxruntime', 'diffusers') if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "[]"
