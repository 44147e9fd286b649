"""A bundle with sparse attention from prompt to video: dense it is the dense bundle, and tables change what is seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reelforge.export.build import build_bundle
from reelforge.export.build_request import BuildRequest
from reelforge.export.models.hunyuan_video.spec_from_checkpoint import Numerics
from reelforge.runtime.attention.table import AttentionTable, Pattern, Rule, usual_table
from reelforge.runtime.errors import RequestError
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.recipe import SparseAttention, SparseKind
from reelforge.runtime.request import Request
from tests.bundles import CPU, TraceMemory, once, session_folder

STEPS = 3


def final(pipeline: Pipeline, table: AttentionTable | None) -> np.ndarray:
    """Return the final latents of one request."""
    resolved = pipeline.resolve(Request("a red ball", 32, 48, 9, STEPS, seed=5, attention=table))
    return pipeline.sample(resolved, pipeline.condition(resolved, pipeline.encode_text(resolved.prompt)))


@pytest.fixture(scope="module")
def bundles(
    tiny_checkpoint: Path, trace_memory: TraceMemory, tmp_path_factory: pytest.TempPathFactory
) -> dict[SparseKind, Path]:
    def made(kind: SparseKind) -> Path:
        def make(path: Path) -> None:
            sparse = SparseAttention(kind, 4, 2)
            with trace_memory.used():
                build_bundle(
                    BuildRequest(
                        tiny_checkpoint, path, CPU, sparse_attention=sparse, numerics=Numerics.DIFFUSERS, verify=True
                    )
                )

        return once(session_folder(tmp_path_factory) / f"{kind.value}.bundle", make)

    return {kind: made(kind) for kind in SparseKind}


def test_dense_by_default_and_on_request(tiny_bundle: Path, bundles: dict[SparseKind, Path]) -> None:
    wanted = final(Pipeline.open(tiny_bundle), None)
    everything = {
        SparseKind.LISTS: AttentionTable(Pattern.SLIDING_TILE, (Rule(window=(9, 9, 9)),)),
        SparseKind.TOP_K: AttentionTable(Pattern.TOP_K, (Rule(share=1.0),)),
    }
    for kind, path in bundles.items():
        pipeline = Pipeline.open(path)
        for table in (None, usual_table(Pattern.DENSE), everything[kind]):
            np.testing.assert_allclose(final(pipeline, table), wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("pattern", [Pattern.SLIDING_TILE, Pattern.RADIAL, Pattern.TOP_K])
def test_dense_steps_bring_the_video_nearer(bundles: dict[SparseKind, Path], pattern: Pattern) -> None:
    rule = {
        Pattern.SLIDING_TILE: Rule(window=(1, 1, 1)),
        Pattern.RADIAL: Rule(decay=0.1),
        Pattern.TOP_K: Rule(share=0.1),
    }[pattern]
    pipeline = Pipeline.open(bundles[SparseKind.TOP_K if pattern is Pattern.TOP_K else SparseKind.LISTS])
    dense = final(pipeline, None)
    losses = [
        float(np.square(final(pipeline, AttentionTable(pattern, (rule,), steps)) - dense).mean())
        for steps in range(STEPS + 1)
    ]
    assert losses[0] > losses[1] > losses[2] > 1e-9 > losses[3]  # what is left is the rounding of another order


def test_rules_of_single_heads_and_steps(bundles: dict[SparseKind, Path]) -> None:
    pipeline = Pipeline.open(bundles[SparseKind.LISTS])

    def video(*rules: Rule) -> np.ndarray:
        return final(pipeline, AttentionTable(Pattern.SLIDING_TILE, rules, tile=(1, 1, 1)))

    narrow = (1, 1, 1)
    by_head = [video(Rule(heads=heads, window=narrow)) for heads in ((0,), (1,), (0, 1))]
    np.testing.assert_array_equal(by_head[2], video(Rule(window=narrow)))
    assert len({one.tobytes() for one in by_head}) == 3
    np.testing.assert_array_equal(video(Rule((0, 1), window=narrow), Rule((2, 2), window=narrow)), by_head[2])
    late = AttentionTable(Pattern.SLIDING_TILE, (Rule(window=narrow),), 2, (1, 1, 1))
    np.testing.assert_array_equal(video(Rule((2, 2), window=narrow)), final(pipeline, late))


def test_a_single_frame(bundles: dict[SparseKind, Path]) -> None:
    for kind, table in (
        (SparseKind.LISTS, usual_table(Pattern.RADIAL)),
        (SparseKind.LISTS, usual_table(Pattern.SLIDING_TILE)),
        (SparseKind.TOP_K, usual_table(Pattern.TOP_K)),
    ):
        frames = Pipeline.open(bundles[kind]).generate(Request("a ball", 32, 32, 1, 2, attention=table))
        assert frames.shape == (1, 32, 32, 3)


def test_other_bundles_refuse(tiny_bundle: Path, bundles: dict[SparseKind, Path]) -> None:
    for path, pattern in (
        (tiny_bundle, Pattern.RADIAL),
        (bundles[SparseKind.LISTS], Pattern.TOP_K),
        (bundles[SparseKind.TOP_K], Pattern.RADIAL),
    ):
        with pytest.raises(RequestError, match=f"attention={pattern.value} is not supported") as caught:
            Pipeline.open(path).resolve(Request("a ball", attention=usual_table(pattern)))
        assert "rebuild with --sparse-attention" in caught.value.fix
    late = AttentionTable(Pattern.RADIAL, (Rule((0, 9), decay=1.0),), 9)
    with pytest.raises(RequestError) as caught:
        Pipeline.open(bundles[SparseKind.LISTS]).resolve(Request("a ball", 32, 32, 5, 8, attention=late))
    assert "dense_steps=9, step 9 of the attention table" in caught.value.where
