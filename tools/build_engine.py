"""The ``build-engine`` command: a checkpoint in, a sealed bundle out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import Precision, Target, VideoShape
from reelforge.tools import console

if TYPE_CHECKING:
    from reelforge.export.build import BuildEvents
    from reelforge.runtime.manifest import Manifest, StageEntry


@click.command(
    "build-engine",
    epilog=console.EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Bundle folder; must not exist.")
@click.option("--target", default="cpu", show_default=True, help="Backend that will execute the engines.")
@click.option(
    "--precision",
    type=click.Choice([precision.value for precision in Precision]),
    default=Precision.FP32.value,
    show_default=True,
    help="Arithmetic of products and convolutions. Norms, softmax, latents and timesteps are always fp32.",
)
@click.option(
    "--shapes",
    default="",
    help="Videos to serve, HEIGHTxWIDTHxFRAMES separated by commas, e.g. 720x1280x129,544x960x129. Requests must then "
    "lie between the smallest and the largest, per dimension, or be one frame. Any size by default.",
)
@click.option("--stages", default="", help="Build only these, separated by commas; such a bundle cannot generate.")
@click.option(
    "--batch", default=1, show_default=True, type=click.IntRange(1), help="Videos per call of the dit engine."
)
@click.option(
    "--numerics",
    type=click.Choice(["tencent", "diffusers"]),
    default="tencent",
    show_default=True,
    help="Whose rounding of the guidance value and VAE tiles to follow.",
)
@click.option(
    "--prompt-template",
    type=click.Path(path_type=Path),
    help="File with the text around a prompt ({} marks its place). By default the checkpoint's own, or an installed "
    "diffusers' (its digest is checked).",
)
@click.option("--verify", is_flag=True, help="Run each stage against its PyTorch reference and store the difference.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout; no progress.")
def build_engine(
    checkpoint: Path,
    output: Path,
    target: str,
    precision: str,
    shapes: str,
    stages: str,
    batch: int,
    numerics: str,
    prompt_template: Path | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Compile the HunyuanVideo CHECKPOINT to a bundle that runs without PyTorch.

    CHECKPOINT is a folder in diffusers' layout (model_index.json, transformer/, vae/, ...) or in Tencent's
    (hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt, ...). Weights that need no conversion are not
    copied: the bundle holds hard links to the checkpoint's files where both lie on one file system.

    The bundle appears under its name only when it is complete; a build that fails or is interrupted leaves nothing.

    \b
    Examples:
      build-engine models/HunyuanVideo -o hv.bundle
      build-engine ckpts -o hv-720p.bundle --precision fp16 --shapes 720x1280x129,544x960x129
    """  # noqa: D301 - \b is click's mark for text that it does not wrap
    parsed_target = Target.parse(target)
    parsed_shapes = tuple(VideoShape.parse(text) for text in shapes.split(",") if text.strip())
    from reelforge.export.build import BuildRequest, build_bundle
    from reelforge.export.models.hunyuan_video.spec_from_checkpoint import Numerics

    if not checkpoint.is_dir():
        raise RequestError(
            f"the checkpoint '{checkpoint}' is not a folder.",
            expected="a folder in diffusers' or Tencent's layout",
            fix="download the model first; hub names are not resolved",
        )
    request = BuildRequest(
        checkpoint=checkpoint,
        output=output,
        target=parsed_target,
        precision=Precision(precision),
        shapes=parsed_shapes,
        stages=tuple(name.strip() for name in stages.split(",") if name.strip()),
        batch=batch,
        numerics=Numerics(numerics),
        prompt_template=prompt_template,
        verify=verify,
    )
    started = time.monotonic()
    finished: dict[str, float] = {}
    with _shown(as_json, lambda entry: finished.update({entry.name: time.monotonic() - started})) as events:
        manifest = build_bundle(request, events)
    if as_json:
        click.echo(json.dumps(_as_json(manifest, output, time.monotonic() - started, finished)))
        return
    terminal = Console(stderr=True)
    terminal.print(_node_table(manifest))
    terminal.print(f"{output}: built in {time.monotonic() - started:.1f} s, content {manifest.content_digest[:16]}")


@contextmanager
def _shown(hidden: bool, on_stage: Callable[[StageEntry], None]) -> Iterator[BuildEvents]:
    """Progress bars for weights and a line per finished stage, on stderr."""
    from reelforge.export.build import BuildEvents

    terminal = Console(stderr=True)
    columns = (
        TextColumn("{task.description:>12}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=terminal, disable=hidden, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def weights(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(f"{stage} weights", total=total)
            bars.update(tasks[stage], completed=done)

        def stage_done(entry: StageEntry) -> None:
            on_stage(entry)
            if not hidden:
                nodes = ", ".join(f"{count} {operator}" for operator, count in list(entry.nodes.items())[:4])
                total = sum(entry.nodes.values())
                size = console.format_bytes(sum(weight.length for weight in entry.weights))
                terminal.print(f"[bold]{entry.name:>12}[/bold]  {size:>10} weights  {total} nodes ({nodes}, ...)")

        yield BuildEvents(weights=weights, stage=stage_done, notice=console.print_notice)


def _as_json(manifest: Manifest, output: Path, seconds: float, finished: dict[str, float]) -> dict[str, Any]:
    """What ``--json`` prints; ``finished_s`` counts from the command's start."""
    return {
        "bundle": str(output),
        "content_digest": manifest.content_digest,
        "seconds": round(seconds, 3),
        "target": str(manifest.target),
        "stages": {
            entry.name: {
                "weights_bytes": sum(weight.length for weight in entry.weights),
                "nodes": entry.nodes,
                "parity": entry.parity,
                "tolerance": entry.tolerance,
                "finished_s": round(finished[entry.name], 3),
            }
            for entry in manifest.stages
        },
    }


def _node_table(manifest: Manifest) -> Table:
    """Operators by stage, the most frequent first."""
    table = Table(title="nodes by type")
    table.add_column("operator")
    totals: dict[str, int] = {}
    for entry in manifest.stages:
        table.add_column(entry.name, justify="right")
        for operator, count in entry.nodes.items():
            totals[operator] = totals.get(operator, 0) + count
    for operator in sorted(totals, key=lambda name: (-totals[name], name)):
        table.add_row(operator, *(str(entry.nodes.get(operator, "")) for entry in manifest.stages))
    return table


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit (the entry point of the package)."""
    console.run(build_engine, arguments)


if __name__ == "__main__":
    main()
