"""The demonstration world: its split, its captions and its judge."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from demo.train import checker, data


def first_clip(scene: data.Scene, which: int = 0) -> data.Array:
    """Return a ground-truth clip [T, 3, H, W] of ``scene``."""
    options = data.placements(scene.shape, scene.motion)
    return data.colourise(data.render_mask(options[which % len(options)]), scene.colour, scene.background)


def test_split_is_disjoint_and_total() -> None:
    held_out = {(s.colour, s.shape, s.motion) for s in data.scenes() if s.held_out}
    trained = {(s.colour, s.shape, s.motion) for s in data.scenes() if not s.held_out}
    assert not held_out & trained
    assert len(held_out) == 24
    assert len(trained) == 96


def test_every_pair_of_attributes_is_trained() -> None:
    trained = [s for s in data.scenes() if not s.held_out]
    assert len({(s.colour, s.shape) for s in trained}) == len(data.COLOURS) * len(data.SHAPES)
    assert len({(s.colour, s.motion) for s in trained}) == len(data.COLOURS) * len(data.MOTIONS)
    assert len({(s.shape, s.motion) for s in trained}) == len(data.SHAPES) * len(data.MOTIONS)


def test_captions_are_unambiguous() -> None:
    captions = [caption for scene in data.scenes() for caption in scene.captions()]
    assert len(captions) == len(set(captions))


def test_judge_accepts_ground_truth_and_refuses_wrong_prompts() -> None:
    scenes = data.scenes()
    for number, scene in enumerate(scenes[::7]):
        findings = checker.inspect(first_clip(scene, number * 13))
        assert checker.compare(findings, scene).together, (scene, findings)
        for other in scenes:
            score = checker.compare(findings, other)
            assert score.together == (other == scene)
            assert score.background == (other.background == scene.background)
            assert score.colour == (other.colour == scene.colour)
            assert score.shape == (other.shape == scene.shape)
            assert score.motion == (other.motion == scene.motion)


def test_judge_tolerates_slight_noise() -> None:
    rng = np.random.default_rng(0)
    scenes = data.scenes()[::11]
    clips = [first_clip(scene, 5) for scene in scenes]
    noisy = [np.clip(clip + rng.normal(0, 0.03, clip.shape), 0, 1).astype(np.float32) for clip in clips]
    right = [checker.compare(checker.inspect(n), s).together for n, s in zip(noisy, scenes, strict=True)]
    assert sum(right) >= 0.95 * len(right)


@pytest.mark.parametrize("seed", range(3))
def test_judge_finds_nothing_in_noise(seed: int) -> None:
    clip = np.random.default_rng(seed).random((9, 3, 64, 64), dtype=np.float32)
    findings = checker.inspect(clip)
    assert findings.background is None
    assert findings.shape is None


def test_judge_finds_no_object_on_a_plain_background() -> None:
    clip = data.colourise(np.zeros((9, 64, 64), np.float32), "red", "white")
    assert checker.inspect(clip) == checker.Findings(background="white")


def test_judge_refuses_a_jumping_object() -> None:
    scene = data.Scene("red", "circle", "right", "black")
    clip = first_clip(scene)
    shuffled = clip[[0, 8, 1, 7, 2, 6, 3, 5, 4]]
    assert checker.inspect(shuffled).motion is None


def test_image_needs_no_motion() -> None:
    scene = data.Scene("blue", "ring", "left", "gray")
    findings = checker.inspect(first_clip(scene)[:1])
    assert findings.motion is None
    assert checker.compare(findings, scene, image=True).together


def test_judge_names_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"expected: \[T, 3, H, W\]"):
        checker.inspect(np.zeros((9, 64, 64), np.float32))


def test_objects_stay_inside() -> None:
    for shape, motion in itertools.product(data.SHAPES, data.MOTIONS):
        placement = data.placements(shape, motion)[-1]
        mask = data.render_mask(placement)
        edges = (mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1])
        assert max(float(edge.max()) for edge in edges) < 0.6
