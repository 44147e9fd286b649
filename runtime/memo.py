"""What was computed before, kept for requests that ask for the same; bounded by bytes, and the oldest use goes first.

Entries are arrays that nobody may alter, addressed by a digest of everything that they were computed from. The module
knows which stages read text, and not what the arrays mean.
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

    def __contains__(self, key: bytes) -> bool:
        """Return whether something is kept under ``key``, without counting it as used."""
        return key in self._entries

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


class Memos:
    """What is remembered of text, and of what was made of it for a schedule.

    They do not push each other out: text is small and long to compute, and requests that wait may have theirs here
    already, while the conditions of a single request can be hundreds of times larger. Any thread may use it, and
    pipelines of one bundle may share it.

    Args:
        limit_bytes: What all of it may take; an eighth is for text.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.text = Memo(limit_bytes // 8)
        self.conditions = Memo(limit_bytes - limit_bytes // 8)

    def of(self, stage: str) -> Memo:
        """Return where a stage's answers are kept."""
        return self.text if stage in TEXT_STAGES else self.conditions

    def clear(self) -> None:
        """Forget everything."""
        self.text.clear()
        self.conditions.clear()


TEXT_STAGES = ("llm", "clip")


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
