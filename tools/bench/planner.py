"""Benchmark of the planner: ``python -m reelforge.tools.bench.planner [--bundle BUNDLE]...``.

Predictions beside published times and beside real builds. Published rows are planned with the kernel that they say
they ran; nothing is fitted to a row. Real builds are read from bundles' manifests and receipts, and from measurements
of single plans that are listed here with their versions. Writes ``benchmarks/planner.md``; needs no GPU and builds
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import click

from reelforge.export.family import FAMILIES
from reelforge.export.planner import kernels, memory
from reelforge.export.planner.gpus import find_gpu
from reelforge.export.planner.kernels import AttentionKernel, Constant, attention_rate
from reelforge.export.planner.plan import Bucket, Model, Plan, PlanOptions, make_plan
from reelforge.export.planner.work import Phase
from reelforge.runtime.recipe import Precision, Recipe, Target, VideoShape
from reelforge.tools.bench import report
from reelforge.tools.bench.planner_bundles import Comparison, compare_bundle
from reelforge.tools.synthesize_layout import SIZES

PACKAGES = ("torch", "onnx")
TEMPLATE_TOKENS = 95
_CUDA = Target.parse("cuda")
_RTX = Target.parse("rtx:sm89+sm120")

_INTRODUCTION = """\
`reelforge plan` beside figures that others published, beside blocks of our own modules on an H100, and beside real
builds. Plans of TensorRT-RTX have never run: their seconds are predictions."""
_PUBLISHED_TEXT = """\
HunyuanVideo 13 B in bf16, one GPU, dense attention. The kernel is the one that the source ran as far as it says. These
programs run eager PyTorch, so that memory-bound work between the products, which the planner takes as fused, costs them
more; predictions should therefore lie below the figures. Rows with several GPUs, sparse attention or caching of steps
are not comparable and are left out, as is Wan 2.1, which the planner has no cost model for."""
_FLASH_3_TEXT = """\
FlashAttention-3 on the H100 is planned at the 470 TFLOP/s of the one table that compares all kernels; its authors
report up to 740 (arXiv 2407.08608). The two bracket the published time."""
_GPU_TEXT = """\
Our modules in eager PyTorch with random weights, bf16, measured by `python -m reelforge.tools.bench.planner_gpu`. A
step is 20 double and 40 single blocks; attention is PyTorch's default on that GPU, cuDNN by its speed. Nothing is fused
between the products, which the planner assumes: small shapes and the decoder's norms show it most. The decoder's tile
is fp16 in PyTorch's default layout."""
_BUILDS_TEXT = """\
Plans compiled by TensorRT-RTX without a GPU, fp16 unless said. Activations are what the compiler states as its total
for a profile; builder memory is the peak of anonymous memory, sampled. Seconds were taken beside other work on two
cores. The first table holds single plans, each of the others one bundle, compared from its own manifest and receipts.
All are of the model's real width, with fewer blocks where a name says so. The tensors that are alive together and the
builder's constants were read off the single plans and the bundles of 1 and of 4+4 blocks, so that their ratios say how
well the model describes them; weights, and whatever other bundles hold, are predictions."""


@dataclass(frozen=True)
class Published:
    """One published time.

    Attributes:
        gpu: Name in the planner's table.
        shape: Of the video.
        kernel: Attention kernel that the source ran.
        seconds: What was published.
        of: ``video``, ``loop``, ``step``, ``decode`` or ``attention`` (of the loop).
        source: Where.
        steps: Sampling steps.
    """

    gpu: str
    shape: str
    kernel: AttentionKernel
    seconds: float
    of: str
    source: str
    steps: int = 50


_FLASH_2, _FLASH_3 = AttentionKernel.FLASH_2, AttentionKernel.FLASH_3
PUBLISHED = (
    Published("H100 SXM", "720x1280x129", _FLASH_2, 1904, "video", "HunyuanVideo README (xDiT's table)"),
    Published("H100 SXM", "720x1280x129", _FLASH_2, 1797, "video", "Sparse VideoGen README, dense"),
    Published("H100 SXM", "720x1280x129", _FLASH_2, 34.2, "step", "HunyuanVideo#146, bf16"),
    Published("H100 SXM", "720x1280x129", _FLASH_2, 34.4, "step", "HunyuanVideo#146, FP8 weights, bf16 products"),
    Published("H100 SXM", "768x1280x117", _FLASH_3, 945, "loop", "arXiv 2502.04507"),
    Published("H100 SXM", "768x1280x117", _FLASH_3, 800, "attention", "arXiv 2502.04507"),
    Published("A800 80GB", "720x1280x129", _FLASH_2, 3245, "video", "MagCache README, dense"),
    Published("A800 80GB", "720x1280x129", _FLASH_2, 50 * 60, "video", "TeaCache README, threshold 0 (in minutes)"),
    Published("A800 80GB", "544x960x129", _FLASH_2, 18 * 60, "video", "TeaCache README, threshold 0 (in minutes)"),
    Published("L20", "720x1280x129", _FLASH_2, 3676, "video", "ParaAttention, 30 steps", 30),
)
FLASH_3_BY_ITS_AUTHORS = 740e12


@dataclass(frozen=True)
class SinglePlan:
    """One plan that was compiled outside a bundle.

    Attributes:
        what: In words.
        stage: Of the model with ``blocks`` double and single blocks.
        blocks: Number of each; None means the real 20 and 40.
        plan_bytes: Its size; None if it was not recorded.
        activation_bytes: Stated by the compiler.
        builder_bytes: Peak anonymous memory.
        seconds: Of the compiler.
        shape: Of the video.
        precision: Of the stage, and of its attention if that is FP8.
    """

    what: str
    stage: str
    blocks: int | None
    plan_bytes: int | None
    activation_bytes: int | None
    builder_bytes: int | None
    seconds: float | None
    shape: str = "720x1280x129"
    precision: Precision = Precision.FP16


# tensorrt_rtx 1.7.1.116, sm89+sm120, full width, two cores without a GPU.
SINGLE_PLANS = (
    SinglePlan("dit, 1+1 blocks", "dit", 1, 684_710_540, 14_754_216_960, 1_552_000_000, 11.8),
    SinglePlan("dit, 4+4 blocks", "dit", 4, None, 12_547_520_000, 5_342_000_000, None),
    SinglePlan("dit, 4+4 blocks, 544x960x129", "dit", 4, None, 7_126_058_496, None, None, "544x960x129"),
    SinglePlan("modulation, 1+1 blocks", "modulation", 1, 386_358_196, 18_757_632, 898_000_000, 4.5),
    SinglePlan("modulation, 4+4 blocks", "modulation", 4, None, 29_612_032, 2_608_000_000, None),
    SinglePlan("dit, 4+4 blocks, FP8", "dit", 4, None, None, 1_977_000_000, None, precision=Precision.FP8),
    SinglePlan("refiner, 1 block", "refiner", 1, 355_816_356, 865_382_400, 855_000_000, 5.8),
)


@cache
def model(blocks: int | None = None) -> Model:
    """Return the real model, or one of its width with fewer blocks."""
    family, spec = FAMILIES["hunyuan_video"], SIZES["full"]
    if blocks is not None:
        dit = replace(spec.dit, double_blocks=blocks, single_blocks=blocks, refiner_blocks=1)
        spec = replace(spec, dit=dit)
    return Model(family, spec, family.stages(spec, 1), TEMPLATE_TOKENS)


def predicted_seconds(row: Published) -> float:
    """Return what the planner says about a published row."""
    recipe = Recipe(
        {**dict.fromkeys(FAMILIES["hunyuan_video"].stage_names, Precision.BF16), "vae_decoder": Precision.FP16},
        (VideoShape.parse(row.shape),),
    )
    options = PlanOptions(gpu=find_gpu(row.gpu), steps=row.steps, kernels={Precision.BF16: row.kernel})
    bucket = make_plan(model(), _CUDA, recipe, options).buckets[0]
    return _figure(bucket, row.of)


def _figure(bucket: Bucket, of: str) -> float:
    step, video = bucket.step, bucket.seconds_per_video
    assert step is not None
    assert video is not None
    figures = {
        "video": video,
        "loop": step.total * bucket.steps,
        "step": step.total,
        "attention": step.attention * bucket.steps,
        "decode": sum(stage.seconds.total for stage in bucket.stages if stage.phase is Phase.DECODE and stage.seconds),
    }
    return figures[of]


def _published() -> list[str]:
    rows = []
    for row in PUBLISHED:
        predicted = predicted_seconds(row)
        rows.append(
            (
                row.gpu,
                row.shape,
                row.of,
                row.steps,
                row.kernel.value,
                f"{predicted:.{1 if row.of == 'step' else 0}f}",
                f"{row.seconds:g}",
                f"{predicted / row.seconds:.2f}",
                row.source,
            )
        )
    headings = ("GPU", "shape", "of", "steps", "attention kernel", "predicted s", "published s", "ratio", "source")
    return ["", "## Published times", "", *_PUBLISHED_TEXT.split("\n"), "", *report.table(headings, rows)]


def _flash_3() -> list[str]:
    rows = []
    for row in PUBLISHED:
        if row.kernel is not _FLASH_3:
            continue
        rate = attention_rate(row.kernel, find_gpu(row.gpu)).rate
        attention = predicted_seconds(replace(row, of="attention"))
        faster = predicted_seconds(row) - attention * (1 - rate / FLASH_3_BY_ITS_AUTHORS)
        rows.append((row.of, f"{predicted_seconds(row):.0f}", f"{faster:.0f}", f"{row.seconds:g}"))
    headings = ("of", "predicted s at 470", "at 740", "published s")
    return ["", *_FLASH_3_TEXT.split("\n"), "", *report.table(headings, rows)]


def _gpu(path: Path) -> list[str]:
    """Return predictions beside what ``tools.bench.planner_gpu`` measured."""
    measured = json.loads(path.read_text(encoding="utf-8"))
    machine = ", ".join(f"{name} {value}" for name, value in measured["machine"].items())
    rows = []
    for shape, blocks in measured["blocks"].items():
        actual = 20 * blocks["double_s"] + 40 * blocks["single_s"]
        predicted = predicted_seconds(Published("H100 SXM", shape, AttentionKernel.CUDNN, actual, "step", ""))
        rows.append((f"step, {shape}", f"{predicted:.2f}", f"{actual:.2f}", f"{predicted / actual:.2f}"))
    tile = predicted_seconds(Published("H100 SXM", "256x256x65", AttentionKernel.CUDNN, 0, "decode", ""))
    actual = measured["vae_tile"]["seconds"]
    rows.append(("tile of 17x32x32 latents", f"{tile:.3f}", f"{actual:.3f}", f"{tile / actual:.2f}"))
    headings = ("what", "predicted s", "measured s", "ratio")
    return ["", "## On a GPU", "", *_GPU_TEXT.split("\n"), "", f"- {machine}", "", *report.table(headings, rows)]


def plan_of(row: SinglePlan) -> Plan:
    """Return the prediction for a plan that was compiled on its own."""
    base = dict.fromkeys(FAMILIES["hunyuan_video"].stage_names, Precision.FP16)
    recipe = Recipe(
        {**base, row.stage: row.precision},
        (VideoShape.parse(row.shape),),
        high_precision=Precision.FP16,
        attention=Precision.FP8 if row.precision is Precision.FP8 else None,
    )
    return make_plan(model(row.blocks), _RTX, recipe)


def single_plans() -> Iterator[Comparison]:
    """Yield predictions beside what was measured of single plans."""
    for row in SINGLE_PLANS:
        plan = plan_of(row)
        build = next(build for build in plan.builds if build.stage == row.stage)
        # Their profiles ended at the model's own numbers of steps and prompts, as do stages that no profile bounds.
        plain = make_plan(model(row.blocks), _CUDA, plan.recipe)
        cost = next(stage for stage in plain.buckets[0].stages if stage.stage == row.stage)
        activations = cost.activation_bytes + memory.ARENA_BASE_BYTES.value
        for figure, predicted, actual in (
            ("plan", build.plan_bytes, row.plan_bytes),
            ("activations", activations, row.activation_bytes),
            ("builder memory", build.builder_bytes, row.builder_bytes),
            ("builder seconds", build.builder_seconds, row.seconds),
        ):
            if actual is not None:
                yield Comparison(row.what, figure, predicted, actual)


def whole_transformer() -> Iterator[Comparison]:
    """Yield the sizes of the whole transformer (blocks and modulation, no refiner) in one plan."""
    plan = make_plan(model(), _RTX, Recipe(dict.fromkeys(FAMILIES["hunyuan_video"].stage_names, Precision.FP16)))
    size = sum(build.plan_bytes for build in plan.builds if build.stage in ("dit", "modulation"))
    yield Comparison("dit with modulation, bf16", "plan", size, 25.0e9)
    yield Comparison("dit with modulation, all FP8", "plan", size / 2, 12.55e9)


def _builds(bundles: tuple[Path, ...]) -> list[str]:
    comparisons = [*whole_transformer(), *single_plans()]
    lines = ["", "## Real builds", "", *_BUILDS_TEXT.split("\n"), "", *_comparison_table(comparisons)]
    for path in bundles:
        found = list(compare_bundle(path))
        lines += ["", f"### {path.name}", "", *_comparison_table(found)]
        within = sum(abs(one.ratio - 1) <= 0.1 for one in found if one.figure != "builder seconds")
        counted = sum(one.figure != "builder seconds" for one in found)
        lines += ["", f"Within 10 %: {within} of {counted} sizes."]
    return lines


def _comparison_table(comparisons: list[Comparison]) -> list[str]:
    rows = [
        (one.what, one.figure, one.shown(one.predicted), one.shown(one.actual), f"{one.ratio:.2f}")
        for one in comparisons
    ]
    return report.table(("what", "figure", "predicted", "actual", "ratio"), rows)


def _constants() -> list[str]:
    named: tuple[tuple[str, Constant], ...] = (
        ("matrix products, share of the dense rate", kernels.GEMM),
        ("matrix products in 8 bits, likewise", kernels.GEMM_8_BIT),
        ("convolutions, share of the dense rate", kernels.CONVOLUTION),
        ("memory, share of the bandwidth", kernels.BANDWIDTH),
        ("export, bytes", memory.EXPORT_BYTES),
        ("code in a plan, bytes", memory.CODE_BASE_BYTES),
        ("code in a plan, bytes per layer", memory.CODE_BYTES_PER_LAYER),
        ("arena, bytes", memory.ARENA_BASE_BYTES),
        ("builder, bytes", memory.BUILDER_BASE_BYTES),
        ("builder, bytes per byte in 16 bits", memory.BUILDER_SHARE_16),
        ("builder, bytes per byte in 8 bits", memory.BUILDER_SHARE_8),
        ("builder, seconds per layer", memory.BUILDER_SECONDS_PER_LAYER),
        ("builder, seconds per byte", memory.BUILDER_SECONDS_PER_BYTE),
        ("GPU memory that the driver keeps, bytes", memory.GPU_RESERVED_BYTES),
    )
    rows = [(name, f"{constant.value:g}", constant.source) for name, constant in named]
    return ["", "## Constants", "", *report.table(("constant", "value", "source"), rows)]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--bundle", "bundles", multiple=True, type=click.Path(exists=True, path_type=Path), help="A real build.")
@click.option("--output", default="benchmarks/planner.md", show_default=True, type=click.Path(path_type=Path))
@click.option("--measured", default="benchmarks/planner_h100.json", type=click.Path(exists=True, path_type=Path))
def main(bundles: tuple[Path, ...], output: Path, measured: Path) -> None:
    """Compare the planner with published times and real builds."""
    command = " ".join(["python -m reelforge.tools.bench.planner", *(f"--bundle {path.name}" for path in bundles)])
    lines = [
        "# The planner",
        "",
        *report.environment(command, PACKAGES),
        "",
        *_INTRODUCTION.split("\n"),
        *_published(),
        *_flash_3(),
        *_gpu(measured),
        *_builds(bundles),
        *_constants(),
    ]
    report.write(output, lines)
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
