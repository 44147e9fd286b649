"""Attention tables: which rule counts, what a file may leave out, and what each refusal says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelforge.runtime.attention.table import (
    DENSE,
    AttentionTable,
    Pattern,
    Rule,
    checked,
    chosen_table,
    possible_patterns,
    problems,
    read_table,
    usual_table,
)
from reelforge.runtime.codec import to_json
from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import SparseAttention, SparseKind

LISTS, TOP_K = SparseAttention(SparseKind.LISTS), SparseAttention(SparseKind.TOP_K)
NARROW, WIDE = Rule(window=(1, 1, 1)), Rule(window=(3, 3, 3))


def written(folder: Path, content: Any) -> Path:
    path = folder / "table.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_the_first_rule_that_covers_counts() -> None:
    rules = (Rule((2, 4), (1,), window=(1, 1, 1)), Rule((3, 9), window=(3, 3, 3)), Rule(heads=(0,), window=(5, 5, 5)))
    table = AttentionTable(Pattern.SLIDING_TILE, rules, dense_steps=1)
    assert table.rule(0, 0) is None  # a dense step
    assert table.rule(2, 0) is rules[2]
    assert table.rule(2, 1) is rules[0]
    assert table.rule(4, 1) is rules[0]
    assert table.rule(5, 1) is rules[1]
    assert table.rule(9, 0) is rules[1]
    assert table.rule(10, 0) is rules[2]
    assert table.rule(10, 1) is None  # no rule says anything
    assert DENSE.rule(0, 0) is None


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 3))
def test_dense_steps_come_first(dense: int, step: int, head: int) -> None:
    table = AttentionTable(Pattern.SLIDING_TILE, (WIDE,), dense)
    assert (table.rule(step, head) is None) == (step < dense)


def test_a_file_may_leave_out_what_has_a_default(tmp_path: Path) -> None:
    table = read_table(
        written(tmp_path, {"pattern": "radial", "rules": [{"decay": 2}, {"steps": [3, 5], "decay": 0.5}]})
    )
    assert table == AttentionTable(Pattern.RADIAL, (Rule(decay=2.0), Rule((3, 5), decay=0.5)))
    assert read_table(written(tmp_path, {"pattern": "dense"})) == DENSE


@pytest.mark.parametrize("pattern", Pattern)
def test_what_is_written_is_read(tmp_path: Path, pattern: Pattern) -> None:
    table = usual_table(pattern)
    assert read_table(written(tmp_path, to_json(table))) == table
    assert chosen_table(pattern.value, None, None) == table


FILES: list[tuple[Any, str, str]] = [
    ("{", "is no attention table", "Expecting property name"),
    ("[]", "is no attention table", "expected an object"),
    ({}, "is no attention table", "missing fields"),
    ({"pattern": "dense", "window": 3}, "is no attention table", "unknown fields"),
    ({"pattern": "round"}, "is no attention table", "expected one of 'dense', 'sliding-tile', 'radial', 'topk'"),
    ({"pattern": "radial", "rules": 3}, "is no attention table", "$.rules: expected a list"),
    ({"pattern": "radial", "rules": [3]}, "is no attention table", "$.rules[0]: expected an object"),
    ({"pattern": "radial", "rules": [{"size": 1}]}, "is no attention table", "unknown fields ['size']"),
    ({"pattern": "radial", "dense_steps": -1, "rules": [{"decay": 1}]}, "has dense_steps that cannot", "-1"),
    ({"pattern": "radial", "tile": [1, 1, 1], "rules": [{"decay": 1}]}, "has a tile that cannot", "[1, 1, 1]"),
    ({"pattern": "topk", "tile": [1, 0, 1], "rules": [{"share": 1}]}, "has a tile that cannot", "[1, 0, 1]"),
    ({"pattern": "radial"}, "has rules that cannot", "none"),
    ({"pattern": "dense", "rules": [{"decay": 1}]}, "has rules that cannot", "1"),
    ({"pattern": "radial", "rules": [{}]}, "has no decay of rule 0 that cannot", "nothing"),
    ({"pattern": "radial", "rules": [{"decay": 1, "share": 0.5}]}, "has a share of rule 0 that cannot", "0.5"),
    ({"pattern": "radial", "rules": [{"decay": 1}, {"decay": 0}]}, "has a decay of rule 1 that cannot", "0"),
    ({"pattern": "sliding-tile", "rules": [{"window": [3, 2, 3]}]}, "has a window of rule 0", "[3, 2, 3]"),
    ({"pattern": "sliding-tile", "rules": [{"window": [3, -1, 3]}]}, "has a window of rule 0", "[3, -1, 3]"),
    ({"pattern": "topk", "rules": [{"share": 0}]}, "has a share of rule 0", "0"),
    ({"pattern": "topk", "rules": [{"share": 1.5}]}, "has a share of rule 0", "1.5"),
    ({"pattern": "topk", "rules": [{"share": 0.5, "heads": [0]}]}, "has heads of rule 0", "[0]"),
    ({"pattern": "radial", "rules": [{"decay": 1, "steps": [5, 4]}]}, "has steps of rule 0", "[5, 4]"),
    ({"pattern": "radial", "rules": [{"decay": 1, "steps": [-1, 4]}]}, "has steps of rule 0", "[-1, 4]"),
    ({"pattern": "radial", "rules": [{"decay": 1, "heads": []}]}, "has heads of rule 0", "[]"),
    ({"pattern": "radial", "rules": [{"decay": 1, "heads": [1, 1]}]}, "has heads of rule 0", "[1, 1]"),
    ({"pattern": "radial", "rules": [{"decay": 1, "heads": [-1]}]}, "has heads of rule 0", "[-1]"),
]


@pytest.mark.parametrize(("content", "where", "received"), FILES)
def test_files_that_are_refused(tmp_path: Path, content: Any, where: str, received: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(RequestError) as caught:
        read_table(path)
    assert str(path) in caught.value.where
    assert where in caught.value.where
    assert received in str(caught.value.received)
    assert caught.value.expected
    assert caught.value.fix


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        read_table(tmp_path / "nothing.json")
    path = tmp_path / "table.json"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(RequestError, match="is no attention table"):
        read_table(path)


def test_options_that_say_nothing_or_too_much(tmp_path: Path) -> None:
    assert chosen_table(None, None, None) is None
    with pytest.raises(RequestError, match="nothing says what comes after") as caught:
        chosen_table(None, None, 3)
    assert caught.value.fix == "add for example --attention radial"
    path = written(tmp_path, to_json(usual_table(Pattern.RADIAL)))
    with pytest.raises(RequestError, match="is of another pattern") as caught:
        chosen_table("topk", path, None)
    assert caught.value.fix == "use --attention radial, or leave it out"
    assert chosen_table("radial", path, 7) == AttentionTable(Pattern.RADIAL, (Rule(decay=1.0),), 7)
    with pytest.raises(RequestError, match="the attention table has dense_steps that cannot be used"):
        chosen_table(None, path, -1)


@pytest.mark.parametrize(
    ("table", "sparse", "received", "fix"),
    [
        (usual_table(Pattern.RADIAL), None, "attention=radial", "rebuild with --sparse-attention lists"),
        (usual_table(Pattern.TOP_K), None, "attention=topk", "rebuild with --sparse-attention topk"),
        (usual_table(Pattern.TOP_K), LISTS, "attention=topk", "rebuild with --sparse-attention topk"),
        (usual_table(Pattern.SLIDING_TILE), TOP_K, "attention=sliding-tile", "rebuild with --sparse-attention lists"),
        (AttentionTable(Pattern.RADIAL, (Rule(decay=1),), 21), LISTS, "dense_steps=21", "use dense_steps=20"),
        (
            AttentionTable(Pattern.RADIAL, (Rule((3, 20), decay=1),)),
            LISTS,
            "step 20 of",
            "made for 20 steps, or steps=21",
        ),
        (AttentionTable(Pattern.RADIAL, (Rule(heads=(0, 2), decay=1),)), LISTS, "head 2 of", "a table of this model"),
        (AttentionTable(Pattern.SLIDING_TILE, (WIDE,), 0, (2, 2, 2)), LISTS, "tile=[2, 2, 2]", "leave it out"),
    ],
)
def test_what_a_request_refuses(table: AttentionTable, sparse: SparseAttention | None, received: str, fix: str) -> None:
    (problem,) = problems(checked(table), sparse, (3, 4, 6), heads=2, steps=20)
    assert received in problem.received
    assert fix in problem.fix
    assert problem.expected


def test_what_a_request_allows() -> None:
    table = AttentionTable(Pattern.SLIDING_TILE, (Rule((0, 19), (0, 1), window=(1, 3, 3)), WIDE), 20, (3, 2, 6))
    assert not list(problems(table, LISTS, (3, 4, 6), heads=2, steps=20))
    for sparse in (None, LISTS, TOP_K):
        assert not list(problems(DENSE, sparse, (3, 4, 6), heads=2, steps=20))
        for pattern in Pattern:
            found = list(problems(usual_table(pattern), sparse, (3, 4, 6), heads=2, steps=20))
            assert bool(found) != (pattern in possible_patterns(sparse))


def test_the_expected_tiles_are_those_that_divide() -> None:
    (problem,) = problems(AttentionTable(Pattern.TOP_K, (Rule(share=1),), 0, (2, 5, 1)), TOP_K, (3, 4, 6), 2, 20)
    assert problem.expected == "tile sizes among [1,3], [1,2,4], [1,2,3,6]"
