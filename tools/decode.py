"""``reelforge decode``: latents that were saved, and a bundle, to a video file.

Knows the options; the work is in ``runtime``.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from reelforge.runtime.bundle.open import Check
from reelforge.runtime.decode import check_latents
from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.latents_file import read_latents
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.video import VideoWriter
from reelforge.tools import console
from reelforge.tools.video_events import open_bundle, progress_bars, write_video


@click.command(epilog=console.EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("latents", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    help="Where the video goes: out.mp4, out.webm, out.gif, out.png (one frame), or frames/%04d.png.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads per operator.  [default: one per core]")
@click.option("--device", type=click.IntRange(min=0), default=0, help="Number of the GPU.  [default: 0]")
@click.option(
    "--check",
    type=click.Choice([check.value for check in Check]),
    default=Check.FULL.value,
    show_default=True,
    help="How the bundle is checked first: every digest, or only presence and sizes (instant for large bundles).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object about the result on stdout, and no bars.")
def decode(
    bundle: Path, latents: Path, output: str, threads: int | None, device: int, check: str, as_json: bool
) -> None:
    """Decode LATENTS, a file that `generate --save-latents` wrote, with BUNDLE.

    For a generation whose decoding failed, and for a bundle whose decoder is another. The video is the one that
    `generate` would have made. Where memory is short, tiles are made smaller from there on, with a notice.

    \b
    Examples:
      reelforge generate my.bundle -p "a red ball" -o ball.mp4 --save-latents ball.npy
      reelforge decode my.bundle ball.npy -o ball.mp4
    """  # noqa: D301 - \b is click's mark for text that it does not wrap
    started = time.monotonic()
    with progress_bars(hidden=as_json) as bars:
        pipeline = Pipeline(open_bundle(bundle, Check(check), bars), EngineOptions(threads=threads, device=device))
        values = read_latents(latents)
        check_latents(values, pipeline.spec)
        vae, rate = pipeline.spec.vae, pipeline.spec.defaults.frames_per_second
        frames = (values.shape[2] - 1) * vae.temporal_compression + 1
        height, width = (side * vae.spatial_compression for side in values.shape[3:])
        with pipeline, VideoWriter(output, height, width, frames, rate) as video:
            told = write_video(pipeline.stream_decode(values), bars, video)
    seconds = time.monotonic() - started
    for notice in told.notices:
        console.print_notice(notice)
    if as_json:
        result = {
            "output": output,
            "latents": str(latents),
            "height": height,
            "width": width,
            "frames": frames,
            "frames_per_second": rate,
            "seconds": round(seconds, 3),
            "notices": told.notices,
            "bundle": pipeline.bundle.manifest.content_digest,
        }
        click.echo(json.dumps(result))
    else:
        click.echo(
            f"{output}: {frames} frame{'s' if frames > 1 else ''} of {width}x{height} in {seconds:.1f} s", err=True
        )
