"""Shapes of a plan's inputs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelforge.export.engines.plan_inputs import input_shapes
from reelforge.export.engines.request import Profile
from reelforge.runtime.errors import BuildError
from reelforge.runtime.manifest import TensorInfo

INPUTS = (
    TensorInfo("latents", "float32", (1, 16, "frames", "height", "width")),
    TensorInfo("text", "float32", (1, "text_tokens", 64)),
    TensorInfo("sigma_step", "float32", ()),
)


def profile(**sizes: tuple[int, int, int]) -> Profile:
    return Profile("720x1280x129", sizes)


def test_every_input_has_its_shapes() -> None:
    fixed = {"frames": (33, 33, 33), "height": (90, 90, 90), "width": (160, 160, 160)}
    shapes = input_shapes(INPUTS, profile(**fixed, text_tokens=(1, 64, 256)))
    assert shapes["latents"].minimum == shapes["latents"].maximum == (1, 16, 33, 90, 160)
    assert shapes["latents"].fixed
    assert (shapes["text"].minimum, shapes["text"].optimum, shapes["text"].maximum) == (
        (1, 1, 64),
        (1, 64, 64),
        (1, 256, 64),
    )
    assert not shapes["text"].fixed
    assert shapes["sigma_step"].optimum == ()


def test_a_dimension_without_sizes() -> None:
    with pytest.raises(BuildError, match="does not say the sizes of height, width") as caught:
        input_shapes(INPUTS, profile(frames=(1, 1, 1), text_tokens=(1, 1, 1)))
    assert "received: frames, text_tokens" in str(caught.value)


@given(st.tuples(*[st.integers(-1, 4)] * 3))
def test_sizes_that_are_not_ascending(sizes: tuple[int, int, int]) -> None:
    infos = (TensorInfo("x", "float32", ("tokens",)),)
    if sizes[0] > 0 and list(sizes) == sorted(sizes):
        assert input_shapes(infos, profile(tokens=sizes))["x"].optimum == (sizes[1],)
    else:
        with pytest.raises(BuildError, match="unusable sizes for dimension 'tokens'"):
            input_shapes(infos, profile(tokens=sizes))
