"""Resumable training state: one file per job, replaced atomically, kept outside the repository."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

STATE_VARIABLE = "REELFORGE_TRAIN_STATE"


def folder() -> Path:
    """Return the state folder: $REELFORGE_TRAIN_STATE, or ~/.cache/reelforge/train-demo."""
    path = Path(os.environ.get(STATE_VARIABLE, "~/.cache/reelforge/train-demo")).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def save(name: str, value: Any) -> None:
    """Write ``value`` as ``<name>.pt`` so that a kill at any moment leaves the old file or the new one whole."""
    target = folder() / f"{name}.pt"
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    torch.save(value, temporary)
    temporary.replace(target)


def load(name: str) -> Any | None:
    """Return what ``save`` stored under ``name``, or None before the first save."""
    target = folder() / f"{name}.pt"
    return torch.load(target, weights_only=True) if target.exists() else None


def log(name: str, record: dict[str, float]) -> None:
    """Append one line to ``<name>.jsonl`` and print it."""
    line = json.dumps({key: round(value, 6) for key, value in record.items()})
    with (folder() / f"{name}.jsonl").open("a") as stream:
        stream.write(line + "\n")
    print(name, line, flush=True)


def read_log(name: str) -> list[dict[str, float]]:
    """Return the records of ``log``; a step that was repeated after a kill appears once, as last written."""
    path = folder() / f"{name}.jsonl"
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [by_step for _, by_step in sorted({int(record["step"]): record for record in records}.items())]
