"""The ``reelforge calibrate`` command: a bundle and prompts to a scale file.

Knows the options and the progress display; the work is in ``export.calibrate``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from reelforge.runtime.errors import OutputError, RequestError
from reelforge.runtime.recipe import Recipe, VideoShape, parse_precisions, resolve_precisions
from reelforge.tools import console
from reelforge.tools.quantisation_options import calibration_options, precision_of


@click.command("calibrate", epilog=console.EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="The scale file. An existing one is replaced when the new one is complete.",
)
@click.option("--precision", required=True, help="What will be built: int8, fp8, or for example dit=fp8,llm=int8.")
@click.option(
    "--attention", type=click.Choice(["fp8", "int8"]), help="Also observe the queries, keys and values of dit."
)
@calibration_options
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    help="Folder in which the work is saved after every step. The same command continues there if it was interrupted; "
    "remove the folder afterwards.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads per operator.  [default: one per core]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object about the result on stdout, and no bars.")
def calibrate(
    bundle: Path,
    output: Path,
    precision: str,
    attention: str | None,
    prompts: Path | None,
    method: str,
    percentile: float,
    smoothing: float | None,
    seed: int,
    steps: int | None,
    shape: str | None,
    memory: float,
    state: Path | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Find the scales for 8-bit layers by running BUNDLE, which is in fp32 or fp16, over prompts and all steps.

    The scale file serves `build-engine --scales` and `reelforge sensitivity`. The last quarter of the prompts is not
    used: it is what `build-engine` measures the result with. The same bundle, prompts and seed give the same bytes.
    Needs the compiler's libraries: pip install 'reelforge[export]'.

    \b
    Examples:
      reelforge calibrate hv.bundle -o hv.scales --precision dit=fp8
      reelforge calibrate hv.bundle -o hv.scales --precision int8 --smoothing 0.5 --method mse --state hv.state
    """  # noqa: D301 - \b is click's mark for text that it does not wrap
    words = parse_precisions(precision)
    size = None if shape is None else VideoShape.parse(shape)
    _require_folder(output)
    from reelforge.calibration.prompts import DEFAULT_PROMPTS, read_prompts, split_prompts
    from reelforge.calibration.scale_file import write_scale_file
    from reelforge.calibration.scale_methods import ScaleMethod
    from reelforge.export.calibrate import CalibrationOptions
    from reelforge.export.calibrate import calibrate as run
    from reelforge.export.family import FAMILIES
    from reelforge.export.quantisation import applicable_groups, attention_formats, quantised_formats
    from reelforge.export.verify import bundle_stages
    from reelforge.runtime.bundle.open import Bundle

    used, _ = split_prompts(DEFAULT_PROMPTS if prompts is None else read_prompts(prompts))
    opened = Bundle.open(bundle)
    spec = opened.manifest.spec
    family = FAMILIES[spec.family]
    rules = family.quantisation(spec)
    resolved = resolve_precisions(words, family.stage_names, family.quantised_by_default)
    recipe = Recipe(resolved, attention=precision_of(attention))
    if not any(each.quantised for each in resolved.values()) and attention is None:
        raise RequestError(
            f"--precision {precision} has nothing to calibrate.",
            received=precision,
            expected="int8 or fp8 for at least one stage",
            fix="write for example --precision dit=int8",
        )
    stages = {stage.name: stage for stage in bundle_stages(opened)}
    for stage in recipe.quantised_stages():
        opened.stage(stage)  # a bundle built with --stages may lack it
    formats = quantised_formats(recipe, rules, stages)
    options = CalibrationOptions(
        prompts=used,
        method=ScaleMethod(method),
        percentile=percentile,
        smoothing=smoothing,
        seed=seed,
        steps=steps,
        shape=size,
        state=state,
        memory_bytes=int(memory * (1 << 30)),
        threads=threads,
    )
    started = time.monotonic()
    with _progress(as_json) as report:
        groups = applicable_groups(rules, formats)
        provenance, tensors = run(opened, formats, groups, options, report, attention_formats(recipe, rules))
    write_scale_file(output, provenance, tensors)
    seconds = time.monotonic() - started
    if as_json:
        result = {"output": str(output), "scales": len(tensors), "seconds": round(seconds, 3)}
        about = {
            "checkpoint": provenance.checkpoint,
            "format": provenance.format,
            "method": provenance.method,
            "sampling": provenance.sampling,
        }
        click.echo(json.dumps({**result, **about}))
    else:
        text = f"{output}: {len(tensors)} tensors, {provenance.format}, {provenance.method}, {provenance.sampling}"
        click.echo(f"{text}, in {seconds:.1f} s", err=True)


def _require_folder(output: Path) -> None:
    """Refuse, before any work, what could not be written after it."""
    if not output.parent.is_dir() or output.is_dir():
        raise OutputError(
            f"the scale file cannot be written to {str(output)!r}.",
            expected="a file in a folder that exists",
            fix="choose another path",
        )


@contextmanager
def _progress(hidden: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show one bar per stage on stderr."""
    columns = (
        TextColumn("{task.description:>18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    terminal = Console(stderr=True)
    with Progress(*columns, console=terminal, disable=hidden or not terminal.is_terminal) as bars:
        tasks = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report
