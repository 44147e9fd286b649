"""What dit is told of its attention: orders, lists of all steps behind one another, counts, densities."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelforge.runtime.attention import patterns
from reelforge.runtime.attention.inputs import (
    AttentionInputs,
    JointSequence,
    attention_inputs,
    mask,
    token_order,
    usual_tile,
)
from reelforge.runtime.attention.patterns import Layout, ListPool
from reelforge.runtime.attention.table import DENSE, AttentionTable, Pattern, Rule, usual_table
from reelforge.runtime.recipe import SparseAttention, SparseKind

LISTS, TOP_K = (SparseAttention(kind, 8, 4) for kind in (SparseKind.LISTS, SparseKind.TOP_K))
SEQUENCE = JointSequence((3, 4, 6), text_tokens=7, heads=2)
STEPS = 5


def inputs(table: AttentionTable, sparse: SparseAttention, sequence: JointSequence = SEQUENCE) -> AttentionInputs:
    tokens = prod(sequence.grid)
    rope = np.arange(2 * tokens, dtype=np.float32).reshape(2, tokens, 1)
    return attention_inputs(table, sparse, sequence, STEPS, (rope[0], rope[1]))


def listed(found: AttentionInputs, step: int, head: int) -> np.ndarray:
    """Return the mask that the lists of a step and head say."""
    index, starts = found.fixed["block_index"], found.per_step["block_start"][step, head]
    result = np.zeros((len(starts) - 1, found.fixed["block_keys"].shape[1]), bool)
    for block, (first, end) in enumerate(pairwise(starts)):
        result[block, index[first:end]] = True
    return result


def test_lists_of_every_step_and_head() -> None:
    rules = (Rule((2, 3), (1,), window=(1, 1, 1)), Rule((3, 4), window=(3, 1, 1)))
    table = AttentionTable(Pattern.SLIDING_TILE, rules, dense_steps=1)
    found = inputs(table, LISTS)
    order = token_order(table, LISTS, SEQUENCE.grid)
    layout = Layout(order.slots, SEQUENCE.text_tokens, 4, 8)
    for step in range(STEPS):
        for head in range(2):
            wanted = mask(table.pattern, table.rule(step, head), layout, order)
            np.testing.assert_array_equal(listed(found, step, head), wanted)
            if step == 0:
                np.testing.assert_array_equal(wanted, patterns.dense(layout))
    assert found.per_step["block_start"].dtype == found.fixed["block_index"].dtype == np.int32
    assert found.density[:2] == (1.0, 1.0)
    assert found.density[2] > found.density[3]
    dense = patterns.dense(layout).sum()
    assert found.density[4] == pytest.approx(listed(found, 4, 0).sum() / dense)
    # Three different masks, each kept once.
    kept = {
        listed(found, step, head).tobytes(): listed(found, step, head).sum() for step in range(5) for head in (0, 1)
    }
    assert len(kept) == 3
    assert len(found.fixed["block_index"]) == sum(kept.values())


def test_shares_of_the_best_blocks() -> None:
    table = AttentionTable(Pattern.TOP_K, (Rule((2, 2), share=0.5), Rule((3, 3), share=1e-6), Rule(share=1.0)), 1)
    found = inputs(table, TOP_K)
    assert token_order(table, TOP_K, SEQUENCE.grid).slots == 72
    np.testing.assert_array_equal(found.per_step["kept_blocks"], [18, 18, 9, 2, 18])
    assert found.per_step["kept_blocks"].dtype == np.int64
    # 9 query blocks of image see 18 key blocks of image and 2 of text, one of text sees all 20.
    np.testing.assert_allclose(found.density, [1, 1, 1 - 81 / 200, 1 - 144 / 200, 1])
    assert set(found.fixed) == {"token_gather", "token_scatter", "rope_cos", "rope_sin", "block_keys"}


@given(st.tuples(*[st.integers(1, 6)] * 3), st.integers(1, 9), st.sampled_from([(1, 1), (4, 2), (8, 8)]), st.booleans())
@settings(max_examples=50, deadline=None)
def test_the_order_comes_with_its_tables(
    grid: tuple[int, int, int], text: int, blocks: tuple[int, int], tiled: bool
) -> None:
    sparse = SparseAttention(SparseKind.LISTS, *blocks)
    table = usual_table(Pattern.SLIDING_TILE) if tiled else DENSE
    found = inputs(table, sparse, JointSequence(grid, text, 1))
    gather, scatter = found.fixed["token_gather"], found.fixed["token_scatter"]
    np.testing.assert_array_equal(gather[scatter], np.arange(prod(grid)))
    np.testing.assert_array_equal(found.fixed["rope_cos"][:, 0], gather)
    np.testing.assert_array_equal(found.fixed["rope_sin"][:, 0], gather + prod(grid))
    counts = found.fixed["block_keys"]
    assert counts.sum() == prod(grid) + text
    assert counts.shape == (1, -(-(len(gather) + text) // blocks[0]) * blocks[0] // blocks[1])
    if not tiled:
        np.testing.assert_array_equal(gather, np.arange(prod(grid)))
    # No query is left without a key: a list has a block that counts.
    for step in range(STEPS):
        assert (listed(found, step, 0) & (counts[0] > 0)).any(axis=1).all()


def test_usual_tiles() -> None:
    assert usual_tile((33, 45, 80), 128) == (3, 5, 8)  # 720p, 129 frames
    assert usual_tile((3, 4, 4), 4) == (1, 2, 2)  # the demonstration model
    assert usual_tile((1, 7, 11), 6) == (1, 1, 1)
    assert usual_tile((5, 6, 7), 10**6) == (5, 6, 7)


def test_a_rule_of_another_pattern_is_a_bug() -> None:
    table = AttentionTable(Pattern.RADIAL, (Rule(window=(1, 1, 1)),))
    with pytest.raises(AssertionError, match="radial attention has no lists"):
        inputs(table, LISTS)


def test_radial_rules_differ_by_head() -> None:
    sequence = JointSequence((9, 8, 8), 5, 2)
    table = AttentionTable(Pattern.RADIAL, (Rule(heads=(1,), decay=0.1), Rule(decay=1.0)))
    found = inputs(table, LISTS, sequence)
    assert listed(found, 0, 1).sum() < listed(found, 0, 0).sum()
    assert found.density[0] < 1


def test_a_pool_keeps_a_mask_once() -> None:
    pool, random = ListPool(), np.random.default_rng(0)
    first, second = (random.random((3, 5)) < 0.5 for _ in range(2))
    rows = [pool.add(one) for one in (first, second, first.copy())]
    np.testing.assert_array_equal(rows[0], rows[2])
    assert len(pool.index()) == first.sum() + second.sum()
    np.testing.assert_array_equal(pool.index()[rows[1][0] : rows[1][-1]], np.nonzero(second)[1])


def test_the_whole_video_is_small() -> None:
    """720p, 129 frames, 50 steps of which 12 are dense: what is kept, and what changes per step."""
    sparse = SparseAttention(SparseKind.LISTS, 128, 64)
    table = AttentionTable(Pattern.SLIDING_TILE, (Rule((0, 29), window=(3, 5, 5)), Rule(window=(3, 3, 3))), 12)
    rope = np.zeros((33 * 45 * 80, 1), np.float32)
    found = attention_inputs(table, sparse, JointSequence((33, 45, 80), 256, 24), 50, (rope, rope))
    assert found.fixed["block_index"].nbytes < 10 << 20
    assert found.per_step["block_start"][0].nbytes < 128 << 10
    assert found.density[11] == 1.0
    assert found.density[12] < 0.1
    assert found.density[30] < 0.04
