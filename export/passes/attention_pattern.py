"""Finds what an attention is made of: projected q, k and v, their norms and rotary tables, back from the portable node.

``projection -> [B, S, h, d] -> RMSNorm over d -> (image and text joined) -> rotation in halves -> attention``, as it is
captured from a transformer block. Anything else is refused with a reason: to leave out a step of it would be wrong
numbers. The module does not know what an attention is replaced by.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from reelforge.export.passes.editing import permutation_of
from reelforge.export.portable import DOMAIN, KEY_LENGTHS_OP
from reelforge.export.portable_sparse import BLOCK_SPARSE_OP

BY_HEAD = [0, 2, 1, 3]
_THROUGH = ("Cast", "Reshape", "Identity")
_PROJECTIONS = ("MatMul", "Gemm")
_OF_ONE_NUMBER = ("Expand", "Reshape", "Cast", "Identity", "Slice", "Squeeze", "Unsqueeze")


class UnmatchedError(Exception):
    """The reason why an attention does not match."""


@dataclass(frozen=True)
class Stream:
    """Tokens that share their projections and norms: all, or those of the image, or of the text.

    Attributes:
        projected: [B, n, h, d], before the norm.
        norm: The norm's weight [d].
    """

    projected: ir.Value
    norm: ir.Value


@dataclass(frozen=True)
class AttentionParts:
    """One attention.

    Attributes:
        queries: One stream, or image and text.
        keys: Likewise.
        value: [B, S, h, d].
        eps: Of the norms.
        tables: Cosines and sines of all tokens, fp32 [S, d / 2].
        others: Inputs of the node behind q, k and v.
        result: The node whose output is the result by token, [B, S, h, d].
    """

    queries: tuple[Stream, ...]
    keys: tuple[Stream, ...]
    value: ir.Value
    eps: float
    tables: tuple[ir.Value, ir.Value]
    others: tuple[ir.Value, ...]
    result: ir.Node

    @property
    def heads(self) -> tuple[int, int]:
        """Number of heads and their channels."""
        sizes = [] if self.value.shape is None else list(self.value.shape)[2:]
        if len(sizes) != 2 or not all(isinstance(size, int) for size in sizes):
            raise UnmatchedError(f"the number of heads and channels of {self.value.name} is not fixed")
        return int(sizes[0]), int(sizes[1])  # type: ignore[arg-type]


def attention_candidates(graph: ir.Graph) -> dict[str, ir.Node]:
    """Return every attention node of a captured graph by the path of its block, ``double.0.attention``."""
    found: dict[str, ir.Node] = {}
    for node in graph:
        portable = node.domain == DOMAIN and node.op_type in (KEY_LENGTHS_OP, BLOCK_SPARSE_OP)
        if portable or (node.domain in ("", "ai.onnx") and node.op_type == "Attention"):
            path = str(node.name).rpartition(".")[0]
            found.setdefault(f"{path}.attention" if path else "attention", node)
    return found


def match_attention(node: ir.Node, trusted_tables: Collection[str] = ()) -> AttentionParts:
    """Return what ``node`` attends with.

    Args:
        node: One of :func:`attention_candidates`.
        trusted_tables: Inputs of the graph that are rotary tables of image and text, the text's rows the identity.

    Raises:
        UnmatchedError: With the reason.
    """
    _check_plain(node)
    query, key, value = (_input(node, index) for index in range(3))
    rotated = [rotation_of(_transposed(operand, name), name) for operand, name in ((query, "q"), (key, "k"))]
    (q, *q_tables), (k, *k_tables) = rotated
    if q_tables != k_tables:
        raise UnmatchedError("q and k are rotated by different tables")
    (queries, q_eps), (keys, k_eps) = _streams(q, "q"), _streams(k, "k")
    if q_eps != k_eps:
        raise UnmatchedError(f"the norms of q and k have different epsilons, {q_eps:g} and {k_eps:g}")
    if len(queries) != len(keys):
        raise UnmatchedError(f"q is joined of {len(queries)} streams and k of {len(keys)}")
    if len(queries) == 2:
        for a, b, name in zip(queries, keys, ("image", "text"), strict=True):
            if _source(a.projected) is not _source(b.projected):
                raise UnmatchedError(f"q and k of the {name} are not projected from the same tokens")
        for table, number in zip(q_tables, (1.0, 0.0), strict=True):
            _check_text_rows(table, number, trusted_tables)
    result = _only_use(node.outputs[0], "Transpose")
    if permutation_of(result) != BY_HEAD:
        raise UnmatchedError("its result is not put back in the order of tokens")
    others = tuple(operand for operand in node.inputs[3:] if operand is not None)
    return AttentionParts(queries, keys, _transposed(value, "v"), q_eps, (q_tables[0], q_tables[1]), others, result)


def _check_plain(node: ir.Node) -> None:
    """Refuse masks, causality and scales of other kinds."""
    if node.domain == DOMAIN:
        return
    if any(operand is not None for operand in node.inputs[3:]):
        raise UnmatchedError("it has a mask or a cache")
    for name in ("is_causal", "softcap"):
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.value != 0:
            raise UnmatchedError(f"it has {name}={attribute.value}")
    scale, shape = node.attributes.get("scale"), node.outputs[0].shape
    if scale is not None:
        channels = None if shape is None else shape[-1]
        if not isinstance(channels, int) or not math.isclose(scale.as_float(), channels**-0.5, rel_tol=1e-6):
            raise UnmatchedError(f"its scale is {scale.as_float():g}, not one over the root of the channels")


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise UnmatchedError(f"input {index} of {node.op_type} is missing")
    return value


def _made_by(value: ir.Value, operators: Sequence[str], what: str) -> ir.Node:
    node = value.producer()
    if node is None or node.op_type not in operators or node.domain not in ("", "ai.onnx"):
        made = "an input" if node is None else node.op_type
        raise UnmatchedError(f"{what} is made by {made}, not by {' or '.join(operators)}")
    return node


def _transposed(value: ir.Value, name: str) -> ir.Value:
    """Return [B, S, h, d] behind [B, h, S, d]."""
    node = _made_by(value, ["Transpose"], f"{name} by head")
    if permutation_of(node) != BY_HEAD:
        raise UnmatchedError(f"{name} is transposed from another order than batch, tokens, heads, channels")
    return _input(node, 0)


def _without_cast(value: ir.Value) -> ir.Value:
    node = value.producer()
    return _without_cast(_input(node, 0)) if node is not None and node.op_type == "Cast" else value


def rotation_of(value: ir.Value, name: str) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return what is rotated, and the tables: ``(a, b) -> (a cos - b sin, b cos + a sin)``."""
    what = f"{name} before attention"
    joined = _made_by(_without_cast(value), ["Concat"], what)
    if len(joined.inputs) != 2 or joined.attributes["axis"].as_int() not in (-1, 3):
        raise UnmatchedError(f"{what} is not joined of two halves of its channels")
    minus = _made_by(_input(joined, 0), ["Sub"], f"the first half of {what}")
    plus = _made_by(_input(joined, 1), ["Add"], f"the second half of {what}")
    products = [_made_by(_input(node, index), ["Mul"], f"half of {what}") for node in (minus, plus) for index in (0, 1)]
    operands = [(_input(product, 0), _input(product, 1)) for product in products]
    (a, cos), (b, sin), (b_again, cos_again), (a_again, sin_again) = operands
    if (a, b, cos, sin) != (a_again, b_again, cos_again, sin_again):
        raise UnmatchedError(f"{what} is not a rotation of its halves")
    split = _made_by(a, ["Split"], f"the first half of {name}")
    if b.producer() is not split or [a, b] != list(split.outputs):
        raise UnmatchedError(f"the halves of {name} are not the two of one split")
    if split.attributes["axis"].as_int() not in (-1, 3):
        raise UnmatchedError(f"{name} is split along another axis than its channels")
    return _input(split, 0), _table(cos, name), _table(sin, name)


def _table(broadcast: ir.Value, name: str) -> ir.Value:
    """Return the table [S, d / 2] that is broadcast over heads as [S, 1, d / 2]."""
    node = _made_by(broadcast, ["Unsqueeze"], f"a table that rotates {name}")
    table, axes = _input(node, 0), ir.convenience.get_const_tensor(_input(node, 1))
    per_token = axes is not None and axes.numpy().reshape(-1).tolist() == [1]
    if not per_token or (table.shape is not None and len(table.shape) != 2):
        raise UnmatchedError(f"a table that rotates {name} is not one of tokens, the same for all heads")
    return table


def _streams(value: ir.Value, name: str) -> tuple[tuple[Stream, ...], float]:
    """Return the normalised streams that ``value`` is joined of, and their norms' epsilon."""
    node = value.producer()
    pieces = [value]
    if node is not None and node.op_type == "Concat":
        if node.attributes["axis"].as_int() != 1 or len(node.inputs) != 2:
            raise UnmatchedError(f"{name} is not joined of image and text tokens")
        pieces = [_input(node, 0), _input(node, 1)]
    streams, eps = [], set()
    for piece in pieces:
        norm = _made_by(piece, ["RMSNormalization"], f"{name} before its rotation")
        if norm.attributes["axis"].as_int() not in (-1, 3):
            raise UnmatchedError(f"{name} is not normalised over the channels of a head")
        eps.add(norm.attributes["epsilon"].as_float())
        streams.append(Stream(_without_cast(_input(norm, 0)), _input(norm, 1)))
    if len(eps) > 1:
        raise UnmatchedError(f"the norms of {name} have different epsilons")
    return tuple(streams), eps.pop()


def _source(value: ir.Value) -> ir.Value:
    """Return the tokens that ``value`` is projected from."""
    node = value.producer()
    while node is not None and node.op_type in (*_THROUGH, "Add"):
        value = _input(node, 0)
        node = value.producer()
    if node is None or node.op_type not in _PROJECTIONS:
        raise UnmatchedError(f"{value.name} is not projected from tokens")
    return _input(node, 0)


def _only_use(value: ir.Value, operator: str) -> ir.Node:
    uses = [use.node for use in value.uses()]
    if len(uses) != 1 or uses[0].op_type != operator:
        raise UnmatchedError(
            f"its result goes to {', '.join(use.op_type for use in uses) or 'nothing'}, not to {operator}"
        )
    return uses[0]


def _check_text_rows(table: ir.Value, number: float, trusted: Collection[str]) -> None:
    """Refuse a table that would rotate text: its last rows are to be ``number`` throughout."""
    if table.is_graph_input() and table.name in trusted:
        return
    joined = _made_by(table, ["Concat"], "a rotary table of image and text")
    found = _one_number(_input(joined, len(joined.inputs) - 1)) if len(joined.inputs) == 2 else None
    if found != number or joined.attributes["axis"].as_int() != 0:
        raise UnmatchedError(f"the rows of {table.name} that belong to text are not {number:g} throughout")


def _one_number(value: ir.Value) -> float | None:
    """Return the number that all elements of ``value`` are, if that can be seen."""
    node = value.producer()
    if node is not None and node.op_type in _OF_ONE_NUMBER:
        return _one_number(_input(node, 0))
    stored = node.attributes.get("value") if node is not None and node.op_type == "Constant" else None
    tensor = stored.as_tensor() if stored is not None else value.const_value if value.is_initializer() else None
    if tensor is None:
        return None
    numbers = np.unique(tensor.numpy())
    return float(numbers[0]) if len(numbers) == 1 else None
