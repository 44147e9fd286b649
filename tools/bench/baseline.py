"""Ratios that must not get worse: the stored ones with their tolerances, and how measured ones are judged.

A ratio is ours over something measured in the same minutes, so lower is better and the machine's speed cancels out,
though not its kind: a CPU with other instructions has other ratios. The module measures nothing.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeGuard

from reelforge.runtime.errors import OutputError, RequestError

SCHEMA = 1
SPREADS, LEAST_TOLERANCE = 3, 0.1
UPDATE = "python -m reelforge.tools.bench.check --update"
RESTORE = f"restore the file from version control, or write it anew with `{UPDATE}` and review the difference"


@dataclass(frozen=True)
class Entry:
    """A stored ratio; one up to ``1 + tolerance`` times as large is accepted.

    Attributes:
        ratio: The median over rounds, or over runs if there were several.
        tolerance: A share of it.
        spread: How far runs of the same commit were from their median at most, as a share; 0 if that is not known.
        runs: How many of them there were.
    """

    ratio: float
    tolerance: float
    spread: float = 0.0
    runs: int = 1

    @property
    def limit(self) -> float:
        """The largest ratio that is accepted."""
        return self.ratio * (1 + self.tolerance)


@dataclass(frozen=True)
class Baseline:
    """All stored ratios by name, and in words where they were measured."""

    ratios: dict[str, Entry]
    machine: str = ""
    versions: str = ""
    commit: str = ""
    date: str = ""
    schema: int = field(default=SCHEMA)


class Verdict(Enum):
    """What became of a ratio; only the first is a failure."""

    WORSE = "worse"
    SAME = "same"
    BETTER = "better"


@dataclass(frozen=True)
class Judged:
    """One ratio beside its entry; ``samples`` are of the rounds that were judged."""

    name: str
    entry: Entry
    samples: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The median over rounds."""
        return statistics.median(self.samples)

    @property
    def verdict(self) -> Verdict:
        """A ratio that is better by more than the tolerance is told apart: the baseline should follow."""
        if self.ratio > self.entry.limit:
            return Verdict.WORSE
        return Verdict.BETTER if self.ratio < self.entry.ratio / (1 + self.entry.tolerance) else Verdict.SAME


def judge(baseline: Baseline, measured: Mapping[str, tuple[float, ...]]) -> list[Judged]:
    """Return every measured ratio beside its entry, in the baseline's order."""
    return [Judged(name, entry, measured[name]) for name, entry in baseline.ratios.items() if name in measured]


def read_baseline(path: Path, names: Collection[str] | None = None) -> Baseline:
    """Read a baseline of exactly the ratios ``names``, or of any.

    Raises:
        RequestError: If there is no such file, if it is no baseline of this schema, or if it has other ratios.
    """
    baseline = _parse(path)
    if names is None:
        return baseline
    missing = [name for name in names if name not in baseline.ratios]
    if missing:
        raise RequestError(
            f"baseline {path} has no entry for {len(missing)} of the measured ratios.",
            received=", ".join(baseline.ratios) or "no entries",
            expected=f"also {', '.join(missing)}",
            fix=f"measure and store them: {UPDATE}",
        )
    unknown = [name for name in baseline.ratios if name not in names]
    if unknown:
        raise RequestError(
            f"baseline {path} has entries that nothing measures.",
            received=", ".join(unknown),
            expected=f"only {', '.join(names)}",
            fix=f"if a measurement was removed on purpose, store the others anew: {UPDATE}",
        )
    return baseline


def _parse(path: Path) -> Baseline:
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RequestError(
            f"there is no baseline at {path}.", expected="a file of stored ratios", fix=f"store one: {UPDATE}"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"baseline {path} is not JSON.", received=error, fix=RESTORE) from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        schema = found.get("schema") if isinstance(found, dict) else type(found).__name__
        raise RequestError(
            f"baseline {path} is of another schema.", received=schema, expected=f"schema {SCHEMA}", fix=RESTORE
        )
    ratios = found.get("ratios")
    if not isinstance(ratios, dict):
        raise RequestError(
            f"baseline {path} has no ratios.", received=ratios, expected="an object of entries by name", fix=RESTORE
        )
    entries = {name: _entry(path, name, entry) for name, entry in ratios.items()}
    machine, versions, commit, date = (str(found.get(key, "")) for key in ("machine", "versions", "commit", "date"))
    return Baseline(entries, machine, versions, commit, date)


def _entry(path: Path, name: str, found: Any) -> Entry:
    values = found if isinstance(found, dict) else {}
    ratio, tolerance = values.get("ratio"), values.get("tolerance")
    spread, runs = values.get("spread", 0.0), values.get("runs", 1)
    known = isinstance(runs, int) and runs > 0 and (spread == 0 or _is_positive(spread))
    if not _is_positive(ratio) or not _is_positive(tolerance) or not known:
        raise RequestError(
            f"baseline {path} has a damaged entry {name!r}.",
            received=json.dumps(found),
            expected='{"ratio": R, "tolerance": T}, both positive numbers',
            fix=RESTORE,
        )
    return Entry(ratio, tolerance, float(spread), runs)


def _is_positive(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write a baseline.

    Raises:
        OutputError: If the file cannot be written.
    """
    text = json.dumps({"schema": baseline.schema, **asdict(baseline)}, indent=2)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"baseline {path} cannot be written.",
            received=error,
            expected="a file in a folder that exists and is writable",
            fix="give another file with --baseline",
        ) from error


def updated(
    stored: Baseline | None, measured: Mapping[str, tuple[float, ...]], tolerances: Mapping[str, float]
) -> dict[str, Entry]:
    """Return entries for what was measured, with the tolerances that are stored already, else ``tolerances``."""
    known = stored.ratios if stored is not None else {}
    return {
        name: replace(known.get(name, Entry(1.0, tolerances[name])), ratio=round(statistics.median(samples), 4))
        for name, samples in measured.items()
    }


def spread_entry(medians: Sequence[float]) -> Entry:
    """Return the entry of a ratio that several runs of one commit measured, the median of each given.

    Both the stored ratio and a later one may be off by the spread; what is left of the tolerance is for what few runs
    have not shown. A tolerance below ``LEAST_TOLERANCE`` is not worth the failures.
    """
    middle = statistics.median(medians)
    spread = max(abs(one / middle - 1) for one in medians)
    tolerance = max(LEAST_TOLERANCE, math.ceil(100 * SPREADS * spread - 1e-9) / 100)
    return Entry(round(middle, 4), tolerance, round(spread, 4), len(medians))
