"""Measures compiled attention kernels on the GPU at hand: ``python -m reelforge.tools.bench.attention_measure``.

Writes a JSON file with the machine, the kernels' digests, every time with its spread, and every error against float64;
``reelforge.tools.bench.attention`` makes tables of it. Kernels come from a folder that was filled on any machine, by
``python -m reelforge.tools.bench.attention --kernels FOLDER``, so that a machine with a GPU needs PyTorch only.
"""

from __future__ import annotations

import datetime
import json
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from reelforge.plugins.compile import CompiledKernel, load_kernels
from reelforge.runtime.attention import patterns
from reelforge.runtime.attention.patterns import Layout, block_lists
from reelforge.runtime.attention.token_order import TileOrder
from reelforge.tools.bench.attention_gpu import (
    HEAD_DIM,
    HEADS,
    Problem,
    errors,
    operations,
    some_rows,
    time_ms,
    torch_attention,
)

SIZES = ((32_768, 20), (119_056, 7))
"""Tokens, and how often each launch is repeated."""
TEXT = 256
DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)
VIDEO = TileOrder((33, 45, 80), (3, 5, 8), 128)
"""720x1280, 129 frames."""
WINDOWS = ((3, 3, 3), (5, 5, 5), (11, 3, 3))
PREPARING = ("key_statistics", "rotary_qk_norm_quantise", "value_statistics", "value_quantise")


def machine() -> dict[str, str]:
    """Return what is measured on."""
    import torch

    fields = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    name, driver, memory, clock, power = _nvidia_smi(fields)
    return {
        "GPU": name,
        "driver": driver,
        "memory": memory,
        "largest SM clock": clock,
        "power limit": power,
        "PyTorch": torch.__version__,
        "cuDNN": str(torch.backends.cudnn.version()),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def ceilings() -> dict[str, float]:
    """Return what a plain copy and PyTorch's own 8-bit matrix products reach here: GB/s and TOPS."""
    import torch

    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = time_ms(lambda: target.copy_(source), 20)
    n = 8192
    a = torch.randn((n, n), device="cuda")
    eighths = [(32 * a).clamp(-127, 127).to(torch.int8), (32 * a.T.contiguous()).clamp(-127, 127).to(torch.int8).T]
    fp8, one = [a.to(torch.float8_e4m3fn), a.T.contiguous().to(torch.float8_e4m3fn).T], torch.ones((), device="cuda")
    int8_time = time_ms(lambda: torch._int_mm(*eighths), 20)
    fp8_time = time_ms(lambda: torch._scaled_mm(*fp8, one, one, out_dtype=torch.bfloat16), 20)
    return {
        "copy_gb_per_s": 2 * source.numel() / copy.median / 1e6,
        "torch_int8_tops": 2 * n**3 / int8_time.median / 1e9,
        "torch_fp8_tops": 2 * n**3 / fp8_time.median / 1e9,
    }


def measure_size(kernels: list[CompiledKernel], tokens: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield one record per kernel, pattern and library at one length."""
    import torch

    problem = Problem(tokens, TEXT, seed=tokens)
    rows = some_rows(tokens)
    exact = problem.exact(rows)
    for backend in ("flash", "cudnn"):
        call = torch_attention(problem, backend)
        timing = time_ms(call, repeats)
        found = call()[0].transpose(0, 1)[rows]
        yield _record(f"PyTorch {backend} bf16", "torch", tokens, timing.as_json(), 1.0, errors(found, exact))
        del call, found
        torch.cuda.empty_cache()
    for group in (64, 128):
        for kernel in _preparing(kernels, group):
            timing = time_ms(problem.prepare(kernel), 20)
            if group == 64 or _group(kernel) == 128:
                record = _record(kernel.variant.name, "prepare", tokens, timing.as_json(), None, {})
                yield record | {"gb": moved_bytes(problem, kernel) / 1e9, "plugin": kernel.variant.plugin}
        for kernel in _of(kernels, "int8_fp8_attention", group):
            timing = time_ms(problem.prepare(kernel), repeats)
            found = problem.tensors["out"][0]
            _check_finite(found, kernel)
            yield _record(kernel.variant.name, "dense", tokens, timing.as_json(), 1.0, errors(found[rows], exact))
        for kernel in _of(kernels, "block_sparse_attention", group) if tokens == SIZES[0][0] else ():
            yield from _random_lists(problem, kernel, repeats, rows, exact)


def _random_lists(
    problem: Problem, kernel: CompiledKernel, repeats: int, rows: Any, exact: Any
) -> Iterator[dict[str, Any]]:
    """Yield times at several densities; every query block visits a random choice of key blocks, in order."""
    layout = Layout(problem.image, TEXT, _group(kernel) or 0)
    random = np.random.default_rng(0)
    reachable = -(-layout.tokens // layout.key_group)
    for density in DENSITIES:
        count = max(1, round(density * reachable))
        mask = np.zeros((HEADS, layout.query_blocks, layout.key_blocks), bool)
        chosen = np.argpartition(random.random((HEADS, layout.query_blocks, reachable), np.float32), count - 1)
        np.put_along_axis(mask, chosen[..., :count], True, axis=2)
        timing, actual = _sparse(problem, kernel, mask, layout.key_counts(), repeats)
        error = errors(problem.tensors["out"][0][rows], exact) if count == reachable else {}
        name = f"{kernel.variant.name}, random blocks"
        yield _record(name, "sparse", problem.tokens, timing, actual * layout.key_blocks / reachable, error)


def measure_tiles(kernels: list[CompiledKernel], repeats: int) -> Iterator[dict[str, Any]]:
    """Yield times of sliding tiles over a whole video, in tile-major order with padding."""
    import torch

    problem = Problem(VIDEO.slots + TEXT, TEXT, seed=5)
    rows = some_rows(problem.tokens)
    for group in (64, 128):
        for kernel in _preparing(kernels, group):
            problem.prepare(kernel)()
        layout = Layout(VIDEO.slots, TEXT, group)
        counts = layout.key_counts(VIDEO.valid())
        for kernel in _of(kernels, "block_sparse_attention", group):
            for window in WINDOWS:
                mask = patterns.sliding_tile(layout, VIDEO, window)
                every_head = np.broadcast_to(mask, (HEADS, *mask.shape))
                timing, density = _sparse(problem, kernel, every_head, counts, repeats)
                by_key = np.repeat(mask[(rows.cpu().numpy() // 128)], group, axis=1)[:, : problem.tokens]
                counted = (np.arange(group)[None, :] < counts[0][:, None]).reshape(-1)[: problem.tokens]
                visible = torch.from_numpy(by_key & counted).cuda().expand(HEADS, -1, -1)
                error = errors(problem.tensors["out"][0][rows], problem.exact(rows, visible))
                sizes = "x".join(map(str, window)), "x".join(map(str, VIDEO.tiles))
                name = f"{kernel.variant.name}, window {sizes[0]} of {sizes[1]} tiles"
                yield _record(name, "tiles", problem.tokens, timing, density, error)


def _sparse(
    problem: Problem, kernel: CompiledKernel, mask: Any, counts: Any, repeats: int
) -> tuple[dict[str, float | int], float]:
    import torch

    lists = block_lists(mask)
    problem.tensors["block_index"] = torch.from_numpy(lists.block_index).cuda()
    problem.tensors["block_start"] = torch.from_numpy(lists.block_start).cuda()
    problem.tensors["block_keys"] = torch.from_numpy(counts).cuda()
    problem.sizes["entries"] = len(lists.block_index)
    timing = time_ms(problem.prepare(kernel), repeats).as_json()
    _check_finite(problem.tensors["out"], kernel)
    return timing, lists.density


def moved_bytes(problem: Problem, kernel: CompiledKernel) -> int:
    """Return the bytes of a kernel's inputs and outputs, each once; small tables are in the caches and left out."""
    schema = kernel.variant.schema
    tensors = [problem.tensors[tensor.name] for tensor in (*schema.inputs, *schema.outputs)]
    return sum(
        tensor.numel() * tensor.element_size() for tensor in tensors if tensor.numel() >= problem.tokens * HEAD_DIM
    )


def _record(
    name: str, kind: str, tokens: int, timing: dict[str, float | int], density: float | None, error: dict[str, float]
) -> dict[str, Any]:
    record: dict[str, Any] = {"name": name, "kind": kind, "tokens": tokens, **timing, **error}
    if density is not None:
        record["density"] = density
        record["tops"] = density * operations(tokens) / timing["median_ms"] / 1e9
    click.echo(
        f"{tokens:7d} {name:90s} {timing['median_ms']:9.3f} ms "
        + (f"{record['tops']:5.0f} TOPS " if "tops" in record else "")
        + (f"cos {error['cosine']:.6f}" if error else "")
    )
    return record


def _preparing(kernels: Iterable[CompiledKernel], group: int) -> list[CompiledKernel]:
    """Return the kernels before an attention with this key group, in the order in which they run."""
    found = [kernel for kernel in kernels if kernel.variant.plugin in PREPARING and _group(kernel) in (None, group)]
    return sorted(found, key=lambda kernel: PREPARING.index(kernel.variant.plugin))


def _of(kernels: Iterable[CompiledKernel], plugin: str, group: int) -> list[CompiledKernel]:
    return [kernel for kernel in kernels if kernel.variant.plugin == plugin and _group(kernel) == group]


def _group(kernel: CompiledKernel) -> int | None:
    group = kernel.variant.constants().get("KEY_GROUP")
    return None if group is None else int(group)


def _check_finite(out: Any, kernel: CompiledKernel) -> None:
    import torch

    if not bool(torch.isfinite(out).all()):
        raise ValueError(f"{kernel.variant.name} left elements unwritten or not finite")


def _nvidia_smi(fields: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return [part.strip() for part in line.split(",")]


def under_load(kernels: list[CompiledKernel]) -> dict[str, str]:
    """Return the clock and power that the driver reports while attention has run for a second or two."""
    import torch

    problem = Problem(SIZES[0][0], TEXT, seed=1)
    group = 128
    for kernel in _preparing(kernels, group):
        problem.prepare(kernel)()
    launch = problem.prepare(_of(kernels, "int8_fp8_attention", group)[0])
    for _ in range(150):
        launch()
    clock, power, temperature = _nvidia_smi("clocks.sm,power.draw,temperature.gpu")
    torch.cuda.synchronize()
    return {"SM clock under load": clock, "power under load": power, "temperature under load": temperature}


@click.command()
@click.option(
    "--kernels", type=click.Path(path_type=Path, exists=True), required=True, help="Folder of compiled kernels."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(kernels: Path, output: Path) -> None:
    """Measure everything and write it down."""
    import torch

    torch.cuda.init()
    major, minor = torch.cuda.get_device_capability()
    loaded = [kernel for kernel in load_kernels(kernels) if kernel.variant.architecture == 10 * major + minor]
    records = [record for tokens, repeats in SIZES for record in measure_size(loaded, tokens, repeats)]
    records += measure_tiles(loaded, SIZES[-1][1])
    result = {
        "architecture": 10 * major + minor,
        "machine": machine() | under_load(loaded),
        "ceilings": ceilings(),
        "kernels": {
            kernel.variant.name: {
                "digest": kernel.digest,
                "triton": json.loads((kernels / f"{kernel.digest}.json").read_text(encoding="utf-8"))["triton"],
            }
            for kernel in loaded
        },
        "records": records,
    }
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
