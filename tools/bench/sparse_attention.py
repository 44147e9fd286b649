"""Sparse attention: ``python -m reelforge.tools.bench.sparse_attention -o benchmarks/sparse_attention.md``.

Run it from the repository's root. Every finished setting is kept in the work folder, so that an interrupted run goes on
where it stopped; ``--fresh`` measures again. What is measured is in ``sparse_attention_measure``.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from reelforge.runtime.codec import from_json
from reelforge.tools.bench import report
from reelforge.tools.bench.sparse_attention_chart import draw
from reelforge.tools.bench.sparse_attention_measure import Result, Studio, chosen_cases, settings

COMMAND = "python -m reelforge.tools.bench.sparse_attention -o benchmarks/sparse_attention.md"
PACKAGES = ("onnxruntime", "onnx-ir", "onnx", "torch", "numpy")
DENSE_STEPS = (0, 5)
STEPS = 20
NO_DIFFERENCE_DB = 100.0
_HEADINGS = (
    "keys left out by",
    "blocks",
    "dense steps",
    "visited",
    "PSNR dB, median (worst)",
    "shape",
    "motion",
    "all four",
    "by seed",
)


@dataclass(frozen=True)
class Measured:
    """Everything that is in the file.

    Attributes:
        about: What is equal in all settings; a run with other numbers starts anew.
        dense_rates: Of dense attention.
        same_db: Lowest PSNR of the sparse bundles with dense attention.
        results: By setting.
    """

    about: str
    dense_rates: dict[str, tuple[float, ...]]
    same_db: dict[str, float]
    results: tuple[Result, ...]


def measure(checkpoint: Path, work: Path, prompts: int, seeds: int, fresh: bool) -> Measured:
    """Measure every setting that the work folder does not hold yet.

    Args:
        checkpoint: The demonstration checkpoint.
        work: Folder that keeps results.
        prompts: Of held-out scenes.
        seeds: Videos per prompt.
        fresh: Whether to measure all of them again.
    """
    kept = work / "results.json"
    about = f"{prompts} prompts of held-out scenes x {seeds} seeds, {STEPS} steps, commit {report.commit()}"
    done = from_json(Measured, json.loads(kept.read_text())) if kept.exists() and not fresh else None
    if done is not None and done.about.rpartition(",")[0] != about.rpartition(",")[0]:
        done = None
    with tempfile.TemporaryDirectory(dir=work) as folder:
        studio = Studio(checkpoint, Path(folder), chosen_cases(prompts), range(seeds))
        found = Measured(about, studio.dense_rates, {}, ()) if done is None else done
        known = {_key(result) for result in found.results}
        wanted = settings(DENSE_STEPS)
        for number, setting in enumerate(wanted, 1):
            key = (setting.table.pattern.value, setting.blocks, setting.name, setting.table.dense_steps)
            if key in known:
                continue
            bundle = f"{setting.table.pattern.value} {setting.blocks[0]}x{setting.blocks[1]}"
            same = found.same_db
            if bundle not in same:
                same = {**same, bundle: min(studio.check_dense(setting), NO_DIFFERENCE_DB)}
            result = studio.measure(setting)
            found = Measured(found.about, found.dense_rates, same, (*found.results, result))
            kept.write_text(json.dumps(asdict(found)), encoding="utf-8")
            click.echo(f"{number}/{len(wanted)} {key}: {_psnr(result)}, together {_mean(result, 'together'):.3f}")
    return found


def document(found: Measured, chart: str) -> list[str]:
    """Return the lines of the file."""
    dense = {name: statistics.mean(rates) for name, rates in found.dense_rates.items()}
    together = found.dense_rates["together"]
    return [
        "# Sparse attention on the demonstration model",
        "",
        *report.environment(COMMAND, PACKAGES),
        f"- {found.about} (of the measurements)",
        "",
        "What leaving out keys does to videos of 64x64x9, in fp32 on the CPU, where a mask hides what a kernel would",
        "skip: this is about quality and says nothing about time. The model has 3x4x4 image tokens and 2 heads and was",
        "never trained for sparse attention; its text (up to 16 tokens) is always visible and counts as visited.",
        "Numbers of a large model with thousands of blocks will be other ones.",
        "",
        "**Visited** is the share of the pairs of blocks that dense attention visits, mean over all steps. **PSNR** is",
        "against dense attention from the same noise. **Shape, motion, all four** (background and colour too) are the",
        "shares of videos that agree with their prompt, as `demo/train/checker.py` judges; *by seed* has the lowest",
        "and the highest. There are fewer videos than in [the demo model's file](demo_model.md), so dense attention",
        f"has another share here, and hundredths are no difference: each video is worth {1 / _videos(found):.3f}.",
        "",
        f"Dense attention: shape {dense['shape']:.3f}, motion {dense['motion']:.3f}, all four {dense['together']:.3f} "
        f"({min(together):.3f}-{max(together):.3f}).",
        "",
        f"![Density against PSNR and accuracy]({chart})",
        "",
        *report.table(_HEADINGS, _rows(found.results)),
        "",
        "Blocks of 1x1 are single tokens; with 4x4, queries and keys are 2x2 patches of a frame (tiles 1x2x2). Windows",
        "of sliding tiles count tiles in time, height and width.",
        "",
        "## The same bundles with dense attention",
        "",
        "Lowest PSNR of four videos, in dB, against the bundle without sparse attention;",
        f"{NO_DIFFERENCE_DB:.0f} stands for that and more: rounding in another order at most.",
        "",
        *report.table(("bundle", "PSNR dB"), [(name, f"{ratio:.1f}") for name, ratio in found.same_db.items()]),
    ]


def _videos(found: Measured) -> int:
    return max((len(result.psnr_db) for result in found.results), default=1)


def _rows(results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    for result in sorted(results, key=lambda one: (one.pattern, one.blocks, one.dense_steps, -one.density)):
        by_seed = result.rates["together"]
        yield (
            f"{result.pattern} {result.name}",
            f"{result.blocks[0]}x{result.blocks[1]}",
            str(result.dense_steps),
            f"{result.density:.2f}",
            _psnr(result),
            f"{_mean(result, 'shape'):.3f}",
            f"{_mean(result, 'motion'):.3f}",
            f"{_mean(result, 'together'):.3f}",
            f"{min(by_seed):.3f}-{max(by_seed):.3f}",
        )


def _psnr(result: Result) -> str:
    median, worst = statistics.median(result.psnr_db), min(result.psnr_db)
    return " ".join(
        text.format(f"{ratio:.1f}" if ratio < NO_DIFFERENCE_DB else f"> {NO_DIFFERENCE_DB:.0f}")
        for text, ratio in (("{}", median), ("({})", worst))
    )


def _mean(result: Result, attribute: str) -> float:
    return statistics.mean(result.rates[attribute])


def _key(result: Result) -> tuple[str, tuple[int, int], str, int]:
    return (result.pattern, result.blocks, result.name, result.dense_steps)


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Markdown file.")
@click.option(
    "--checkpoint", default="demo/checkpoint", show_default=True, type=click.Path(path_type=Path, exists=True)
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("build/bench/sparse_attention"),
    show_default=True,
    help="Folder for results, and while running for bundles.",
)
@click.option("--prompts", default=24, show_default=True, type=click.IntRange(1, 72), help="Of held-out scenes.")
@click.option("--seeds", default=2, show_default=True, type=click.IntRange(1), help="Videos per prompt.")
@click.option("--fresh", is_flag=True, help="Measure again what the work folder has.")
def main(output: Path, checkpoint: Path, work: Path, prompts: int, seeds: int, fresh: bool) -> None:
    """Measure sparse attention and write one Markdown file and its chart."""
    work.mkdir(parents=True, exist_ok=True)
    found = measure(checkpoint, work, prompts, seeds, fresh)
    chart = output.with_suffix(".png")
    chart.write_bytes(draw(found.results, statistics.mean(found.dense_rates["together"])))
    report.write(output, document(found, chart.name))
    click.echo(f"wrote {output} and {chart}")


if __name__ == "__main__":
    main()
