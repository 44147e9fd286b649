"""Trains the demonstration model: ``python -m demo.train`` runs every stage, ``python -m demo.train dit`` only one.

Stages: ``vae`` (decoder on analytic latents), ``dit`` (transformer), ``distil`` (guidance), ``export`` (checkpoint and
loss plot). Each goes on where it was killed; its state lies in $REELFORGE_TRAIN_STATE or ~/.cache/reelforge/train-demo.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

from demo.train import distil, dit, export, plot, ranks, vae

STAGES = ("vae", "dit", "distil", "export")


@click.command()
@click.argument("stages", nargs=-1, type=click.Choice(STAGES))
@click.option("--processes", default=min(2, os.cpu_count() or 1), show_default=True, help="Single-threaded processes.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("demo/checkpoint"), show_default=True)
def main(stages: tuple[str, ...], processes: int, output: Path) -> None:
    """Run the named STAGES, or all of them in order."""
    for stage in stages or STAGES:
        if stage == "vae":
            ranks.launch(vae.train, vae.Plan(), 1)
        elif stage == "dit":
            ranks.launch(dit.train, dit.Plan(), processes)
        elif stage == "distil":
            ranks.launch(distil.train, distil.Plan(), processes)
        else:
            export.write(output)
            plot.write(output / "training.png")


if __name__ == "__main__":
    main()
