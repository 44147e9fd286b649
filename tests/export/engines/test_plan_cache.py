"""The cache and ``reelforge inspect`` with plans and receipts of the real compiler."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from reelforge.export.cache import PlanCache, PlanKey
from reelforge.export.engines.compile import compile_plan
from reelforge.export.engines.request import PlanRequest
from reelforge.runtime.codec import from_json
from reelforge.runtime.manifest import PlanEntry, ProfileEntry
from reelforge.runtime.receipt import Receipt
from reelforge.tools.inspect_receipts import PlanReceipt, layer_counts, layer_table, plan_table, profile_table


def test_a_plan_from_the_cache_is_what_the_compiler_makes_again(float8_request: PlanRequest, tmp_path: Path) -> None:
    """Byte for byte, in a process of its own; of the receipts only the seconds that they state may differ."""

    def build(plan: Path, receipt: Path) -> None:
        compile_plan(replace(float8_request, plan=str(plan), receipt=str(receipt)))

    key = PlanKey(float8_request, "0" * 64, "tensorrt_rtx")
    plans, hits = [], []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        hits.append(PlanCache(tmp_path / "cache").fetch_or_build(key, build, folder / "plan", folder / "receipt"))
        plans.append(folder / "plan")
    assert hits == [False, True]
    assert plans[0].samefile(plans[1])
    build(tmp_path / "plan", tmp_path / "receipt")
    assert (tmp_path / "plan").read_bytes() == plans[0].read_bytes()
    receipts = [json.loads(path.read_text()) for path in (tmp_path / "receipt", folder / "receipt")]
    ours, theirs = (replace(from_json(Receipt, value), build_seconds=0.0) for value in receipts)
    assert ours == theirs


def test_what_a_person_sees_of_a_real_receipt(
    float8_request: PlanRequest, float8_plan: tuple[Path, Receipt], capsys: pytest.CaptureFixture[str]
) -> None:
    receipt = float8_plan[1]
    entry = PlanEntry(
        path="plans/toy.plan",
        receipt="receipts/toy.json",
        architectures=receipt.architectures,
        part=0,
        parts=1,
        inputs=(),
        outputs=(),
        profiles=tuple(ProfileEntry(each.name, each.dimensions, 0) for each in float8_request.profiles),
        weight_bytes=receipt.weight_bytes,
        backend=receipt.backend,
    )
    item = PlanReceipt("toy", entry, receipt, receipt.plan_sha256)
    assert layer_counts([receipt])["gemm"] == {"FP8": len(float8_request.expected.layers)}
    screen = Console(width=100, highlight=False)
    for table in (plan_table([item]), profile_table([item]), layer_table(item)):
        screen.print(table)
    shown = capsys.readouterr().out
    assert f"{len(float8_request.expected.layers)} FP8" in shown
    for layer in float8_request.expected.layers:
        assert layer in shown
    for word in ("small", "large", "tokens 65..1024 (512)"):
        assert word in shown
    assert "unknown" not in shown
    assert "BFloat16" not in shown
    assert max(map(len, shown.splitlines())) <= 100
