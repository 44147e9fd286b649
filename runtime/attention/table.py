"""The attention table: which pattern a video's attention has, and its window per step and head; read from a JSON file.

A table says one pattern for the whole video, since tokens have one order, and rules: each names steps and heads and
how wide the pattern is there. The first rule that covers a step and a head counts; where none does, and in the first
``dense_steps`` steps, attention is dense. The module knows neither models nor blocks: whether a table fits a request is
asked with :func:`problems`.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from reelforge.runtime.attention.token_order import Grid
from reelforge.runtime.codec import CodecError, from_json
from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import SparseAttention, SparseKind


class Pattern(enum.Enum):
    """What is left out."""

    DENSE = "dense"  # nothing
    SLIDING_TILE = "sliding-tile"  # what is outside a window of tiles
    RADIAL = "radial"  # ever more of frames that are further away
    TOP_K = "topk"  # the key blocks whose mean matters least to the mean query


@dataclass(frozen=True)
class Rule:
    """How wide the pattern is in some steps and heads; exactly the field of the table's pattern is given.

    Attributes:
        steps: The first and the last step that it covers, counted from 0; None is all.
        heads: Numbers of heads; None is all.
        window: For sliding tiles: odd numbers of tiles in time, height and width.
        decay: For radial attention: factor of the reach in space.
        share: For the best blocks: how many of the image's key blocks are kept, 0 to 1.
    """

    steps: tuple[int, int] | None = None
    heads: tuple[int, ...] | None = None
    window: tuple[int, int, int] | None = None
    decay: float | None = None
    share: float | None = None

    def covers(self, step: int, head: int) -> bool:
        """Return whether the rule speaks of a head in a step."""
        in_steps = self.steps is None or self.steps[0] <= step <= self.steps[1]
        return in_steps and (self.heads is None or head in self.heads)


@dataclass(frozen=True)
class AttentionTable:
    """Which keys attention leaves out.

    Attributes:
        pattern: What is left out.
        rules: How wide, per step and head.
        dense_steps: So many steps come first in which nothing is left out.
        tile: Tokens of a tile in time, height and width, which divide the video's; None chooses one. Tiles order the
            tokens for sliding tiles and the best blocks; radial attention needs whole frames.
    """

    pattern: Pattern
    rules: tuple[Rule, ...] = ()
    dense_steps: int = 0
    tile: tuple[int, int, int] | None = None

    def rule(self, step: int, head: int) -> Rule | None:
        """Return the rule for a head in a step; None is dense."""
        if step < self.dense_steps or self.pattern is Pattern.DENSE:
            return None
        return next((rule for rule in self.rules if rule.covers(step, head)), None)


@dataclass(frozen=True)
class TableProblem:
    """One thing about a table that a bundle or a request does not allow."""

    received: str
    expected: str
    fix: str


DENSE = AttentionTable(Pattern.DENSE)

_FIELDS = {Pattern.SLIDING_TILE: "window", Pattern.RADIAL: "decay", Pattern.TOP_K: "share"}
_USUAL = {
    Pattern.SLIDING_TILE: Rule(window=(3, 3, 3)),
    Pattern.RADIAL: Rule(decay=1.0),
    Pattern.TOP_K: Rule(share=0.25),
}
_EXAMPLES = {"window": "[3, 3, 3]", "decay": "1.0", "share": "0.25"}
_FORM = '{"pattern": ..., "tile": [t, h, w], "dense_steps": K, "rules": [{"steps": [a, b], "heads": [...], ...}]}'


def usual_table(pattern: Pattern) -> AttentionTable:
    """Return the table of a pattern for which none is given: one window for all steps and heads."""
    return AttentionTable(pattern, (_USUAL[pattern],) if pattern in _USUAL else ())


def chosen_table(pattern: str | None, path: Path | None, dense_steps: int | None) -> AttentionTable | None:
    """Return the table that ``--attention``, ``--attention-table`` and ``--dense-steps`` ask for; None if none does.

    Args:
        pattern: A value of :class:`Pattern`.
        path: A table file; its pattern must be ``pattern`` if both are given.
        dense_steps: Replaces the table's.

    Raises:
        RequestError: If the file is no table, the two name different patterns, or there is nothing to be dense before.
    """
    if pattern is None and path is None:
        if dense_steps is not None:
            raise RequestError(
                "--dense-steps says how long attention stays dense, and nothing says what comes after.",
                received=f"--dense-steps {dense_steps}",
                expected="--attention or --attention-table beside it",
                fix="add for example --attention radial",
            )
        return None
    table = usual_table(Pattern(pattern)) if path is None else read_table(path)
    if pattern is not None and table.pattern is not Pattern(pattern):
        raise RequestError(
            f"the attention table {str(path)!r} is of another pattern.",
            received=f"--attention {pattern}, and {table.pattern.value} in the file",
            expected="one pattern",
            fix=f"use --attention {table.pattern.value}, or leave it out",
        )
    return table if dense_steps is None else checked(replace(table, dense_steps=dense_steps))


def read_table(path: Path) -> AttentionTable:
    """Read a table file; fields may be left out where they have a default.

    Raises:
        RequestError: If the file cannot be read, or is no table.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return checked(from_json(AttentionTable, _filled(content)), f"the attention table {str(path)!r}")
    except OSError as error:
        raise RequestError(
            f"the attention table {str(path)!r} cannot be read: {error.strerror or error}.",
            expected="a JSON file",
            fix="check the path",
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError, CodecError) as error:
        raise RequestError(
            f"the attention table {str(path)!r} is no attention table.",
            received=str(error),
            expected=_FORM,
            fix="see docs/sparse_attention.md for an example of each pattern",
        ) from error


def checked(table: AttentionTable, name: str = "the attention table") -> AttentionTable:
    """Return ``table`` if what it says makes sense by itself.

    Raises:
        RequestError: Naming the first field that does not.
    """
    for where, received, expected, fix in _faults(table):
        raise RequestError(f"{name} has {where} that cannot be used.", received=received, expected=expected, fix=fix)
    return table


def possible_patterns(sparse: SparseAttention | None) -> tuple[Pattern, ...]:
    """Return the patterns of a bundle that was built with ``sparse``."""
    if sparse is None:
        return (Pattern.DENSE,)
    lists = (Pattern.SLIDING_TILE, Pattern.RADIAL)
    return (Pattern.DENSE, *((Pattern.TOP_K,) if sparse.kind is SparseKind.TOP_K else lists))


def problems(
    table: AttentionTable, sparse: SparseAttention | None, grid: Grid | None, heads: int, steps: int | None
) -> Iterator[TableProblem]:
    """Yield what is wrong with a table for a request.

    Args:
        table: From :func:`checked`.
        sparse: What the bundle was built for.
        grid: The video's tokens in time, height and width; None looks at nothing that depends on it.
        heads: Of the model.
        steps: Of the request; None likewise.
    """
    name = table.pattern.value
    kind = SparseKind.TOP_K if table.pattern is Pattern.TOP_K else SparseKind.LISTS
    if table.pattern is not Pattern.DENSE and (sparse is None or sparse.kind is not kind):
        fix = f"rebuild with --sparse-attention {kind.value}, or leave attention out"
        expected = " or ".join(pattern.value for pattern in possible_patterns(sparse))
        yield TableProblem(f"attention={name}", f"attention {expected}, as the bundle was built", fix)
        return
    if steps is not None and table.dense_steps > steps:
        yield TableProblem(f"dense_steps={table.dense_steps}", f"dense_steps in 0..{steps}", f"use dense_steps={steps}")
    last = max((rule.steps[1] for rule in table.rules if rule.steps is not None), default=0)
    if steps is not None and last >= steps:
        fix = f"use a table made for {steps} steps, or steps={last + 1}"
        yield TableProblem(f"step {last} of the attention table", f"steps 0..{steps - 1}", fix)
    head = max((head for rule in table.rules for head in rule.heads or ()), default=0)
    if head >= heads:
        yield TableProblem(f"head {head} of the attention table", f"heads 0..{heads - 1}", "use a table of this model")
    tile = table.tile
    if grid is not None and tile is not None and any(size % part for size, part in zip(grid, tile, strict=True)):
        sizes = [[part for part in range(1, size + 1) if size % part == 0] for size in grid]
        expected = "tile sizes among " + ", ".join(str(one).replace(" ", "") for one in sizes)
        yield TableProblem(f"tile={list(tile)}", expected, "use such a tile, or leave it out to have one chosen")


def _filled(content: Any) -> Any:
    """Add the fields that a file may leave out, as the strict decoder wants them."""
    if not isinstance(content, dict):
        return content
    rules = content.get("rules", [])
    filled = [
        {**dict.fromkeys(field.name for field in fields(Rule)), **rule} if isinstance(rule, dict) else rule
        for rule in (rules if isinstance(rules, list) else [])
    ]
    return {"dense_steps": 0, "tile": None, **content, "rules": filled if isinstance(rules, list) else rules}


def _faults(table: AttentionTable) -> Iterator[tuple[str, str, str, str]]:
    """Yield (where, received, expected, fix) of what makes no sense."""
    if table.dense_steps < 0:
        yield "dense_steps", str(table.dense_steps), "0 or more", "leave it out for none"
    tiled = table.pattern in (Pattern.SLIDING_TILE, Pattern.TOP_K)
    if table.tile is not None and not tiled:
        yield "a tile", str(list(table.tile)), f"none: {table.pattern.value} attention has no tiles", "leave it out"
    if table.tile is not None and min(table.tile) < 1:
        yield "a tile", str(list(table.tile)), "three numbers of at least 1", "use for example [3, 5, 8]"
    if table.pattern is Pattern.DENSE and table.rules:
        yield "rules", f"{len(table.rules)}", "none: dense attention leaves nothing out", "leave them out"
        return
    if table.pattern is not Pattern.DENSE and not table.rules:
        yield "rules", "none", "at least one", f'write for example {{"{_FIELDS[table.pattern]}": ...}}'
    for number, rule in enumerate(table.rules):
        for where, received, expected, fix in _rule_faults(rule, _FIELDS[table.pattern]):
            yield f"{where} of rule {number}", received, expected, fix


def _rule_faults(rule: Rule, field: str) -> Iterator[tuple[str, str, str, str]]:
    example = f'write for example "{field}": {_EXAMPLES[field]}'
    for other in _EXAMPLES:
        if other != field and getattr(rule, other) is not None:
            yield f"a {other}", str(getattr(rule, other)), f"{field}, which the pattern has", example
    if getattr(rule, field) is None:
        yield f"no {field}", "nothing", f"a {field}", example
    if rule.window is not None and any(size < 1 or size % 2 == 0 for size in rule.window):
        yield "a window", str(list(rule.window)), "three odd numbers of tiles, so that it has a centre", example
    if rule.decay is not None and not (math.isfinite(rule.decay) and rule.decay > 0):
        yield "a decay", f"{rule.decay:g}", "a finite number above 0", example
    if rule.share is not None and not 0 < rule.share <= 1:
        yield "a share", f"{rule.share:g}", "a number above 0 and at most 1", example
    if rule.share is not None and rule.heads is not None:
        yield "heads", str(list(rule.heads)), "none: all heads keep the same share of their own blocks", "leave it out"
    if rule.steps is not None and not 0 <= rule.steps[0] <= rule.steps[1]:
        yield "steps", str(list(rule.steps)), "the first and the last step, counted from 0", 'write "steps": [10, 49]'
    heads = rule.heads
    if heads is not None and (not heads or min(heads) < 0 or len(set(heads)) != len(heads)):
        yield "heads", str(list(heads)), "numbers of heads from 0, each once", "leave heads out for all"
