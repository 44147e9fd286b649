"""A sparse DiT as TensorRT would get it: its plugins, executed through their functions, against the modules in fp32.

Tiles are padded, lists differ by head, and blocks have the kernels' sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reelforge.plugins.attention_choice import ATTENTION_PLUGINS
from reelforge.plugins.schema import NAMESPACE
from reelforge.runtime.attention.inputs import JointSequence, attention_inputs
from reelforge.runtime.attention.table import AttentionTable, Pattern, Rule
from reelforge.runtime.recipe import Precision, SparseAttention, SparseKind, Target
from tests.bundles import TraceMemory, once, session_folder
from tests.checkpoints import make_diffusers_checkpoint
from tests.export.stage_graphs import Arrays, StageGraphs, relative, stage_graphs
from tests.export.test_plugin_graphs import FP8_ERROR, check, execute, reference, step_inputs
from tests.export.tiny_stages import FAMILY

GRID, TEXT = (8, 6, 8), 20  # four tiles of 4x6x4, each padded from 96 to 128
TABLES = {
    SparseKind.LISTS: AttentionTable(
        Pattern.SLIDING_TILE, (Rule(heads=(0,), window=(1, 1, 1)), Rule(window=(3, 1, 1)))
    ),
    SparseKind.TOP_K: AttentionTable(Pattern.TOP_K, (Rule(share=0.4),)),
}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StageGraphs]:
    def make(path: Path) -> None:
        make_diffusers_checkpoint(path, seed=1, head_dim=64)

    checkpoint = once(session_folder(tmp_path_factory) / "wide_heads", make)
    with stage_graphs(checkpoint, tmp_path_factory.mktemp("sparse_plugins")) as made:
        yield made


def inputs_of(graphs: StageGraphs, kind: SparseKind, table: AttentionTable) -> Arrays:
    given = step_inputs(graphs, GRID[0], TEXT)
    sequence = JointSequence(GRID, TEXT, graphs.tiny.spec.dit.heads)
    found = attention_inputs(table, SparseAttention(kind), sequence, 1, (given["rope_cos"], given["rope_sin"]))
    assert found.density[0] < 0.8
    assert len(found.fixed["token_gather"]) == 512
    return given | found.fixed | {name: rows[0, ...] for name, rows in found.per_step.items()}


@pytest.mark.parametrize("kind", SparseKind)
def test_the_graph_of_sparse_plugins_is_the_transformer(
    graphs: StageGraphs, trace_memory: TraceMemory, kind: SparseKind
) -> None:
    inputs = inputs_of(graphs, kind, TABLES[kind])
    stages = {stage.name: stage for stage in FAMILY.stages(graphs.tiny.spec, 1, SparseAttention(kind))}
    mine = StageGraphs(replace(graphs.tiny, stages=stages), graphs.writer)
    mine.__dict__["_placed"] = {"dit": graphs.weights("dit")}
    with trace_memory.used():
        model = mine.graph("dit", Target.parse("trt:sm90"), Precision.FP32)
    named = [node.op_type for node in model.graph if node.domain == NAMESPACE]
    assert named.count(ATTENTION_PLUGINS["sm90"].sparse) == 4
    received, wanted = execute(mine, model, inputs), reference(mine, inputs)
    check(received, wanted, FP8_ERROR)
    dense = reference(graphs, step_inputs(graphs, GRID[0], TEXT))
    assert relative(wanted["velocity"], dense["velocity"]) > 3 * FP8_ERROR  # leaving out keys is seen
    assert np.isfinite(received["velocity"]).all()
