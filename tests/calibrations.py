"""What tests of calibration share: small requests, which layers are quantised, and an oracle of what layers read.

The oracle runs the modules that the graphs were captured from, in PyTorch, and records the inputs of every linear and
convolution and the operands of every attention. It shares the pipeline's inputs of each stage and nothing after that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from reelforge.calibration.number_formats import FP8_E4M3, INT8, NumberFormat
from reelforge.calibration.rules import SmoothingGroup
from reelforge.export import reference
from reelforge.export.calibrate import CalibrationOptions
from reelforge.export.family import FAMILIES
from reelforge.export.passes.layers import attention_nodes, weighted_layers
from reelforge.export.verify import bundle_stages
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.noise import gaussian_noise
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.recipe import VideoShape
from reelforge.runtime.request import Request
from reelforge.runtime.sampling import step_inputs
from reelforge.runtime.tiling import plan_tiles

PROMPTS = ("a cat", "two dogs run along a beach")
SHAPE = VideoShape(32, 48, 5)
STEPS = 3
SEED = 11

Formats = dict[str, dict[str, NumberFormat]]
Recording = dict[str, list[np.ndarray]]
"""Layer -> what it read, each ``[rows, channels]``.

An attention's operands have ``.query`` and so on appended, what a convolution made has ``.output``.
"""


def options(**changes: Any) -> CalibrationOptions:
    """Two prompts, three steps, a small video, one thread."""
    settings = {"prompts": PROMPTS, "seed": SEED, "steps": STEPS, "shape": SHAPE, "threads": 1, **changes}
    return CalibrationOptions(**settings)


def formats_of(bundle: Bundle, **stages: NumberFormat) -> Formats:
    """Return the layers that the family quantises of each stage."""
    rules = FAMILIES[bundle.manifest.spec.family].quantisation(bundle.manifest.spec)
    layers = {stage: weighted_layers(ir.load(bundle.graph(stage)).graph) for stage in stages}
    return {stage: {name: own for name in layers[stage] if rules[stage].covers(name)} for stage, own in stages.items()}


def attention_of(bundle: Bundle) -> Formats:
    """Return all attentions of ``dit``, in FP8."""
    return {"dit": dict.fromkeys(attention_nodes(ir.load(bundle.graph("dit")).graph), FP8_E4M3)}


def groups_of(bundle: Bundle) -> list[SmoothingGroup]:
    """Return every smoothing group of the family."""
    rules = FAMILIES[bundle.manifest.spec.family].quantisation(bundle.manifest.spec)
    return [group for rule in rules.values() for group in rule.groups]


def record(bundle: Bundle, pipeline: Pipeline) -> dict[str, Recording]:
    """Return what every layer of ``llm``, ``dit`` and ``vae_decoder`` reads in the run that ``options`` describes."""
    recordings: dict[str, Recording] = {"llm": {}, "dit": {}, "vae_decoder": {}}
    size = (1, *pipeline.spec.latent_shape(SHAPE.height, SHAPE.width, SHAPE.frames))
    run = {stage: _recorder(bundle, stage, recording) for stage, recording in recordings.items()}
    for index, prompt in enumerate(PROMPTS):
        request = pipeline.resolve(Request(prompt, SHAPE.height, SHAPE.width, SHAPE.frames, STEPS, SEED + index))
        run["llm"](pipeline.inputs.text(prompt).llm)
        told = pipeline.condition(request, pipeline.encode_text(prompt))
        latents = gaussian_noise(size, request.seed)
        with pipeline.engine("dit") as dit:
            for step in range(STEPS):
                feed = {"latents": latents, **told.fixed, **step_inputs(told.per_step, step)}
                run["dit"](feed)
                latents = dit.run(feed)["next_latents"]
        plan = plan_tiles(latents.shape[2:], pipeline.spec.tiling)
        for t, y, x in product(plan.windows, plan.rows, plan.columns):
            run["vae_decoder"]({"latent_tile": latents[:, :, slice(*t), slice(*y), slice(*x)]})
    return recordings


def _recorder(bundle: Bundle, stage: str, recording: Recording) -> Callable[[Mapping[str, np.ndarray]], None]:
    definition = next(each for each in bundle_stages(bundle) if each.name == stage)
    weights = {weight.name: weight for weight in bundle.stage(stage).weights}
    layers = {
        reference.read_weight(bundle.path, weight).numpy().tobytes(): name.removesuffix(".weight")
        for name, weight in weights.items()
        if name.endswith(".weight")
    }

    def run(feed: Mapping[str, np.ndarray]) -> None:
        with _hooked(bundle, stage, layers, recording):
            reference.run_stage(definition, bundle.path, weights, feed)

    return run


@contextmanager
def _hooked(bundle: Bundle, stage: str, layers: Mapping[bytes, str], recording: Recording) -> Iterator[None]:
    spec = bundle.manifest.spec.dit
    blocks = [f"double.{k}" for k in range(spec.double_blocks)] + [f"single.{k}" for k in range(spec.single_blocks)]
    remaining = iter(blocks)
    attend = torch.nn.functional.scaled_dot_product_attention

    def before(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, nn.Linear | nn.Conv3d):
            values = inputs[0].movedim(1, -1) if isinstance(module, nn.Conv3d) else inputs[0]
            name = layers[module.weight.detach().numpy().tobytes()]
            recording.setdefault(name, []).append(values.reshape(-1, values.shape[-1]).numpy().copy())

    def after(module: nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if isinstance(module, nn.Conv3d):
            name = layers[module.weight.detach().numpy().tobytes()]
            values = output.movedim(1, -1)
            recording.setdefault(f"{name}.output", []).append(values.reshape(-1, values.shape[-1]).numpy().copy())

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *more: Any, **others: Any
    ) -> torch.Tensor:
        block = next(remaining)
        for name, operand in (("query", query), ("key", key), ("value", value)):
            rows = operand.transpose(1, 2).flatten(2).reshape(-1, operand.shape[1] * operand.shape[3])
            recording.setdefault(f"{block}.attention.{name}", []).append(rows.numpy().copy())
        return attend(query, key, value, *more, **others)

    handles = [
        nn.modules.module.register_module_forward_pre_hook(before),
        nn.modules.module.register_module_forward_hook(after),
    ]
    try:
        with pytest.MonkeyPatch.context() as patch:
            if stage == "dit":
                patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
            yield
    finally:
        for handle in handles:
            handle.remove()


def damaged(bundle: Path, weight: str, stage: str, value: float) -> None:
    """Overwrite the first element of a stage's fp32 weight in a copy of a bundle."""
    entry = next(each for each in Bundle(bundle, _manifest(bundle)).stage(stage).weights if each.name == weight)
    assert entry.dtype == "F32"
    with (bundle / entry.file).open("r+b") as file:
        file.seek(entry.offset)
        file.write(np.float32(value).tobytes())


def _manifest(bundle: Path) -> Any:
    from reelforge.runtime.bundle.open import Check

    return Bundle.open(bundle, Check.SIZES).manifest


__all__ = [
    "INT8",
    "PROMPTS",
    "SEED",
    "SHAPE",
    "STEPS",
    "attention_of",
    "damaged",
    "formats_of",
    "groups_of",
    "options",
    "record",
]
