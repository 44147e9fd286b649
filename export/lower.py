"""The one visible list of passes per target, in order."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, common

from reelforge.export.engines.requirements import takes
from reelforge.export.passes.decompose_frame_causal_attention import DecomposeFrameCausalAttentionPass
from reelforge.export.passes.decompose_top_k_attention import DecomposeTopKAttentionPass
from reelforge.export.passes.defer_scales import DeferScalesPass
from reelforge.export.passes.lower_attention import AddPluginFunctionsPass, LowerAttentionPass
from reelforge.export.passes.lower_block_sparse_attention import LowerBlockSparseAttentionPass
from reelforge.export.passes.lower_float8 import LowerFloat8Pass
from reelforge.export.passes.lower_frame_causal_attention import LowerFrameCausalAttentionPass
from reelforge.export.passes.lower_group_norm import LowerGroupNormPass
from reelforge.export.passes.lower_integer_attention import LowerIntegerAttentionPass
from reelforge.export.passes.lower_integer_convolution import LowerIntegerConvolutionPass
from reelforge.export.passes.lower_integer_linear import LowerIntegerLinearPass
from reelforge.export.passes.lower_key_lengths import LowerKeyLengthsPass
from reelforge.export.passes.lower_linear import LowerLinearPass
from reelforge.export.passes.lower_rotation import LowerRotationPass
from reelforge.export.passes.lower_upsampling import LowerUpsamplingPass
from reelforge.export.passes.mask_key_lengths import MaskKeyLengthsPass
from reelforge.export.passes.quantise_attention import AttentionScales, QuantiseAttentionPass
from reelforge.export.passes.quantise_layers import IntegerInputs, QuantisedLayer, QuantiseLayersPass
from reelforge.plugins.attention_choice import ATTENTION_PLUGINS
from reelforge.runtime.errors import BuildError
from reelforge.runtime.recipe import Backend, Precision, Target


@dataclass(frozen=True)
class EightBit:
    """What of a graph is computed in 8 bits.

    Attributes:
        layers: By layer name.
        attentions: Scales by the attention's name.
    """

    layers: Mapping[str, QuantisedLayer] = field(default_factory=dict)
    attentions: Mapping[str, AttentionScales] = field(default_factory=dict)

    def layers_in(self, codes: ir.DataType) -> frozenset[str]:
        """Return the layers whose weights are codes of one type."""
        return frozenset(name for name, layer in self.layers.items() if layer.codes.dtype == codes)

    @property
    def output_ranges(self) -> dict[str, tuple[float, float]]:
        """The ranges of the outputs of those layers that have one."""
        known = ((name, layer.output_range) for name, layer in self.layers.items())
        return {name: limits for name, limits in known if limits is not None}

    def attentions_in(self, precision: Precision) -> dict[str, AttentionScales]:
        """Return the attentions of one precision."""
        return {name: scales for name, scales in self.attentions.items() if scales.precision is precision}


@dataclass(frozen=True)
class PluginAttentions:
    """Which attentions of a graph a target with plugins computes by them.

    Attributes:
        names: Of the attentions.
        trusted_tables: See :class:`LowerAttentionPass`.
    """

    names: tuple[str, ...] = ()
    trusted_tables: Collection[str] = ()


def passes_for(
    target: Target, eight_bit: EightBit, plugin_attentions: PluginAttentions | None = None
) -> Sequence[InPlacePass]:
    """Return the passes that turn an assembled graph into one that ``target`` takes, in the order they run.

    Args:
        target: What will execute the graph.
        eight_bit: What of it is computed in 8 bits.
        plugin_attentions: What plugins compute, if the target has them; other targets compute it themselves.

    Raises:
        BuildError: If the target's architectures have different plugins.
    """
    compiled = (
        common.IdentityEliminationPass(),
        DecomposeTopKAttentionPass(),
        *_attention_plugins(target, eight_bit, plugin_attentions or PluginAttentions()),
        DecomposeFrameCausalAttentionPass(_logits(target)),
        MaskKeyLengthsPass(),
        LowerLinearPass(),
        common.RemoveUnusedNodesPass(),
        QuantiseLayersPass(eight_bit.layers, IntegerInputs.SIGNED),
        DeferScalesPass(),
        QuantiseAttentionPass(eight_bit.attentions),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.ClearMetadataAndDocStringPass(),
    )
    lowering: dict[Backend, tuple[InPlacePass, ...]] = {
        Backend.CPU: (
            common.IdentityEliminationPass(),
            DecomposeTopKAttentionPass(),
            LowerBlockSparseAttentionPass(),
            LowerFrameCausalAttentionPass(),
            LowerKeyLengthsPass(),
            LowerGroupNormPass(),
            LowerLinearPass(),
            common.RemoveUnusedNodesPass(),  # the transposes: a layer is what alone uses its weight
            LowerRotationPass(),
            LowerUpsamplingPass(),
            QuantiseLayersPass(eight_bit.layers, IntegerInputs.UNSIGNED),
            QuantiseAttentionPass(eight_bit.attentions_in(Precision.FP8)),
            LowerIntegerAttentionPass(eight_bit.attentions_in(Precision.INT8)),
            LowerFloat8Pass(),
            LowerIntegerConvolutionPass(eight_bit.output_ranges),
            LowerIntegerLinearPass(eight_bit.layers_in(ir.DataType.INT8)),
            common.CommonSubexpressionEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedOpsetsPass(),
            common.ClearMetadataAndDocStringPass(),
        ),
        Backend.CUDA: (  # as the CPU's, with the int8 inputs of GPUs; never run on one
            common.IdentityEliminationPass(),
            DecomposeTopKAttentionPass(),
            LowerBlockSparseAttentionPass(),
            LowerFrameCausalAttentionPass(),
            LowerKeyLengthsPass(),
            LowerGroupNormPass(),
            LowerLinearPass(),
            common.RemoveUnusedNodesPass(),
            QuantiseLayersPass(eight_bit.layers, IntegerInputs.SIGNED),
            QuantiseAttentionPass(eight_bit.attentions),
            LowerFloat8Pass(),
            common.CommonSubexpressionEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedOpsetsPass(),
            common.ClearMetadataAndDocStringPass(),
        ),
        Backend.RTX: compiled,
        Backend.TRT: (*compiled, AddPluginFunctionsPass()),
    }
    return lowering[target.backend]


def _attention_plugins(
    target: Target, eight_bit: EightBit, plugin_attentions: PluginAttentions
) -> tuple[InPlacePass, ...]:
    """Return the pass for a target with plugins; none where its architecture has no kernels.

    An attention with scales of its own is the compiler's: that is what they were asked for.
    """
    names = tuple(name for name in plugin_attentions.names if name not in eight_bit.attentions)
    if target.backend is not Backend.TRT or not names:
        return ()
    first, *others = [ATTENTION_PLUGINS.get(name) for name in target.architectures]
    if any(other != first for other in others):
        raise BuildError(
            "one graph cannot name the attention plugins of all these architectures.",
            received=str(target),
            expected="architectures with the same plugins",
            fix="build a bundle for each",
        )
    return () if first is None else (LowerAttentionPass(names, first, plugin_attentions.trusted_tables),)


def _logits(target: Target) -> ir.DataType | None:
    """Return what the VAE's queries and keys are multiplied in: fp32 where all architectures have such products."""
    exact = all(takes(target.backend, name, Precision.FP32) for name in target.architectures)
    return ir.DataType.FLOAT if exact else None


def lower(
    model: ir.Model,
    target: Target,
    eight_bit: EightBit | None = None,
    plugin_attentions: PluginAttentions | None = None,
) -> ir.Model:
    """Run the target's passes over ``model`` in place and return it; see :func:`passes_for`."""
    for graph_pass in passes_for(target, eight_bit or EightBit(), plugin_attentions):
        graph_pass(model)
    return model
