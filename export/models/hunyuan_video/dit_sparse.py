"""Blocks of the diffusion transformer whose attention visits key blocks of a list, or chooses them itself.

Weights and everything but the attention are those of ``dit``. Both operators take the same number of tensors, so one
class serves either: ``(block_index, block_start, block_keys)`` or ``(token_gather, kept_blocks, block_keys)``, as
``export.portable_sparse`` has them. Image tokens come in an order of tiles, which nothing here knows of.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from reelforge.export.models.hunyuan_video.dit import Attention, DoubleBlock, SingleBlock
from reelforge.export.portable_sparse import Blocks, block_sparse_attention, top_k_attention
from reelforge.runtime.recipe import SparseAttention, SparseKind
from reelforge.runtime.spec import DitSpec

Operator = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Blocks], Tensor]
OPERATORS: dict[SparseKind, Operator] = {
    SparseKind.LISTS: block_sparse_attention,
    SparseKind.TOP_K: top_k_attention,
}


def sparse(how: SparseAttention, first: Tensor, second: Tensor, block_keys: Tensor) -> Attention:
    """Return the attention that visits the blocks that the operator's tensors say."""
    operator, blocks = OPERATORS[how.kind], Blocks(how.query_block, how.key_block)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        return operator(query, key, value, first, second, block_keys, blocks).transpose(1, 2).flatten(2)

    return attention


class SparseDoubleBlock(DoubleBlock):
    """A double block with sparse attention."""

    def __init__(self, spec: DitSpec, how: SparseAttention) -> None:
        super().__init__(spec)
        self.how = how

    def forward(  # type: ignore[override]
        self,
        image: Tensor,
        text: Tensor,
        modulation: Tensor,
        joint_cos: Tensor,
        joint_sin: Tensor,
        first: Tensor,
        second: Tensor,
        block_keys: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the new ``(image, text)``; the last three are the operator's, the others a double block's."""
        attention = sparse(self.how, first, second, block_keys)
        return self.compute(image, text, modulation, joint_cos, joint_sin, attention)


class SparseSingleBlock(SingleBlock):
    """A single block with sparse attention."""

    def __init__(self, spec: DitSpec, how: SparseAttention) -> None:
        super().__init__(spec)
        self.how = how

    def forward(  # type: ignore[override]
        self,
        joint: Tensor,
        modulation: Tensor,
        joint_cos: Tensor,
        joint_sin: Tensor,
        first: Tensor,
        second: Tensor,
        block_keys: Tensor,
    ) -> Tensor:
        """Return the new joint sequence; the last three are the operator's, the others a single block's."""
        return self.compute(joint, modulation, joint_cos, joint_sin, sparse(self.how, first, second, block_keys))
