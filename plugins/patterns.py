"""Which key blocks each query block visits: dense, sliding tile, radial, top-k; lists for ``block_sparse_attention``.

A mask here is bool [query blocks, key blocks], or with heads in front. Query blocks are of 128 tokens, key blocks of
``key_group``; image tokens come first, then text. Text keys are visible to all, and text queries see everything. The
module does not know when which pattern is good: the map from heads and steps to patterns is the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reelforge.plugins.schema import PAD
from reelforge.plugins.token_order import Grid, TileOrder

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class BlockLists:
    """Masks of all heads as run-time inputs of the kernel.

    Attributes:
        block_index: int32 [entries].
        block_start: int32 [heads, query blocks + 1], into ``block_index``.
        key_blocks: Number of key blocks there are.
    """

    block_index: NDArray[np.int32]
    block_start: NDArray[np.int32]
    key_blocks: int

    @property
    def density(self) -> float:
        """Visited share of all pairs of blocks."""
        heads, closed = self.block_start.shape
        return float(self.block_index.size / (heads * (closed - 1) * self.key_blocks))


@dataclass(frozen=True)
class Layout:
    """Where blocks lie in the joint sequence.

    Attributes:
        image_tokens: Slots of the image, padding included.
        text_tokens: Behind them.
        key_group: Tokens of a key block.
    """

    image_tokens: int
    text_tokens: int
    key_group: int

    @property
    def tokens(self) -> int:
        """Length of the joint sequence."""
        return self.image_tokens + self.text_tokens

    @property
    def query_blocks(self) -> int:
        """Blocks of 128 queries."""
        return -(-self.tokens // PAD)

    @property
    def key_blocks(self) -> int:
        """Blocks of ``key_group`` keys, in a sequence padded to 128."""
        return self.query_blocks * PAD // self.key_group

    def with_text(self, image: Mask) -> Mask:
        """Return ``image`` with text keys visible to all and text queries that see everything."""
        mask = image.copy()
        mask[..., :, self.image_tokens // self.key_group :] = True
        mask[..., self.image_tokens // PAD :, :] = True
        mask[..., -(-self.tokens // self.key_group) :] = False  # nothing but padding
        return mask

    def key_counts(
        self, valid: NDArray[np.bool_] | None = None, text_lengths: tuple[int, ...] = ()
    ) -> NDArray[np.int32]:
        """Return how many keys of each block count, int32 [batch, key blocks].

        Args:
            valid: Which image slots count, bool [image_tokens]; None is all. In a block those that count come first.
            text_lengths: Per video, how many text tokens count; empty is one video with all.
        """
        rows = []
        for length in text_lengths or (self.text_tokens,):
            counts = np.zeros(self.key_blocks * self.key_group, bool)
            counts[: self.image_tokens] = True if valid is None else valid
            counts[self.image_tokens : self.image_tokens + length] = True
            blocks = counts.reshape(-1, self.key_group)
            if (np.diff(blocks.astype(np.int8), axis=1) > 0).any():
                raise ValueError("within a block, keys that count must come before those that do not")
            rows.append(blocks.sum(1))
        return np.array(rows, np.int32)


def block_lists(mask: Mask) -> BlockLists:
    """Return the lists of a mask [heads, query blocks, key blocks]."""
    heads = mask.shape[0]
    counts = mask.sum(2).reshape(-1)
    ends = np.cumsum(counts).reshape(heads, -1)
    starts = ends[:, :1] - mask[:, 0].sum(1)[:, None]
    index = np.nonzero(mask)[2]
    return BlockLists(index.astype(np.int32), np.concatenate((starts, ends), axis=1).astype(np.int32), mask.shape[2])


def dense(layout: Layout) -> Mask:
    """Return a mask in which every query sees every key."""
    return layout.with_text(np.ones((layout.query_blocks, layout.key_blocks), bool))


def sliding_tile(layout: Layout, order: TileOrder, window: Grid) -> Mask:
    """Return the mask of a window of tiles around each query's tile, its centre clamped so that it stays inside.

    Args:
        layout: Of the sequence in tile-major order.
        order: The tiles.
        window: Odd numbers of tiles in time, height and width; more than there are is all.

    A block that holds tokens of several tiles sees, and is seen by, what any of them may.
    """
    if any(size % 2 == 0 for size in window):
        raise ValueError(f"a window of {window} tiles has no centre; its sizes must be odd")
    coordinates = np.stack(np.unravel_index(np.arange(order.slots // order.padded_tile), order.tiles), axis=1)
    near = np.ones((len(coordinates),) * 2, bool)
    for axis, (tiles, size) in enumerate(zip(order.tiles, window, strict=True)):
        reach = size // 2
        position = coordinates[:, axis]
        centre = np.clip(position, min(reach, tiles // 2), max(tiles - 1 - reach, tiles // 2))
        near &= np.abs(position[None, :] - centre[:, None]) <= reach
    tile = order.tile_of_slot()
    queries = _membership(tile, PAD, layout.query_blocks)
    keys = _membership(tile, layout.key_group, layout.key_blocks)
    seen = queries.astype(np.float32) @ near.astype(np.float32) @ keys.T.astype(np.float32) > 0
    return layout.with_text(np.asarray(seen))


def radial(layout: Layout, frames: int, frame_tokens: int, decay: float = 1.0) -> Mask:
    """Return the mask of attention whose reach in space halves each time the distance in time doubles.

    Args:
        layout: Of the sequence in t-major order.
        frames: Latent frames.
        frame_tokens: Tokens of one frame.
        decay: Factor of the reach; with 1, a frame and its neighbours see each other whole.

    After "Radial Attention" (Li et al., 2025): at a distance of d frames, tokens see each other whose places in their
    frames differ by at most ``decay * frame_tokens / 2**floor(log2(d))``. Where that is less than a key block, one
    frame in so many is kept. The first frame is visible to all. Blocks see each other if some of their tokens may.
    """
    time = np.arange(layout.image_tokens) // frame_tokens
    place = np.arange(layout.image_tokens) % frame_tokens
    if frames * frame_tokens != layout.image_tokens:
        raise ValueError(f"{frames} frames of {frame_tokens} tokens are not {layout.image_tokens} image tokens")
    mask = np.zeros((layout.query_blocks, layout.key_blocks), bool)
    query_ends = [(b * PAD, min((b + 1) * PAD, layout.image_tokens)) for b in range(layout.query_blocks)]
    group = layout.key_group
    starts = np.minimum(np.arange(layout.key_blocks) * group, layout.image_tokens - 1)
    ends = np.minimum(starts + group, layout.image_tokens) - 1
    for block, (first, end) in enumerate(query_ends):
        if first >= end:
            continue
        middle = (first + end - 1) // 2
        for at in (starts, ends):  # a key block may lie in two frames
            distance = np.abs(time[at] - time[middle])
            reach = decay * frame_tokens / 2.0 ** np.floor(np.log2(np.maximum(distance, 1)))
            gap = np.maximum(np.abs(place[at] - place[middle]) - (PAD + group) // 2, 0)
            kept = np.maximum(np.ceil(group / reach), 1).astype(np.int64)
            mask[block] |= (gap <= reach) & (distance % kept == 0)
        mask[block] |= time[starts] == 0
    return layout.with_text(mask)


def top_k(layout: Layout, q: NDArray[Any], k: NDArray[Any], share: float) -> Mask:
    """Return, per head, the key blocks whose mean key has the largest products with a query block's mean query.

    Args:
        layout: Of the sequence.
        q: [L, H, D], as attention sees them: normalised and rotated.
        k: Likewise.
        share: Of the image's key blocks that is kept, at least one block.

    Returns:
        bool [H, query blocks, key blocks]; a block sees itself.
    """
    queries, keys = _means(q, PAD, layout.query_blocks), _means(k, layout.key_group, layout.key_blocks)
    scores = np.einsum("qhd,khd->hqk", queries, keys)
    image_blocks = -(-layout.image_tokens // layout.key_group)
    count = max(1, round(share * image_blocks))
    best = np.argsort(-scores[:, :, :image_blocks], axis=2, kind="stable")[:, :, :count]
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, best, True, axis=2)
    own = np.arange(layout.key_blocks) * layout.key_group // PAD
    mask |= own[None, None, :] == np.arange(layout.query_blocks)[None, :, None]
    return layout.with_text(mask)


def _membership(tile: NDArray[np.int64], size: int, blocks: int) -> Mask:
    """Return which tiles each block has tokens of, bool [blocks, tiles]."""
    member = np.zeros((blocks, int(tile[-1]) + 1), bool)
    member[np.arange(len(tile)) // size, tile] = True
    return member


def _means(x: NDArray[Any], size: int, blocks: int) -> NDArray[np.float64]:
    wide = x.astype(np.float64)
    starts = np.arange(0, len(x), size)
    means = np.add.reduceat(wide, starts, axis=0) / np.minimum(size, len(x) - starts)[:, None, None]
    return np.pad(means, ((0, blocks - len(means)), (0, 0), (0, 0)))
