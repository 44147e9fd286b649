"""The ``reelforge verify`` command: a bundle's weights and numbers against the checkpoint it was built from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from reelforge.tools import console

if TYPE_CHECKING:
    from reelforge.export.verify import StageParity


@click.command("verify", epilog=console.EXIT_CODES)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    required=True,
    type=click.Path(path_type=Path),
    help="The checkpoint that the bundle was built from, in either layout.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")
def verify(bundle: Path, checkpoint: Path, as_json: bool) -> None:
    """Check BUNDLE's files, its weights against CHECKPOINT, and each stage's numbers against PyTorch.

    Every file's digest is checked first. Then every weight is compared with the checkpoint's by digest. Then each
    engine runs beside the module it was captured from, in fp32, on the same small inputs; a difference above the
    stage's tolerance fails with exit code 6. Needs the compiler's libraries: pip install 'reelforge[export]'.

    A bundle for a GPU does not run here: of such a one only files and weights are checked.

    What a quantised bundle stores in 8 bits is quantised again from CHECKPOINT and compared by digest; the numbers of
    such a stage were measured when it was built, see `reelforge inspect`.
    """
    from reelforge.export.verify import bundle_stages, measure_stages, require_within
    from reelforge.export.verify_weights import compare_weights
    from reelforge.runtime.bundle.open import Bundle
    from reelforge.runtime.recipe import Backend

    opened = Bundle.open(bundle)
    compared = compare_weights(opened, checkpoint)
    executable = opened.manifest.target.backend is Backend.CPU
    parities = measure_stages(opened.path, opened.manifest, bundle_stages(opened)) if executable else []
    if as_json:
        stages = {p.stage: {"difference": p.difference, "tolerance": p.tolerance, "within": p.within} for p in parities}
        click.echo(json.dumps({"bundle": str(bundle), "weights_compared": compared, "stages": stages}))
    elif executable:
        _print(parities, compared)
    else:
        click.echo(f"{compared} weights equal the checkpoint's; engines for {opened.manifest.target} do not run here")
    require_within(parities)


def _print(parities: list[StageParity], compared: int) -> None:
    table = Table(title=f"{compared} weights equal the checkpoint's")
    for heading in ("stage", "largest difference", "tolerance", ""):
        table.add_column(heading)
    for parity in parities:
        verdict = "[green]within[/green]" if parity.within else "[red]outside[/red]"
        table.add_row(parity.stage, f"{parity.difference:.2e}", f"{parity.tolerance:.0e}", verdict)
    Console().print(table)
