"""One schema per plugin: names, types and shapes of its tensors, its attributes and the numbers its kernel takes.

Everything else that must agree with it is derived from it or checked against it: the Triton kernel's parameters, the
NumPy reference's, the TensorRT registration and the ONNX node. The module knows no kernel, no GPU and no TensorRT.

Symbols of shapes: ``batch``, ``tokens`` (image then text), ``heads``, ``head_dim``, ``image_tokens``, and ``entries``
of block lists. Kernel parameters come in TensorRT's order: inputs, extras, outputs; then the compile-time constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any

NAMESPACE = "reelforge"
"""TensorRT's plugin namespace and the domain of the ONNX nodes."""

PAD = 128
"""Keys, values and scales are padded to a multiple of so many tokens."""

QUERY_GROUP = 32
"""Queries that share a scale: the rows that one warp owns."""

CHUNK = 2048
"""Tokens per partial statistic."""

HEAD_DIMS = (64, 128)
"""Head dimensions that kernels are written for."""


class DType(Enum):
    """Element types, each with its name in Triton's signatures, in NumPy (with ``ml_dtypes``) and in TensorRT."""

    FLOAT32 = ("fp32", "float32", "FLOAT")
    FLOAT16 = ("fp16", "float16", "HALF")
    BFLOAT16 = ("bf16", "bfloat16", "BF16")
    INT8 = ("i8", "int8", "INT8")
    INT32 = ("i32", "int32", "INT32")
    FP8_E4M3 = ("fp8e4nv", "float8_e4m3fn", "FP8")

    @property
    def triton_name(self) -> str:
        """Name in a Triton signature."""
        return str(self.value[0])

    @property
    def numpy_name(self) -> str:
        """Name of the NumPy or ``ml_dtypes`` type."""
        return str(self.value[1])

    @property
    def tensorrt_name(self) -> str:
        """Name of the member of ``tensorrt.DataType``."""
        return str(self.value[2])

    @property
    def size(self) -> int:
        """Bytes per element."""
        return {"float32": 4, "int32": 4, "float16": 2, "bfloat16": 2}.get(self.numpy_name, 1)


ACTIVATIONS = (DType.FLOAT16, DType.BFLOAT16)
"""Types that a plugin's 16-bit tensors may have, all of them the same one."""


@dataclass(frozen=True)
class Extent:
    """One dimension: ``ceil(symbol / block) * block / unit``, plus one if ``closed``.

    Attributes:
        symbol: A symbol of shapes.
        block: A number, or the name of a compile-time constant: the symbol is rounded up to a multiple of it.
        unit: Likewise: divides the rounded symbol without a remainder.
        closed: Whether there is one element more, as in a list of starts and ends.
    """

    symbol: str
    block: int | str = 1
    unit: int | str = 1
    closed: bool = False

    def of(self, sizes: Mapping[str, int], constants: Mapping[str, int | float]) -> int:
        """Return the number for known symbols and constants."""
        block, unit = (int(constants[x]) if isinstance(x, str) else x for x in (self.block, self.unit))
        return -(-sizes[self.symbol] // block) * block // unit + self.closed

    def symbolic(
        self, sizes: Mapping[str, Any], constants: Mapping[str, int | float], ceil_div: Callable[[Any, int], Any]
    ) -> Any:
        """Return the same as an expression of a library, whose values have ``*`` and ``+`` and a ceiling division."""
        block, unit = (int(constants[x]) if isinstance(x, str) else x for x in (self.block, self.unit))
        value = sizes[self.symbol]
        if block != 1:
            value = ceil_div(value, block)
        if unit != 1 and block % unit:
            raise ValueError(f"blocks of {block} {self.symbol} are no multiple of {unit}")
        if block != unit:
            value = value * (block // unit)
        return value + 1 if self.closed else value


@dataclass(frozen=True)
class TensorSchema:
    """One input or output.

    Attributes:
        name: The kernel's parameter.
        dtype: Element type; None is the plugin's 16-bit activation type.
        shape: Its dimensions, row-major.
    """

    name: str
    dtype: DType | None
    shape: tuple[Extent, ...]


@dataclass(frozen=True)
class ExtraSchema:
    """An int32 kernel parameter that is the size of some input's dimension.

    Attributes:
        name: The kernel's parameter, which is also the symbol it stands for.
        tensor: The input that shows it.
        axis: In which dimension.
    """

    name: str
    tensor: str
    axis: int


@dataclass(frozen=True)
class AttributeSchema:
    """A number that is fixed when an engine is built.

    Attributes:
        name: In ONNX and TensorRT.
        constant: The kernel's compile-time constant.
        default: Its value if none is given; its type is the attribute's.
        choices: Allowed values; empty if any positive number is.
    """

    name: str
    constant: str
    default: int | float
    choices: tuple[int | float, ...] = ()


@dataclass(frozen=True)
class PluginSchema:
    """One plugin, which is one kernel.

    Attributes:
        name: In TensorRT and ONNX, and of the reference function.
        kernel: Module below ``reelforge.plugins.kernels`` that holds ``<function>``, and its reference module with
            ``_reference`` behind its name.
        function: The kernel.
        inputs: In order.
        extras: Sizes passed between inputs and outputs.
        outputs: In order.
        attributes: In order.
        constants: Compile-time constants that no attribute or tactic decides.
        grid: Programs in x, y and z.
    """

    name: str
    kernel: str
    function: str
    inputs: tuple[TensorSchema, ...]
    extras: tuple[ExtraSchema, ...]
    outputs: tuple[TensorSchema, ...]
    attributes: tuple[AttributeSchema, ...]
    constants: Mapping[str, int | float]
    grid: tuple[Extent, Extent, Extent]

    @property
    def types_its_output(self) -> bool:
        """Whether an output has the 16-bit type and no input shows which that is."""
        return any(tensor.dtype is None for tensor in self.outputs) and all(
            tensor.dtype is not None for tensor in self.inputs
        )

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the kernel's run-time parameters in order."""
        inputs, outputs = (tuple(tensor.name for tensor in group) for group in (self.inputs, self.outputs))
        return (*inputs, *(extra.name for extra in self.extras), *outputs)

    def signature(self, activation: DType) -> dict[str, str]:
        """Return Triton's type of every run-time parameter; ``activation`` is one of ACTIVATIONS."""
        types = {tensor.name: f"*{(tensor.dtype or activation).triton_name}" for tensor in self.inputs}
        types |= {extra.name: "i32" for extra in self.extras}
        return types | {tensor.name: f"*{(tensor.dtype or activation).triton_name}" for tensor in self.outputs}

    def sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Return the symbols that input shapes show.

        Raises:
            ValueError: If two inputs disagree or a number of dimensions is wrong.
        """
        sizes: dict[str, int] = {}
        for tensor in self.inputs:
            shape = shapes[tensor.name]
            if len(shape) != len(tensor.shape):
                raise ValueError(f"{self.name}: {tensor.name} has shape {list(shape)}, expected {len(tensor.shape)}-D")
            for size, extent in zip(shape, tensor.shape, strict=True):
                if extent == Extent(extent.symbol) and sizes.setdefault(extent.symbol, size) != size:
                    raise ValueError(f"{self.name}: {extent.symbol} is {size} in {tensor.name}, elsewhere not")
        return sizes

    def check_inputs(self, shapes: Mapping[str, tuple[int, ...]], constants: Mapping[str, int | float]) -> None:
        """Check that every input has the shape that the symbols ask for.

        Raises:
            ValueError: If one has not; the message names it.
        """
        sizes = self.sizes(shapes)
        for tensor in self.inputs:
            expected = tuple(extent.of(sizes, constants) for extent in tensor.shape)
            if shapes[tensor.name] != expected:
                received = list(shapes[tensor.name])
                raise ValueError(f"{self.name}: {tensor.name} has shape {received}, expected {list(expected)}")

    def output_shapes(
        self, sizes: Mapping[str, int], constants: Mapping[str, int | float]
    ) -> dict[str, tuple[int, ...]]:
        """Return the outputs' shapes."""
        return {tensor.name: tuple(x.of(sizes, constants) for x in tensor.shape) for tensor in self.outputs}


def _size(*symbols: str) -> tuple[Extent, ...]:
    return tuple(Extent(symbol) for symbol in symbols)


_HALF = Extent("head_dim", 1, 2)
_PADDED = Extent("tokens", PAD)
_QUERY_SCALES = Extent("tokens", PAD, "QUERY_GROUP")
_KEY_SCALES = Extent("tokens", PAD, "KEY_GROUP")
_CHUNKS = Extent("tokens", "CHUNK", "CHUNK")
_BY_TOKEN = _size("batch", "tokens", "heads", "head_dim")
_BY_HEAD = _size("batch", "heads", "tokens", "head_dim")

_ROPE = (
    TensorSchema("rope_cos", DType.FLOAT32, (Extent("image_tokens"), _HALF)),
    TensorSchema("rope_sin", DType.FLOAT32, (Extent("image_tokens"), _HALF)),
)
_STATISTICS_GRID = (Extent("heads"), _CHUNKS, Extent("batch"))
_QUANTISE_GRID = (Extent("heads"), Extent("tokens", PAD, PAD), Extent("batch"))
_ATTENTION_GRID = (Extent("tokens", "BLOCK_M", "BLOCK_M"), Extent("heads"), Extent("batch"))
_EPS = AttributeSchema("eps", "EPS", 1e-6)
_KEY_GROUP = AttributeSchema("key_group", "KEY_GROUP", 64, (64, 128))
_ROPE_EXTRAS = (ExtraSchema("tokens", "k", 1), ExtraSchema("image_tokens", "rope_cos", 0))

_KEY_SUMS = TensorSchema("key_sums", DType.FLOAT32, (*_size("batch", "heads"), _CHUNKS, Extent("head_dim")))
_VALUE_MAX = TensorSchema("value_max", DType.FLOAT32, (*_size("batch", "heads"), _CHUNKS, Extent("head_dim")))
_QUERY = (
    TensorSchema("query", DType.INT8, _BY_HEAD),
    TensorSchema("query_scale", DType.FLOAT32, (*_size("batch", "heads"), _QUERY_SCALES)),
)
_KEY = (
    TensorSchema("key", DType.INT8, (*_size("batch", "heads"), _PADDED, Extent("head_dim"))),
    TensorSchema("key_scale", DType.FLOAT32, (*_size("batch", "heads"), _KEY_SCALES)),
)
_VALUE = (
    TensorSchema("value", DType.FP8_E4M3, (*_size("batch", "heads", "head_dim"), _PADDED)),
    TensorSchema("value_scale", DType.FLOAT32, _size("batch", "heads", "head_dim")),
)
_VALUE_16BIT = (TensorSchema("value", None, _BY_TOKEN), _VALUE[1])
_BLOCK_LISTS = (
    TensorSchema("block_index", DType.INT32, _size("entries")),
    TensorSchema("block_start", DType.INT32, (Extent("heads"), Extent("tokens", PAD, PAD, closed=True))),
    TensorSchema("block_keys", DType.INT32, (Extent("batch"), _KEY_SCALES)),
)
PV_FP8, PV_FP8_FP16_ACCUMULATOR, PV_16BIT = 0, 1, 2
"""How probabilities and values are multiplied; the same numbers as in ``kernels.online_softmax``."""


def _attention(name: str, pv: int, sparse: bool) -> PluginSchema:
    values = _VALUE_16BIT if pv == PV_16BIT else _VALUE
    lengths = _BLOCK_LISTS if sparse else (TensorSchema("key_lengths", DType.INT32, _size("batch")),)
    kernel = "block_sparse_attention" if sparse else "int8_attention"
    key_group = _KEY_GROUP if pv == PV_FP8 else AttributeSchema("key_group", "KEY_GROUP", 64, (64,))
    return PluginSchema(
        name,
        kernel,
        f"{kernel}_kernel",
        (*_QUERY, *_KEY, *values, *lengths),
        (ExtraSchema("tokens", "query", 2),),
        (TensorSchema("out", None, _BY_TOKEN),),
        (key_group,),
        {"QUERY_GROUP": QUERY_GROUP, "PV": pv},
        _ATTENTION_GRID,
    )


_SCHEMAS = (
    PluginSchema(
        "key_statistics",
        "rotary_quantise",
        "key_statistics_kernel",
        (
            TensorSchema("k", None, _BY_TOKEN),
            TensorSchema("key_norm", DType.FLOAT32, (Extent("norms"), Extent("head_dim"))),
            *_ROPE,
        ),
        _ROPE_EXTRAS,
        (_KEY_SUMS,),
        (_EPS,),
        {"CHUNK": CHUNK},
        _STATISTICS_GRID,
    ),
    PluginSchema(
        "rotary_qk_norm_quantise",
        "rotary_quantise",
        "rotary_qk_norm_quantise_kernel",
        (
            TensorSchema("q", None, _BY_TOKEN),
            TensorSchema("k", None, _BY_TOKEN),
            TensorSchema("query_norm", DType.FLOAT32, (Extent("norms"), Extent("head_dim"))),
            TensorSchema("key_norm", DType.FLOAT32, (Extent("norms"), Extent("head_dim"))),
            *_ROPE,
            _KEY_SUMS,
        ),
        _ROPE_EXTRAS,
        (*_QUERY, *_KEY),
        (_EPS, _KEY_GROUP),
        {"CHUNK": CHUNK, "QUERY_GROUP": QUERY_GROUP},
        _QUANTISE_GRID,
    ),
    PluginSchema(
        "value_statistics",
        "value_quantise",
        "value_statistics_kernel",
        (TensorSchema("v", None, _BY_TOKEN),),
        (ExtraSchema("tokens", "v", 1),),
        (_VALUE_MAX,),
        (),
        {"CHUNK": CHUNK},
        _STATISTICS_GRID,
    ),
    PluginSchema(
        "value_quantise",
        "value_quantise",
        "value_quantise_kernel",
        (TensorSchema("v", None, _BY_TOKEN), _VALUE_MAX),
        (ExtraSchema("tokens", "v", 1),),
        _VALUE,
        (AttributeSchema("value_range", "RANGE", 448.0, (448.0, 2.25)),),
        {"CHUNK": CHUNK},
        _QUANTISE_GRID,
    ),
    _attention("int8_fp8_attention", PV_FP8, sparse=False),
    _attention("int8_fp8_attention_fp16_accumulator", PV_FP8_FP16_ACCUMULATOR, sparse=False),
    _attention("int8_fp16_attention", PV_16BIT, sparse=False),
    _attention("block_sparse_attention", PV_FP8, sparse=True),
    _attention("block_sparse_attention_fp16_accumulator", PV_FP8_FP16_ACCUMULATOR, sparse=True),
    _attention("block_sparse_fp16_attention", PV_16BIT, sparse=True),
)

PLUGINS: Mapping[str, PluginSchema] = MappingProxyType({schema.name: schema for schema in _SCHEMAS})
"""All plugins by name; ``norms`` in shapes is 2: one row for image and one for text tokens."""
