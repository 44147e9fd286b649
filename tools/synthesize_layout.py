"""Tables of what a HunyuanVideo checkpoint holds: every tensor's key and shape, per file format, from a ModelSpec.

A checkpoint is described by **pieces**: the smallest ranges of rows that both public formats keep contiguous. diffusers
names most pieces one by one; Tencent's files fuse some (``to_q``, ``to_k``, ``to_v`` become ``img_attn_qkv``) and swap
the halves of the final modulation. Content is drawn per piece, so both formats of one seed hold the same model.

Source: specification 6.1 and 7. The module needs neither torch nor numpy, and knows nothing of files, bytes or values
beyond the scale of each piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from reelforge.runtime.spec import (
    ClipSpec,
    DitSpec,
    GuidanceRounding,
    LlmSpec,
    ModelSpec,
    SamplerDefaults,
    VaeSpec,
    VaeTiling,
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Rows that stay together in every format; values lie in ``mean`` +- ``spread``."""

    name: str
    shape: Shape
    mean: float
    spread: float

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TensorLayout:
    """One tensor of a file: ``pieces`` one after the other along the first dimension."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def shape(self) -> Shape:
        """Shape of the whole tensor."""
        return (sum(piece.shape[0] for piece in self.pieces), *self.pieces[0].shape[1:])

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def piece(name: str, shape: Shape) -> Piece:
    """Return a piece whose scale keeps a network of such weights at unit scale.

    Matrices and convolutions get a standard deviation of ``fan_in ** -0.5`` (uniform, so ``spread = sqrt(3) * std``),
    embeddings of about one half, norm weights lie around one and biases around zero.
    """
    parameter = name.rpartition(".")[2].partition("#")[0]
    if "embed_tokens" in name or "embedding.weight" in name:
        return Piece(name, shape, 0.0, 1.0)
    if len(shape) > 1:
        return Piece(name, shape, 0.0, math.sqrt(3.0 / math.prod(shape[1:])))
    return Piece(name, shape, 0.0, 0.05) if parameter == "bias" else Piece(name, shape, 1.0, 0.1)


def linear(name: str, outputs: int, inputs: int) -> list[TensorLayout]:
    """Return weight [outputs, inputs] and bias [outputs]."""
    return [_plain(f"{name}.weight", (outputs, inputs)), _plain(f"{name}.bias", (outputs,))]


def norm(name: str, width: int) -> list[TensorLayout]:
    """Return the weight and bias of an affine normalisation."""
    return [_plain(f"{name}.weight", (width,)), _plain(f"{name}.bias", (width,))]


def _plain(name: str, shape: Shape) -> TensorLayout:
    return TensorLayout(name, (piece(name, shape),))


def diffusers_transformer(spec: DitSpec) -> list[TensorLayout]:
    """Return the tensors of ``HunyuanVideoTransformer3DModel``: 1264 at full size."""
    width, mlp, sinusoid = spec.width, spec.mlp_width, spec.sinusoid_width
    patch = math.prod(spec.patch)
    result = [
        _plain("x_embedder.proj.weight", (width, spec.latent_channels, *spec.patch)),
        _plain("x_embedder.proj.bias", (width,)),
    ]
    result += _embedder("time_text_embed.timestep_embedder", width, sinusoid)
    if spec.guidance_embedding:
        result += _embedder("time_text_embed.guidance_embedder", width, sinusoid)
    result += _embedder("time_text_embed.text_embedder", width, spec.pooled_width)
    result += linear("context_embedder.proj_in", width, spec.text_width)
    result += _embedder("context_embedder.time_text_embed.timestep_embedder", width, sinusoid)
    result += _embedder("context_embedder.time_text_embed.text_embedder", width, spec.text_width)
    for i in range(spec.refiner_blocks):
        block = f"context_embedder.token_refiner.refiner_blocks.{i}"
        result += norm(f"{block}.norm1", width) + norm(f"{block}.norm2", width)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            result += linear(f"{block}.attn.{name}", width, width)
        result += _feed_forward(f"{block}.ff", width, mlp)
        result += linear(f"{block}.norm_out.linear", 2 * width, width)
    for i in range(spec.double_blocks):
        block = f"transformer_blocks.{i}"
        for name in ("norm1", "norm1_context"):
            result += linear(f"{block}.{name}.linear", 6 * width, width)
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
            result += linear(f"{block}.attn.{name}", width, width)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            result.append(_plain(f"{block}.attn.{name}.weight", (spec.head_dim,)))
        result += _feed_forward(f"{block}.ff", width, mlp) + _feed_forward(f"{block}.ff_context", width, mlp)
    for i in range(spec.single_blocks):
        block = f"single_transformer_blocks.{i}"
        result += linear(f"{block}.norm.linear", 3 * width, width)
        for name in ("to_q", "to_k", "to_v"):
            result += linear(f"{block}.attn.{name}", width, width)
        for name in ("norm_q", "norm_k"):
            result.append(_plain(f"{block}.attn.{name}.weight", (spec.head_dim,)))
        result += linear(f"{block}.proj_mlp", mlp, width)
        result += linear(f"{block}.proj_out", width, width + mlp)
    for tensor in linear("norm_out.linear", 2 * width, width):
        rows = (width, *tensor.shape[1:])
        halves = (piece(f"{tensor.name}#scale", rows), piece(f"{tensor.name}#shift", rows))
        result.append(TensorLayout(tensor.name, halves))
    return result + linear("proj_out", patch * spec.latent_channels, width)


def _embedder(name: str, width: int, inputs: int) -> list[TensorLayout]:
    return linear(f"{name}.linear_1", width, inputs) + linear(f"{name}.linear_2", width, width)


def _feed_forward(name: str, width: int, mlp: int) -> list[TensorLayout]:
    return linear(f"{name}.net.0.proj", mlp, width) + linear(f"{name}.net.2", width, mlp)


def tencent_modules(spec: DitSpec) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield Tencent's module names with the diffusers modules whose rows they concatenate (specification 7)."""
    yield "img_in.proj", ("x_embedder.proj",)
    yield from _tencent_embedder("time_in.mlp", "time_text_embed.timestep_embedder")
    if spec.guidance_embedding:
        yield from _tencent_embedder("guidance_in.mlp", "time_text_embed.guidance_embedder")
    yield "vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)
    yield "vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)
    yield "txt_in.input_embedder", ("context_embedder.proj_in",)
    yield from _tencent_embedder("txt_in.t_embedder.mlp", "context_embedder.time_text_embed.timestep_embedder")
    for j in (1, 2):
        yield f"txt_in.c_embedder.linear_{j}", (f"context_embedder.time_text_embed.text_embedder.linear_{j}",)
    for i in range(spec.refiner_blocks):
        ours, theirs = (
            f"context_embedder.token_refiner.refiner_blocks.{i}",
            f"txt_in.individual_token_refiner.blocks.{i}",
        )
        yield f"{theirs}.norm1", (f"{ours}.norm1",)
        yield f"{theirs}.norm2", (f"{ours}.norm2",)
        yield f"{theirs}.self_attn_qkv", tuple(f"{ours}.attn.to_{x}" for x in "qkv")
        yield f"{theirs}.self_attn_proj", (f"{ours}.attn.to_out.0",)
        yield from _tencent_mlp(f"{theirs}.mlp", f"{ours}.ff")
        yield f"{theirs}.adaLN_modulation.1", (f"{ours}.norm_out.linear",)
    for i in range(spec.double_blocks):
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        yield f"{theirs}.img_mod.linear", (f"{ours}.norm1.linear",)
        yield f"{theirs}.txt_mod.linear", (f"{ours}.norm1_context.linear",)
        yield f"{theirs}.img_attn_qkv", tuple(f"{ours}.attn.to_{x}" for x in "qkv")
        yield f"{theirs}.txt_attn_qkv", tuple(f"{ours}.attn.add_{x}_proj" for x in "qkv")
        for x in "qk":
            yield f"{theirs}.img_attn_{x}_norm", (f"{ours}.attn.norm_{x}",)
            yield f"{theirs}.txt_attn_{x}_norm", (f"{ours}.attn.norm_added_{x}",)
        yield f"{theirs}.img_attn_proj", (f"{ours}.attn.to_out.0",)
        yield f"{theirs}.txt_attn_proj", (f"{ours}.attn.to_add_out",)
        yield from _tencent_mlp(f"{theirs}.img_mlp", f"{ours}.ff")
        yield from _tencent_mlp(f"{theirs}.txt_mlp", f"{ours}.ff_context")
    for i in range(spec.single_blocks):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        yield f"{theirs}.linear1", (*(f"{ours}.attn.to_{x}" for x in "qkv"), f"{ours}.proj_mlp")
        yield f"{theirs}.linear2", (f"{ours}.proj_out",)
        for x in "qk":
            yield f"{theirs}.{x}_norm", (f"{ours}.attn.norm_{x}",)
        yield f"{theirs}.modulation.linear", (f"{ours}.norm.linear",)
    yield "final_layer.adaLN_modulation.1", ("norm_out.linear",)
    yield "final_layer.linear", ("proj_out",)


def _tencent_embedder(theirs: str, ours: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield f"{theirs}.0", (f"{ours}.linear_1",)
    yield f"{theirs}.2", (f"{ours}.linear_2",)


def _tencent_mlp(theirs: str, ours: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield f"{theirs}.fc1", (f"{ours}.net.0.proj",)
    yield f"{theirs}.fc2", (f"{ours}.net.2",)


def tencent_transformer(spec: DitSpec) -> list[TensorLayout]:
    """Return the tensors of ``mp_rank_00_model_states.pt``: 856 at full size, of the same pieces as diffusers'."""
    source = {tensor.name: tensor for tensor in diffusers_transformer(spec)}
    result = []
    for theirs, modules in tencent_modules(spec):
        for parameter in ("weight", "bias"):
            parts = [source[f"{module}.{parameter}"] for module in modules if f"{module}.{parameter}" in source]
            pieces = tuple(item for part in parts for item in part.pieces)
            if theirs.startswith("final_layer.adaLN"):
                pieces = pieces[::-1]  # Tencent's order is shift, scale
            if pieces:
                result.append(TensorLayout(f"{theirs}.{parameter}", pieces))
    return result


def vae(spec: VaeSpec) -> list[TensorLayout]:
    """Return the tensors of encoder and decoder, equal in both formats: 248 at full size."""
    widths, levels = spec.block_widths, len(spec.block_widths)
    samplers = round(math.log2(spec.spatial_compression))
    inner = widths[-1]
    result = _convolution("encoder.conv_in.conv", widths[0], 3, 3)
    before = widths[0]
    for i, width in enumerate(widths):
        result += _resnets(f"encoder.down_blocks.{i}", before, width, spec.layers_per_block)
        if i < min(samplers, levels - 1):
            result += _convolution(f"encoder.down_blocks.{i}.downsamplers.0.conv.conv", width, width, 3)
        before = width
    result += _middle("encoder.mid_block", inner) + norm("encoder.conv_norm_out", inner)
    result += _convolution("encoder.conv_out.conv", 2 * spec.latent_channels, inner, 3)
    result += _convolution("decoder.conv_in.conv", inner, spec.latent_channels, 3)
    result += _middle("decoder.mid_block", inner)
    before = inner
    for i, width in enumerate(reversed(widths)):
        result += _resnets(f"decoder.up_blocks.{i}", before, width, spec.layers_per_block + 1)
        if i < min(samplers, levels - 1):
            result += _convolution(f"decoder.up_blocks.{i}.upsamplers.0.conv.conv", width, width, 3)
        before = width
    result += norm("decoder.conv_norm_out", widths[0]) + _convolution("decoder.conv_out.conv", 3, widths[0], 3)
    result += _convolution("quant_conv", 2 * spec.latent_channels, 2 * spec.latent_channels, 1)
    return result + _convolution("post_quant_conv", spec.latent_channels, spec.latent_channels, 1)


def _convolution(name: str, outputs: int, inputs: int, kernel: int) -> list[TensorLayout]:
    return [_plain(f"{name}.weight", (outputs, inputs, kernel, kernel, kernel)), _plain(f"{name}.bias", (outputs,))]


def _resnets(block: str, inputs: int, outputs: int, count: int) -> list[TensorLayout]:
    result = []
    for j in range(count):
        name, width = f"{block}.resnets.{j}", inputs if j == 0 else outputs
        result += norm(f"{name}.norm1", width) + _convolution(f"{name}.conv1.conv", outputs, width, 3)
        result += norm(f"{name}.norm2", outputs) + _convolution(f"{name}.conv2.conv", outputs, outputs, 3)
        if width != outputs:
            result += _convolution(f"{name}.conv_shortcut.conv", outputs, width, 1)
    return result


def _middle(name: str, width: int) -> list[TensorLayout]:
    result = _resnets(name, width, width, 2) + norm(f"{name}.attentions.0.group_norm", width)
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        result += linear(f"{name}.attentions.0.{part}", width, width)
    return result


def llm(spec: LlmSpec) -> list[TensorLayout]:
    """Return the tensors of ``LlamaModel``, all layers and the final norm."""
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    result = [_plain("embed_tokens.weight", (spec.vocabulary, spec.width))]
    for i in range(spec.layers):
        layer = f"layers.{i}"
        result += [
            _plain(f"{layer}.self_attn.q_proj.weight", (queries, spec.width)),
            _plain(f"{layer}.self_attn.k_proj.weight", (keys, spec.width)),
            _plain(f"{layer}.self_attn.v_proj.weight", (keys, spec.width)),
            _plain(f"{layer}.self_attn.o_proj.weight", (spec.width, queries)),
            _plain(f"{layer}.mlp.gate_proj.weight", (spec.mlp_width, spec.width)),
            _plain(f"{layer}.mlp.up_proj.weight", (spec.mlp_width, spec.width)),
            _plain(f"{layer}.mlp.down_proj.weight", (spec.width, spec.mlp_width)),
            _plain(f"{layer}.input_layernorm.weight", (spec.width,)),
            _plain(f"{layer}.post_attention_layernorm.weight", (spec.width,)),
        ]
    return [*result, _plain("norm.weight", (spec.width,))]


def clip(spec: ClipSpec) -> list[TensorLayout]:
    """Return the tensors of ``CLIPTextModel`` without the ``text_model.`` prefix."""
    result = [
        _plain("embeddings.token_embedding.weight", (spec.vocabulary, spec.width)),
        _plain("embeddings.position_embedding.weight", (spec.max_tokens, spec.width)),
    ]
    for i in range(spec.layers):
        layer = f"encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            result += linear(f"{layer}.self_attn.{name}", spec.width, spec.width)
        result += norm(f"{layer}.layer_norm1", spec.width) + norm(f"{layer}.layer_norm2", spec.width)
        result += linear(f"{layer}.mlp.fc1", spec.mlp_width, spec.width)
        result += linear(f"{layer}.mlp.fc2", spec.width, spec.mlp_width)
    return result + norm("final_layer_norm", spec.width)


def named(tensors: Iterable[TensorLayout], component: str, prefix: str = "") -> list[TensorLayout]:
    """Return ``tensors`` with pieces named after their ``component`` and keys that begin with ``prefix``."""
    return [
        TensorLayout(
            prefix + tensor.name,
            tuple(Piece(f"{component}/{part.name}", part.shape, part.mean, part.spread) for part in tensor.pieces),
        )
        for tensor in tensors
    ]


def _spec(
    dit: DitSpec, llm_spec: LlmSpec, clip_spec: ClipSpec, vae_spec: VaeSpec, size: tuple[int, int, int], steps: int
) -> ModelSpec:
    defaults = SamplerDefaults(steps, 7.0, 6.0, *size, frames_per_second=24)
    tiling = VaeTiling(tile=32, stride=24, frame_window=16, frame_stride=12)
    return ModelSpec("hunyuan_video", llm_spec, clip_spec, dit, vae_spec, tiling, GuidanceRounding.BF16, defaults)


# Heads of 32 and 64 keep the proportions 1 : 3.5 : 3.5 of the rotary axes of heads of 128.
SIZES: dict[str, ModelSpec] = {
    "tiny": _spec(
        DitSpec(64, 2, 32, 2, 2, 2, 256, 4, (1, 2, 2), 64, 32, (4, 14, 14), 256.0, 256, 1e-6, True),
        LlmSpec(64, 4, 2, 4, 2, 16, 128, 512, 500000.0, 1e-5, 256),
        ClipSpec(32, 2, 2, 128, 768, 77, 1e-5, "quick_gelu", 767),
        VaeSpec(4, (16, 16, 32, 32), 1, 8, 1e-6, 0.476986, 8, 4),
        (64, 64, 9),
        20,
    ),
    "demo": _spec(
        DitSpec(128, 2, 64, 2, 4, 2, 512, 16, (1, 2, 2), 128, 64, (8, 28, 28), 256.0, 256, 1e-6, True),
        LlmSpec(128, 4, 2, 4, 2, 32, 256, 512, 500000.0, 1e-5, 256),
        ClipSpec(64, 2, 2, 256, 768, 77, 1e-5, "quick_gelu", 767),
        VaeSpec(16, (16, 16, 32, 64), 1, 8, 1e-6, 0.476986, 8, 4),
        (64, 64, 9),
        20,
    ),
    # 0.3 billion parameters, of which the default shape makes 2048 image tokens: matrix products dominate a step, and
    # it takes seconds on a small machine. Only the transformer is of a serious size.
    "mid": _spec(
        DitSpec(1024, 8, 128, 4, 8, 2, 4096, 16, (1, 2, 2), 128, 64, (16, 56, 56), 256.0, 256, 1e-6, True),
        LlmSpec(128, 4, 2, 4, 2, 32, 256, 512, 500000.0, 1e-5, 256),
        ClipSpec(64, 2, 2, 256, 768, 77, 1e-5, "quick_gelu", 767),
        VaeSpec(16, (16, 16, 32, 64), 1, 8, 1e-6, 0.476986, 8, 4),
        (256, 256, 29),
        20,
    ),
    # The real VAE behind a small transformer: a decoder whose memory matters, on a small machine.
    "wide-vae": _spec(
        DitSpec(128, 2, 64, 2, 4, 2, 512, 16, (1, 2, 2), 128, 64, (8, 28, 28), 256.0, 256, 1e-6, True),
        LlmSpec(128, 4, 2, 4, 2, 32, 256, 512, 500000.0, 1e-5, 256),
        ClipSpec(64, 2, 2, 256, 768, 77, 1e-5, "quick_gelu", 767),
        VaeSpec(16, (128, 256, 512, 512), 2, 32, 1e-6, 0.476986, 8, 4),
        (64, 64, 9),
        20,
    ),
    # Full width, one block of each kind: what can be executed and compared on a small machine.
    "block": _spec(
        DitSpec(3072, 24, 128, 1, 1, 1, 12288, 16, (1, 2, 2), 4096, 768, (16, 56, 56), 256.0, 256, 1e-6, True),
        LlmSpec(4096, 3, 1, 32, 8, 128, 14336, 512, 500000.0, 1e-5, 256),
        ClipSpec(768, 1, 12, 3072, 768, 77, 1e-5, "quick_gelu", 767),
        VaeSpec(16, (128, 256, 512, 512), 2, 32, 1e-6, 0.476986, 8, 4),
        (64, 64, 9),
        20,
    ),
    "full": _spec(
        DitSpec(3072, 24, 128, 20, 40, 2, 12288, 16, (1, 2, 2), 4096, 768, (16, 56, 56), 256.0, 256, 1e-6, True),
        LlmSpec(4096, 32, 30, 32, 8, 128, 14336, 128320, 500000.0, 1e-5, 256),
        ClipSpec(768, 12, 12, 3072, 49408, 77, 1e-5, "quick_gelu", 49407),
        VaeSpec(16, (128, 256, 512, 512), 2, 32, 1e-6, 0.476986, 8, 4),
        (720, 1280, 129),
        50,
    ),
}
