"""What is remembered: the same bits for the same inputs, within its bytes, and the oldest use goes first."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reelforge.runtime.memo import Memo, key_of


def arrays(count: int) -> dict[str, np.ndarray]:
    return {"a": np.zeros(count, np.uint8)}


def test_the_least_recently_used_is_forgotten() -> None:
    memo = Memo(10)
    for key in (b"x", b"y"):
        memo.put(key, arrays(5))
    assert memo.get(b"x") is not None
    memo.put(b"z", arrays(5))
    assert [memo.get(key) is not None for key in (b"x", b"y", b"z")] == [True, False, True]
    assert (memo.hits, memo.misses, memo.bytes, len(memo)) == (3, 1, 10, 2)
    memo.put(b"large", arrays(11))
    assert (memo.get(b"large"), memo.bytes) == (None, 10)
    memo.put(b"x", arrays(1))
    assert memo.bytes == 6
    memo.clear()
    assert (len(memo), memo.bytes) == (0, 0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=40), st.integers(0, 20))
def test_the_limit_holds(puts: list[tuple[int, int]], limit: int) -> None:
    memo = Memo(limit)
    for number, size in puts:
        memo.put(bytes([number]), arrays(size))
        kept = [memo.get(bytes([other])) for other in range(6)]
        total = sum(entry["a"].nbytes for entry in kept if entry is not None)
        assert total == memo.bytes <= limit
        assert size > limit or memo.get(bytes([number])) is not None


def test_keys_tell_apart_what_differs() -> None:
    base = np.arange(6, dtype=np.float32)
    variants = [
        ("llm", {"x": base}),
        ("clip", {"x": base}),
        ("llm", {"y": base}),
        ("llm", {"x": base.reshape(2, 3)}),
        ("llm", {"x": base.astype(np.float64)}),
        ("llm", {"x": base.view(np.int32)}),
        ("llm", {"x": -base}),  # -0.0 is another input than 0.0
        ("llm", {"x": base, "y": base}),
        ("llm", {"x": base[:3], "y": base[3:]}),
    ]
    assert len({key_of(stage, inputs) for stage, inputs in variants}) == len(variants)
    assert key_of("llm", {"x": base, "y": -base}) == key_of("llm", {"y": -base, "x": base[::1].copy()})
    assert key_of("llm", {"x": base[::2]}) == key_of("llm", {"x": base[::2].copy()})
