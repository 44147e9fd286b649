"""The DiT with sparse attention: dense in any order of tokens it is the dense DiT; the graph is what PyTorch computes.

The stage's parity with diffusers is the dense stage's (``test_stage_parity``), which is held against here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reelforge.export.passes.layers import attention_nodes
from reelforge.export.reference import run_stage
from reelforge.runtime.attention.inputs import JointSequence, attention_inputs
from reelforge.runtime.attention.table import DENSE, AttentionTable, Pattern, Rule, usual_table
from reelforge.runtime.conditioning import rope_tables
from reelforge.runtime.recipe import Backend, Precision, SparseAttention, SparseKind, Target
from tests.export.stage_graphs import GRID, StageGraphs, relative, stage_graphs
from tests.export.tiny_stages import FAMILY, TinyStages

CPU = Target(Backend.CPU)
TOKENS = (GRID[0], GRID[1] // 2, GRID[2] // 2)
TEXT = 7
DIVISORS = st.tuples(*[st.sampled_from([part for part in range(1, size + 1) if size % part == 0]) for size in TOKENS])
LISTS = SparseAttention(SparseKind.LISTS, 4, 2)
BLOCKS = st.sampled_from([(1, 1), (4, 2), (4, 4), (16, 4)])


@dataclass(frozen=True)
class SparseGraphs(StageGraphs):
    """Graphs of a checkpoint whose ``dit`` is sparse; ``table`` says what a step leaves out."""

    sparse: SparseAttention = LISTS
    table: AttentionTable = DENSE

    def inputs(self, name: str) -> dict[str, np.ndarray]:
        given = StageGraphs(self.dense, self.writer).inputs(name)
        dit = self.tiny.spec.dit
        rope = rope_tables(TOKENS, dit.rope_axes, dit.rope_theta)
        found = attention_inputs(self.table, self.sparse, JointSequence(TOKENS, TEXT, dit.heads), 1, rope)
        every = {**given, **found.fixed, **{key: rows[0, ...] for key, rows in found.per_step.items()}}
        return {key: every[key] for key in self.stage(name).inputs}

    @property
    def dense(self) -> TinyStages:
        """The same checkpoint with its usual ``dit``."""
        return replace(self.tiny, stages={stage.name: stage for stage in FAMILY.stages(self.tiny.spec)})

    def but(self, sparse: SparseAttention, table: AttentionTable) -> SparseGraphs:
        """Return graphs of the same weights for another stage and table."""
        stages = {stage.name: stage for stage in FAMILY.stages(self.tiny.spec, 1, sparse)}
        other = SparseGraphs(replace(self.tiny, stages=stages), self.writer, sparse=sparse, table=table)
        other.__dict__["_placed"] = {"dit": self.weights("dit")}
        return other

    def dense_velocity(self) -> np.ndarray:
        """Return what the usual stage computes."""
        stage, graphs = self.dense.stages["dit"], StageGraphs(self.dense, self.writer)
        return run_stage(stage, self.writer.folder, self.weights("dit"), graphs.inputs("dit"))["velocity"]


@contextmanager
def sparse_graphs(checkpoint: Path, folder: Path) -> Iterator[SparseGraphs]:
    with stage_graphs(checkpoint, folder) as graphs:
        yield SparseGraphs(graphs.tiny, graphs.writer)


@pytest.fixture(scope="module")
def graphs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparseGraphs]:
    with sparse_graphs(tiny_checkpoint, tmp_path_factory.mktemp("sparse")) as found:
        yield found


@given(tile=DIVISORS, blocks=BLOCKS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_dense_lists_in_any_order_are_dense_attention(
    graphs: SparseGraphs, tile: tuple[int, int, int], blocks: tuple[int, int]
) -> None:
    """Tokens go in permuted and padded, with their rotary tables, and come out where they were."""
    table = AttentionTable(Pattern.SLIDING_TILE, (Rule(window=(9, 9, 9)),), tile=tile)
    mine = graphs.but(SparseAttention(SparseKind.LISTS, *blocks), table)
    velocity = mine.eager("dit")["velocity"]
    np.testing.assert_allclose(velocity, graphs.dense_velocity(), rtol=0, atol=2e-5)


@given(tile=DIVISORS, blocks=BLOCKS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_all_blocks_are_the_best_ones(
    graphs: SparseGraphs, tile: tuple[int, int, int], blocks: tuple[int, int]
) -> None:
    table = AttentionTable(Pattern.TOP_K, (Rule(share=1.0),), tile=tile)
    velocity = graphs.but(SparseAttention(SparseKind.TOP_K, *blocks), table).eager("dit")["velocity"]
    np.testing.assert_allclose(velocity, graphs.dense_velocity(), rtol=0, atol=2e-5)


@pytest.mark.usefixtures("remembered_traces")
@pytest.mark.parametrize(
    ("kind", "table"),
    [
        (SparseKind.LISTS, DENSE),
        (SparseKind.LISTS, AttentionTable(Pattern.SLIDING_TILE, (Rule(window=(1, 1, 1)),), tile=(1, 2, 1))),
        (
            SparseKind.LISTS,
            AttentionTable(Pattern.SLIDING_TILE, (Rule(heads=(1,), window=(3, 1, 1)), Rule(window=(1, 1, 3)))),
        ),
        (SparseKind.LISTS, AttentionTable(Pattern.RADIAL, (Rule(decay=0.2),))),
        (SparseKind.TOP_K, AttentionTable(Pattern.TOP_K, (Rule(share=0.3),))),
    ],
)
def test_the_graph_is_what_pytorch_computes(graphs: SparseGraphs, kind: SparseKind, table: AttentionTable) -> None:
    mine = graphs.but(SparseAttention(kind, 4, 2), table)
    model = mine.graph("dit", CPU, Precision.FP32)
    blocks = {name.rpartition(".")[0] for name in attention_nodes(model.graph)}
    assert blocks == {"double.0", "double.1", "single.0", "single.1"}
    # One mask for all blocks where the lists are inputs; where a block chooses, one each.
    cuts = [node.inputs[3].producer() for node in attention_nodes(model.graph).values()]
    masks = {cut.inputs[0] for cut in cuts}
    assert len(masks) == (1 if kind is SparseKind.LISTS else 4)
    received, wanted = mine.run(model, "dit"), mine.eager("dit")
    for name in wanted:
        np.testing.assert_allclose(received[name], wanted[name], rtol=0, atol=2e-5)
    loss = relative(wanted["velocity"], graphs.dense_velocity())
    assert loss < 1e-6 if table == DENSE else 1e-3 < loss < 1


@pytest.mark.usefixtures("remembered_traces")
@pytest.mark.parametrize("kind", SparseKind)
def test_half_precision(graphs: SparseGraphs, kind: SparseKind) -> None:
    pattern = Pattern.TOP_K if kind is SparseKind.TOP_K else Pattern.SLIDING_TILE
    mine = graphs.but(SparseAttention(kind, 4, 2), usual_table(pattern))
    received = mine.run(mine.graph("dit", CPU, Precision.FP16), "dit")["velocity"]
    # A choice may differ where scores are close: the error of a step stays small, not that of every number.
    assert relative(received, mine.eager("dit")["velocity"]) < (1e-2 if kind is SparseKind.LISTS else 0.2)
