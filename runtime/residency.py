"""Which engines are in memory.

The module knows stages by name only. Each engine is closed when its ``with`` block ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from reelforge.runtime.engines.engine import Engine


class Residency:
    """Lends engines, which it loads and closes.

    Args:
        load: Loads the engine of a stage.
    """

    def __init__(self, load: Callable[[str], Engine]) -> None:
        self._load = load

    @contextmanager
    def lease(self, stage: str) -> Iterator[Engine]:
        """Lend the engine of a stage for the duration of a ``with`` block."""
        with closing(self._load(stage)) as engine:
            yield engine

    def make_room(self) -> bool:
        """Close what nobody uses, and return whether there was any."""
        return False

    def close(self) -> None:
        """Close what is loaded."""
