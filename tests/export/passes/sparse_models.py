"""Models of one portable operator of sparse attention, for the tests of the passes that lower them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from tests.export.passes.portable_model import one_operator

HEADS, WIDTH = 2, 4


def sparse_model(
    operator: str,
    blocks: tuple[int, int],
    others: Mapping[str, tuple[ir.DataType, Sequence[int | str]]],
    dtype: ir.DataType = ir.DataType.FLOAT,
    videos: int | str = "batch",
) -> ir.Model:
    """Return a model of q, k, v and ``others``; ``blocks`` are the sizes of query and key blocks."""
    kind = (dtype, (videos, HEADS, "tokens", WIDTH))
    model = one_operator(operator, {"q": kind, "k": kind, "v": kind, **others})
    for name, size in zip(("query_block", "key_block"), blocks, strict=True):
        model.graph[0].attributes.add(ir.AttrInt64(name, size))
    return model
