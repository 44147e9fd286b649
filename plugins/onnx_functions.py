"""What the plugins compute, as ONNX functions: with them ONNX Runtime executes on a CPU the graph that TensorRT gets.

A function has a plugin's name, inputs, outputs and attributes (``plugins.schema``), so that a node of the plugin calls
it. Arithmetic is the kernels': fp32 inside, int8 codes rounded half to even, ``Cast`` to FLOAT8E4M3FN, K less its token
mean, scales per 32 queries and per key group. ``onnx_attention_functions`` holds the attentions. The 16-bit type of
an output cannot depend on an attribute in ONNX: functions are made for one, and a model has one. TensorRT gets a graph
without them (:func:`remove_functions`): its parser finds the plugins by the same names. The module does not know what
graphs are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from reelforge.plugins.onnx_attention_functions import attention_body
from reelforge.plugins.onnx_text import ONNX_CODES, padded, regrouped, with_constants
from reelforge.plugins.schema import ACTIVATIONS, CHUNK, NAMESPACE, PAD, PLUGINS, QUERY_GROUP, DType

if TYPE_CHECKING:
    import onnx_ir as ir

_FLOAT, _INT8, _FLOAT8 = (ONNX_CODES[dtype] for dtype in (DType.FLOAT32, DType.INT8, DType.FP8_E4M3))


def plugin_functions(names: Iterable[str], activation: DType, opset: int) -> dict[str, ir.Function]:
    """Return the functions of plugins by name.

    Args:
        names: Keys of PLUGINS.
        activation: The type of 16-bit outputs.
        opset: Version of the standard operators in the model that gets them.

    Raises:
        ValueError: If ``activation`` is no 16-bit type.
    """
    import onnx
    import onnx_ir as ir

    if activation not in ACTIVATIONS:
        raise ValueError(f"plugins compute in 16 bits, not in {activation.name}")
    return {
        name: ir.serde.deserialize_function(onnx.parser.parse_function(function_text(name, activation, opset)))
        for name in sorted(set(names))
    }


def add_functions(model: ir.Model) -> None:
    """Give ``model`` the functions of the plugins that its nodes name.

    Raises:
        ValueError: If a node names no plugin, or nodes have outputs of both 16-bit types.
    """
    import onnx_ir as ir

    by_name = {ir.DataType[dtype.name]: dtype for dtype in ACTIVATIONS}
    nodes = plugin_nodes(model.graph)
    unknown = sorted({node.op_type for node in nodes} - set(PLUGINS))
    if unknown:
        raise ValueError(f"there are no plugins {', '.join(unknown)}")
    types = {by_name[output.dtype] for node in nodes for output in node.outputs if output.dtype in by_name} or {
        DType.BFLOAT16
    }
    if len(types) > 1:
        raise ValueError("plugins of one graph have outputs of both 16-bit types")
    opset = model.graph.opset_imports[""]
    for function in plugin_functions({node.op_type for node in nodes}, types.pop(), opset).values():
        model.functions[function.identifier()] = function
    if nodes:
        model.graph.opset_imports[NAMESPACE] = 1


def remove_functions(model: ir.Model) -> ir.Model:
    """Take the plugins' functions off ``model``, in place: what is left is for a parser that has the plugins."""
    for key in [key for key in model.functions if key[0] == NAMESPACE and key[1] in PLUGINS]:
        del model.functions[key]
    return model


def plugin_nodes(graph: ir.Graph) -> list[ir.Node]:
    """Return the nodes of ``graph`` that are of the plugins' namespace, in order."""
    return [node for node in graph if node.domain == NAMESPACE]


def function_text(name: str, activation: DType, opset: int) -> str:
    """Return one function in ONNX's text syntax."""
    schema = PLUGINS[name]
    attributes = [attribute.name for attribute in schema.attributes]
    attributes += ["output_type"] * schema.types_its_output
    body = _BODIES[name]() if name in _BODIES else attention_body(schema, activation)
    inputs, outputs = (", ".join(tensor.name for tensor in group) for group in (schema.inputs, schema.outputs))
    declared = f"<{', '.join(attributes)}>" if attributes else ""
    return (
        f'<domain: "{NAMESPACE}", opset_import: ["": {opset}]>\n'
        f"{name} {declared} ({inputs}) => ({outputs}) {{\n{with_constants(body)}\n}}"
    )


def _rotated(source: str, norm: str, prefix: str) -> str:
    """Lines that make ``{prefix}rows`` fp32 [B, H, L, D] of 16-bit ``source`` [B, L, H, D]: normalised, rotated."""
    return f"""
{prefix}wide = Cast <to = {_FLOAT}> ({source})
{prefix}squares = Mul ({prefix}wide, {prefix}wide)
{prefix}mean_square = ReduceMean <keepdims = 1> ({prefix}squares, i_m1)
{prefix}eps = Constant <value_float: float = @eps> ()
{prefix}shifted = Add ({prefix}mean_square, {prefix}eps)
{prefix}root = Sqrt ({prefix}shifted)
{prefix}normed = Div ({prefix}wide, {prefix}root)
{prefix}count = Shape <start = 0, end = 1> (rope_cos)
{prefix}image_norm = Slice ({norm}, i_0, i_1, i_0)
{prefix}text_norm = Slice ({norm}, i_1, i_2, i_0)
{prefix}image_part = Slice ({prefix}normed, i_0, {prefix}count, i_1)
{prefix}text_part = Slice ({prefix}normed, {prefix}count, i_max, i_1)
{prefix}image = Mul ({prefix}image_part, {prefix}image_norm)
{prefix}text = Mul ({prefix}text_part, {prefix}text_norm)
{prefix}first, {prefix}second = Split <axis = -1, num_outputs = 2> ({prefix}image)
{prefix}cos = Unsqueeze (rope_cos, i_1)
{prefix}sin = Unsqueeze (rope_sin, i_1)
{prefix}first_cos = Mul ({prefix}first, {prefix}cos)
{prefix}second_sin = Mul ({prefix}second, {prefix}sin)
{prefix}second_cos = Mul ({prefix}second, {prefix}cos)
{prefix}first_sin = Mul ({prefix}first, {prefix}sin)
{prefix}turned_first = Sub ({prefix}first_cos, {prefix}second_sin)
{prefix}turned_second = Add ({prefix}second_cos, {prefix}first_sin)
{prefix}turned = Concat <axis = -1> ({prefix}turned_first, {prefix}turned_second)
{prefix}joint = Concat <axis = 1> ({prefix}turned, {prefix}text)
{prefix}rows = Transpose <perm = [0, 2, 1, 3]> ({prefix}joint)"""


def _chunked(source: str) -> str:
    """Lines that make ``chunked`` [B, H, chunks, CHUNK, D] of ``source`` [B, H, L, D], with zeros behind the end."""
    return f"""
{padded(source, "whole", axis=2, rank=4, multiple=CHUNK)}
width = Shape <start = 3, end = 4> (whole)
chunk_shape = Concat <axis = 0> (i_0, i_0, i_m1, i_{CHUNK}, width)
chunked = Reshape (whole, chunk_shape)"""


def _quantised(source: str, group: str, codes: str, scale: str, prefix: str) -> str:
    """Lines that make int8 ``codes`` [B, H, P, D] and fp32 ``scale`` [B, H, P / group] of ``source`` [B, H, L, D]."""
    return f"""
{padded(source, f"{prefix}whole", axis=2, rank=4, multiple=PAD)}
{prefix}width = Shape <start = 3, end = 4> ({prefix}whole)
{prefix}group_shape = Concat <axis = 0> (i_0, i_0, i_m1, {group}, {prefix}width)
{prefix}groups = Reshape ({prefix}whole, {prefix}group_shape)
{prefix}magnitudes = Abs ({prefix}groups)
{prefix}largest = ReduceMax <keepdims = 1> ({prefix}magnitudes, i_3_4)
{prefix}safe = Max ({prefix}largest, f_tiny)
{prefix}factor = Div (f_127, {prefix}safe)
{prefix}scaled = Mul ({prefix}groups, {prefix}factor)
{prefix}rounded = Round ({prefix}scaled)
{prefix}code_shape = Shape ({prefix}whole)
{prefix}flat = Reshape ({prefix}rounded, {prefix}code_shape)
{codes} = Cast <to = {_INT8}> ({prefix}flat)
{prefix}group_largest = Squeeze ({prefix}largest, i_3_4)
{scale} = Div ({prefix}group_largest, f_127)"""


def _key_statistics() -> str:
    return f"""{_rotated("k", "key_norm", "k_")}
{_chunked("k_rows")}
key_sums = ReduceSum <keepdims = 0> (chunked, i_3)"""


def _rotary_qk_norm_quantise() -> str:
    return f"""{_rotated("q", "query_norm", "q_")}
{_quantised("q_rows", f"i_{QUERY_GROUP}", "query_codes", "query_scale", "query_")}
tokens = Shape <start = 2, end = 3> (q_rows)
query = Slice (query_codes, i_0, tokens, i_2)
{_rotated("k", "key_norm", "k_")}
token_count = Cast <to = {_FLOAT}> (tokens)
sums = ReduceSum <keepdims = 1> (key_sums, i_2)
mean = Div (sums, token_count)
centred = Sub (k_rows, mean)
key_group_number = Constant <value_int: int = @key_group> ()
key_group_1 = Unsqueeze (key_group_number, i_0)
{_quantised("centred", "key_group_1", "key", "key_scale", "key_")}"""


def _value_statistics() -> str:
    return f"""
wide = Cast <to = {_FLOAT}> (v)
rows = Transpose <perm = [0, 2, 1, 3]> (wide)
magnitudes = Abs (rows)
{_chunked("magnitudes")}
value_max = ReduceMax <keepdims = 0> (chunked, i_3)"""


def _value_quantise() -> str:
    return f"""
wide = Cast <to = {_FLOAT}> (v)
channels = Transpose <perm = [0, 2, 3, 1]> (wide)
largest = ReduceMax <keepdims = 0> (value_max, i_2)
range = Constant <value_float: float = @value_range> ()
safe = Max (largest, f_tiny)
factor = Div (range, safe)
factors = Unsqueeze (factor, i_m1)
scaled = Mul (channels, factors)
{padded("scaled", "whole", axis=3, rank=4, multiple=PAD)}
{regrouped("whole", "stored", (2, 2, 4, 2))}
value = Cast <to = {_FLOAT8}, saturate = 1> (stored)
value_scale = Div (largest, range)"""


_BODIES: Mapping[str, Callable[[], str]] = {
    "key_statistics": _key_statistics,
    "rotary_qk_norm_quantise": _rotary_qk_norm_quantise,
    "value_statistics": _value_statistics,
    "value_quantise": _value_quantise,
}
