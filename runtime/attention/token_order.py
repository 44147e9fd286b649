"""Tile-major order of image tokens: a permutation done once where tokens enter the DiT, and undone where they leave.

A tile is a box of neighbouring tokens in time, height and width. In tile-major order its tokens lie together, so that a
window of tiles is a set of whole key blocks. Attention does not depend on the order of tokens, as long as rotary tables
are permuted alike. Tiles are padded to whole blocks; padding repeats a token of the tile, so that every statistic over
tokens stays what real tokens make it, and does not count as a key. Knows neither patterns nor kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Grid = tuple[int, int, int]
"""Time, height, width."""


@dataclass(frozen=True)
class TileOrder:
    """An order of image tokens by tiles.

    Attributes:
        grid: Tokens in time, height and width.
        tile: Likewise of a tile.
        padded_tile: Slots of a tile: its tokens and the padding behind them.
    """

    grid: Grid
    tile: Grid
    padded_tile: int

    def __post_init__(self) -> None:
        if any(size % part for size, part in zip(self.grid, self.tile, strict=True)):
            raise ValueError(f"tiles of {self.tile} do not divide a grid of {self.grid} tokens")
        if self.padded_tile < prod(self.tile):
            raise ValueError(f"a tile of {prod(self.tile)} tokens does not fit into {self.padded_tile} slots")

    @property
    def tiles(self) -> Grid:
        """Tiles in time, height and width."""
        t, h, w = (size // part for size, part in zip(self.grid, self.tile, strict=True))
        return t, h, w

    @property
    def slots(self) -> int:
        """Length of the permuted sequence."""
        return prod(self.tiles) * self.padded_tile

    def gather(self) -> NDArray[np.int64]:
        """Return which token, counted in t-major order, is in each slot: int64 [slots]."""
        (t, h, w), (a, b, c) = self.tiles, self.tile
        numbers = np.arange(prod(self.grid), dtype=np.int64).reshape(t, a, h, b, w, c)
        by_tile = numbers.transpose(0, 2, 4, 1, 3, 5).reshape(t * h * w, a * b * c)
        padding = np.repeat(by_tile[:, :1], self.padded_tile - a * b * c, axis=1)
        return np.concatenate((by_tile, padding), axis=1).reshape(-1)

    def valid(self) -> NDArray[np.bool_]:
        """Return which slots hold a token of their own: bool [slots]."""
        in_tile = np.arange(self.padded_tile) < prod(self.tile)
        return np.tile(in_tile, prod(self.tiles))

    def scatter(self) -> NDArray[np.int64]:
        """Return the slot of each token: int64 [tokens]; ``x[gather][scatter] == x``."""
        slots = np.flatnonzero(self.valid())
        positions = np.empty(prod(self.grid), np.int64)
        positions[self.gather()[slots]] = slots
        return positions

    def tile_of_slot(self) -> NDArray[np.int64]:
        """Return the number of each slot's tile: int64 [slots]."""
        return np.repeat(np.arange(prod(self.tiles), dtype=np.int64), self.padded_tile)


def enter(x: NDArray[Any], order: TileOrder, axis: int = 0) -> NDArray[Any]:
    """Return image tokens, or rows of a rotary table, in tile-major order with padding."""
    return np.take(x, order.gather(), axis=axis)


def leave(x: NDArray[Any], order: TileOrder, axis: int = 0) -> NDArray[Any]:
    """Undo :func:`enter`."""
    return np.take(x, order.scatter(), axis=axis)
