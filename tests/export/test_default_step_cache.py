"""``build-engine --step-cache``: what may be a bundle's default, and that it gets into the bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from reelforge.export.build import build_bundle, default_step_cache
from reelforge.export.build_request import BuildRequest
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import Target
from reelforge.runtime.step_cache.ratios import MagnitudeRatios

STAGES = ("step_change", "step_reuse")


def request(step_cache: str | None, stages: tuple[str, ...] = (), checkpoint: Path = Path()) -> BuildRequest:
    return BuildRequest(checkpoint, Path("out"), Target.parse("cpu"), stages=stages, step_cache=step_cache)


@pytest.mark.parametrize(("text", "kept"), [(None, None), ("off", None), ("easycache:0.1", "easycache:0.1")])
def test_what_is_kept(text: str | None, kept: str | None) -> None:
    assert default_step_cache(request(text)) == kept


def test_it_is_in_the_bundle(tiny_checkpoint: Path, tmp_path: Path, remembered_traces: None) -> None:
    text = "easycache:0.1,warmup=3"
    path = tmp_path / "b"
    build_bundle(BuildRequest(tiny_checkpoint, path, Target.parse("cpu"), stages=STAGES, step_cache=text))
    assert Bundle.open(path).manifest.step_cache == text


@pytest.mark.parametrize(
    ("text", "stages", "parts"),
    [
        ("easycache", (), ["the step cache 'easycache' cannot be read"]),
        ("easycache:-1", (), ["cannot be a bundle's default", "threshold=-1.0", "a finite number of at least 0"]),
        (
            "easycache:0.1",
            ("dit", "step_reuse"),
            [
                "needs stages that are not built",
                "received: --stages dit,step_reuse",
                "expected: step_change among them",
            ],
        ),
    ],
)
def test_what_is_refused(text: str, stages: tuple[str, ...], parts: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        default_step_cache(request(text, stages))
    for part in parts:
        assert part in str(caught.value)


def test_files_stay_outside_of_bundles(tmp_path: Path) -> None:
    path = tmp_path / "ratios.json"
    MagnitudeRatios((1.0, 0.9), (1.0, 0.5)).write(path)
    with pytest.raises(RequestError) as caught:
        default_step_cache(request(f"magcache:0.1,ratios={path}"))
    for part in ("cannot refer to a file", "expected: easycache, which needs none", "fix: use easycache:0.025"):
        assert part in str(caught.value)
