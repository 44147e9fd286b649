"""Key tables of Tencent's layout: for every parameter of every stage, where its values lie in the checkpoint.

Differs from ``keys_diffusers`` in the transformer only: other names, fused query, key and value (and the MLP with them
in single blocks), and the final modulation as (shift, scale). The module knows names only.
"""

from __future__ import annotations

from collections.abc import Sequence

from reelforge.export.checkpoint.match import Explained
from reelforge.export.checkpoint.sources import HalfSplit, Whole
from reelforge.export.models.hunyuan_video.keys_diffusers import (
    ROTATED,
    StageTables,
    Table,
    linear,
    rows,
    shared_explained,
    shared_sources,
    split_projection,
)
from reelforge.runtime.spec import DitSpec, ModelSpec

_REFINER_BLOCK = {
    **{"norm1": "norm1", "norm2": "norm2", "proj": "self_attn_proj"},
    **{"fc1": "mlp.fc1", "fc2": "mlp.fc2", "gates": "adaLN_modulation.1"},
}
_STREAMS = {"image": "img", "text": "txt"}


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
    table = {
        **_embedder("time_in", "txt_in.t_embedder"),
        **linear("pooled_text_in.fc1", "txt_in.c_embedder.linear_1"),
        **linear("pooled_text_in.fc2", "txt_in.c_embedder.linear_2"),
        **linear("input", "txt_in.input_embedder"),
    }
    for i in range(dit.refiner_blocks):
        block = f"txt_in.individual_token_refiner.blocks.{i}"
        for ours, theirs in _REFINER_BLOCK.items():
            table |= linear(f"blocks.{i}.{ours}", f"{block}.{theirs}")
        for j, part in enumerate("qkv"):
            table |= rows(f"blocks.{i}.{part}", f"{block}.self_attn_qkv", j * dit.width, (j + 1) * dit.width)
    return table


def modulation_table(dit: DitSpec) -> Table:
    """Return the sources of the conditioning embedders and of all modulation linears."""
    table = {
        **_embedder("time_in", "time_in"),
        **linear("pooled_in.fc1", "vector_in.in_layer"),
        **linear("pooled_in.fc2", "vector_in.out_layer"),
        **linear("final.linear", "final_layer.adaLN_modulation.1"),
    }
    if dit.guidance_embedding:
        table |= _embedder("guidance_in", "guidance_in")
    for i in range(dit.double_blocks):
        for ours, theirs in _STREAMS.items():
            table |= linear(f"double.{i}.{ours}.linear", f"double_blocks.{i}.{theirs}_mod.linear")
    for i in range(dit.single_blocks):
        table |= linear(f"single.{i}.linear", f"single_blocks.{i}.modulation.linear")
    return table


def dit_table(dit: DitSpec) -> Table:
    """Return the sources of the transformer's blocks, patch embedding and final projection."""
    table = {**linear("patch_embed", "img_in.proj"), **linear("final.proj", "final_layer.linear")}
    for i in range(dit.double_blocks):
        for ours, theirs in _STREAMS.items():
            stream, block = f"double.{i}.{ours}", f"double_blocks.{i}.{theirs}"
            table |= _fused_qkv(stream, f"{block}_attn_qkv", dit) | _qk_norms(stream, f"{block}_attn_", dit)
            table |= linear(f"{stream}.proj", f"{block}_attn_proj")
            table |= linear(f"{stream}.fc1", f"{block}_mlp.fc1") | linear(f"{stream}.fc2", f"{block}_mlp.fc2")
    for i in range(dit.single_blocks):
        ours, theirs = f"single.{i}", f"single_blocks.{i}"
        table |= _fused_qkv(ours, f"{theirs}.linear1", dit) | _qk_norms(ours, f"{theirs}.", dit)
        table |= rows(f"{ours}.fc1", f"{theirs}.linear1", 3 * dit.width, 3 * dit.width + dit.mlp_width)
        table |= split_projection(ours, f"{theirs}.linear2", dit)
    return table


def _fused_qkv(ours: str, theirs: str, dit: DitSpec) -> Table:
    table: Table = {}
    for j, part in enumerate("qkv"):
        for name, source in rows(f"{ours}.{part}", theirs, j * dit.width, (j + 1) * dit.width).items():
            table[name] = HalfSplit(source, dit.head_dim) if part in ROTATED else source
    return table


def _qk_norms(ours: str, prefix: str, dit: DitSpec) -> Table:
    return {
        f"{ours}.{part}_norm.weight": HalfSplit(Whole(f"{prefix}{part}_norm.weight"), dit.head_dim) for part in "qk"
    }


def _embedder(ours: str, theirs: str) -> Table:
    return linear(f"{ours}.fc1", f"{theirs}.mlp.0") | linear(f"{ours}.fc2", f"{theirs}.mlp.2")
