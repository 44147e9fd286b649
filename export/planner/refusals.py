"""What does not fit, and what would: a plan judged against a GPU and the machine that builds.

Advice is found by planning again with one thing changed and is only given where the changed plan fits. The module does
not decide for the user: it lists each change that would do on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from reelforge.export.planner.gpus import GPUS, Gpu
from reelforge.export.planner.memory import BuildCost, PhaseMemory
from reelforge.export.planner.plan import Bucket, Model, Plan, make_plan
from reelforge.export.planner.work import Phase
from reelforge.runtime.architectures import ARCHITECTURES
from reelforge.runtime.errors import BuildError, RequestError
from reelforge.runtime.recipe import Backend, Precision, Recipe, Target, VideoShape

_NARROWER = (Precision.FP8, Precision.INT8, Precision.FP16)
_FEWER_FRAMES = (2, 4)
_COMPILER_SHARE = 0.7  # of the machine, when nothing else runs on it


@dataclass(frozen=True)
class Refusal:
    """One thing that cannot be done.

    Attributes:
        where: What, in a sentence.
        received: How much it needs.
        expected: How much there is.
        fixes: Changes of which each would do; empty if none was found.
    """

    where: str
    received: str
    expected: str
    fixes: tuple[str, ...]

    def error(self) -> BuildError:
        """Return it as an error."""
        fix = "; or ".join(self.fixes) if self.fixes else "no single change that the planner tries is enough"
        return BuildError(self.where, received=self.received, expected=self.expected, fix=fix)


def check_gpu(target: Target, gpu: Gpu) -> None:
    """Refuse a GPU that the target does not serve.

    Raises:
        RequestError: Saying which target would.
    """
    if target.backend is Backend.CPU:
        raise RequestError(
            f"target cpu does not run on the {gpu.name}.",
            received=f"--target {target} --gpu '{gpu.name}'",
            expected="a target that runs on a GPU, or no --gpu",
            fix=f"use --target {_serving(gpu)}, or leave --gpu out",
        )
    if target.backend.has_plans and gpu.architecture not in target.architectures:
        raise RequestError(
            f"target {target} has no plan for the {gpu.name}, which is {gpu.architecture}.",
            received=f"--target {target} --gpu '{gpu.name}'",
            expected=f"a target with {gpu.architecture}",
            fix=f"use --target {_serving(gpu)}",
        )


def _serving(gpu: Gpu) -> str:
    backends = ARCHITECTURES[gpu.architecture].backends
    return f"{backends[0]}:{gpu.architecture}"


def find_refusals(model: Model, plan: Plan) -> tuple[Refusal, ...]:
    """Return everything about a plan that does not fit: GPU memory by phase, then memory of the build."""
    found = [_gpu_refusal(model, plan, phase) for phase in Phase]
    return tuple(refusal for refusal in (*found, *_host_refusals(model, plan)) if refusal is not None)


def require_fit(refusals: Sequence[Refusal]) -> None:
    """Raise the first refusal; the others are counted in its text.

    Raises:
        BuildError: If there is one.
    """
    if not refusals:
        return
    error = refusals[0].error()
    if len(refusals) > 1:
        error.fix += f" (and {len(refusals) - 1} more that does not fit: see reelforge plan)"
    raise error


def gigabytes(count: float) -> str:
    """Return a size as the messages write it."""
    return f"{count / 1e9:.1f} GB"


def _gpu_refusal(model: Model, plan: Plan, phase: Phase) -> Refusal | None:
    gpu = plan.options.gpu
    if gpu is None:
        return None
    failing = [(bucket, memory) for bucket, memory in _of_phase(plan, phase) if memory.total_bytes > gpu.memory_bytes]
    if not failing:
        return None
    bucket, worst = max(failing, key=lambda pair: pair[1].total_bytes)
    names = ", ".join(str(one.shape) for one, _ in failing)
    needed = (
        f"{gigabytes(worst.total_bytes)} at {bucket.shape}: {worst.stage} with {gigabytes(worst.weight_bytes)} weights "
        f"and {gigabytes(worst.activation_bytes)} activations"
    )
    return Refusal(
        f"the {phase.value} does not fit the {gpu.name} at {names}.",
        needed,
        f"at most {gigabytes(gpu.memory_bytes)}",
        tuple(_advice(model, plan, gpu, phase, worst)),
    )


def _of_phase(plan: Plan, phase: Phase) -> Iterator[tuple[Bucket, PhaseMemory]]:
    for bucket in plan.buckets:
        for memory in bucket.memory:
            if memory.phase is phase:
                yield bucket, memory


def _fits(plan: Plan, phase: Phase, gpu: Gpu) -> bool:
    return all(memory.total_bytes <= gpu.memory_bytes for _, memory in _of_phase(plan, phase))


def _advice(model: Model, plan: Plan, gpu: Gpu, phase: Phase, worst: PhaseMemory) -> Iterator[str]:
    """Yield each single change with which ``phase`` fits ``gpu``."""
    stage, recipe = worst.stage, plan.recipe

    def fits(recipe: Recipe = recipe, model: Model = model) -> bool:
        return _fits(make_plan(model, plan.target, recipe, plan.options), phase, gpu)

    for precision in _narrower(model, plan, gpu, stage):
        if fits(replace(recipe, precision={**recipe.precision, stage: precision})):
            yield f"use --precision {stage}={precision.value}"
            break
    smaller = _smaller_shapes(model, plan, phase, gpu)
    if smaller:
        yield f"use --shapes {','.join(str(shape) for shape in smaller)}"
    if phase is Phase.DECODE:
        for option, tiling in model.tilings.items():
            if fits(model=replace(model, spec=replace(model.spec, tiling=tiling))):
                yield f"decode in smaller tiles with {option}"
    larger = _larger_gpu(plan, worst)
    if larger is not None:
        yield f"use a GPU with more memory, such as the {larger.name}"


def _narrower(model: Model, plan: Plan, gpu: Gpu, stage: str) -> Iterator[Precision]:
    """Yield precisions that make a stage smaller and that every architecture in question computes in."""
    current = plan.recipe.precision[stage]
    quantisable = stage in model.family.quantisation(model.spec)
    architectures = [ARCHITECTURES[name] for name in plan.target.architectures or (gpu.architecture,)]
    able = {
        Precision.FP8: quantisable and all(one.fp8 for one in architectures),
        Precision.INT8: quantisable and all(one.int8 for one in architectures),
        Precision.FP16: current is Precision.FP32,
    }
    for precision in _NARROWER:
        if able[precision] and not current.quantised:
            yield precision


def _smaller_shapes(model: Model, plan: Plan, phase: Phase, gpu: Gpu) -> tuple[VideoShape, ...]:
    """Return the requested videos that fit, or else the largest with fewer frames or smaller pictures that does."""
    asked = [bucket.shape for bucket in plan.buckets if bucket.shape.frames > 1]
    fitting = tuple(shape for shape in asked if _shape_fits(model, plan, phase, gpu, shape))
    if fitting or not asked:
        return fitting
    period, multiple = model.spec.vae.temporal_compression, model.spec.pixel_multiple
    smallest = min(asked, key=lambda shape: shape.height * shape.width * shape.frames)
    for divisor in _FEWER_FRAMES:
        frames = (smallest.frames - 1) // divisor // period * period + 1
        shape = replace(smallest, frames=frames)
        if 1 < frames < smallest.frames and _shape_fits(model, plan, phase, gpu, shape):
            return (shape,)
    for divisor in _FEWER_FRAMES:
        height, width = (side // divisor // multiple * multiple for side in (smallest.height, smallest.width))
        shape = replace(smallest, height=height, width=width)
        if height and width and _shape_fits(model, plan, phase, gpu, shape):
            return (shape,)
    return ()


def _shape_fits(model: Model, plan: Plan, phase: Phase, gpu: Gpu, shape: VideoShape) -> bool:
    recipe = replace(plan.recipe, shapes=(shape,))
    return _fits(make_plan(model, plan.target, recipe, plan.options), phase, gpu)


def _larger_gpu(plan: Plan, worst: PhaseMemory) -> Gpu | None:
    served = plan.target.architectures
    able = [gpu for gpu in GPUS if not served or gpu.architecture in served]
    enough = [gpu for gpu in able if gpu.memory_bytes >= worst.total_bytes]
    return min(enough, key=lambda gpu: gpu.memory_bytes, default=None)


def _host_refusals(model: Model, plan: Plan) -> Iterator[Refusal]:
    host = plan.options.host_bytes
    if host is None:
        return
    if plan.export_bytes > host:
        yield Refusal(
            "calibration does not fit this machine's memory.",
            gigabytes(plan.export_bytes),
            f"at most {gigabytes(host)}",
            (f"use --calibration-memory {max(1, int((host - 1e9) / 2**30 * 0.8))}", "give --scales"),
        )
    for build in plan.builds:
        if build.builder_bytes > host:
            yield _compiler_refusal(model, plan, build, host)


def _compiler_refusal(model: Model, plan: Plan, build: BuildCost, host: int) -> Refusal:
    compiler = int(host * _COMPILER_SHARE)
    cut = replace(plan.options, parts={}, compiler_bytes=compiler)
    again = make_plan(model, plan.target, plan.recipe, cut)
    enough = next(one for one in again.builds if one.stage == build.stage)
    fixes = []
    if enough.builder_bytes <= host:
        fixes = [f"cut {build.stage} into {enough.parts} parts with --builder-memory {compiler / 1e9:.1f}"]
    return Refusal(
        f"compiling {build.stage} in {build.parts} part{'s' if build.parts > 1 else ''} does not fit this machine.",
        f"{gigabytes(build.builder_bytes)} of memory",
        f"at most {gigabytes(host)}",
        (*fixes, f"build on a machine with {gigabytes(build.builder_bytes)} of memory"),
    )
