"""Builds in a child process, and every way in which a child can end."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reelforge.export.engines import compile as compile_module
from reelforge.export.engines.channel import Progress
from reelforge.export.engines.compile import compile_plan
from reelforge.export.engines.plan_writer import partial_path
from reelforge.export.engines.request import Expected, PlanRequest
from reelforge.runtime.codec import from_json, to_json
from reelforge.runtime.errors import BuildError, RequestError
from reelforge.runtime.plan_file import check_header, check_plan_file
from reelforge.runtime.receipt import Receipt
from reelforge.runtime.recipe import Backend, Precision
from tests.export.engines.tiny_graphs import (
    expect_attention,
    expect_linears,
    request_for,
    save_attention,
    save_linears,
    with_plan,
)

PARENT = """
import json, sys
from pathlib import Path
from reelforge.export.engines.compile import compile_plan
from reelforge.export.engines.request import PlanRequest
from reelforge.runtime.codec import from_json
request = from_json(PlanRequest, json.loads(Path(sys.argv[1]).read_text()))
compile_plan(request, on_start=lambda pid: print(pid, flush=True))
"""


@pytest.fixture
def request_(tmp_path: Path) -> PlanRequest:
    graph = save_linears(tmp_path / "g.onnx", Precision.FP8)
    return request_for(graph, "rtx:sm89", expect_linears(Precision.FP8), out=tmp_path / "out")


@pytest.fixture
def longer_request(tmp_path: Path) -> PlanRequest:
    """One that takes seconds, so that it can be caught in the middle."""
    graph = save_linears(tmp_path / "g.onnx", Precision.FP8, blocks=24)
    return request_for(graph, "rtx:sm89", expect_linears(Precision.FP8), out=tmp_path / "out")


def left(request: PlanRequest) -> list[str]:
    """Return the files in the results' folder and below, and in the scratch folder."""
    return sorted(path.name for path in Path(request.plan).parent.rglob("*") if path.is_file())


def test_a_plan_and_its_receipt(float8_plan: tuple[Path, Receipt], float8_request: PlanRequest) -> None:
    plan, receipt = float8_plan
    check_plan_file(plan, sha256=receipt.plan_sha256, size_bytes=receipt.plan_bytes)
    version = receipt.backend.removeprefix("tensorrt_rtx ")
    for architecture in ("sm89", "sm120"):
        check_header(plan, backend=Backend.RTX, version=version, architecture=architecture)
    assert receipt.architectures == ("sm89", "sm120")
    assert from_json(Receipt, json.loads(Path(float8_request.receipt).read_text())) == receipt
    assert left(float8_request) == ["toy.json", "toy.plan"]
    assert not list(Path(float8_request.scratch).iterdir())


def test_two_processes_give_the_same_bytes(
    tmp_path: Path, float8_plan: tuple[Path, Receipt], float8_request: PlanRequest
) -> None:
    plan, first = float8_plan
    second = compile_plan(with_plan(float8_request, tmp_path))
    assert (tmp_path / "toy.plan").read_bytes() == plan.read_bytes()
    assert dataclasses.replace(second, build_seconds=first.build_seconds) == first


def test_an_attention_in_fp8(tmp_path: Path) -> None:
    graph = save_attention(tmp_path / "g.onnx", eight_bits=True)
    receipt = compile_plan(request_for(graph, "rtx:sm89+sm120", expect_attention(Precision.FP8)))
    assert receipt.precisions("attention") == {"FP8": 1}


def test_progress_and_process_id(request_: PlanRequest) -> None:
    steps: list[Progress] = []
    children: list[int] = []
    compile_plan(request_, steps.append, children.append)
    assert steps
    assert len(children) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(children[0], 0)


def test_what_the_compiler_refuses(request_: PlanRequest, tmp_path: Path) -> None:
    graph = save_attention(tmp_path / "wide.onnx", head_dim=512)
    with pytest.raises(BuildError, match="did not compile the graph of stage 'toy'") as caught:
        compile_plan(with_plan(request_for(graph, "rtx:sm89"), Path(request_.plan).parent))
    assert "not supported by a dedicated kernel" in str(caught.value)
    assert left(request_) == []


def test_a_promise_that_is_not_kept(request_: PlanRequest, tmp_path: Path) -> None:
    graph = save_linears(tmp_path / "plain.onnx")
    broken = dataclasses.replace(request_, graph=str(graph))
    with pytest.raises(BuildError, match="2 of 2 layers and attentions"):
        compile_plan(broken)
    assert left(request_) == []


def test_a_layer_that_is_not_in_the_graph(request_: PlanRequest) -> None:
    with pytest.raises(BuildError, match="1 layers that the recipe speaks of are not in the graph"):
        compile_plan(dataclasses.replace(request_, expected=Expected(layers={"absent": Precision.FP8})))
    assert left(request_) == []


def test_a_plugin(tmp_path: Path) -> None:
    request = request_for(save_linears(tmp_path / "g.onnx", domain="reelforge"), "rtx:sm89", out=tmp_path / "out")
    with pytest.raises(BuildError, match="need a plugin"):
        compile_plan(request)


def test_an_architecture_that_cannot(request_: PlanRequest) -> None:
    target = dataclasses.replace(request_.target, architectures=("sm86", "sm89"))
    with pytest.raises(RequestError, match="sm86 cannot compute in fp8"):
        compile_plan(dataclasses.replace(request_, target=target))
    assert not Path(request_.plan).parent.exists()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "was killed, most often because memory ran out"),
        (signal.SIGSEGV, r"crashed \(SIGSEGV\)"),
        (signal.SIGABRT, r"crashed \(SIGABRT\)"),
    ],
)
def test_a_child_that_dies_midway(longer_request: PlanRequest, number: signal.Signals, message: str) -> None:
    children: list[int] = []
    seen: list[list[str]] = []

    def kill(_: Progress) -> None:
        seen.append(left(longer_request))
        os.kill(children[0], number)

    with pytest.raises(BuildError, match=message) as caught:
        compile_plan(longer_request, kill, children.append)
    assert "toy.plan.partial" in seen[0]  # it was in the middle
    assert left(longer_request) == []
    assert "received: " in str(caught.value)  # the compiler's last messages


def test_an_interrupted_parent(longer_request: PlanRequest) -> None:
    children: list[int] = []

    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_plan(longer_request, interrupt, children.append)
    with pytest.raises(ProcessLookupError):
        os.kill(children[0], 0)
    assert left(longer_request) == []


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to kill the child")
def test_a_parent_that_is_killed_takes_its_child_along(longer_request: PlanRequest, tmp_path: Path) -> None:
    job = tmp_path / "job.json"
    job.write_text(json.dumps(to_json(longer_request)))
    command = [sys.executable, "-c", PARENT, str(job)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        files = [Path(longer_request.plan), partial_path(Path(longer_request.plan))]
        while parent.poll() is None and not any(path.exists() for path in files):
            time.sleep(0.01)
        parent.kill()
    deadline = time.monotonic() + 20
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(child)


def is_running(process: int) -> bool:
    """Whether the process exists and is more than an entry that nobody has collected."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(request_: PlanRequest) -> None:
    def fill(_: int) -> None:
        partial_path(Path(request_.receipt)).symlink_to("/dev/full")

    with pytest.raises(BuildError, match=r"toy\.json cannot be written") as caught:
        compile_plan(request_, on_start=fill)
    assert "No space left on device" in str(caught.value)
    assert left(request_) == []


def test_a_child_that_fails_without_a_word(request_: PlanRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(request_.graph).parent))
    Path(request_.graph).with_name("onnx_ir.py").write_text("raise ZeroDivisionError('broken installation')\n")
    with pytest.raises(BuildError, match="ended with status 1") as caught:
        compile_plan(request_)
    assert "ZeroDivisionError: broken installation" in str(caught.value)


def test_an_earlier_plan_does_not_survive_a_failed_build(request_: PlanRequest) -> None:
    Path(request_.plan).parent.mkdir()
    Path(request_.plan).write_bytes(b"earlier")
    Path(request_.receipt).write_text("{}")
    with pytest.raises(BuildError):
        compile_plan(dataclasses.replace(request_, expected=Expected(layers={"absent": Precision.FP8})))
    assert left(request_) == []


def test_an_unreadable_receipt(request_: PlanRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(request: PlanRequest, *_: object) -> None:
        Path(request.receipt).write_text("[]")

    monkeypatch.setattr(compile_module, "_run", pretend)
    with pytest.raises(BuildError, match="left no readable receipt"):
        compile_plan(request_)
