"""Plots the logged losses of all jobs into one picture."""

from __future__ import annotations

from pathlib import Path

from demo.train import state

PANELS = (
    ("vae", "loss", "VAE decoder: loss"),
    ("vae_psnr", "psnr", "VAE decoder: PSNR, dB"),
    ("dit", "loss", "transformer: velocity loss"),
    ("distilled", "loss", "guidance distillation: loss"),
)


def write(path: Path) -> None:
    """Write the loss plot as PNG to ``path``; a job that has no log yet has an empty panel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(14, 3), layout="constrained")
    for axis, (name, key, title) in zip(axes, PANELS, strict=True):
        records = state.read_log(name)
        axis.plot([record["step"] for record in records], [record[key] for record in records])
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if key == "loss" and records:
            axis.set_yscale("log")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
