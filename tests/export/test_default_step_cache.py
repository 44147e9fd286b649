"""``build-engine --step-cache``: what may be a bundle's default, and that it gets into the bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from reelforge.export.build import build_bundle
from reelforge.export.build_request import BuildRequest
from reelforge.export.default_step_cache import default_step_cache, require_coefficients
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import Target
from reelforge.runtime.step_cache.ratios import MagnitudeRatios
from reelforge.tools.synthesize_layout import SIZES

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


def test_coefficients_must_be_published_of_the_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Otherwise the bundle would refuse every request that says nothing; nothing is left of it."""
    asked = BuildRequest(tiny_checkpoint, tmp_path / "b", Target.parse("cpu"), step_cache="teacache:0.1")
    with pytest.raises(RequestError) as caught:
        build_bundle(asked)
    for part in (
        "the step cache 'teacache:0.1' cannot be a bundle's default: no coefficients are published for this model.",
        "received: hunyuan_video of width ",
        "expected: hunyuan_video of width 3072 with 20+40 blocks",
        "fix: use easycache:0.025",
    ):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", [None, "easycache:0.1", "teacache:0.1"])
def test_the_released_model_may_have_any_default(text: str | None) -> None:
    require_coefficients(default_step_cache(request(text)), SIZES["full"])
