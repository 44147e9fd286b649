"""LowerAttentionPass: a block's attention as a chain of plugins, for classic TensorRT.

``RMSNorm(q), RMSNorm(k) -> rotation -> attention`` becomes ``key_statistics, rotary_qk_norm_quantise, value_statistics,
value_quantise`` and an attention in 8 bits (``plugins.onnx_nodes``), on q, k and v as they are projected. A key length
per video, or lists of key blocks, go to the plugin as they are. A graph that computes in fp32 (one that is executed
to measure a build) has casts to and from the 16 bits that plugins work in. An attention that the pass is told to lower
and cannot is an error with the reason. ``AddPluginFunctionsPass`` adds what lets ONNX Runtime execute the nodes. The
passes do not know architectures: a row of ``plugins.attention_choice`` says which plugins.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from reelforge.export.passes.attention_pattern import (
    AttentionParts,
    Stream,
    UnmatchedError,
    attention_candidates,
    match_attention,
)
from reelforge.export.passes.editing import GraphEditor, replace_output
from reelforge.export.portable import DOMAIN, KEY_LENGTHS_OP
from reelforge.export.portable_sparse import BLOCK_SPARSE_OP
from reelforge.plugins.attention_choice import AttentionPlugins
from reelforge.plugins.onnx_functions import add_functions
from reelforge.plugins.onnx_nodes import ONNX_TYPES, AttentionChoice, attention_chain
from reelforge.plugins.schema import ACTIVATIONS, HEAD_DIMS, NAMESPACE, PAD, PLUGINS, DType
from reelforge.runtime.errors import BuildError

_FLOAT, _INT32 = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.INT32)
_BY_TYPE: Mapping[ir.DataType, DType] = {ir.DataType[ONNX_TYPES[dtype]]: dtype for dtype in ACTIVATIONS}


class LowerAttentionPass(InPlacePass):
    """Replace attentions by plugins.

    Args:
        attentions: Names of those to replace, ``double.0.attention``; every one must match.
        plugins: Which plugins.
        trusted_tables: Inputs of the graph that are rotary tables of image and text, as the part of a cut stage makes
            them in which they are not an input.
        activation: What plugins compute in where the graph has fp32.
    """

    def __init__(
        self,
        attentions: Collection[str],
        plugins: AttentionPlugins,
        trusted_tables: Collection[str] = (),
        activation: DType = DType.BFLOAT16,
    ) -> None:
        super().__init__()
        self.attentions = tuple(attentions)
        self.plugins = plugins
        self.trusted_tables = trusted_tables
        self.activation = activation

    def call(self, model: ir.Model) -> PassResult:
        """Replace each attention.

        Raises:
            BuildError: For one that is not there or does not match.
        """
        found = attention_candidates(model.graph)
        for name in self.attentions:
            try:
                if name not in found:
                    raise UnmatchedError("the graph has no such attention")
                parts = match_attention(found[name], self.trusted_tables)
                self._check(found[name], parts)
            except UnmatchedError as reason:
                raise BuildError(
                    f"the attention {name} of {model.graph.name!r} cannot be computed by a plugin.",
                    received=str(reason),
                    expected="projected q and k, a norm per head, rotation in halves, and attention to all keys, "
                    "to the first so many, or to listed blocks",
                    fix="use a target rtx:..., or --attention fp8 for the compiler's own attention",
                ) from reason
            self._replace(model.graph, found[name], parts, name)
        return PassResult(model, modified=bool(self.attentions))

    def ensures(self, model: ir.Model) -> None:
        """No attention that was to be replaced is left."""
        left = set(attention_candidates(model.graph)) & set(self.attentions)
        if left:
            raise PostconditionError(f"{', '.join(sorted(left))} is still in the graph")

    def _check(self, node: ir.Node, parts: AttentionParts) -> None:
        """Refuse what no kernel is compiled for."""
        _, channels = parts.heads
        if channels not in HEAD_DIMS:
            raise UnmatchedError(
                f"heads of {channels} channels; there are kernels for {' and '.join(map(str, HEAD_DIMS))}"
            )
        if parts.value.dtype != ir.DataType.FLOAT and parts.value.dtype not in _BY_TYPE:
            raise UnmatchedError(f"values of type {parts.value.dtype}")
        if (node.domain, node.op_type) == (DOMAIN, BLOCK_SPARSE_OP):
            blocks = tuple(node.attributes[name].as_int() for name in ("query_block", "key_block"))
            if blocks[0] != PAD or blocks[1] not in self.plugins.key_groups:
                raise UnmatchedError(
                    f"blocks of {blocks[0]} queries and {blocks[1]} keys; kernels have {PAD} and "
                    f"{' or '.join(map(str, self.plugins.key_groups))}"
                )

    def _replace(self, graph: ir.Graph, node: ir.Node, parts: AttentionParts, name: str) -> None:
        editor = GraphEditor(graph, node, name)
        activation = self.activation if parts.value.dtype is None else _BY_TYPE.get(parts.value.dtype, self.activation)
        kind = ir.TensorType(ir.DataType[ONNX_TYPES[activation]])
        sparse = node.op_type == BLOCK_SPARSE_OP
        cos, sin = self._tables(editor, parts)
        inputs = {
            "q": editor.cast(_joined(editor, parts.queries), kind),
            "k": editor.cast(_joined(editor, parts.keys), kind),
            "v": editor.cast(parts.value, kind),
            "query_norm": _norms(editor, parts.queries),
            "key_norm": _norms(editor, parts.keys),
            "rope_cos": cos,
            "rope_sin": sin,
        }
        if sparse:
            inputs |= dict(zip(("block_index", "block_start", "block_keys"), parts.others, strict=True))
        else:
            inputs["key_lengths"] = _key_lengths(editor, node, parts)
        plugin = self.plugins.sparse if sparse else self.plugins.dense
        if "value_scale" in _not_computed(plugin):
            inputs["value_scale"] = _unread_scales(editor, parts)
        key_group = node.attributes["key_block"].as_int() if sparse else self.plugins.key_group
        nodes, out = attention_chain(AttentionChoice(plugin, activation, key_group, parts.eps), inputs, name)
        for made in nodes:
            graph.insert_before(node, made)
        out.shape = parts.value.shape
        replace_output(graph, parts.result, editor.cast(out, parts.value.type))
        graph.remove(node, safe=True)

    def _tables(self, editor: GraphEditor, parts: AttentionParts) -> tuple[ir.Value, ir.Value]:
        """Return the tables' rows that the plugin rotates by.

        Where image and text have norms of their own, the plugin tells them apart by the tables' length: it gets the
        image's rows, and the others are the identity. Where they share norms, all tokens may be rotated.
        """
        if len(parts.queries) == 1:
            return parts.tables
        image = editor.emit("Shape", [parts.queries[0].projected], {"start": 1, "end": 2})
        zero = editor.constant([0])
        cos, sin = (editor.emit("Slice", [table, zero, image, zero], kind=_FLOAT) for table in parts.tables)
        for rows, table in ((cos, parts.tables[0]), (sin, parts.tables[1])):
            rows.shape = ir.Shape([None, None if table.shape is None else table.shape[1]])
        return cos, sin


class AddPluginFunctionsPass(InPlacePass):
    """Give a graph the ONNX functions of the plugins that it names; it comes last."""

    def call(self, model: ir.Model) -> PassResult:
        """Add the functions."""
        before = len(model.functions)
        add_functions(model)
        return PassResult(model, modified=len(model.functions) != before)

    def ensures(self, model: ir.Model) -> None:
        """Every node of the plugins' namespace has its function."""
        for node in model.graph:
            if node.domain == NAMESPACE and node.op_identifier() not in model.functions:
                raise PostconditionError(f"{node.name} has no function")


def _joined(editor: GraphEditor, streams: tuple[Stream, ...]) -> ir.Value:
    """Return the projected tokens of all streams, [B, S, h, d]."""
    if len(streams) == 1:
        return streams[0].projected
    first = streams[0].projected
    sizes = None if first.shape is None else [size if isinstance(size, int) else None for size in first.shape]
    shape = None if sizes is None else [sizes[0], None, *sizes[2:]]
    return editor.emit("Concat", [stream.projected for stream in streams], {"axis": 1}, kind=first.type, shape=shape)


def _norms(editor: GraphEditor, streams: tuple[Stream, ...]) -> ir.Value:
    """Return the norms' weights of image and text, fp32 [2, d]."""
    zero = editor.constant([0])
    rows = [editor.emit("Unsqueeze", [editor.cast(stream.norm, _FLOAT), zero], kind=_FLOAT) for stream in streams]
    return editor.emit("Concat", [rows[0], rows[-1]], {"axis": 0}, kind=_FLOAT)


def _key_lengths(editor: GraphEditor, node: ir.Node, parts: AttentionParts) -> ir.Value:
    """Return how many keys each video sees, int32 [B]."""
    if (node.domain, node.op_type) == (DOMAIN, KEY_LENGTHS_OP):
        return editor.cast(parts.others[0], _INT32)
    batch, tokens = (editor.emit("Shape", [parts.value], {"start": axis, "end": axis + 1}) for axis in (0, 1))
    every = editor.emit("Expand", [tokens, batch], kind=ir.TensorType(ir.DataType.INT64), shape=[None])
    return editor.cast(every, _INT32)


def _not_computed(plugin: str) -> set[str]:
    """Return inputs of an attention that no plugin of its chain makes."""
    return {"value_scale"} if PLUGINS[plugin].inputs[4].dtype is None else set()


def _unread_scales(editor: GraphEditor, parts: AttentionParts) -> ir.Value:
    """Return ones of the shape of values' scales, [B, h, d]: 16-bit values have none, the plugins' signature does."""
    batch = editor.emit("Shape", [parts.value], {"start": 0, "end": 1})
    shape = editor.emit("Concat", [batch, editor.constant(list(parts.heads))], {"axis": 0})
    one = editor.constant([1.0], ir.DataType.FLOAT, scalar=True)
    return editor.emit("Expand", [one, shape], kind=_FLOAT)
