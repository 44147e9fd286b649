"""Requests: everything wrong is said at once, and whatever passes is on the model's grid and in the bundle's range."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelforge.runtime.attention.table import AttentionTable, Pattern, usual_table
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.errors import RequestError
from reelforge.runtime.manifest import Manifest, PlanEntry, ProfileEntry
from reelforge.runtime.recipe import Target, VideoShape
from reelforge.runtime.request import (
    MAX_FRAMES,
    MAX_SIDE,
    MAX_STEPS,
    Request,
    default_shape,
    resolve_request,
)


@pytest.fixture(scope="module")
def manifest(fake_bundle: Path) -> Manifest:
    return Bundle.open(fake_bundle).manifest


def with_shapes(manifest: Manifest, *shapes: str) -> Manifest:
    return replace(manifest, recipe=replace(manifest.recipe, shapes=tuple(VideoShape.parse(shape) for shape in shapes)))


def test_defaults(manifest: Manifest) -> None:
    resolved = resolve_request(Request("  a ball "), manifest, "x")
    assert resolved.prompt == "a ball"
    assert resolved.shape == VideoShape(48, 64, 13)
    assert (resolved.steps, resolved.seed, resolved.guidance, resolved.shift) == (4, 0, 6.0, 7.0)


def test_default_shape_is_one_that_the_bundle_serves(manifest: Manifest) -> None:
    assert default_shape(with_shapes(manifest, "32x32x9", "96x96x25")) == VideoShape(48, 64, 13)
    assert default_shape(with_shapes(manifest, "96x96x25", "32x80x5")) == VideoShape(96, 96, 25)


def test_one_problem_reads_like_a_sentence(manifest: Manifest) -> None:
    served = with_shapes(manifest, "544x544x129", "1280x1280x129")
    with pytest.raises(RequestError) as caught:
        resolve_request(Request("", height=700, width=544), served, "hv-720p")
    assert str(caught.value) == (
        "RequestError: height=700 is not supported by bundle 'hv-720p'.\n"
        "  received: 700   expected: height a multiple of 16 in 544..1280\n"
        "  fix: use height=704"
    )
    assert caught.value.exit_code == 2


def test_all_problems_at_once(manifest: Manifest) -> None:
    request = Request("", height=17, width=-16, frames=4, steps=0, seed=-1, guidance=math.nan, shift=0.0)
    with pytest.raises(RequestError) as caught:
        resolve_request(request, manifest, "x")
    text = str(caught.value)
    for part in ("height=17", "width=-16", "frames=4", "steps=0", "seed=-1", "guidance=nan", "shift=0.0"):
        assert part in text
    assert "frames 4k+1 in 1..4097" in text
    assert "use height=16; use width=16; use frames=5" in text


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ({"frames": 6}, "use frames=5"),
        ({"frames": 0}, "use frames=1"),
        ({"frames": True}, "use frames="),
        ({"height": 0}, "use height=16"),
        ({"height": 48.0}, "use height="),
        ({"steps": 2.5}, "use for example steps=4"),
        ({"seed": 2**64}, "use for example seed=0"),
        ({"guidance": -1.0}, "use for example guidance=6"),
        ({"guidance": math.inf}, "use for example guidance=6"),
        ({"shift": "7"}, "use for example shift=7"),
    ],
)
def test_single_settings(manifest: Manifest, setting: dict[str, object], hint: str) -> None:
    with pytest.raises(RequestError, match=f"{next(iter(setting))}=") as caught:
        resolve_request(Request("", **setting), manifest, "x")  # type: ignore[arg-type]
    assert hint in caught.value.fix


def test_outside_of_the_shapes(manifest: Manifest) -> None:
    served = with_shapes(manifest, "32x64x9", "64x32x17")
    resolve_request(Request("", height=48, width=48, frames=13), served, "x")
    assert resolve_request(Request("", frames=1), served, "x").shape.frames == 1
    with pytest.raises(RequestError, match="rebuild with a shape that covers it"):
        resolve_request(Request("", height=80), served, "x")
    with pytest.raises(RequestError, match=r"frames 4k\+1 in 9..17 or 1"):
        resolve_request(Request("", frames=5), served, "x")
    with pytest.raises(RequestError, match=r"frames 4k\+1, here 9 or 1"):
        resolve_request(Request("", frames=13), with_shapes(manifest, "32x64x9"), "x")


def test_guidance_for_a_model_that_takes_none(manifest: Manifest) -> None:
    plain = replace(manifest, spec=replace(manifest.spec, dit=replace(manifest.spec.dit, guidance_embedding=False)))
    resolve_request(Request(""), plain, "x")
    with pytest.raises(RequestError, match="this model takes none"):
        resolve_request(Request("", guidance=6.0), plain, "x")


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("\udcff", r"prompt='\\udcff'.*not valid Unicode text at character 0"),
        ("caf\ud800e", r"prompt='\\ud800'.*not valid Unicode text at character 3"),
        (None, "prompt=None.*a string"),
        (b"a ball", "prompt=b'a ball'.*a string"),
        (["a ball"], "a string"),
        (7, "prompt=7.*a string"),
        ([0] * 10**6, "a string"),
    ],
)
def test_prompts_that_are_no_text_are_listed_with_the_rest(manifest: Manifest, prompt: object, said: str) -> None:
    for steps in (None, 0):
        with pytest.raises(RequestError) as caught:
            resolve_request(Request(prompt, steps=steps), manifest, "x")  # type: ignore[arg-type]
        text = " ".join(str(caught.value).split())
        assert re.search(said, text), text
        assert ("steps=0" in text) == (steps == 0)
        assert len(text) < 500
        text.encode("ascii")


STRANGE: list[object] = [
    True, False, "", "48", "\udcff", b"1", math.nan, math.inf, -math.inf, 1e308, -0.0, 10**30, 10**5000, -(10**5000),
    [], {}, (16,), object(), complex(1, 1), np.float32(2), np.int64(16), np.array([16, 16]), 1j,
]  # fmt: skip
SETTINGS = ("height", "width", "frames", "steps", "seed", "guidance", "shift")


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("value", STRANGE, ids=lambda value: type(value).__name__)
def test_strange_values_are_refused_by_name(manifest: Manifest, name: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        resolve_request(Request("", **{name: value}), manifest, "x")  # type: ignore[arg-type]
    text = str(caught.value)
    assert text.startswith(f"RequestError: {name}=")
    assert f"expected: {name} " in text
    assert f"{name}=" in caught.value.fix
    assert len(text) < 500


@pytest.mark.parametrize("value", STRANGE, ids=lambda value: type(value).__name__)
def test_everything_strange_at_once_is_listed_at_once(manifest: Manifest, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        resolve_request(Request(*([value] * 8)), manifest, "x")  # type: ignore[arg-type]
    assert [name for name in SETTINGS if f"{name}=" not in caught.value.where] == []
    assert ("prompt=" in caught.value.where) == (not isinstance(value, str) or value == "\udcff")


@pytest.mark.parametrize("name", ["attention", "cfg_scale", "negative_prompt", "step_cache"])
@pytest.mark.parametrize(
    "value",
    [*STRANGE, np.zeros(2), "radial", AttentionTable("radial")],  # type: ignore[arg-type]
    ids=lambda value: type(value).__name__,
)
def test_strange_values_of_the_other_settings(manifest: Manifest, name: str, value: object) -> None:
    request = Request("", steps=0, cfg_scale=4.0, negative_prompt="fog")
    with pytest.raises(RequestError) as caught:
        resolve_request(replace(request, **{name: value}), manifest, "x")  # type: ignore[arg-type]
    assert "steps=0" in caught.value.where
    if name != "negative_prompt" or not isinstance(value, str):
        assert f"{name}" in caught.value.where
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (usual_table(Pattern.RADIAL), "attention=radial"),
        (AttentionTable(Pattern.RADIAL), "attention with rules=none"),
        (AttentionTable(Pattern.DENSE, dense_steps=-1), "attention with dense_steps=-1"),
    ],
)
def test_attention_is_listed_with_the_rest(manifest: Manifest, table: AttentionTable, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        resolve_request(Request("", height=17, seed=-1, attention=table), manifest, "x")
    for part in (said, "height=17", "seed=-1"):
        assert part in caught.value.where


@pytest.mark.parametrize(("name", "most"), [("height", MAX_SIDE), ("frames", MAX_FRAMES), ("steps", MAX_STEPS)])
def test_numbers_that_would_take_all_memory(manifest: Manifest, name: str, most: int) -> None:
    resolve_request(Request("", **{name: most}), manifest, "x")
    for beyond in (most + 16, most * 10**400):
        with pytest.raises(RequestError, match=f"{name}=") as caught:
            resolve_request(Request("", **{name: beyond}), manifest, "x")
        assert str(most) in caught.value.expected


sizes = st.one_of(st.none(), st.integers(-40, 400))


@given(sizes, sizes, sizes, st.booleans())
def test_what_passes_is_on_the_grid_and_what_fails_says_how_to_pass(
    manifest: Manifest, height: int | None, width: int | None, frames: int | None, limited: bool
) -> None:
    served = with_shapes(manifest, "32x64x9", "128x96x33") if limited else manifest
    request = Request("", height=height, width=width, frames=frames)
    try:
        shape = resolve_request(request, served, "x").shape
    except RequestError as error:
        fixes = dict(part.removeprefix("use ").split(",")[0].split("=") for part in error.fix.split("; "))
        repaired = replace(request, **{name: int(value) for name, value in fixes.items()})
        shape = resolve_request(repaired, served, "x").shape
    assert shape.height % 16 == shape.width % 16 == 0
    assert shape.frames % 4 == 1
    assert min(shape.height, shape.width) >= 16
    if limited:
        assert 32 <= shape.height <= 128
        assert 64 <= shape.width <= 96
        assert shape.frames == 1 or 9 <= shape.frames <= 33


# Plans


def with_plans(manifest: Manifest, *shapes: str, images: bool = True) -> Manifest:
    """The manifest of a bundle for a GPU, whose refiner takes at most 30 steps."""
    served = [VideoShape.parse(shape) for shape in shapes]
    served += [VideoShape(shape.height, shape.width, 1) for shape in served if images]
    videos = []
    for shape in served:
        sizes = manifest.spec.latent_shape(shape.height, shape.width, shape.frames)[1:]
        names = ("latent_frames", "latent_height", "latent_width")
        videos.append(ProfileEntry(str(shape), {name: (n, n, n) for name, n in zip(names, sizes, strict=True)}, 0))
    profiles = {"refiner": (ProfileEntry("default", {"steps": (1, 20, 30)}, 0),), "dit": tuple(videos)}

    def plans(stage: str) -> tuple[PlanEntry, ...]:
        own = profiles.get(stage, ())
        return (PlanEntry("x.plan", "x.json", ("sm89",), 0, 1, (), (), own, 0, "tensorrt_rtx 1"),) if own else ()

    stages = tuple(replace(stage, plans=plans(stage.name)) for stage in manifest.stages)
    return replace(with_shapes(manifest, *shapes), target=Target.parse("rtx:sm89"), stages=stages)


@pytest.mark.parametrize("shape", ["32x64x9", "64x32x17", "32x64x1", "64x32x1"])
def test_plans_serve_their_shapes_and_single_frames(manifest: Manifest, shape: str) -> None:
    wanted = VideoShape.parse(shape)
    request = Request("", wanted.height, wanted.width, wanted.frames, steps=30)
    assert resolve_request(request, with_plans(manifest, "32x64x9", "64x32x17"), "x").shape == wanted


@pytest.mark.parametrize("shape", ["32x64x17", "64x32x9", "32x32x9", "64x64x1"])
def test_plans_serve_no_shapes_in_between(manifest: Manifest, shape: str) -> None:
    wanted = VideoShape.parse(shape)
    served = with_plans(manifest, "32x64x9", "64x32x17")
    with pytest.raises(RequestError) as caught:
        resolve_request(Request("", wanted.height, wanted.width, wanted.frames), served, "gpu.bundle")
    message = str(caught.value)
    assert f"shape={shape} is not supported by bundle 'gpu.bundle'" in message
    assert "one of 32x64x9, 64x32x17, 32x64x1, 64x32x1" in message
    assert f"--shapes 32x64x9,64x32x17,{shape}" in message


def test_images_need_a_plan_for_them(manifest: Manifest) -> None:
    """FP8 attention takes no fewer than 32 tokens, so a small size may be served as a video only."""
    served = with_plans(manifest, "32x64x9", images=False)
    assert resolve_request(Request("", 32, 64, 9), served, "x").shape == VideoShape(32, 64, 9)
    with pytest.raises(RequestError, match="one of 32x64x9"):
        resolve_request(Request("", 32, 64, 1), served, "x")


def test_what_plans_do_not_serve_is_listed_with_the_rest(manifest: Manifest) -> None:
    with pytest.raises(RequestError) as caught:
        resolve_request(Request("", 32, 64, 17, steps=31, seed=-1), with_plans(manifest, "32x64x9"), "x")
    for part in ("frames=17", "steps=31", "seed=-1"):
        assert part in caught.value.where
    with pytest.raises(RequestError) as caught:
        resolve_request(Request("", 32, 32, 9, steps=0), with_plans(manifest, "32x64x9", "64x32x17"), "x")
    for part in ("shape=32x32x9", "steps=0"):
        assert part in caught.value.where


def test_plans_serve_so_many_steps(manifest: Manifest) -> None:
    with pytest.raises(RequestError, match="steps up to 30") as caught:
        resolve_request(Request("", 32, 64, 9, steps=31), with_plans(manifest, "32x64x9"), "x")
    assert "fix: use steps=30" in str(caught.value)
