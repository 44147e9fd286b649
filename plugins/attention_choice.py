"""Which plugins compute attention on which GPU architecture: one row of data each.

Architectures are called as in targets (``sm90``). One that is not here has no kernels: its attention stays the
compiler's own. Where several would do, the choice is by what was measured (sm90: a key group of 128 took 0.56 of the
time of 64 at 119,056 tokens, benchmarks/attention.md) or by datasheets (sm89, sm120: twice the rate with an fp16
accumulator; never timed). The module does not know graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class AttentionPlugins:
    """What one architecture computes attention with.

    Attributes:
        dense: Plugin of attention to all keys, or to the first so many.
        sparse: Plugin of attention over lists of key blocks.
        key_group: Keys that share a scale where nothing else decides it.
        key_groups: Those that the architecture has kernels for.
    """

    dense: str
    sparse: str
    key_group: int = 64
    key_groups: tuple[int, ...] = (64,)


_FP8 = ("int8_fp8_attention", "block_sparse_attention")
_FP16_SUMS = ("int8_fp8_attention_fp16_accumulator", "block_sparse_attention_fp16_accumulator")
_NO_FP8 = ("int8_fp16_attention", "block_sparse_fp16_attention")

ATTENTION_PLUGINS: Mapping[str, AttentionPlugins] = MappingProxyType(
    {
        "sm80": AttentionPlugins(*_NO_FP8),
        "sm86": AttentionPlugins(*_NO_FP8),
        "sm89": AttentionPlugins(*_FP16_SUMS),
        "sm90": AttentionPlugins(*_FP8, key_group=128, key_groups=(64, 128)),
        "sm100": AttentionPlugins(*_FP8),
        "sm120": AttentionPlugins(*_FP16_SUMS),
    }
)
"""By the names of ``runtime.architectures``."""
