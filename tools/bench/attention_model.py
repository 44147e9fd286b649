"""The roofline section of ``benchmarks/attention.md``: a model from datasheets, in which nothing was timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from reelforge.tools.bench import report

HEADS, HEAD_DIM = 24, 128
SHAPES = {"720x1280x129": 119_056, "544x960x129": 67_576, "480x832x81": 33_016}
"""Image and text tokens of a video."""

BLOCK_ROWS = 64
"""Queries of a program on Hopper; keys and values pass through the L2 cache once for each so many."""


@dataclass(frozen=True)
class Gpu:
    """Rates of a datasheet, dense.

    Attributes:
        name: The GPU.
        int8_tops: Of the score product.
        value_tops: Of the product with values in the variant named by ``variant``.
        variant: Which variant it runs.
        exp_per_s: Exponentials: 16 per clock and multiprocessor.
        bytes_per_s: Of memory.
        published: TOPS of published kernels for 32K tokens and head dimension 128.
    """

    name: str
    int8_tops: float
    value_tops: float
    variant: str
    exp_per_s: float
    bytes_per_s: float
    published: str


GPUS = (
    Gpu("A100 80GB", 624, 312, "int8 + 16-bit", 16 * 108 * 1.41e9, 2.04e12, "-"),
    Gpu("RTX 4090", 661, 330, "int8 + fp8", 16 * 128 * 2.52e9, 1.01e12, "FA2 164, Sage1 322, Sage2 431"),
    Gpu("RTX 4090", 661, 661, "int8 + fp8, fp16 accumulator", 16 * 128 * 2.52e9, 1.01e12, "Sage2++ 493"),
    Gpu("H100 SXM", 1979, 1979, "int8 + fp8", 16 * 132 * 1.83e9, 3.35e12, "FA2 339, FA3 fp8 892, Sage1 518, Sage2 882"),
    Gpu("RTX 5090", 838, 419, "int8 + fp8", 16 * 170 * 2.41e9, 1.79e12, "FA2 214, Sage1 479, Sage2 554"),
    Gpu("RTX 5090", 838, 838, "int8 + fp8, fp16 accumulator", 16 * 170 * 2.41e9, 1.79e12, "Sage2++ 643"),
)

READ_AND_WRITTEN = {
    "key_statistics": 2.0,
    "rotary_qk_norm_quantise": 6.0,
    "value_statistics": 2.0,
    "value_quantise": 3.0,
}
"""Bytes per element of one of q, k and v: 16-bit inputs read, 8-bit outputs written; k and v are read twice."""


def section() -> list[str]:
    """Return the lines of the roofline model."""
    headings = ("GPU", "variant", "video", "tensor cores ms", "exponentials ms", "memory ms", "bound ms", "bound TOPS")
    return [
        "**A model: nothing here was timed.** Times that datasheets' rates allow one attention of 24 heads of 128: of",
        "its two products, of one exponential per score, and of q, k, v and the output once through memory. The",
        "largest is a bound if everything overlaps; no kernel reaches it. Beside it, what others have published",
        "for their kernels at 32K tokens (TOPS; theirs, not measured here).",
        "",
        *report.table((*headings, "published TOPS"), _rows()),
    ]


def _rows() -> Iterator[tuple[str, ...]]:
    for gpu in GPUS:
        for video, tokens in SHAPES.items():
            scores = float(tokens) * tokens * HEADS
            tensor = 2 * scores * HEAD_DIM * (1 / gpu.int8_tops + 1 / gpu.value_tops) / 1e12
            exponentials = scores / gpu.exp_per_s
            value_bytes = 2 if "16-bit" in gpu.variant else 1
            memory = tokens * HEADS * HEAD_DIM * (1 + 1 + value_bytes + 2) / gpu.bytes_per_s
            bound = max(tensor, exponentials, memory)
            yield (
                gpu.name,
                gpu.variant,
                video,
                *(f"{1e3 * seconds:.1f}" for seconds in (tensor, exponentials, memory, bound)),
                f"{4 * scores * HEAD_DIM / bound / 1e12:.0f}",
                gpu.published,
            )


def preparing_section() -> list[str]:
    """Return the lines on what the kernels before the attention cost, from bytes."""
    total = sum(READ_AND_WRITTEN.values())
    rows = []
    for gpu in GPUS:
        if "accumulator" in gpu.variant or "16-bit" in gpu.variant:
            continue
        for video, tokens in SHAPES.items():
            seconds = total * tokens * HEADS * HEAD_DIM / gpu.bytes_per_s
            scores = float(tokens) * tokens * HEADS
            tensor = 2 * scores * HEAD_DIM * (1 / gpu.int8_tops + 1 / gpu.value_tops) / 1e12
            bound = max(tensor, scores / gpu.exp_per_s)
            rows.append((gpu.name, video, f"{1e3 * seconds:.2f}", f"{100 * seconds / bound:.1f} %"))
    parts = ", ".join(f"`{name}` {value:g}" for name, value in READ_AND_WRITTEN.items())
    return [
        f"**A model: nothing here was timed.** Bytes per element of one of q, k and v: {parts}; {total:g} in all.",
        "Scales, rotary tables (read once, then cached) and partial statistics are less than 2 % of it. At a",
        "datasheet's memory bandwidth, as a share of the attention's bound above:",
        "",
        *report.table(("GPU", "video", "ms", "share of the attention's bound"), rows),
    ]
