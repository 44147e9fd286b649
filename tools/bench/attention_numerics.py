"""The numerics section of ``benchmarks/attention.md``: kernels in Triton's interpreter against float64, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from reelforge.plugins.interpreter import Interpreter
from reelforge.plugins.kernels.block_sparse_attention_reference import visible_keys
from reelforge.plugins.schema import DType
from reelforge.runtime.attention import patterns
from reelforge.runtime.attention.patterns import Layout, block_lists
from reelforge.tools.bench import report
from reelforge.tools.bench.attention_problems import ATTENTION, EPS, Array, Problem, cosine, relative_l1

GOALS = {"fp8": 0.9999, "fp8_fp16_accumulator": 0.9999, "fp16": 0.99999}
ZERO_MEAN_GOAL = 0.999
NAMES = {"fp8": "int8 + fp8", "fp8_fp16_accumulator": "int8 + fp8, fp16 accumulator", "fp16": "int8 + 16-bit"}


@dataclass(frozen=True)
class Case:
    """A problem with its name and goal; no goal is the variants' own."""

    name: str
    problem: Callable[[], Problem]
    goal: float | None = None


def _case(name: str, image: int, text: int, goal: float | None = None, **options: float | bool | int) -> Case:
    def make() -> Problem:
        return Problem(image, text, **{"heads": 2, "activation": DType.FLOAT16, **options})  # type: ignore[arg-type]

    return Case(name, make, goal)


CASES = (
    _case("896 image + 128 text", 896, 128),
    _case("the same, head dimension 64", 896, 128, head_dim=64),
    _case("ragged: 701 + 77", 701, 77),
    _case("one frame: 240 + 256", 240, 256),
    _case("one frame, 1 text token", 240, 1),
    _case("two videos of a batch, one with 40 of 100 text tokens", 300, 100, batch=2),
    _case("outlier channels, 30 times as large", 448, 64, outliers=True),
    _case("values without a mean: 600 + 40", 600, 40, goal=ZERO_MEAN_GOAL, value_mean=0.0),
)


def section() -> list[str]:
    """Return the lines of the section."""
    with Interpreter() as interpreter:
        dense = list(_dense(interpreter))
        smoothing = _smoothing(interpreter)
        sparse = list(_sparse(interpreter))
    return [
        "Everything from projected fp16 q, k and v to the output, on the CPU in Triton's interpreter, against float64",
        "softmax attention on what was never quantised: RMSNorm, rotation, int8 q and k, the value's format, online",
        "softmax. The interpreter shows the formats' rounding; it does not show accumulators of fewer bits than fp32.",
        "",
        *report.table(("problem", "variant", "cosine", "relative L1", "goal"), dense),
        "",
        "The mean of k over tokens, taken off before quantising, where one slow pair of channels is 20 larger:",
        "",
        *report.table(("k", "cosine", "relative L1"), smoothing),
        "",
        "Block-sparse, against float64 attention under the same mask:",
        "",
        *report.table(("pattern", "density", "cosine", "relative L1"), sparse),
    ]


def _dense(interpreter: Interpreter) -> Iterator[tuple[str, ...]]:
    for case in CASES:
        for variant in ATTENTION:
            problem = case.problem()
            if problem.batch > 1:
                problem.tensors["key_lengths"][0] -= 60
            found, exact = problem.attend(interpreter, variant), problem.exact()
            goal = GOALS[variant] if case.goal is None else case.goal
            met = "met" if cosine(found, exact) >= goal else "**missed**"
            yield (case.name, NAMES[variant], *_cells(found, exact), f"{goal:g}: {met}")


def _smoothing(interpreter: Interpreter) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for taken_off in (True, False):
        problem = Problem(480, 32, activation=DType.FLOAT16)
        problem.tensors["k"][..., [63, 127]] += 20
        found = problem.attend(interpreter, "fp16")
        if not taken_off:
            problem.tensors["key_sums"] = np.zeros_like(problem.tensors["key_sums"])
            problem.run(interpreter, "rotary_qk_norm_quantise", EPS=EPS, KEY_GROUP=64)
            tiles = {"KEY_GROUP": 64, "BLOCK_M": 64, "BLOCK_N": 64, "STAGES": 2}
            found = problem.run(interpreter, ATTENTION["fp16"], **tiles)["out"].astype(np.float64)
        rows.append(("mean taken off" if taken_off else "as it is", *_cells(found, problem.exact())))
    return rows


def _sparse(interpreter: Interpreter) -> Iterator[tuple[str, ...]]:
    problem = Problem(960, 64, heads=2, activation=DType.FLOAT16)
    layout = Layout(960, 64, 64)
    q, k = problem.rotated()
    shape = (2, layout.query_blocks, layout.key_blocks)
    masks = {
        "dense": np.broadcast_to(patterns.dense(layout), shape),
        "radial, 15 frames of 64": np.broadcast_to(patterns.radial(layout, 15, 64), shape),
        "top quarter of pooled scores": patterns.top_k(layout, q[0], k[0], 0.25),
    }
    for name, mask in masks.items():
        lists = block_lists(mask)
        problem.tensors |= {"block_index": lists.block_index, "block_start": lists.block_start}
        problem.tensors["block_keys"] = layout.key_counts()
        found = problem.attend(interpreter, "fp8", sparse=True)
        visible = visible_keys(lists.block_index, lists.block_start, layout.key_counts(), layout.tokens, 64)
        yield (name, f"{lists.density:.2f}", *_cells(found, problem.exact(visible)))


def _cells(found: Array, exact: Array) -> tuple[str, str]:
    return f"{cosine(found, exact):.7f}", f"{relative_l1(found, exact):.5f}"
