"""Key tables of the diffusers layout: for every parameter of every stage, where its values lie in the checkpoint.

The tables restate section 7 of the specification in the direction parameter -> stored tensor. Tensors of the VAE and of
both text encoders have the same names in either layout (prefixes aside), so ``keys_tencent`` takes them from here.
The module knows names only: shapes and types are checked by ``export.checkpoint.match``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from reelforge.export.checkpoint.match import Explained
from reelforge.export.checkpoint.sources import Columns, HalfSplit, Rows, Source, SwapHalves, Whole
from reelforge.runtime.spec import ClipSpec, DitSpec, LlmSpec, ModelSpec, VaeSpec

Table = dict[str, Source]
StageTables = dict[str, dict[str, Table]]
"""Component -> stage -> parameter -> source."""

LINEAR = ("weight", "bias")

_EMBEDDER = "time_text_embed.{}_embedder.linear_{}"
_REFINER_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "q": "attn.to_q",
    "k": "attn.to_k",
    "v": "attn.to_v",
    "proj": "attn.to_out.0",
    "fc1": "ff.net.0.proj",
    "fc2": "ff.net.2",
    "gates": "norm_out.linear",
}
_STREAMS = {
    "image": {
        **{"q": "attn.to_q", "k": "attn.to_k", "v": "attn.to_v", "proj": "attn.to_out.0"},
        **{"fc1": "ff.net.0.proj", "fc2": "ff.net.2", "q_norm": "attn.norm_q", "k_norm": "attn.norm_k"},
    },
    "text": {
        **{"q": "attn.add_q_proj", "k": "attn.add_k_proj", "v": "attn.add_v_proj", "proj": "attn.to_add_out"},
        **{"fc1": "ff_context.net.0.proj", "fc2": "ff_context.net.2"},
        **{"q_norm": "attn.norm_added_q", "k_norm": "attn.norm_added_k"},
    },
}
_SINGLE = {
    **{"q": "attn.to_q", "k": "attn.to_k", "v": "attn.to_v", "fc1": "proj_mlp"},
    **{"q_norm": "attn.norm_q", "k_norm": "attn.norm_k"},
}
ROTATED = ("q", "k", "q_norm", "k_norm")
"""Parts whose rows are put in half-split rotary order."""


def stage_sources(spec: ModelSpec) -> StageTables:
    """Return the source of every parameter: component -> stage -> parameter -> source."""
    return {
        "transformer": {
            "refiner": refiner_table(spec.dit),
            "modulation": modulation_table(spec.dit),
            "dit": dit_table(spec.dit),
        },
        **shared_sources(spec),
    }


def explained(spec: ModelSpec) -> dict[str, Sequence[Explained]]:
    """Return, for each component, the stored tensors that no stage needs."""
    return {"transformer": (), **shared_explained(spec)}


def refiner_table(dit: DitSpec) -> Table:
    """Return the sources of the token refiner."""
    root = "context_embedder."
    table = {
        **_embedder("time_in", root + _EMBEDDER, "timestep"),
        **_embedder("pooled_text_in", root + _EMBEDDER, "text"),
        **linear("input", f"{root}proj_in"),
    }
    for i in range(dit.refiner_blocks):
        for ours, theirs in _REFINER_BLOCK.items():
            table |= linear(f"blocks.{i}.{ours}", f"{root}token_refiner.refiner_blocks.{i}.{theirs}")
    return table


def modulation_table(dit: DitSpec) -> Table:
    """Return the sources of the conditioning embedders and of all modulation linears."""
    table = {
        **_embedder("time_in", _EMBEDDER, "timestep"),
        **_embedder("pooled_in", _EMBEDDER, "text"),
        # diffusers stores (scale, shift), Tencent and the stage (shift, scale).
        **{f"final.linear.{part}": SwapHalves(Whole(f"norm_out.linear.{part}")) for part in LINEAR},
    }
    if dit.guidance_embedding:
        table |= _embedder("guidance_in", _EMBEDDER, "guidance")
    for i in range(dit.double_blocks):
        table |= linear(f"double.{i}.image.linear", f"transformer_blocks.{i}.norm1.linear")
        table |= linear(f"double.{i}.text.linear", f"transformer_blocks.{i}.norm1_context.linear")
    for i in range(dit.single_blocks):
        table |= linear(f"single.{i}.linear", f"single_transformer_blocks.{i}.norm.linear")
    return table


def dit_table(dit: DitSpec) -> Table:
    """Return the sources of the transformer's blocks, patch embedding and final projection."""
    table = {**linear("patch_embed", "x_embedder.proj"), **linear("final.proj", "proj_out")}
    for i in range(dit.double_blocks):
        for stream, parts in _STREAMS.items():
            table |= _attention_parts(f"double.{i}.{stream}", f"transformer_blocks.{i}", parts, dit)
    for i in range(dit.single_blocks):
        theirs = f"single_transformer_blocks.{i}"
        table |= _attention_parts(f"single.{i}", theirs, _SINGLE, dit)
        table |= split_projection(f"single.{i}", f"{theirs}.proj_out", dit)
    return table


def _attention_parts(ours: str, theirs: str, parts: dict[str, str], dit: DitSpec) -> Table:
    table: Table = {}
    for part, key in parts.items():
        for kind in ("weight",) if part.endswith("_norm") else LINEAR:
            whole = Whole(f"{theirs}.{key}.{kind}")
            table[f"{ours}.{part}.{kind}"] = HalfSplit(whole, dit.head_dim) if part in ROTATED else whole
    return table


def split_projection(ours: str, theirs: str, dit: DitSpec) -> Table:
    """Return a single block's output projection as two: columns of the attention, then of the MLP; one bias."""
    return {
        f"{ours}.proj_attention.weight": Columns(f"{theirs}.weight", 0, dit.width),
        f"{ours}.proj_attention.bias": Whole(f"{theirs}.bias"),
        f"{ours}.proj_mlp.weight": Columns(f"{theirs}.weight", dit.width, dit.width + dit.mlp_width),
    }


def linear(ours: str, theirs: str) -> Table:
    """Return weight and bias taken whole."""
    return {f"{ours}.{part}": Whole(f"{theirs}.{part}") for part in LINEAR}


def rows(ours: str, theirs: str, start: int, stop: int) -> dict[str, Rows]:
    """Return weight and bias of one part of a fused linear."""
    return {f"{ours}.{part}": Rows(f"{theirs}.{part}", start, stop) for part in LINEAR}


def _embedder(ours: str, pattern: str, name: str) -> Table:
    return {**linear(f"{ours}.fc1", pattern.format(name, 1)), **linear(f"{ours}.fc2", pattern.format(name, 2))}


# Components with the same names in both layouts.

_LLM_LAYER = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    *("input_layernorm", "post_attention_layernorm"),
)
_CLIP_LAYER = (
    *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")),
    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
)


def shared_sources(spec: ModelSpec) -> StageTables:
    """Return the tables of the VAE and the text encoders: every parameter has its name in the checkpoint."""
    names = {
        "vae": ("vae_decoder", vae_names(spec.vae)),
        "text_encoder": ("llm", llm_names(spec.llm)),
        "text_encoder_2": ("clip", clip_names(spec.clip)),
    }
    return {component: {stage: {name: Whole(name) for name in keys}} for component, (stage, keys) in names.items()}


def shared_explained(spec: ModelSpec) -> dict[str, Sequence[Explained]]:
    """Return what the stages do not need of the VAE and the text encoders."""
    unused_layers = "|".join(str(i) for i in range(spec.llm.used_layers, spec.llm.layers))
    return {
        "vae": (Explained(r"encoder\..+|quant_conv\..+", "the encoder is not needed to generate from text"),),
        "text_encoder": (
            Explained(rf"layers\.({unused_layers})\..+", "layers after the state that is used"),
            Explained(r"norm\.weight", "the state is taken before the final norm"),
            Explained(r"lm_head\.weight", "no words are predicted"),
            Explained(r".+\.rotary_emb\.inv_freq", "computed"),
            Explained(r"vision_tower\..+|multi_modal_projector\..+", "the vision part of LLaVA"),
        ),
        "text_encoder_2": (
            Explained(r"embeddings\.position_ids", "computed"),
            Explained(r"vision_model\..+|(text|visual)_projection\.weight|logit_scale", "other parts of CLIP"),
        ),
    }


def llm_names(llm: LlmSpec) -> Iterator[str]:
    """Yield the names of the LLaMA decoder's parameters up to the state that is used."""
    yield "embed_tokens.weight"
    for i in range(llm.used_layers):
        yield from (f"layers.{i}.{part}.weight" for part in _LLM_LAYER)


def clip_names(clip: ClipSpec) -> Iterator[str]:
    """Yield the names of the CLIP text tower's parameters."""
    yield from ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight")
    for i in range(clip.layers):
        yield from (f"encoder.layers.{i}.{part}.{kind}" for part in _CLIP_LAYER for kind in LINEAR)
    yield from (f"final_layer_norm.{kind}" for kind in LINEAR)


def vae_names(vae: VaeSpec) -> Iterator[str]:
    """Yield the names of the VAE decoder's parameters (specification 5.1)."""
    modules = ["post_quant_conv", "decoder.conv_in.conv", "decoder.conv_norm_out", "decoder.conv_out.conv"]
    modules += [f"decoder.mid_block.attentions.0.{part}" for part in ("group_norm", "to_q", "to_k", "to_v", "to_out.0")]
    for i in range(2):
        modules += _resnet(f"decoder.mid_block.resnets.{i}", shortcut=False)
    widths = list(reversed(vae.block_widths))
    for i, width in enumerate(widths):
        for j in range(vae.layers_per_block + 1):
            narrows = j == 0 and i > 0 and widths[i - 1] != width
            modules += _resnet(f"decoder.up_blocks.{i}.resnets.{j}", shortcut=narrows)
        if i < len(widths) - 1:
            modules.append(f"decoder.up_blocks.{i}.upsamplers.0.conv.conv")
    return (f"{module}.{kind}" for module in modules for kind in LINEAR)


def _resnet(name: str, shortcut: bool) -> list[str]:
    parts = ["norm1", "conv1.conv", "norm2", "conv2.conv", *(["conv_shortcut.conv"] if shortcut else [])]
    return [f"{name}.{part}" for part in parts]
