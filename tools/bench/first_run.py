"""Benchmark of the first minutes: ``python -m reelforge.tools.bench.first_run``, from a checkout.

Clones the project to an empty folder and runs ``make demo`` there as a newcomer would, environment included. Writes
``benchmarks/first_run.md`` and keeps the video beside it.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import av
import click

from reelforge.tools.bench import report

PACKAGES = ("onnxruntime", "torch", "av")
VIDEO = "demo.mp4"


def timed(*command: str, folder: Path) -> float:
    """Run a command in ``folder`` and return its seconds; its output goes to the terminal.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    started = time.monotonic()
    subprocess.run(command, cwd=folder, check=True)
    return time.monotonic() - started


def describe(video: Path) -> str:
    """Return size, frames and codec of a video file, by decoding it."""
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        frames = sum(1 for _ in container.decode(stream))
        name = stream.codec_context.name
        return f"{stream.width}x{stream.height}, {frames} frames, {name}, {video.stat().st_size} bytes"


@click.command()
@click.option("--output", default=Path("benchmarks/first_run.md"), show_default=True, type=click.Path(path_type=Path))
def main(output: Path) -> None:
    """Time `make demo` in an empty clone, step by step."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "reelforge"
        steps = [
            ("git clone", timed("git", "clone", "--quiet", str(here), str(folder), folder=here)),
            ("make env (download and install)", timed("make", "env", folder=folder)),
            ("make demo (build the bundle, generate)", timed("make", "demo", folder=folder)),
            ("make demo again (generate only)", timed("make", "demo", folder=folder)),
        ]
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "out" / VIDEO, output.parent / VIDEO)
    lines = [
        "# The first run",
        "",
        *report.environment("python -m reelforge.tools.bench.first_run", PACKAGES),
        "",
        "`make demo` in an empty clone, once; the environment is downloaded from the package index.",
        "",
        *report.table(("step", "seconds"), [(step, f"{seconds:.0f}") for step, seconds in steps]),
        "",
        f"In all {sum(seconds for _, seconds in steps[:3]) / 60:.1f} minutes to the first video:",
        f"[{VIDEO}]({VIDEO}), {describe(output.parent / VIDEO)}.",
    ]
    report.write(output, lines)
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
