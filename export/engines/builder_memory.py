"""How much memory a compiler takes, from the weights of the plan that it streams to the disk.

Anonymous memory at its peak, TensorRT-RTX 1.7.1.116 on a machine without a GPU: stacks of FP8 products of 0.45, 0.76
and 2.26 GB took 0.29 GB and once their weights; whole FP8 blocks of the model 1.3 times; 16-bit products up to twice,
since those that read one input (q, k and v; a gated MLP) are merged into one constant. The mapped graph comes on top as
file-backed memory, which the kernel may take back. The module knows no graphs.
"""

from __future__ import annotations

BASE_BYTES = 300_000_000
SHARE_8_BIT, SHARE_16_BIT = 1.3, 2.1


def weights_that_fit(memory_bytes: int, eight_bit_fraction: float) -> int:
    """Return how many bytes of weights a plan may have for its compiler to stay below ``memory_bytes``; at least 1.

    Args:
        memory_bytes: What the compiler may occupy.
        eight_bit_fraction: Share of the weights' bytes that is stored in 8 bits.
    """
    share = SHARE_8_BIT * eight_bit_fraction + SHARE_16_BIT * (1 - eight_bit_fraction)
    return max(1, int((memory_bytes - BASE_BYTES) / share))
