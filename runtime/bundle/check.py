"""How thoroughly a bundle is checked. Apart from what does it, so that whoever names it imports nothing else."""

from __future__ import annotations

import enum


class Check(enum.Enum):
    """How thoroughly a bundle is checked when it is opened."""

    FULL = "full"  # sizes, and the sha256 of every file and every weight
    SIZES = "sizes"  # presence and size of every file: instant, finds truncated copies but not altered bytes
