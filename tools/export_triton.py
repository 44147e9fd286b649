"""``reelforge export-triton``: a bundle as a model repository of Triton Inference Server.

Knows the options; the work is in ``tools.triton``.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.tools import console
from reelforge.tools.triton.repository import ExportRequest, export_repository


@click.command("export-triton", epilog=console.EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="The repository's folder; it must not exist."
)
@click.option(
    "--name", default="reelforge", show_default=True, help="Of the pipeline's model; all others' names begin with it."
)
@click.option(
    "--inside",
    multiple=True,
    metavar="STAGE,...|all",
    help="Stages to run inside the pipeline's model, on reelforge's own engines and within a memory budget, instead of "
    "as models of their own. Those that none of Triton's backends loads always are.",
)
@click.option(
    "--instances", type=click.IntRange(1, 64), default=1, show_default=True, help="How many videos are made at once."
)
@click.option("--memory-budget", default="", metavar="SIZE", help="What stages inside may take, for example 20GiB.")
@click.option("--copy", is_flag=True, help="Copy weights even where they could be hard-linked.")
@click.option(
    "--check",
    type=click.Choice([check.value for check in Check]),
    default=Check.FULL.value,
    show_default=True,
    help="How the bundle is checked first: every digest, or only presence and sizes.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object about the result on stdout.")
def export_triton(
    bundle: Path,
    output: Path,
    name: str,
    inside: tuple[str, ...],
    instances: int,
    memory_budget: str,
    copy: bool,
    check: str,
    as_json: bool,
) -> None:
    """Write BUNDLE as a model repository of Triton Inference Server.

    One model per stage, and one that takes prompts and gives videos: it runs the pipeline in Triton's Python backend,
    with the other models as its engines. There, `pip install reelforge` is all it needs.

    \b
    Examples:
      reelforge export-triton my.bundle -o models
      tritonserver --model-repository models
    """  # noqa: D301 - \b is click's mark for text that it does not wrap
    stages = tuple(stage.strip() for item in inside for stage in item.split(",") if stage.strip())
    request = ExportRequest(output, name, stages, instances, memory_budget, copy)
    done = export_repository(Bundle.open(bundle, Check(check)), request)
    if as_json:
        result = {
            "output": str(output),
            "models": list(done.models),
            "inside": done.layout.reasons,
            "linked_bytes": done.linked_bytes,
            "copied_bytes": done.copied_bytes,
        }
        click.echo(json.dumps(result))
        return
    for stage, reason in done.layout.reasons.items():
        click.echo(f"stage {stage!r} runs inside {name!r}: {reason}", err=True)
    sizes = [
        f"{console.format_bytes(count)} {how}"
        for count, how in ((done.linked_bytes, "linked"), (done.copied_bytes, "copied"))
        if count
    ]
    click.echo(f"{output}: {', '.join(done.models)} ({', '.join(sizes)})", err=True)
