"""What was computed before, kept for requests that ask for the same; bounded by bytes, and the oldest use goes first.

Entries are arrays that nobody may alter, addressed by a digest of everything that they were computed from. The module
knows neither stages nor what the arrays mean.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping

from reelforge.runtime.engines.engine import Array

Arrays = Mapping[str, Array]


class Memo:
    """Remembers named arrays. Any thread may use it.

    Args:
        limit_bytes: What all entries may take together; a larger one is not kept. 0 remembers nothing.

    Attributes:
        hits: How often something was remembered.
        misses: How often it was not.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._entries: OrderedDict[bytes, Arrays] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        """Return how many entries there are."""
        return len(self._entries)

    def get(self, key: bytes) -> Arrays | None:
        """Return what was kept under ``key``, or None."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self.misses += 1
                return None
            self._entries.move_to_end(key)
            self.hits += 1
            return found

    def put(self, key: bytes, arrays: Arrays) -> None:
        """Keep arrays, which must not be altered afterwards, and forget what was not used for longest."""
        size = _size(arrays)
        if size > self.limit_bytes:
            return
        with self._lock:
            before = self._entries.pop(key, None)
            self.bytes += size - (0 if before is None else _size(before))
            self._entries[key] = arrays
            while self.bytes > self.limit_bytes:
                _, oldest = self._entries.popitem(last=False)
                self.bytes -= _size(oldest)

    def clear(self) -> None:
        """Forget everything; the counts stay."""
        with self._lock:
            self._entries.clear()
            self.bytes = 0


def key_of(stage: str, inputs: Arrays) -> bytes:
    """Return a digest of a stage's name and inputs: their names, types, shapes and bytes."""
    digest = hashlib.sha256(stage.encode())
    for name in sorted(inputs):
        array = inputs[name]
        digest.update(f"\0{name} {array.dtype.str} {array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.digest()


def _size(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())
