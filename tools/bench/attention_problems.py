"""Small attention problems and what the kernels make of them, beside the float64 oracle; for tests and the benchmark.

Inputs are random with the properties that make 8-bit attention hard: keys and values with a mean, channels that are far
larger than others, slow rotation. Knows the plugins' names and order; not on what they run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from reelforge.plugins.kernels.int8_attention_reference import attention
from reelforge.plugins.kernels.rotary_quantise_reference import normalise_and_rotate
from reelforge.plugins.schema import PLUGINS, DType

Array = NDArray[Any]


class Runner(Protocol):
    """The interpreter or a GPU."""

    def run(
        self, plugin: str, inputs: Mapping[str, Array], constants: Mapping[str, int | float], activation: DType
    ) -> dict[str, Array]:
        """Return a plugin's outputs, see ``Interpreter.run``."""
        ...


EPS = 1e-6
PV_BITS = {"fp8": 448.0, "fp8_fp16_accumulator": 2.25, "fp16": None}
ATTENTION = {
    "fp8": "int8_fp8_attention",
    "fp8_fp16_accumulator": "int8_fp8_attention_fp16_accumulator",
    "fp16": "int8_fp16_attention",
}
SPARSE = {
    "fp8": "block_sparse_attention",
    "fp8_fp16_accumulator": "block_sparse_attention_fp16_accumulator",
    "fp16": "block_sparse_fp16_attention",
}


@dataclass
class Problem:
    """Inputs of a block's attention: projected q, k, v, norms and rotary tables.

    Attributes:
        image: Image tokens.
        text: Text tokens.
        head_dim: D.
        heads: H.
        batch: B.
        seed: Of all values.
        value_mean: Size of V's mean per channel, in standard deviations.
        key_mean: Likewise of K.
        outliers: Whether a few channels are thirty times as large.
        activation: The 16-bit type.
    """

    image: int
    text: int
    head_dim: int = 128
    heads: int = 2
    batch: int = 1
    seed: int = 0
    value_mean: float = 1.0
    key_mean: float = 2.0
    outliers: bool = False
    activation: DType = DType.BFLOAT16
    tensors: dict[str, Array] = field(init=False)

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        shape = (self.batch, self.tokens, self.heads, self.head_dim)
        dtype = np.dtype(ml_dtypes.bfloat16) if self.activation is DType.BFLOAT16 else np.dtype(np.float16)
        q, k, v = (random.normal(size=shape) for _ in range(3))
        k += self.key_mean * random.normal(size=(self.heads, self.head_dim))
        v += self.value_mean * random.normal(size=(self.heads, self.head_dim))
        if self.outliers:
            channels = random.choice(self.head_dim, 3, replace=False)
            for x in (q, k, v):
                x[..., channels] *= 30
        # Most channels turn slowly, as the model's do, so that a mean of k before rotation is one after it.
        speeds = 256.0 ** -np.linspace(0, 1, self.head_dim // 2)
        angles = random.uniform(0, 16, size=(self.image, 1)) * speeds
        norms = random.uniform(0.6, 1.4, size=(2, 2, self.head_dim)).astype(np.float32)
        self.tensors = {
            "q": q.astype(dtype),
            "k": k.astype(dtype),
            "v": v.astype(dtype),
            "query_norm": norms[0],
            "key_norm": norms[1],
            "rope_cos": np.cos(angles).astype(np.float32),
            "rope_sin": np.sin(angles).astype(np.float32),
            "key_lengths": np.full(self.batch, self.tokens, np.int32),
        }

    @property
    def tokens(self) -> int:
        """Length of the joint sequence."""
        return self.image + self.text

    def rotated(self) -> tuple[Array, Array]:
        """Return q and k as attention sees them, float64 [B, L, H, D]."""
        tables = self.tensors["rope_cos"], self.tensors["rope_sin"]
        return (
            normalise_and_rotate(self.tensors["q"], self.tensors["query_norm"], *tables, EPS),
            normalise_and_rotate(self.tensors["k"], self.tensors["key_norm"], *tables, EPS),
        )

    def exact(self, visible: Array | None = None) -> Array:
        """The oracle: float64 attention on what was never quantised; without ``visible``, over ``key_lengths`` keys."""
        if visible is None:
            counts = np.arange(self.tokens)[None, :] < self.tensors["key_lengths"][:, None]
            visible = counts[:, None, None, :]
        q, k = self.rotated()
        return attention(q, k, self.tensors["v"], visible)

    def run(self, runner: Runner, plugin: str, **constants: int | float) -> dict[str, Array]:
        """Run one plugin on what is there, keep and return its outputs."""
        inputs = {tensor.name: self.tensors[tensor.name] for tensor in PLUGINS[plugin].inputs}
        outputs = runner.run(plugin, inputs, {"HEAD_DIM": self.head_dim, **constants}, self.activation)
        self.tensors |= outputs
        return outputs

    def quantise(self, runner: Runner, pv: str = "fp8", key_group: int = 64) -> None:
        """Run everything before the attention."""
        self.run(runner, "key_statistics", EPS=EPS, ROWS=32)
        self.run(runner, "rotary_qk_norm_quantise", EPS=EPS, KEY_GROUP=key_group)
        value_range = PV_BITS[pv]
        if value_range is None:
            self.tensors["value"] = self.tensors["v"]
            self.tensors["value_scale"] = np.ones((self.batch, self.heads, self.head_dim), np.float32)
        else:
            self.run(runner, "value_statistics", ROWS=64)
            self.run(runner, "value_quantise", RANGE=value_range)

    def attend(self, runner: Runner, pv: str = "fp8", key_group: int = 64, sparse: bool = False) -> Array:
        """Quantise, attend, and return the output as float64."""
        self.quantise(runner, pv, key_group)
        plugin = (SPARSE if sparse else ATTENTION)[pv]
        outputs = self.run(runner, plugin, KEY_GROUP=key_group, BLOCK_M=64, BLOCK_N=key_group, STAGES=2)
        return outputs["out"].astype(np.float64)


def cosine(a: Array, b: Array) -> float:
    """Return the cosine of two arrays as vectors."""
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def relative_l1(a: Array, b: Array) -> float:
    """Return the sum of differences over the sum of ``b``'s magnitudes."""
    return float(np.abs(a - b).sum() / np.abs(b).sum())
