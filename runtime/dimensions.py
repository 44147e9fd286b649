"""The named dimensions of stages that a request decides.

The module knows no engines, and not which stage has which dimension.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from reelforge.runtime.tiling import plan_tiles

if TYPE_CHECKING:
    from reelforge.runtime.recipe import VideoShape
    from reelforge.runtime.spec import ModelSpec


def video_sizes(spec: ModelSpec, shape: VideoShape, steps: int) -> dict[str, int]:
    """Return the sizes of named dimensions for one video; of the decoder's tiles, the largest."""
    _, frames, height, width = spec.latent_shape(shape.height, shape.width, shape.frames)
    tiles = plan_tiles((frames, height, width), spec.tiling)
    window, rows, columns = (
        max(stop - start for start, stop in spans) for spans in (tiles.windows, tiles.rows, tiles.columns)
    )
    return {
        "batch": 1,
        "steps": steps,
        "latent_frames": frames,
        "latent_height": height,
        "latent_width": width,
        "image_tokens": frames * height * width // math.prod(spec.dit.patch),
        "tile_frames": window,
        "tile_height": rows,
        "tile_width": columns,
        "video_frames": (window - 1) * spec.vae.temporal_compression + 1,
        "video_height": rows * spec.vae.spatial_compression,
        "video_width": columns * spec.vae.spatial_compression,
    }
