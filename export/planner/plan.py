"""plan_build: from a checkpoint's headers, a recipe and a target to a Plan of costs; nothing is built or executed.

The module puts the pieces together: layers, operations, bytes and seconds of every stage for every shape. What does not
fit is judged in ``refusals``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from reelforge.export.engines.builder_memory import weights_that_fit
from reelforge.export.engines.profiles import MAX_STEPS, profiles_for
from reelforge.export.engines.requirements import compatible_groups, stage_precisions
from reelforge.export.family import Family
from reelforge.export.planner.flops import Flops, call_flops
from reelforge.export.planner.gpus import Gpu
from reelforge.export.planner.kernels import COMPILERS_KERNELS, AttentionKernel, plugin_kernel
from reelforge.export.planner.layers import StageLayers, stage_layers
from reelforge.export.planner.memory import (
    ARENA_BASE_BYTES,
    EXPORT_BYTES,
    GPU_RESERVED_BYTES,
    BuildCost,
    PhaseMemory,
    activation_bytes,
    build_cost,
    eight_bit_share,
    joined,
    tensor_bytes,
)
from reelforge.export.planner.roofline import Seconds, call_seconds
from reelforge.export.planner.work import Phase, StageWork, Workload
from reelforge.export.stage import Stage
from reelforge.runtime.manifest import PromptTemplate
from reelforge.runtime.recipe import Backend, Precision, Recipe, Target, VideoShape
from reelforge.runtime.spec import ModelSpec, VaeTiling
from reelforge.runtime.step_cache.settings import PARTS

PROFILE_PROMPTS = 2
"""Prompts that the text encoders' profiles take at once (``export.engines.profiles``)."""


@dataclass(frozen=True)
class Model:
    """What is planned: a family, its numbers and its stages.

    Attributes:
        family: Gives rules and work.
        spec: The numbers.
        stages: Those that are built.
        template_tokens: Tokens of the prompt's template that are cropped from the text.
        tilings: Other tilings of the decoder, by the option that chooses them.
    """

    family: Family
    spec: ModelSpec
    stages: Sequence[Stage]
    template_tokens: int
    tilings: Mapping[str, VaeTiling] = field(default_factory=dict)

    @cached_property
    def counted(self) -> Sequence[Stage]:
        """The stages with weights of their own, or none; other views of a stage add next to nothing to it."""
        return [stage for stage in self.stages if not stage.weights_of]

    def chain(self, stage: Stage) -> Sequence[Stage]:
        """Return what a stage's plans are compiled of, in order: head, body and tail where all are built, or itself."""
        parts = [one for one in self.stages if one.weights_of == stage.name and one.name in PARTS]
        return parts if len(parts) == len(PARTS) else (stage,)

    @cached_property
    def parameters(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """Stage -> parameter -> shape; modules are built for it, without storage."""
        return {stage.name: stage.parameter_shapes() for stage in self.counted}

    def layers(self, stage: str, recipe: Recipe) -> StageLayers:
        """Return the layers of a stage in the precisions of a recipe."""
        rules = self.family.quantisation(self.spec).get(stage)
        return stage_layers(stage, self.parameters[stage], recipe, rules)


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is asked for beside the recipe.

    Attributes:
        gpu: Where videos will be made; None leaves times and fits out.
        steps: Sampling steps; None means the model's default.
        parts: Into how many pieces stages (of a chain: its links) are cut at most; others into as few as
            ``compiler_bytes`` asks for.
        host_bytes: Memory of the machine that builds; None means enough.
        compiler_bytes: What of it a compiler may occupy; None means half.
        calibration_bytes: Weights that calibration may load; 0 if nothing is calibrated.
        kernels: Attention kernels by precision, instead of the target's own and of its plugins.
    """

    gpu: Gpu | None = None
    steps: int | None = None
    parts: Mapping[str, int] = field(default_factory=dict)
    host_bytes: int | None = None
    compiler_bytes: int | None = None
    calibration_bytes: int = 0
    kernels: Mapping[Precision, AttentionKernel] | None = None


@dataclass(frozen=True)
class StageCost:
    """What one video costs in one stage.

    Attributes:
        stage: Its name.
        phase: Its part of the generation.
        calls: How often it runs.
        flops: Of all calls.
        seconds: Of all calls; None without a GPU.
        activation_bytes: Of the largest call; of a plan, of the largest that its profile takes.
        io_bytes: Inputs and outputs of the largest call.
        output_bytes: The outputs alone.
    """

    stage: str
    phase: Phase
    calls: int
    flops: Flops
    seconds: Seconds | None
    activation_bytes: int
    io_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class Bucket:
    """One shape: what a video of it costs.

    Attributes:
        shape: Of the video; one frame is image mode.
        steps: Sampling steps.
        stages: In pipeline order.
        memory: GPU memory (on a CPU: the host's) by phase, in order; the same for every video of a process.
    """

    shape: VideoShape
    steps: int
    stages: tuple[StageCost, ...]
    memory: tuple[PhaseMemory, ...]

    @property
    def peak(self) -> PhaseMemory:
        """The phase that needs most."""
        return max(self.memory, key=lambda phase: phase.total_bytes)

    @property
    def seconds_per_video(self) -> float | None:
        """Of all stages; None without a GPU."""
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(seconds.total for seconds in known) if known else None

    @property
    def step(self) -> Seconds | None:
        """One sampling step; None without a GPU or the loop's stage."""
        loop = [stage for stage in self.stages if stage.phase is Phase.LOOP]
        if not loop or loop[0].seconds is None:
            return None
        return loop[0].seconds * (1 / self.steps)


@dataclass(frozen=True)
class Plan:
    """Everything that is predicted of a build and its videos.

    Attributes:
        target: Backend and architectures.
        recipe: Precisions and shapes.
        options: What was asked for.
        export_bytes: Peak anonymous memory of the export (with calibration, if there is one).
        builds: By stage.
        buckets: One per shape, and one per picture size in image mode.
        attention_kernel: That the loop's attention is assumed to run in; None for one that is not fused.
    """

    target: Target
    recipe: Recipe
    options: PlanOptions
    export_bytes: int
    builds: tuple[BuildCost, ...]
    buckets: tuple[Bucket, ...]
    attention_kernel: AttentionKernel | None

    @property
    def bundle_bytes(self) -> int:
        """All plans or weights together."""
        return sum(build.plan_bytes for build in self.builds)

    @property
    def builder_bytes(self) -> int:
        """Peak anonymous memory of the build: stages are compiled one after the other."""
        return max((build.builder_bytes for build in self.builds), default=0)

    @property
    def builder_seconds(self) -> float:
        """Of all stages."""
        return sum(build.builder_seconds for build in self.builds)


def make_plan(model: Model, target: Target, recipe: Recipe, options: PlanOptions | None = None) -> Plan:
    """Predict what a build costs, and videos made with it.

    Args:
        model: What is built.
        target: For what.
        recipe: In which precisions, for which shapes.
        options: GPU, steps, partition.

    Raises:
        RequestError: If the GPU does not compute in a precision of the recipe.
    """
    options = options or PlanOptions()
    layers = {stage.name: model.layers(stage.name, recipe) for stage in model.counted}
    builds = tuple(_build(model, layers[stage.name], target, recipe, options) for stage in model.counted)
    kernels = options.kernels or COMPILERS_KERNELS
    plugin = plugin_kernel(target) if options.kernels is None and recipe.attention is None else None
    planner = _Planner(model, target, recipe, replace(options, kernels=kernels), layers, builds, plugin)
    buckets = tuple(planner.bucket(shape) for shape in with_images(_shapes(model, recipe)))
    return Plan(
        target,
        recipe,
        options,
        int(EXPORT_BYTES.value) + options.calibration_bytes,
        builds,
        buckets,
        plugin or _loop_kernel(kernels, layers, buckets[0]),
    )


def _loop_kernel(
    kernels: Mapping[Precision, AttentionKernel], layers: Mapping[str, StageLayers], bucket: Bucket
) -> AttentionKernel | None:
    loop = [layers[stage.stage] for stage in bucket.stages if stage.phase is Phase.LOOP]
    return kernels.get(loop[0].attention) if loop else None


def _build(model: Model, layers: StageLayers, target: Target, recipe: Recipe, options: PlanOptions) -> BuildCost:
    stage = next(one for one in model.stages if one.name == layers.name)
    if not target.backend.has_plans:
        return build_cost(stage, layers, plans=0)
    rules = model.family.quantisation(model.spec).get(stage.name)
    attends = rules is not None and bool(rules.attentions)
    plans = len(compatible_groups(target, stage_precisions(recipe, stage.name, has_attention=attends)))
    template = PromptTemplate("", model.template_tokens, "")
    costs = []
    for link in model.chain(stage):
        own = layers if link is stage else layers.of(link.name, link.parameter_shapes())
        profiles = len(profiles_for(link, model.spec, recipe, template))
        if link.name in options.parts or options.host_bytes is None:
            costs.append(build_cost(link, own, plans, profiles, parts=options.parts.get(link.name, 1)))
            continue
        compiler = options.compiler_bytes or options.host_bytes // 2
        limit = weights_that_fit(compiler, eight_bit_share(own))
        costs.append(build_cost(link, own, plans, profiles, part_limit=limit))
    return joined(stage.name, costs)


def with_images(shapes: Sequence[VideoShape]) -> tuple[VideoShape, ...]:
    """Return the shapes, and one frame of every picture size among them."""
    images = (VideoShape(shape.height, shape.width, 1) for shape in shapes)
    return tuple(dict.fromkeys((*shapes, *images)))


def _shapes(model: Model, recipe: Recipe) -> tuple[VideoShape, ...]:
    defaults = model.spec.defaults
    return recipe.shapes or (VideoShape(defaults.height, defaults.width, defaults.frames),)


def _workload(model: Model, recipe: Recipe, options: PlanOptions, shape: VideoShape) -> Workload:
    text = model.spec.llm.max_text_tokens
    steps = options.steps or model.spec.defaults.steps
    return Workload(shape, steps, text, text + model.template_tokens, recipe.batch)


@dataclass(frozen=True)
class _Planner:
    """Costs of one shape after the other, over what all shapes share."""

    model: Model
    target: Target
    recipe: Recipe
    options: PlanOptions
    layers: Mapping[str, StageLayers]
    builds: tuple[BuildCost, ...]
    plugin: AttentionKernel | None

    def bucket(self, shape: VideoShape) -> Bucket:
        """Return the costs of one shape."""
        workload = _workload(self.model, self.recipe, self.options, shape)
        works = self.model.family.work(self.model.spec, workload)
        largest = works
        if self.target.backend.has_plans:  # an arena is as large as its profile's largest sizes ask for
            largest = self.model.family.work(
                self.model.spec, replace(workload, steps=max(MAX_STEPS, workload.steps), prompts=PROFILE_PROMPTS)
            )
        stages = tuple(self._stage(stage, works[stage.name], largest[stage.name]) for stage in self.model.counted)
        return Bucket(shape, workload.steps, stages, tuple(self._memory(stages)))

    def _stage(self, stage: Stage, work: StageWork, largest: StageWork) -> StageCost:
        layers, gpu = self.layers[stage.name], self.options.gpu
        base = int(ARENA_BASE_BYTES.value) if self.target.backend.has_plans else 0
        flops, seconds = Flops(), Seconds()
        for call in work.calls:
            flops += call_flops(call, layers) * call.times
            if gpu is not None:
                seconds += call_seconds(call, layers, gpu, self.options.kernels or {}, self.plugin) * call.times
        return StageCost(
            stage.name,
            work.phase,
            sum(call.times for call in work.calls),
            flops,
            None if gpu is None else seconds,
            base + max(activation_bytes(call, layers) for call in largest.calls),
            max(tensor_bytes(stage, (*stage.inputs, *stage.outputs), call.dimensions) for call in work.calls),
            max(tensor_bytes(stage, stage.outputs, call.dimensions) for call in work.calls),
        )

    def _memory(self, stages: Sequence[StageCost]) -> list[PhaseMemory]:
        weights = {build.stage: build.weight_bytes for build in self.builds}
        reserved = 0 if self.target.backend is Backend.CPU else int(GPU_RESERVED_BYTES.value)
        result: list[PhaseMemory] = []
        carried = 0
        for phase in Phase:
            of_phase = [stage for stage in stages if stage.phase is phase]
            if of_phase:
                candidates = [
                    PhaseMemory(
                        phase,
                        stage.stage,
                        weights[stage.stage],
                        stage.activation_bytes,
                        stage.io_bytes,
                        carried,
                        reserved,
                    )
                    for stage in of_phase
                ]
                result.append(max(candidates, key=lambda memory: memory.total_bytes))
            carried = sum(stage.output_bytes for stage in of_phase)
        return result
