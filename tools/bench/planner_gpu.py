"""Measures on a GPU what the planner assumes: ``python -m reelforge.tools.bench.planner_gpu -o FILE.json``.

Kernels at the sizes of HunyuanVideo, and whole blocks of our own modules in eager PyTorch with random weights: a step
is 20 double and 40 single blocks. ``benchmarks/planner.md`` is made from the file (``tools.bench.planner``). Needs a
CUDA build of PyTorch; it knows nothing of the planner.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

TOKENS = {"720x1280x129": 118_800, "544x960x129": 67_320, "480x832x81": 32_760}
TEXT, WIDTH, HEADS, HEAD_DIM, MLP = 256, 3072, 24, 128, 12288
TILE = (17, 32, 32)
PRODUCTS = {"q": (WIDTH, WIDTH), "fc1": (MLP, WIDTH), "fc2": (WIDTH, MLP)}  # outputs, inputs
CONVOLUTIONS = {  # channels in and out; frames, height and width of the output
    "512 at 17x32x32": (512, 512, 17, 32, 32),
    "512 at 33x128x128": (512, 512, 33, 128, 128),
    "256 at 65x256x256": (256, 256, 65, 256, 256),
    "128 at 65x256x256": (128, 128, 65, 256, 256),
}


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Return the median time of a call on the device, after one warm-up."""
    import torch

    run()
    times: list[float] = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def machine() -> dict[str, str]:
    """Return what the numbers are of."""
    import torch

    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
    names = ("gpu", "driver", "memory", "power_limit")
    words = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0].split(", ")
    cudnn = torch.backends.cudnn.version()
    return {**dict(zip(names, words, strict=True)), "torch": torch.__version__, "cudnn": str(cudnn)}


def bandwidth() -> float:
    """Return bytes per second of a copy, read and written."""
    import torch

    source = torch.randint(0, 255, (4 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * float(source.numel()) / seconds(lambda: target.copy_(source))


def product_rates() -> dict[str, dict[str, float]]:
    """Return operations per second of the matrix products of a 720p step, by precision."""
    import torch

    rows = TOKENS["720x1280x129"]
    result: dict[str, dict[str, float]] = {"bf16": {}, "fp8": {}}
    one = torch.ones((), device="cuda")
    for name, (outputs, inputs) in PRODUCTS.items():
        left = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
        right = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
        work = 2 * rows * outputs * inputs
        result["bf16"][name] = work / seconds(partial(torch.matmul, left, right.T))
        left8, right8 = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn)

        def scaled(left8: Any = left8, right8: Any = right8) -> object:
            return torch._scaled_mm(left8, right8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

        result["fp8"][name] = work / seconds(scaled)
    return result


def convolution_rates() -> dict[str, dict[str, float]]:
    """Return operations per second of 3x3x3 convolutions in fp16, by memory layout."""
    import torch

    result: dict[str, dict[str, float]] = {}
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        rates = result[str(layout)] = {}
        for name, (inputs, outputs, *grid) in CONVOLUTIONS.items():
            convolution = torch.nn.Conv3d(inputs, outputs, 3, device="cuda", dtype=torch.float16)
            convolution = convolution.to(memory_format=layout)
            x = torch.randn(1, inputs, *(size + 2 for size in grid), device="cuda", dtype=torch.float16)
            x = x.to(memory_format=layout)
            work = 2 * 27 * inputs * outputs * grid[0] * grid[1] * grid[2]
            rates[name] = work / seconds(partial(convolution, x), 3)
            torch.cuda.empty_cache()
    return result


def _randomised(module: Any) -> Any:
    import torch

    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return module


def blocks() -> dict[str, dict[str, float]]:
    """Return seconds of one double and one single block, and their peak memory, by shape."""
    import torch

    from reelforge.export.models.hunyuan_video.dit import DoubleBlock, SingleBlock
    from reelforge.tools.synthesize_layout import SIZES

    spec = SIZES["full"].dit
    with torch.device("cuda"):
        double, single = (_randomised(kind(spec)).to(torch.bfloat16) for kind in (DoubleBlock, SingleBlock))
    result = {}
    for shape, tokens in TOKENS.items():
        joint = tokens + TEXT
        image, text = (torch.randn(1, n, WIDTH, device="cuda", dtype=torch.bfloat16) for n in (tokens, TEXT))
        angles = torch.rand(joint, HEAD_DIM // 2, device="cuda")
        cos, sin = angles.cos(), angles.sin()
        modulation = torch.randn(1, 2, 6, WIDTH, device="cuda") * 0.1
        both = torch.cat((image, text), dim=1)
        row = {}
        for name, run in (
            ("double", lambda: double(image, text, modulation, cos, sin)),  # noqa: B023 - called in this turn
            ("single", lambda: single(both, modulation[:, 0, :3], cos, sin)),  # noqa: B023
        ):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            row[f"{name}_s"] = seconds(run, 3)
            row[f"{name}_peak_bytes"] = float(torch.cuda.max_memory_allocated() - before)
        result[shape] = row
    return result


def vae_tile() -> dict[str, float]:
    """Return seconds and peak memory of one tile of the decoder in fp16."""
    import torch

    from reelforge.export.models.hunyuan_video.vae_decoder import VaeDecoder
    from reelforge.tools.synthesize_layout import SIZES

    spec = SIZES["full"].vae
    with torch.device("cuda"):
        decoder = _randomised(VaeDecoder(spec)).to(torch.float16)
    latents = torch.randn(1, spec.latent_channels, *TILE, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    taken = seconds(lambda: decoder(latents), 3)
    return {"seconds": taken, "peak_bytes": float(torch.cuda.max_memory_allocated() - before)}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="JSON file to write.")
def main(output: Path) -> None:
    """Measure kernels and blocks on this machine's GPU (about two minutes)."""
    import torch

    result: dict[str, Any] = {"machine": machine()}
    measurements: tuple[tuple[str, Callable[[], object]], ...] = (
        ("copy_bytes_per_s", bandwidth),
        ("products", product_rates),
        ("blocks", blocks),
        ("convolutions", convolution_rates),
        ("vae_tile", vae_tile),
    )
    for name, measure in measurements:
        with torch.inference_mode():
            result[name] = measure()
        torch.cuda.empty_cache()
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        click.echo(f"{name}: {json.dumps(result[name])}")


if __name__ == "__main__":
    main()
