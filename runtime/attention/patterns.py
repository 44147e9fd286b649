"""Which key blocks each query block visits: dense, sliding tile, radial, top-k; lists for block-sparse attention.

A mask here is bool [query blocks, key blocks], or with heads in front. Image tokens come first, then text. Text keys
are visible to all, and text queries see everything. The module does not know when which pattern is good: the map from
heads and steps to patterns is the caller's (``runtime.attention.table``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reelforge.runtime.attention.token_order import Grid, TileOrder

Mask = NDArray[np.bool_]

QUERY_BLOCK = 128
"""Queries of a block of the kernels."""


@dataclass(frozen=True)
class BlockLists:
    """Masks of all heads as run-time inputs of the kernel; heads with equal masks share entries.

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
        lengths = np.diff(self.block_start.astype(np.int64), axis=-1)
        return float(lengths.sum() / (lengths.size * self.key_blocks))


class ListPool:
    """Lists of many masks behind one another, each mask once: one ``block_index`` for heads and steps alike."""

    def __init__(self) -> None:
        self._starts: dict[bytes, NDArray[np.int32]] = {}
        self._entries: list[NDArray[np.int32]] = []
        self._length = 0

    def add(self, mask: Mask) -> NDArray[np.int32]:
        """Add a mask [query blocks, key blocks] if it is new, and return its row of ``block_start``."""
        key = np.packbits(mask).tobytes()
        if key not in self._starts:
            ends = self._length + np.cumsum(mask.sum(1))
            self._starts[key] = np.concatenate(([self._length], ends)).astype(np.int32)
            self._entries.append(np.nonzero(mask)[1].astype(np.int32))
            self._length = int(ends[-1])
        return self._starts[key]

    def index(self) -> NDArray[np.int32]:
        """Return ``block_index`` of all masks so far."""
        return np.concatenate(self._entries)


@dataclass(frozen=True)
class Layout:
    """Where blocks lie in the joint sequence.

    Attributes:
        image_tokens: Slots of the image, padding included.
        text_tokens: Behind them.
        key_group: Tokens of a key block.
        query_block: Tokens of a query block, a multiple of ``key_group``.
    """

    image_tokens: int
    text_tokens: int
    key_group: int
    query_block: int = QUERY_BLOCK

    @property
    def tokens(self) -> int:
        """Length of the joint sequence."""
        return self.image_tokens + self.text_tokens

    @property
    def query_blocks(self) -> int:
        """Blocks of queries."""
        return -(-self.tokens // self.query_block)

    @property
    def key_blocks(self) -> int:
        """Blocks of ``key_group`` keys, in a sequence padded to whole query blocks."""
        return self.query_blocks * self.query_block // self.key_group

    @property
    def own_blocks(self) -> int:
        """Key blocks that a query block is made of."""
        return self.query_block // self.key_group

    @property
    def ranked_blocks(self) -> int:
        """Key blocks that hold nothing but image: those that a choice of the best chooses from."""
        return self.image_tokens // self.key_group

    def kept_blocks(self, share: float) -> int:
        """Return how many ranked blocks a share keeps: at least a query block's own."""
        return min(max(self.own_blocks, round(share * self.ranked_blocks)), self.ranked_blocks)

    def with_text(self, image: Mask) -> Mask:
        """Return ``image`` with text keys visible to all and text queries that see everything."""
        mask = image.copy()
        mask[..., :, self.image_tokens // self.key_group :] = True
        mask[..., self.image_tokens // self.query_block :, :] = True
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
    pool = ListPool()
    starts = np.stack([pool.add(head) for head in mask])
    return BlockLists(pool.index(), starts, mask.shape[2])


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
    queries = _membership(tile, layout.query_block, layout.query_blocks)
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
    size, group = layout.query_block, layout.key_group
    query_ends = [(b * size, min((b + 1) * size, layout.image_tokens)) for b in range(layout.query_blocks)]
    starts = np.minimum(np.arange(layout.key_blocks) * group, layout.image_tokens - 1)
    ends = np.minimum(starts + group, layout.image_tokens) - 1
    for block, (first, end) in enumerate(query_ends):
        if first >= end:
            continue
        middle = (first + end - 1) // 2
        for at in (starts, ends):  # a key block may lie in two frames
            distance = np.abs(time[at] - time[middle])
            reach = decay * frame_tokens / 2.0 ** np.floor(np.log2(np.maximum(distance, 1)))
            gap = np.maximum(np.abs(place[at] - place[middle]) - (size + group) // 2, 0)
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
        share: Of the image's key blocks that is kept, a block's own among them (see :meth:`Layout.kept_blocks`).

    Returns:
        bool [H, query blocks, key blocks].
    """
    queries, keys = _means(q, layout.query_block, layout.query_blocks), _means(k, layout.key_group, layout.key_blocks)
    scores = np.einsum("qhd,khd->hqk", queries, keys)[:, :, : layout.ranked_blocks]
    own = np.arange(layout.ranked_blocks) // layout.own_blocks == np.arange(layout.query_blocks)[:, None]
    scores[:, own] = np.inf
    best = np.argsort(-scores, axis=2, kind="stable")[:, :, : layout.kept_blocks(share)]
    mask = np.zeros((*scores.shape[:2], layout.key_blocks), bool)
    np.put_along_axis(mask, best, True, axis=2)
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
