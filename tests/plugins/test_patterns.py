"""Block lists, patterns, and the tile-major order: attention in permuted order is attention."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelforge.plugins.interpreter import Interpreter
from reelforge.plugins.kernels.block_sparse_attention_reference import block_sparse_attention, visible_keys
from reelforge.plugins.kernels.int8_attention_reference import attention
from reelforge.plugins.schema import PLUGINS
from reelforge.runtime.attention import patterns
from reelforge.runtime.attention.patterns import Layout, block_lists
from reelforge.runtime.attention.token_order import TileOrder, enter, leave
from reelforge.tools.bench.attention_problems import SPARSE, Problem, cosine

ORDERS = st.builds(
    lambda tiles, tile, extra: TileOrder(
        tuple(a * b for a, b in zip(tiles, tile, strict=True)), tile, prod(tile) + extra
    ),
    st.tuples(*[st.integers(1, 3)] * 3),
    st.tuples(*[st.integers(1, 4)] * 3),
    st.integers(0, 9),
)


def sparse_inputs(problem: Problem, layout: Layout, mask: np.ndarray, valid: np.ndarray | None = None) -> None:
    lists = block_lists(np.broadcast_to(mask, (problem.heads, *mask.shape[-2:])))
    problem.tensors["block_index"], problem.tensors["block_start"] = lists.block_index, lists.block_start
    problem.tensors["block_keys"] = layout.key_counts(valid)


@pytest.mark.parametrize("pv", SPARSE)
def test_the_kernel_against_its_reference(interpreter: Interpreter, pv: str) -> None:
    problem = Problem(300, 50, heads=2)
    layout = Layout(300, 50, 64)
    random = np.random.default_rng(1)
    mask = random.random((2, layout.query_blocks, layout.key_blocks)) < 0.5
    mask[:, :, 0] = True
    sparse_inputs(problem, layout, mask)
    out = problem.attend(interpreter, pv, sparse=True)
    visible = visible_keys(*(problem.tensors[f"block_{name}"] for name in ("index", "start", "keys")), 350, 64)
    assert cosine(out, problem.exact(visible)) > 0.9995
    if pv == "fp8":
        inputs = [problem.tensors[tensor.name] for tensor in PLUGINS[SPARSE[pv]].inputs]
        assert cosine(out, block_sparse_attention(*inputs, key_group=64)) > 0.99998


@pytest.mark.parametrize("key_group", [64, 128])
def test_dense_lists_are_dense_attention(interpreter: Interpreter, key_group: int) -> None:
    problem = Problem(200, 30, head_dim=64)
    layout = Layout(200, 30, key_group)
    sparse_inputs(problem, layout, patterns.dense(layout))
    out = problem.attend(interpreter, "fp8", key_group, sparse=True)
    dense = problem.attend(interpreter, "fp8", key_group)
    np.testing.assert_allclose(out, dense, atol=1e-2 * np.abs(dense).max())
    assert cosine(out, dense) > 0.99999


def test_an_empty_list_gives_zeros(interpreter: Interpreter) -> None:
    problem = Problem(200, 0, head_dim=64, heads=1)
    layout = Layout(200, 0, 64)
    mask = np.zeros((1, 2, 4), bool)
    mask[0, 1] = True
    sparse_inputs(problem, layout, mask)
    out = problem.attend(interpreter, "fp8", sparse=True)
    assert not out[:, :128].any()
    assert out[:, 128:].any()


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_lists_and_masks_are_the_same(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 4)] * 3))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=prod(shape), max_size=prod(shape)))).reshape(shape)
    lists = block_lists(mask)
    assert lists.density == mask.mean()
    again = np.zeros_like(mask)
    for head, block in np.ndindex(*shape[:2]):
        entries = lists.block_index[lists.block_start[head, block] : lists.block_start[head, block + 1]]
        again[head, block, entries] = True
        assert (np.diff(entries) > 0).all()
    np.testing.assert_array_equal(again, mask)


@given(ORDERS)
@settings(max_examples=60, deadline=None)
def test_the_tile_order_is_a_permutation(order: TileOrder) -> None:
    tokens = np.arange(prod(order.grid))
    there = enter(tokens, order)
    assert len(there) == order.slots
    np.testing.assert_array_equal(leave(there, order), tokens)
    np.testing.assert_array_equal(np.sort(there[order.valid()]), tokens)
    # A tile's tokens, its padding among them, are one box of the grid.
    boxes = np.stack(np.unravel_index(there, order.grid), axis=1).reshape(-1, order.padded_tile, 3)
    assert (np.ptp(boxes, axis=1) < np.array(order.tile)).all()


@given(ORDERS, st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_dense_attention_does_not_depend_on_the_order(order: TileOrder, seed: int) -> None:
    problem = Problem(prod(order.grid), 5, head_dim=8, heads=1, seed=seed)
    expected = problem.exact()
    image = problem.image
    permuted = Problem(order.slots, 5, head_dim=8, heads=1, seed=seed)
    for name in ("q", "k", "v"):
        x = problem.tensors[name]
        permuted.tensors[name] = np.concatenate((enter(x[:, :image], order, axis=1), x[:, image:]), axis=1)
    for name in ("rope_cos", "rope_sin"):
        permuted.tensors[name] = enter(problem.tensors[name], order)
    permuted.tensors |= {name: problem.tensors[name] for name in ("query_norm", "key_norm")}
    counts = np.concatenate((order.valid(), np.ones(5, bool)))
    out = permuted.exact(counts[None, None, None, :])
    np.testing.assert_allclose(leave(out[:, : order.slots], order, axis=1), expected[:, :image], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(out[:, order.slots :], expected[:, image:], rtol=1e-9, atol=1e-12)


def test_the_kernel_in_tile_order(interpreter: Interpreter) -> None:
    """Padded tiles, permuted rotary tables, blocks with few keys: undone at the exit, it is plain attention."""
    order = TileOrder((3, 10, 8), (3, 5, 4), 64)
    problem = Problem(240, 20, heads=1, head_dim=64)
    layout = Layout(order.slots, 20, 64)
    permuted = Problem(order.slots, 20, heads=1, head_dim=64)
    for name in ("q", "k", "v"):
        x = problem.tensors[name]
        permuted.tensors[name] = np.concatenate((enter(x[:, :240], order, axis=1), x[:, 240:]), axis=1)
    for name in ("rope_cos", "rope_sin"):
        permuted.tensors[name] = enter(problem.tensors[name], order)
    permuted.tensors |= {name: problem.tensors[name] for name in ("query_norm", "key_norm")}
    sparse_inputs(permuted, layout, patterns.dense(layout), order.valid())
    assert permuted.tensors["block_keys"].min() < 64
    out = permuted.attend(interpreter, "fp8", sparse=True)
    undone = np.concatenate((leave(out[:, : order.slots], order, axis=1), out[:, order.slots :]), axis=1)
    assert cosine(undone, problem.exact()) > 0.9998


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    st.tuples(*[st.sampled_from([1, 3, 5, 9])] * 3),
    st.sampled_from([64, 128]),
)
@settings(max_examples=40, deadline=None)
def test_sliding_tiles(tiles: tuple[int, int, int], window: tuple[int, int, int], key_group: int) -> None:
    order = TileOrder(tuple(a * b for a, b in zip(tiles, (2, 8, 8), strict=True)), (2, 8, 8), 128)
    layout = Layout(order.slots, 100, key_group)
    mask = patterns.sliding_tile(layout, order, window)
    # Independent: every image query sees exactly the window's volume, clamped to the grid.
    expected = prod(min(size, count) for size, count in zip(window, tiles, strict=True))
    image = mask[: prod(tiles), : order.slots // key_group]
    assert (image.sum(1) == expected * 128 // key_group).all()
    own = np.arange(prod(tiles))
    assert image[own, own * 128 // key_group].all()
    assert mask[:, order.slots // key_group : -(-layout.tokens // key_group)].all()
    assert mask[prod(tiles) :, : layout.tokens // key_group].all()


def test_a_window_needs_a_centre() -> None:
    order = TileOrder((2, 8, 8), (2, 8, 8), 128)
    with pytest.raises(ValueError, match="must be odd"):
        patterns.sliding_tile(Layout(128, 0, 64), order, (2, 1, 1))


def test_radial_reach_shrinks_with_distance() -> None:
    layout = Layout(16 * 1024, 0, 64)
    mask = patterns.radial(layout, 16, 1024)
    frames = mask.reshape(16, 8, 16, 16).mean(axis=(1, 3))  # density by frame of query and of key
    assert frames[5, 5] == 1
    assert frames[5, 6] == frames[6, 5] == 1
    assert frames[4, 4] >= frames[4, 5] >= frames[4, 6] >= frames[4, 8] >= frames[4, 12] > 0
    assert (frames[:, 0] == 1).all()  # the first frame is visible to all
    assert patterns.radial(layout, 16, 1024, decay=0.25).mean() < mask.mean() < 0.75
    diagonal = np.arange(128)
    assert mask[diagonal, 2 * diagonal].all()
    with pytest.raises(ValueError, match="16 frames of 1000 tokens"):
        patterns.radial(layout, 16, 1000)


def test_top_k_keeps_the_blocks_that_matter() -> None:
    random = np.random.default_rng(0)
    layout = Layout(1024, 64, 64)
    k = random.normal(size=(1088, 2, 32))
    q = 0.1 * random.normal(size=(1088, 2, 32))
    k[128:192] += 3  # one key block that all queries of the second head look for
    q[:, 1] += 1
    mask = patterns.top_k(layout, q, k, 0.25)
    assert mask.shape == (2, 9, 18)
    assert mask[1, :, 2].all()
    image = mask[:, :8, :16].sum(2)
    assert ((image >= 4) & (image <= 6)).all()  # a quarter of 16, and its own two
    assert mask[:, :, 16].all()
    assert mask[:, 8, :17].all()
    assert not mask[:, :, 17].any()  # padding


def test_top_k_loses_less_than_it_skips(interpreter: Interpreter) -> None:
    problem = Problem(480, 20, heads=1, head_dim=64)
    problem.tensors["q"] = (3 * problem.tensors["q"].astype(np.float32)).astype(problem.tensors["q"].dtype)
    q, k = problem.rotated()
    layout = Layout(480, 20, 64)
    mask = patterns.top_k(layout, q[0], k[0], 0.5)
    sparse_inputs(problem, layout, mask)
    assert block_lists(mask).density < 0.85
    out = problem.attend(interpreter, "fp8", sparse=True)
    assert cosine(out, problem.exact()) > 0.9


def test_key_counts() -> None:
    layout = Layout(192, 100, 64)
    np.testing.assert_array_equal(layout.key_counts(), [[64, 64, 64, 64, 36, 0]])
    np.testing.assert_array_equal(layout.key_counts(text_lengths=(10, 70))[:, 3:], [[10, 0, 0], [64, 6, 0]])
    valid = np.ones(192, bool)
    valid[60:64] = False
    assert layout.key_counts(valid)[0, 0] == 60
    valid[3] = False
    with pytest.raises(ValueError, match="must come before"):
        layout.key_counts(valid)


def test_tiles_must_fit() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        TileOrder((33, 45, 80), (6, 8, 8), 384)
    with pytest.raises(ValueError, match="does not fit into 128 slots"):
        TileOrder((33, 45, 80), (11, 5, 8), 128)
    assert TileOrder((33, 45, 80), (3, 5, 8), 128).tiles == (11, 9, 10)


def test_attention_of_no_visible_key_is_zero() -> None:
    x = np.ones((1, 3, 1, 8))
    assert not attention(x, x, x, np.zeros((1, 1, 3, 3), bool)).any()


def test_lists_of_the_whole_video_are_small() -> None:
    """720p, 129 frames: what crosses to the GPU once per window."""
    order = TileOrder((33, 45, 80), (3, 5, 8), 128)
    layout = Layout(order.slots, 256, 128)
    mask = patterns.sliding_tile(layout, order, (3, 3, 3))
    lists = block_lists(np.broadcast_to(mask, (24, *mask.shape)))
    assert lists.density < 0.04
    assert lists.block_index.nbytes < 4 << 20
