"""The attentions' ONNX functions, dense and block-sparse: the kernels' online softmax as a ``Scan`` over key blocks.

The kernels round P to e4m3 relative to the largest score *so far*, and so does this: blocks of ``key_group`` keys in
ascending order, with running maximum, sum and output in fp32, which is their arithmetic step by step. What differs:

- A kernel makes scores with one multiply-add in fp32 that starts from 1.5 * 2**23, here they are a product. Powers of
  two and sums are rounded as the processor's are. Either moves single elements of P to the next e4m3 number.
- The fp16 accumulator is rounded once per key block here, and after every 32 keys or fewer on a GPU.
- Block lists are taken as sets: an entry that is listed twice counts once, and the order is ascending.
- Scores of one key block exist at a time, [B, H, L, key_group] in fp32: no S x S matrix.

``tests/plugins/test_onnx_functions.py`` bounds this: relative L1 below 1e-4 beside the kernels in Triton's interpreter
(3e-5 as measured, where e4m3 itself costs 3e-3), and 6e-3 beside float64 references, whose P is not
rounded. Accumulators of tensor cores are shown by neither. The module does not know the plugins before the attention.
"""

from __future__ import annotations

from reelforge.plugins.onnx_text import INT64_CODE, ONNX_CODES, padded, regrouped
from reelforge.plugins.schema import (
    PAD,
    PV_16BIT,
    PV_FP8_FP16_ACCUMULATOR,
    QUERY_GROUP,
    DType,
    PluginSchema,
)

_FLOAT, _HALF, _FLOAT8 = (ONNX_CODES[dtype] for dtype in (DType.FLOAT32, DType.FLOAT16, DType.FP8_E4M3))


def attention_body(schema: PluginSchema, activation: DType) -> str:
    """Return the lines of one attention's function.

    Args:
        schema: Of the attention.
        activation: Type of its result, and of P and V where these have 16 bits.
    """
    pv = int(schema.constants["PV"])
    sparse = any(tensor.name == "block_index" for tensor in schema.inputs)
    sixteen = pv == PV_16BIT
    listed_type, listed = (", bool[] listed_now", ", listed") if sparse else ("", "")
    return f"""
key_group_number = Constant <value_int: int = @key_group> ()
group = Unsqueeze (key_group_number, i_0)
tokens = Shape <start = 2, end = 3> (query)
width = Shape <start = 3, end = 4> (query)
queries = Cast <to = {_FLOAT}> (query)
{_row_factors()}
{_key_blocks()}
{_values_16bit() if sixteen else _values_fp8()}
{_listed() if sparse else ""}
{_counted_of_blocks() if sparse else _counted_of_lengths()}
row_shape = Shape (row_factors)
sum_shape = Shape (queries)
largest_0 = Expand (f_hidden, row_shape)
total_0 = Expand (f_0, row_shape)
sums_0 = Expand (f_0, sum_shape)
largest, total, sums = Scan <num_scan_inputs = {5 if sparse else 4}, body = one_key_block (
  float[] largest_old, float[] total_old, float[] sums_old,
  float[] keys_now, float[] factors_now, float[] values_now, bool[] counted_now{listed_type}
) => (float[] largest_new, float[] total_new, float[] sums_new) {{
{_one_block(pv, sparse, ONNX_CODES[activation])}
}}> (largest_0, total_0, sums_0, key_blocks, key_factors, value_blocks, counted{listed})
some = Greater (total, f_0)
divisor = Where (some, total, f_1)
mean = Div (sums, divisor)
{"scaled = Identity (mean)" if sixteen else _scaled_values()}
by_token = Transpose <perm = [0, 2, 1, 3]> (scaled)
out = Cast <to = {ONNX_CODES[activation]}> (by_token)"""


def _one_block(pv: int, sparse: bool, activation: int) -> str:
    """Lines of one step: what a kernel does with one key block."""
    headroom = "f_0" if pv == PV_16BIT else "f_log2_448"
    kind = activation if pv == PV_16BIT else _FLOAT8
    seen = "seen = And (counted_now, listed_now)" if sparse else "seen = Identity (counted_now)"
    product = "block_sums = MatMul (rounded, values_now)"
    if pv == PV_FP8_FP16_ACCUMULATOR:
        product = f"""exact_sums = MatMul (rounded, values_now)
  half_sums = Cast <to = {_HALF}> (exact_sums)
  block_sums = Cast <to = {_FLOAT}> (half_sums)"""
    return f"""
  {seen}
  products = MatMul (queries, keys_now)
  factors_any = Mul (row_factors, factors_now)
  factors = Max (factors_any, f_tiny)
  scores = Mul (products, factors)
  shown = Where (seen, scores, f_hidden)
  block_largest = ReduceMax <keepdims = 1> (shown, i_m1)
  largest_new = Max (largest_old, block_largest)
  below = Sub (scores, largest_new)
  exponents = Add (below, {headroom})
  powers = Pow (f_2, exponents)
  probabilities = Where (seen, powers, f_0)
  change = Sub (largest_old, largest_new)
  decay = Pow (f_2, change)
  block_total = ReduceSum <keepdims = 1> (probabilities, i_m1)
  total_kept = Mul (total_old, decay)
  total_new = Add (total_kept, block_total)
  codes = Cast <to = {kind}> (probabilities)
  rounded = Cast <to = {_FLOAT}> (codes)
  {product}
  sums_kept = Mul (sums_old, decay)
  sums_new = Add (sums_kept, block_sums)"""


def _row_factors() -> str:
    """Lines that make ``row_factors`` [B, H, L, 1]: scales of queries, of the softmax, and of base 2."""
    return f"""
scale_column = Unsqueeze (query_scale, i_3)
scale_rows_shape = Concat <axis = 0> (i_1, i_1, i_1, i_{QUERY_GROUP})
scale_rows = Expand (scale_column, scale_rows_shape)
row_column_shape = Concat <axis = 0> (i_0, i_0, i_m1, i_1)
row_scales_padded = Reshape (scale_rows, row_column_shape)
row_scales = Slice (row_scales_padded, i_0, tokens, i_2)
width_number = Cast <to = {_FLOAT}> (width)
width_root = Sqrt (width_number)
softmax_scale = Div (f_log2_e, width_root)
row_factors = Mul (row_scales, softmax_scale)"""


def _key_blocks() -> str:
    """Lines that make ``key_blocks`` [blocks, B, H, D, group] and ``key_factors`` [blocks, B, H, 1, 1]."""
    return f"""
keys = Cast <to = {_FLOAT}> (key)
block_shape = Concat <axis = 0> (i_0, i_0, i_m1, group, width)
keys_by_block = Reshape (keys, block_shape)
key_blocks = Transpose <perm = [2, 0, 1, 4, 3]> (keys_by_block)
factors_by_block = Transpose <perm = [2, 0, 1]> (key_scale)
key_factors = Unsqueeze (factors_by_block, i_3_4)"""


def _values_fp8() -> str:
    """Lines that make ``value_blocks`` [blocks, B, H, group, D] of e4m3 values in stored order."""
    return f"""
value_numbers = Cast <to = {_FLOAT}> (value)
{regrouped("value_numbers", "ordered", (2, 4, 2, 2))}
value_shape = Concat <axis = 0> (i_0, i_0, i_0, i_m1, group)
values_by_block = Reshape (ordered, value_shape)
value_blocks = Transpose <perm = [3, 0, 1, 4, 2]> (values_by_block)"""


def _values_16bit() -> str:
    """The same of 16-bit values [B, L, H, D]."""
    return f"""
value_numbers = Cast <to = {_FLOAT}> (value)
value_rows = Transpose <perm = [0, 2, 1, 3]> (value_numbers)
{padded("value_rows", "value_padded", axis=2, rank=4, multiple=PAD)}
values_by_block = Reshape (value_padded, block_shape)
value_blocks = Transpose <perm = [2, 0, 1, 3, 4]> (values_by_block)"""


def _scaled_values() -> str:
    return """
scale_row = Unsqueeze (value_scale, i_2)
scaled = Mul (mean, scale_row)"""


def _counted_of_lengths() -> str:
    """Lines that make ``counted`` [blocks, B, 1, 1, group]: which keys are before the end."""
    return f"""
stored = Shape <start = 2, end = 3> (key)
stored_number = Squeeze (stored)
start_number = Squeeze (i_0)
step_number = Squeeze (i_1)
positions_flat = Range (start_number, stored_number, step_number)
positions_shape = Concat <axis = 0> (i_m1, i_1, group)
positions = Reshape (positions_flat, positions_shape)
lengths = Cast <to = {INT64_CODE}> (key_lengths)
lengths_column = Unsqueeze (lengths, i_0_2)
counted_flat = Less (positions, lengths_column)
counted = Unsqueeze (counted_flat, i_2_3)"""


def _counted_of_blocks() -> str:
    """Lines that make ``counted`` [blocks, B, 1, 1, group] of how many keys of each block count."""
    return f"""
group_scalar = Squeeze (group)
start_number = Squeeze (i_0)
step_number = Squeeze (i_1)
places = Range (start_number, group_scalar, step_number)
counts = Cast <to = {INT64_CODE}> (block_keys)
counts_by_block = Transpose <perm = [1, 0]> (counts)
counts_column = Unsqueeze (counts_by_block, i_2)
counted_flat = Less (places, counts_column)
counted = Unsqueeze (counted_flat, i_2_3)"""


def _listed() -> str:
    """Lines that make ``listed`` [blocks, H, L, 1]: whether a query's list has the key block.

    How often each block is among the first n entries of all lists is counted for every n; a list is the difference
    between its end and its start.
    """
    return f"""
block_count = Shape <start = 1, end = 2> (block_keys)
count_number = Squeeze (block_count)
first_number = Squeeze (i_0)
one_number = Squeeze (i_1)
block_numbers = Range (first_number, count_number, one_number)
entries = Cast <to = {INT64_CODE}> (block_index)
entry_column = Unsqueeze (entries, i_1)
is_block = Equal (entry_column, block_numbers)
is_block_number = Cast <to = {INT64_CODE}> (is_block)
no_entry = Pad (is_block_number, i_1_0_0_0)
seen_before = CumSum (no_entry, first_number)
bounds = Cast <to = {INT64_CODE}> (block_start)
starts = Slice (bounds, i_0, i_m1, i_1)
ends = Slice (bounds, i_1, i_max, i_1)
before_start = Gather <axis = 0> (seen_before, starts)
before_end = Gather <axis = 0> (seen_before, ends)
in_list = Greater (before_end, before_start)
by_key_block = Transpose <perm = [2, 0, 1]> (in_list)
list_column = Unsqueeze (by_key_block, i_3)
row_expansion = Concat <axis = 0> (i_1, i_1, i_1, i_{PAD})
list_rows = Expand (list_column, row_expansion)
list_row_shape = Concat <axis = 0> (i_0, i_0, i_m1, i_1)
listed_padded = Reshape (list_rows, list_row_shape)
listed = Slice (listed_padded, i_0, tokens, i_2)"""
