"""Command-line options about sparse attention: what a build makes possible, and what a video leaves out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from reelforge.runtime.attention.table import Pattern
from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import SparseAttention, SparseKind

F = TypeVar("F", bound=Callable[..., Any])


def sparse_build_options(function: F) -> F:
    """Add the options of a build: ``sparse_attention`` and ``attention_blocks``, for :func:`sparse_attention_of`."""
    options = (
        click.option(
            "--sparse-attention",
            type=click.Choice([kind.value for kind in SparseKind]),
            help="Let dit's attention leave out keys, as each request says: by patterns of positions (lists: sliding "
            "tiles, radial) or by itself (topk). For --target cpu, which saves no time.",
        ),
        click.option(
            "--attention-blocks",
            metavar="QUERIESxKEYS",
            help="Tokens that are visited or left out together, with --sparse-attention.  [default: 128x64]",
        ),
    )
    return _with(function, options)


def attention_options(function: F) -> F:
    """Add the options of a video: ``attention``, ``attention_table`` and ``dense_steps``, for ``chosen_table``."""
    options = (
        click.option(
            "--attention",
            type=click.Choice([pattern.value for pattern in Pattern]),
            help="What attention leaves out, in bundles built with --sparse-attention.  [default: dense, nothing]",
        ),
        click.option(
            "--attention-table",
            type=click.Path(path_type=Path),
            help="JSON file with windows per step and head (see docs/sparse_attention.md).",
        ),
        click.option(
            "--dense-steps",
            type=click.IntRange(min=0),
            help="So many steps come first in which nothing is left out.  [default: the table's, or 0]",
        ),
    )
    return _with(function, options)


def sparse_attention_of(kind: str | None, blocks: str | None) -> SparseAttention | None:
    """Return what the options of a build say; None for dense attention.

    Raises:
        RequestError: If blocks cannot be read, or are given for dense attention.
    """
    if kind is None:
        if blocks is not None:
            raise RequestError(
                "blocks are given for attention that leaves nothing out.",
                received=f"--attention-blocks {blocks}",
                expected="--sparse-attention beside it",
                fix="add --sparse-attention lists, or leave the blocks out",
            )
        return None
    if blocks is None:
        return SparseAttention(SparseKind(kind))
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", blocks.strip())
    if match is None:
        raise RequestError(
            f"the attention blocks {blocks!r} cannot be read.",
            received=blocks,
            expected="QUERIESxKEYS, two numbers of tokens",
            fix="write for example 128x64",
        )
    return SparseAttention(SparseKind(kind), int(match[1]), int(match[2]))


def _with(function: F, options: tuple[Callable[[F], F], ...]) -> F:
    for option in reversed(options):
        function = option(function)
    return function
