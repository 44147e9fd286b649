"""The one visible list of passes per target, in order."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, common

from reelforge.export.passes.lower_frame_causal_attention import LowerFrameCausalAttentionPass
from reelforge.export.passes.lower_group_norm import LowerGroupNormPass
from reelforge.export.passes.lower_key_lengths import LowerKeyLengthsPass
from reelforge.export.passes.lower_linear import LowerLinearPass
from reelforge.runtime.recipe import Backend, Target


def passes_for(target: Target) -> Sequence[InPlacePass]:
    """Return the passes that turn an assembled graph into one that ``target`` takes, in the order they run."""
    lowering: dict[Backend, tuple[InPlacePass, ...]] = {
        Backend.CPU: (
            common.IdentityEliminationPass(),
            LowerFrameCausalAttentionPass(),
            LowerKeyLengthsPass(),
            LowerGroupNormPass(),
            LowerLinearPass(),
            common.CommonSubexpressionEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedOpsetsPass(),
            common.ClearMetadataAndDocStringPass(),
        ),
    }
    return lowering[target.backend]


def lower(model: ir.Model, target: Target) -> ir.Model:
    """Run the target's passes over ``model`` in place and return it."""
    for graph_pass in passes_for(target):
        graph_pass(model)
    return model
