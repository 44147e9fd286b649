"""Which layers of HunyuanVideo may be computed in 8 bits, and where their smoothing folds.

High precision keeps what is small and sensitive: patch embedding, every embedder, the modulation, the token refiner,
the CLIP encoder (a single vector from it steers all blocks), the final projection, and the VAE's first and last
convolution and norms. The module holds names, no numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

from reelforge.calibration.rules import Fold, FoldKind, SmoothingGroup, StageRules
from reelforge.runtime.spec import ModelSpec


def quantisation_rules(spec: ModelSpec) -> Mapping[str, StageRules]:
    """Return the rules of every stage that can be quantised."""
    return {
        "dit": StageRules(("double.*", "single.*"), _dit_groups(spec), _attentions(spec)),
        "llm": StageRules(("layers.*",), _llm_groups(spec)),
        "vae_decoder": StageRules(("decoder.mid_block.*", "decoder.up_blocks.*")),
    }


def _attentions(spec: ModelSpec) -> tuple[str, ...]:
    blocks = {"double": spec.dit.double_blocks, "single": spec.dit.single_blocks}
    return tuple(f"{kind}.{index}.attention" for kind, count in blocks.items() for index in range(count))


def _dit_groups(spec: ModelSpec) -> tuple[SmoothingGroup, ...]:
    """Inputs behind a modulated norm fold into the modulation; an attention's output folds into ``v``."""
    dit = spec.dit
    groups = []
    for index in range(dit.double_blocks):
        block = f"double.{index}"
        for stream in (f"{block}.image", f"{block}.text"):
            attention = tuple(f"{stream}.{name}" for name in ("q", "k", "v"))
            groups.append(SmoothingGroup("dit", attention, (_modulation(f"{stream}.linear", 0, dit.width),)))
            groups.append(SmoothingGroup("dit", (f"{stream}.fc1",), (_modulation(f"{stream}.linear", 3, dit.width),)))
        # Both projections read mixtures of the values of both streams.
        values = tuple(Fold(FoldKind.AFFINE, "dit", f"{block}.{stream}.v") for stream in ("image", "text"))
        groups.append(SmoothingGroup("dit", (f"{block}.image.proj", f"{block}.text.proj"), values))
    for index in range(dit.single_blocks):
        block = f"single.{index}"
        normed = tuple(f"{block}.{name}" for name in ("q", "k", "v", "fc1"))
        groups.append(SmoothingGroup("dit", normed, (_modulation(f"{block}.linear", 0, dit.width),)))
        value = Fold(FoldKind.AFFINE, "dit", f"{block}.v")
        groups.append(SmoothingGroup("dit", (f"{block}.proj_attention",), (value,)))
    return tuple(groups)


def _modulation(layer: str, first: int, width: int) -> Fold:
    """The vectors ``first`` (shift) and ``first + 1`` (scale) of a modulation linear."""
    shift, scale, end = (width * (first + offset) for offset in (0, 1, 2))
    return Fold(FoldKind.MODULATION, "modulation", layer, (shift, scale), (scale, end))


def _llm_groups(spec: ModelSpec) -> tuple[SmoothingGroup, ...]:
    """Inputs behind an RMSNorm fold into its weight. Grouped-query values feed several heads and are left alone."""
    groups = []
    for index in range(spec.llm.used_layers):
        layer = f"layers.{index}"
        attention = tuple(f"{layer}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))
        groups.append(SmoothingGroup("llm", attention, (_norm(f"{layer}.input_layernorm"),)))
        mlp = (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")
        groups.append(SmoothingGroup("llm", mlp, (_norm(f"{layer}.post_attention_layernorm"),)))
    return tuple(groups)


def _norm(layer: str) -> Fold:
    return Fold(FoldKind.AFFINE, "llm", layer)
