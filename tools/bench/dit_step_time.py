"""Time of one denoising step: ``python -m reelforge.tools.bench.dit_step_time --case NAME CHECKPOINT BUNDLE -o FILE``.

Contenders on the same weights and shapes are our fp32 graph, quantised ones (``--quantised``), and diffusers'
transformer in fp32 and bf16. They take turns in one process on all cores, so that a disturbance of the machine meets
all of them; each has run before it is timed. Text is not padded, which spares diffusers more than us. Its step contains
token refiner and modulation, which a bundle computes once for all steps. Development only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import HunyuanVideoTransformer3DModel

from reelforge.calibration.quality import cosine
from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.conditioning import guidance_value, rope_tables, sinusoids
from reelforge.runtime.engines.engine import Array, Engine
from reelforge.runtime.engines.onnxruntime_engine import engine_from_onnx
from reelforge.runtime.noise import gaussian_noise
from reelforge.tools.bench import report

PACKAGES = ("onnxruntime", "torch", "diffusers")
BASE = "reelforge fp32"
TIMESTEP, SIGMA_STEP, TEXT_TOKENS = 500.0, -0.05, 16
PAUSE_S = 0.3  # idle threads of the contender before have stopped spinning by then
SAMPLE_S = 0.3  # shorter steps are repeated within one sample


@dataclass(frozen=True)
class StepInputs:
    """What one step needs, as both sides take it.

    Attributes:
        latents: ``[1, C, T, H, W]``.
        states: Of the text, ``[1, L, text_width]``.
        pooled: ``[1, pooled_width]``.
        guidance: Times 1000 and rounded as the bundle does; diffusers rounds it only in bf16.
    """

    latents: Array
    states: Array
    pooled: Array
    guidance: float


@dataclass(frozen=True)
class Timing:
    """One contender: ``seconds`` of a step, one per round, and the cosine of its velocity with ``BASE``'s."""

    contender: str
    seconds: tuple[float, ...]
    cosine: float


Step = Callable[[], Array]


def random_inputs(bundle: Bundle, text_tokens: int = TEXT_TOKENS) -> StepInputs:
    """Return noise at the bundle's default shape."""
    spec = bundle.manifest.spec
    size = spec.defaults
    shape = (1, *spec.latent_shape(size.height, size.width, size.frames))
    return StepInputs(
        gaussian_noise(shape, 0),
        gaussian_noise((1, text_tokens, spec.dit.text_width), 1),
        gaussian_noise((1, spec.dit.pooled_width), 2),
        guidance_value(size.guidance, spec.guidance_rounding),
    )


def dit_inputs(bundle: Bundle, inputs: StepInputs) -> dict[str, Array]:
    """Run the bundle's refiner and modulation and return the inputs of its ``dit``."""
    spec = bundle.manifest.spec
    times = sinusoids([TIMESTEP], spec.dit.sinusoid_width)
    vectors: dict[str, Array] = {"timestep_embedding": times, "pooled_text": inputs.pooled}
    if spec.dit.guidance_embedding:
        vectors["guidance_embedding"] = sinusoids([inputs.guidance], spec.dit.sinusoid_width)
    with closing(load(bundle, "refiner")) as refiner, closing(load(bundle, "modulation")) as modulation:
        text = refiner.run({"text_states": inputs.states, "timestep_embedding": times})
        modulations = modulation.run(vectors)
    frames, height, width = inputs.latents.shape[2:]
    patch = spec.dit.patch
    cos, sin = rope_tables(
        (frames // patch[0], height // patch[1], width // patch[2]), spec.dit.rope_axes, spec.dit.rope_theta
    )
    sigma_step = np.array(SIGMA_STEP, np.float32)
    return {
        "latents": inputs.latents,
        "rope_cos": cos,
        "rope_sin": sin,
        "sigma_step": sigma_step,
        **text,
        **modulations,
    }


def load(bundle: Bundle, stage: str) -> Engine:
    """Load a stage on all cores."""
    return engine_from_onnx(bundle.graph(stage), bundle.stage(stage))


def bundle_step(bundle: Bundle, inputs: StepInputs, stack: ExitStack) -> Step:
    """Return a step of a bundle's ``dit``, which ``stack`` closes."""
    arrays = dit_inputs(bundle, inputs)
    dit = stack.enter_context(closing(load(bundle, "dit")))
    # As in the sampling loop, which asks for the latents; the velocity is asked for once, for the comparison.
    return lambda: dit.run(arrays, {"velocity": None})["velocity"]


def diffusers_step(checkpoint: Path, inputs: StepInputs, dtype: Any) -> Step:
    """Return a step of diffusers' transformer, eager."""
    model = HunyuanVideoTransformer3DModel.from_pretrained(checkpoint / "transformer", torch_dtype=dtype).eval()
    latents, states, pooled = (
        torch.from_numpy(array).to(dtype) for array in (inputs.latents, inputs.states, inputs.pooled)
    )
    mask = torch.ones(states.shape[:2], dtype=torch.int64)
    guidance = torch.tensor([inputs.guidance], dtype=dtype) if model.config.guidance_embeds else None

    def step() -> Array:
        with torch.inference_mode():
            velocity = model(
                latents, torch.tensor([TIMESTEP]), states, mask, pooled, guidance=guidance, return_dict=False
            )
        result: Array = velocity[0].float().numpy()
        return result

    return step


def take_turns(contenders: Mapping[str, Step], repeats: int) -> list[Timing]:
    """Time ``repeats`` rounds in which every contender runs once; the order is another in every round.

    Args:
        contenders: By name; ``BASE`` must be among them.
        repeats: Rounds. A round's sample is the mean over as many steps as fill ``SAMPLE_S``.
    """
    velocities, steps = {}, {}
    for name, step in contenders.items():
        velocities[name] = step()  # also warms it up
        started = time.perf_counter()
        step()
        steps[name] = max(1, round(SAMPLE_S / (time.perf_counter() - started)))
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            time.sleep(PAUSE_S)
            started = time.perf_counter()
            for _ in range(steps[name]):
                contenders[name]()
            seconds[name].append((time.perf_counter() - started) / steps[name])
    return [Timing(name, tuple(seconds[name]), cosine(velocities[name], velocities[BASE])) for name in names]


def measure(checkpoint: Path, bundle: Path, quantised: Mapping[str, Path], repeats: int) -> list[Timing]:
    """Time a step of all contenders.

    Args:
        checkpoint: In diffusers' layout.
        bundle: Its fp32 bundle, with the stages refiner, modulation and dit at least.
        quantised: Other bundles of the same checkpoint, by the name of the contender.
        repeats: Rounds.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with ExitStack() as stack:
        base = Bundle.open(bundle, Check.SIZES)
        inputs = random_inputs(base)
        contenders = {BASE: bundle_step(base, inputs, stack)}
        for name, path in quantised.items():
            contenders[name] = bundle_step(Bundle.open(path, Check.SIZES), inputs, stack)
        contenders["diffusers fp32"] = diffusers_step(checkpoint, inputs, torch.float32)
        contenders["diffusers bf16"] = diffusers_step(checkpoint, inputs, torch.bfloat16)
        return take_turns(contenders, repeats)


def timing_lines(timings: Sequence[Timing]) -> list[str]:
    """Return the Markdown table of one case; ratios are of times in the same round."""
    (base,) = (timing for timing in timings if timing.contender == BASE)
    rows = []
    for timing in timings:
        ratios = [ours / theirs for ours, theirs in zip(base.seconds, timing.seconds, strict=True)]
        rows.append(
            (
                timing.contender,
                report.spread([value * 1e3 for value in timing.seconds]),
                report.spread(ratios, digits=2),
                f"{timing.cosine:.6f}",
            )
        )
    return report.table(("contender", "ms per step", f"times as fast as {BASE}", "cosine with its velocity"), rows)


def describe(bundle: Path) -> str:
    """Return the size of a case's model and step in words."""
    spec = Bundle.open(bundle, Check.SIZES).manifest.spec
    size, dit = spec.defaults, spec.dit
    latents = spec.latent_shape(size.height, size.width, size.frames)[1:]
    tokens = int(np.prod(latents)) // int(np.prod(dit.patch))
    return (
        f"Width {dit.width}, {dit.double_blocks} double and {dit.single_blocks} single blocks, "
        f"{tokens} image and {TEXT_TOKENS} text tokens."
    )


@click.command()
@click.option(
    "--case",
    "cases",
    multiple=True,
    required=True,
    type=(str, click.Path(path_type=Path, exists=True), click.Path(path_type=Path, exists=True)),
    metavar="NAME CHECKPOINT BUNDLE",
    help="A checkpoint in diffusers' layout and its fp32 bundle; repeatable.",
)
@click.option(
    "--quantised",
    multiple=True,
    type=(str, str, click.Path(path_type=Path, exists=True)),
    metavar="CASE CONTENDER BUNDLE",
    help="Another bundle of a case's checkpoint; repeatable.",
)
@click.option("--repeats", default=7, show_default=True, help="Rounds.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Markdown file.")
def main(
    cases: list[tuple[str, Path, Path]], quantised: list[tuple[str, str, Path]], repeats: int, output: Path
) -> None:
    """Time one denoising step of our graphs and of diffusers' transformer."""
    unknown = {case for case, _, _ in quantised} - {name for name, _, _ in cases}
    if unknown:
        raise click.BadParameter(f"no --case is called {', '.join(sorted(unknown))}", param_hint="--quantised")
    lines = [
        "# Time of a denoising step",
        "",
        *report.environment("python -m reelforge.tools.bench.dit_step_time", PACKAGES),
        "",
        f"Median of {repeats} rounds (smallest-largest); contenders take turns on all cores, warm.",
    ]
    for name, checkpoint, bundle in cases:
        others = {label: path for case, label, path in quantised if case == name}
        lines += ["", f"## {name}", "", describe(bundle), ""]
        lines += timing_lines(measure(checkpoint, bundle, others, repeats))
    report.write(output, lines)
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
