"""Budgets as users write them, what stages are counted with, and what is said where a budget does not suffice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelforge.runtime.budget import StageBytes, parse_budget, refuse_too_small, show_bytes, stage_bytes
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.dimensions import video_sizes
from reelforge.runtime.errors import RequestError
from reelforge.runtime.host_memory import anonymous_bytes, available_bytes, return_freed
from reelforge.runtime.manifest import PlanEntry, ProfileEntry, WeightEntry
from reelforge.runtime.recipe import Backend, Target, VideoShape
from tests.runtime.fake_bundle import SPEC


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("20GiB", 20 << 30), ("8GB", 8 * 10**9), (" 1.5 gib ", 3 << 29), ("512MiB", 512 << 20), ("100kb", 100_000),
        ("7", 7), (123, 123), ("1TB", 10**12), ("12b", 12), ("least", 0), (None, None),
    ],
)  # fmt: skip
def test_budgets(text: int | str | None, count: int | None) -> None:
    assert parse_budget(text) == count


@pytest.mark.parametrize(
    "wrong", ["", "GiB", "-1GB", "20 gigs", "1e9", 0, -5, True, "0GB", "nan", float("inf"), "9" * 30]
)
def test_budgets_that_are_none(wrong: int | str) -> None:
    with pytest.raises(RequestError, match="memory budget is not a number of bytes") as caught:
        parse_budget(wrong)
    assert f"received: memory_budget={wrong!r}" in str(caught.value)
    assert "fix: use for example '20GiB', 'least'" in str(caught.value)


@given(st.integers(1, 2**50))
def test_what_is_shown_suffices(count: int) -> None:
    shown = parse_budget(show_bytes(count))
    assert shown is not None
    assert count <= shown <= count * 1.01 + 1


def test_a_budget_that_is_too_small_says_what_would_fit() -> None:
    needs = {"llm": StageBytes(15 << 30, 1 << 30), "clip": StageBytes(1 << 30, 0), "dit": StageBytes(25 << 30, 3 << 30)}
    refuse_too_small(needs, 28 << 30, "this")
    refuse_too_small(needs, 0, "this")
    with pytest.raises(RequestError) as caught:
        refuse_too_small(needs, 20 << 30, "bundle 'hv'")
    assert str(caught.value) == (
        "RequestError: the memory budget is too small for bundle 'hv': it does not fit dit 28.0GiB (weights 25.0GiB).\n"
        "  received: memory_budget=20.0GiB, in which llm, clip would fit   "
        "expected: 28.0GiB or more, with which stages are loaded one after the other\n"
        "  fix: use memory_budget='28.0GiB', make a smaller or shorter video, or build with a lower precision"
    )
    with pytest.raises(RequestError, match="in which no stage would fit") as caught:
        refuse_too_small(needs, 10, "bundle 'hv'")
    assert "llm 16.0GiB" in str(caught.value)


def test_weights_on_the_cpu_are_wide(fake_bundle: Path) -> None:
    manifest = Bundle.open(fake_bundle).manifest
    llm = manifest.stage("llm")
    assert llm is not None
    stored = sum(weight.length for weight in llm.weights)
    assert stage_bytes(manifest, llm).weights == stored == (300 * 6 + 7) * 4
    narrow = tuple(WeightEntry(w.name, "BF16", w.shape, w.file, w.offset, w.length // 2, w.sha256) for w in llm.weights)
    often = stage_bytes(manifest, replace(llm, name="dit", weights=narrow))
    assert often.weights == stored, "widened once, when it is loaded"
    once = stage_bytes(manifest, replace(llm, weights=narrow))
    assert once.weights == stored // 2, "widened in the run, one after the other"
    assert once.activations == stage_bytes(manifest, llm).activations + 300 * 6 * 4
    on_gpu = replace(manifest, target=Target(Backend.CUDA))
    assert stage_bytes(on_gpu, replace(llm, weights=narrow)).weights == stored // 2


def test_activations_grow_with_the_video(fake_bundle: Path) -> None:
    manifest = Bundle.open(fake_bundle).manifest
    small, large = (video_sizes(SPEC, VideoShape(side, side, 5), 4) for side in (32, 64))
    for name in ("dit", "vae_decoder"):
        stage = manifest.stage(name)
        assert stage is not None
        none, some, more = (stage_bytes(manifest, stage, sizes).activations for sizes in ({}, small, large))
        assert none <= some <= more
        assert none < more


def test_sizes_of_a_video() -> None:
    sizes = video_sizes(SPEC, VideoShape(64, 48, 13), 7)
    assert sizes == {
        "batch": 1, "steps": 7, "latent_frames": 4, "latent_height": 8, "latent_width": 6, "image_tokens": 48,
        "tile_frames": 3, "tile_height": 4, "tile_width": 4, "video_frames": 9, "video_height": 32, "video_width": 32,
    }  # fmt: skip


def test_plans_state_what_they_need(fake_bundle: Path) -> None:
    manifest = Bundle.open(fake_bundle).manifest
    dit = manifest.stage("dit")
    assert dit is not None

    def profile(name: str, low: int, high: int, count: int) -> ProfileEntry:
        return ProfileEntry(name, {"latent_height": (low, high, high)}, count)

    def plan(architecture: str, part: int, weights: int, *profiles: ProfileEntry) -> PlanEntry:
        return PlanEntry(f"plans/{part}", "", (architecture,), part, 2, (), (), profiles, weights, "")

    small, large = profile("small", 4, 8, 100), profile("large", 4, 16, 400)
    plans = (plan("sm89", 0, 1000, small, large), plan("sm89", 1, 2000, small), plan("sm90", 0, 500, large))
    stage = replace(dit, plans=plans)
    assert stage_bytes(manifest, stage) == StageBytes(3000, 100)
    assert stage_bytes(manifest, stage, {"latent_height": 16}) == StageBytes(3000, 400)


def test_the_machines_memory_is_known_here() -> None:
    held, free = anonymous_bytes(), available_bytes()
    assert held is None or 10**6 < held < 10**12
    assert free is None or 10**6 < free < 10**14
    return_freed()


def test_what_a_video_decides_has_the_names_that_compiled_stages_use(tiny_bundle: Path) -> None:
    """A name that only a hand-made bundle has would count a real one's tensors as nothing."""
    manifest = Bundle.open(tiny_bundle).manifest
    known = set(video_sizes(manifest.spec, VideoShape(48, 64, 9), 4))
    for stage in ("dit", "vae_decoder"):
        entry = manifest.stage(stage)
        assert entry is not None
        named = {size for info in (*entry.inputs, *entry.outputs) for size in info.shape if isinstance(size, str)}
        assert named - known <= {"text_tokens"}, "known once the prompt is"
