"""What a ``dit`` with sparse attention is told besides the usual: the order of its tokens and who sees whom.

The lists of all steps and heads lie behind one another in ``block_index``, each once, which all steps share; what
changes from step to step is ``block_start``, which points into it. So every step has inputs of the same shapes, and
what is uploaded per step is small. The module knows a bundle's blocks and a request's table; no engine.

Letters: ``n`` steps, ``N`` image tokens, ``Q`` query blocks, ``K`` key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reelforge.runtime.attention import patterns
from reelforge.runtime.attention.patterns import Layout, ListPool, Mask
from reelforge.runtime.attention.table import AttentionTable, Pattern, Rule
from reelforge.runtime.attention.token_order import Grid, TileOrder, enter
from reelforge.runtime.recipe import SparseAttention, SparseKind

Array = NDArray[Any]


@dataclass(frozen=True)
class JointSequence:
    """The joint sequence of one video.

    Attributes:
        grid: Image tokens in time, height and width.
        text_tokens: Behind them.
        heads: Of the attention.
    """

    grid: Grid
    text_tokens: int
    heads: int


@dataclass(frozen=True)
class AttentionInputs:
    """Inputs of ``dit``.

    Attributes:
        fixed: For all steps: ``token_gather`` int64 [slots], ``token_scatter`` int64 [N], ``rope_cos`` and ``rope_sin``
            in the order of slots, ``block_keys`` int32 [1, K]; for lists ``block_index`` int32 [entries].
        per_step: ``block_start`` int32 [n, heads, Q + 1], or ``kept_blocks`` int64 [n].
        density: Per step, the visited pairs of blocks as a share of those that dense attention visits.
    """

    fixed: dict[str, Array]
    per_step: dict[str, Array]
    density: tuple[float, ...]


def attention_inputs(
    table: AttentionTable, sparse: SparseAttention, sequence: JointSequence, steps: int, rope: tuple[Array, Array]
) -> AttentionInputs:
    """Return what ``dit`` is told of its attention.

    Args:
        table: One without ``problems`` for this bundle and video.
        sparse: What the bundle was built for.
        sequence: The video's.
        steps: Sampling steps.
        rope: Cosines and sines of image tokens in t-major order, float32 [N, d/2].
    """
    order = token_order(table, sparse, sequence.grid)
    layout = Layout(order.slots, sequence.text_tokens, sparse.key_block, sparse.query_block)
    fixed: dict[str, Array] = {
        "token_gather": order.gather(),
        "token_scatter": order.scatter(),
        "rope_cos": enter(rope[0], order),
        "rope_sin": enter(rope[1], order),
        "block_keys": layout.key_counts(order.valid()),
    }
    everything = int(patterns.dense(layout).sum())
    if sparse.kind is SparseKind.TOP_K:
        rules = [table.rule(step, head=0) for step in range(steps)]
        kept = [layout.kept_blocks(1.0 if rule is None or rule.share is None else rule.share) for rule in rules]
        skipped = layout.image_tokens // layout.query_block * (layout.ranked_blocks - np.array(kept, np.int64))
        density = 1 - skipped / everything
        return AttentionInputs(fixed, {"kept_blocks": np.array(kept, np.int64)}, tuple(map(float, density)))
    pool = ListPool()
    rows: dict[Rule | None, NDArray[np.int32]] = {}
    starts = np.empty((steps, sequence.heads, layout.query_blocks + 1), np.int32)
    for step, head in product(range(steps), range(sequence.heads)):
        rule = table.rule(step, head)
        if rule not in rows:
            rows[rule] = pool.add(mask(table.pattern, rule, layout, order))
        starts[step, head] = rows[rule]
    visited = (starts[:, :, -1] - starts[:, :, 0]).sum(axis=1)
    density = visited / (everything * sequence.heads)
    return AttentionInputs({**fixed, "block_index": pool.index()}, {"block_start": starts}, tuple(map(float, density)))


def token_order(table: AttentionTable, sparse: SparseAttention, grid: Grid) -> TileOrder:
    """Return the order of a video's image tokens.

    Tiles are padded to whole key blocks. Dense and radial attention keep the t-major order: one tile, without padding.
    """
    if table.pattern not in (Pattern.SLIDING_TILE, Pattern.TOP_K):
        return TileOrder(grid, grid, prod(grid))
    tile = table.tile or usual_tile(grid, sparse.query_block)
    return TileOrder(grid, tile, -(-prod(tile) // sparse.key_block) * sparse.key_block)


def usual_tile(grid: Grid, tokens: int) -> Grid:
    """Return the tile that divides a grid, has at most so many tokens, and the least surface for its volume."""
    sizes = [[part for part in range(1, size + 1) if size % part == 0] for size in grid]
    tiles = [tile for tile in product(*sizes) if prod(tile) <= tokens]
    t, h, w = min(tiles, key=lambda tile: (sum(1 / size for size in tile), tile))
    return t, h, w


def mask(pattern: Pattern, rule: Rule | None, layout: Layout, order: TileOrder) -> Mask:
    """Return the mask of a rule, bool [Q, K]; without one, that of dense attention."""
    if rule is None or pattern is Pattern.DENSE:
        return patterns.dense(layout)
    if pattern is Pattern.SLIDING_TILE and rule.window is not None:
        return patterns.sliding_tile(layout, order, rule.window)
    if pattern is Pattern.RADIAL and rule.decay is not None:
        frames, height, width = order.grid
        return patterns.radial(layout, frames, height * width, rule.decay)
    raise AssertionError(f"a rule of {pattern.value} attention has no lists: {rule}")
