"""Profiles against what the runtime feeds: every tensor of every request within the shapes lies within a profile."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelforge.export.engines.profiles import (
    FP8_ATTENTION_TOKENS,
    MAX_STEPS,
    named_shapes,
    profiles_for,
    served_shapes,
)
from reelforge.export.engines.request import Profile
from reelforge.export.models.hunyuan_video.stages import hunyuan_video_stages
from reelforge.export.partition import partition
from reelforge.export.stage import Stage
from reelforge.runtime.bundle.open import Check
from reelforge.runtime.engines.tensorrt_plan import choose_profile
from reelforge.runtime.errors import EngineError, RequestError
from reelforge.runtime.manifest import PlanEntry, ProfileEntry, PromptTemplate, TensorInfo
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.recipe import Precision, Recipe, VideoShape
from reelforge.runtime.request import ResolvedRequest
from reelforge.runtime.spec import ModelSpec
from reelforge.runtime.stage_inputs import TextEncoding
from reelforge.runtime.tiling import decode_tiled
from tests.bundles import STAGES

Arrays = Mapping[str, np.ndarray]

BUCKETS = (VideoShape(720, 1280, 129), VideoShape(544, 960, 129), VideoShape(480, 832, 81))
TEMPLATE = PromptTemplate("{}", 95, "test")


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Pipeline:
    return Pipeline.open(tiny_bundle, check=Check.SIZES)


@pytest.fixture(scope="module")
def spec(pipeline: Pipeline) -> ModelSpec:
    return pipeline.spec


def stages_of(spec: ModelSpec, batch: int = 1) -> dict[str, Stage]:
    return {stage.name: stage for stage in hunyuan_video_stages(spec, batch)}


def recipe_of(*shapes: VideoShape, batch: int = 1, attention: Precision | None = None) -> Recipe:
    return replace(Recipe.uniform(Precision.BF16, STAGES, shapes, batch), attention=attention)


def sizes_of(infos: tuple[TensorInfo, ...], arrays: Arrays) -> dict[str, int]:
    """Return the named dimensions' sizes, which agree wherever a name comes twice."""
    sizes: dict[str, int] = {}
    assert {info.name for info in infos} == set(arrays)
    for info in infos:
        for name, size in zip(info.shape, arrays[info.name].shape, strict=True):
            if isinstance(name, str):
                assert sizes.setdefault(name, size) == size
            else:
                assert name == size
    return sizes


def chosen(stage: Stage, profiles: tuple[Profile, ...], arrays: Arrays) -> str:
    """Return the name of the profile that the runtime takes for ``arrays``."""
    infos = stage.tensor_infos(stage.inputs)
    entries = tuple(ProfileEntry(profile.name, profile.dimensions, 0) for profile in profiles)
    plan = PlanEntry("p", "r", ("sm89",), 0, 1, infos, (), entries, 0, "tensorrt_rtx 1")
    return profiles[choose_profile(stage.name, plan, sizes_of(infos, arrays))].name


def dit_inputs(pipeline: Pipeline, request: ResolvedRequest, text_tokens: int) -> dict[str, np.ndarray]:
    dit = pipeline.spec.dit
    refined = np.zeros((request.steps, text_tokens, dit.width), np.float32)
    vectors = {
        "double_modulation": np.zeros((request.steps, dit.double_blocks, 2, 6, dit.width), np.float32),
        "single_modulation": np.zeros((request.steps, dit.single_blocks, 3, dit.width), np.float32),
        "final_modulation": np.zeros((request.steps, 2, dit.width), np.float32),
    }
    conditions = pipeline.inputs.conditions(request, refined, vectors)
    latents = np.zeros((1, *pipeline.spec.latent_shape(*sizes(request.shape))), np.float32)
    return {"latents": latents, **conditions.fixed, **{name: rows[0] for name, rows in conditions.per_step.items()}}


def sizes(shape: VideoShape) -> tuple[int, int, int]:
    return shape.height, shape.width, shape.frames


def tiles_of(spec: ModelSpec, latents: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the tiles that the runtime decodes; the decoder here enlarges nothing."""
    seen: list[np.ndarray] = []

    def decode(tile: np.ndarray) -> np.ndarray:
        seen.append(tile)
        return np.zeros((1, 3, *tile.shape[2:]), np.float32)

    for _ in decode_tiled(
        latents, decode, spec.tiling, replace(spec.vae, spatial_compression=1, temporal_compression=1)
    ):
        pass
    yield from seen


shapes = st.builds(
    lambda height, width, frames: VideoShape(16 * height, 16 * width, 4 * frames + 1),
    st.integers(1, 50), st.integers(1, 50), st.integers(0, 40),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(buckets=st.lists(shapes, max_size=3), data=st.data())
def test_every_request_within_the_shapes_is_served(
    pipeline: Pipeline, spec: ModelSpec, buckets: list[VideoShape], data: st.DataObject
) -> None:
    recipe, stages = recipe_of(*buckets), stages_of(spec)
    template = pipeline.bundle.manifest.prompt_template
    profiles = {name: profiles_for(stage, spec, recipe, template) for name, stage in stages.items()}
    shape = data.draw(st.sampled_from(named_shapes(spec, recipe)))
    shape = data.draw(st.sampled_from([shape, VideoShape(shape.height, shape.width, 1)]))
    steps = data.draw(st.integers(1, MAX_STEPS))
    request = ResolvedRequest("", shape, steps, 0, 6.0, 7.0)
    prompt = data.draw(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=600))
    words = pipeline.inputs.text(prompt)
    assert chosen(stages["llm"], profiles["llm"], words.llm) == "default"
    assert chosen(stages["clip"], profiles["clip"], words.clip) == "default"
    tokens = words.llm["input_ids"].shape[1]
    states = np.zeros((1, tokens, spec.dit.text_width), np.float32)
    text = pipeline.inputs.text_encoding(words, states, np.zeros((1, spec.dit.pooled_width), np.float32))
    assert text.states.shape[1] <= spec.llm.max_text_tokens
    assert chosen(stages["refiner"], profiles["refiner"], pipeline.inputs.refiner(request, text)) == "default"
    assert chosen(stages["modulation"], profiles["modulation"], pipeline.inputs.modulation(request, text)) == "default"
    arrays = dit_inputs(pipeline, request, text.states.shape[1])
    assert chosen(stages["dit"], profiles["dit"], arrays) == str(shape)
    for tile in tiles_of(spec, arrays["latents"]):
        assert chosen(stages["vae_decoder"], profiles["vae_decoder"], {"latent_tile": tile}) == "default"


@pytest.mark.parametrize("tokens", [1, 256])
def test_text_lengths_at_either_end(pipeline: Pipeline, spec: ModelSpec, tokens: int) -> None:
    request = ResolvedRequest("", BUCKETS[2], MAX_STEPS, 0, 6.0, 7.0)
    stages, recipe = stages_of(spec), recipe_of(*BUCKETS)
    text = TextEncoding(
        np.zeros((1, tokens, spec.dit.text_width), np.float32), np.zeros((1, spec.dit.pooled_width), np.float32), ()
    )
    refiner = profiles_for(stages["refiner"], spec, recipe, TEMPLATE)
    assert chosen(stages["refiner"], refiner, pipeline.inputs.refiner(request, text)) == "default"
    dit = profiles_for(stages["dit"], spec, recipe, TEMPLATE)
    assert chosen(stages["dit"], dit, dit_inputs(pipeline, request, tokens)) == "480x832x81"


def test_what_lies_outside_is_refused_by_the_runtime(pipeline: Pipeline, spec: ModelSpec) -> None:
    stage = stages_of(spec)["dit"]
    profiles = profiles_for(stage, spec, recipe_of(BUCKETS[2]), TEMPLATE)
    for shape, tokens in ((VideoShape(480, 832, 77), 5), (VideoShape(480, 816, 81), 5), (BUCKETS[2], 257)):
        arrays = dit_inputs(pipeline, ResolvedRequest("", shape, 2, 0, 6.0, 7.0), tokens)
        with pytest.raises(EngineError, match="no profile"):
            chosen(stage, profiles, arrays)


def test_the_numbers_at_three_sizes(spec: ModelSpec) -> None:
    """Written out once by hand, for the original model's tokens: 33 latent frames of 45 x 80 patches are 118800."""
    recipe, stages = recipe_of(*BUCKETS), stages_of(spec)
    dit = profiles_for(stages["dit"], spec, recipe, TEMPLATE)
    assert [profile.name for profile in dit] == [
        *("720x1280x129", "544x960x129", "480x832x81"),
        *("720x1280x1", "544x960x1", "480x832x1"),
    ]
    assert dit[0].dimensions == {
        "latent_frames": (33, 33, 33), "latent_height": (90, 90, 90), "latent_width": (160, 160, 160),
        "text_tokens": (1, 64, 256), "image_tokens": (118800, 118800, 118800),
    }  # fmt: skip
    assert dit[5].dimensions["image_tokens"] == (30 * 52,) * 3
    (llm,) = profiles_for(stages["llm"], spec, recipe, TEMPLATE)
    assert llm.dimensions == {"batch": (1, 1, 2), "prompt_tokens": (1, 159, 351)}
    (refiner,) = profiles_for(stages["refiner"], spec, recipe, TEMPLATE)
    assert refiner.dimensions["steps"] == (1, spec.defaults.steps, 100)


def test_tiles_of_the_original_tiling(spec: ModelSpec) -> None:
    tencent = replace(spec, tiling=replace(spec.tiling, tile=32, stride=24, frame_window=16, frame_stride=12))
    (profile,) = profiles_for(stages_of(tencent)["vae_decoder"], tencent, recipe_of(BUCKETS[0]), TEMPLATE)
    # Columns start at 0, 24, ... 144 of 160: the last has 16. Rows of 90 leave 18; one frame is an image's.
    assert profile.dimensions == {
        "tile_frames": (1, 17, 17), "tile_height": (18, 32, 32), "tile_width": (16, 32, 32)
    }  # fmt: skip


def test_every_stage_has_profiles_and_optima_inside(spec: ModelSpec) -> None:
    for batch, shape in itertools.product((1, 3), (VideoShape(16, 16, 1), BUCKETS[0])):
        for stage in stages_of(spec, batch).values():
            found = profiles_for(stage, spec, recipe_of(shape, batch=batch), TEMPLATE)
            assert found
            assert len({profile.name for profile in found}) == len(found)
            for profile in found:
                for low, best, high in profile.dimensions.values():
                    assert 0 < low <= best <= high


def test_several_videos_per_call(spec: ModelSpec) -> None:
    stage = stages_of(spec, 4)["dit"]
    profiles = profiles_for(stage, spec, recipe_of(BUCKETS[0], batch=4), TEMPLATE)
    assert {profile.dimensions["batch"] for profile in profiles} == {(1, 4, 4)}


def test_no_shapes_mean_the_default_and_a_shape_of_one_frame_comes_once(spec: ModelSpec) -> None:
    defaults = spec.defaults
    default = VideoShape(defaults.height, defaults.width, defaults.frames)
    assert named_shapes(spec, recipe_of()) == (default,)
    image = VideoShape(64, 64, 1)
    assert served_shapes(spec, recipe_of(image)) == (image,)
    assert served_shapes(spec, recipe_of(replace(image, frames=9), image, image)) == (replace(image, frames=9), image)


def test_parts_of_a_stage(spec: ModelSpec) -> None:
    """What passes a cut has dimensions of its own: the joint sequence follows from picture and text."""
    stage = stages_of(spec)["dit"]
    weights = {name: int(np.prod(shape)) * 2 for name, shape in stage.parameter_shapes().items()}
    parts = partition(stage, weights, sum(weights.values()) // 3)
    assert len(parts) > 2
    ranges = [profiles_for(part, spec, recipe_of(BUCKETS[2]), TEMPLATE)[0].dimensions for part in parts]
    assert ranges[-1]["joint_tokens"] == (21 * 30 * 52 + 1, 21 * 30 * 52 + 64, 21 * 30 * 52 + 256)


def test_fp8_attention_needs_tokens(spec: ModelSpec) -> None:
    stage = stages_of(spec)["dit"]
    small, enough = VideoShape(64, 64, 5), VideoShape(64, 64, 9)  # 16 tokens a frame
    assert 2 * 16 + 1 >= FP8_ATTENTION_TOKENS > 16 + 1
    names = [p.name for p in profiles_for(stage, spec, recipe_of(enough, attention=Precision.FP8), TEMPLATE)]
    assert names == ["64x64x9"]  # its image is too small
    names = [p.name for p in profiles_for(stage, spec, recipe_of(small, attention=Precision.FP8), TEMPLATE)]
    assert names == ["64x64x5"]
    with pytest.raises(RequestError, match="the shape 64x64x1 is too small for attention in fp8") as caught:
        profiles_for(stage, spec, recipe_of(replace(small, frames=1), attention=Precision.FP8), TEMPLATE)
    assert "17 tokens" in str(caught.value)
    assert "at least 32 tokens" in str(caught.value)
    assert "leave --attention fp8 out" in str(caught.value)
