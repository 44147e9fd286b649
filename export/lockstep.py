"""A bundle's own pipeline over many prompts in lockstep: stage by stage and step by step, every engine loaded for all.

It is the arithmetic of ``runtime.pipeline`` in another order, so that a stage larger than memory passes through it once
per step and not once per prompt. What ``dit`` is told about each prompt lies in files, since for all prompts and steps
it is large. The module does not know what is done with observed values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np
import onnx_ir as ir

from reelforge.calibration.errors import NonFiniteError
from reelforge.calibration.state import CalibrationState
from reelforge.export.observed import ObservedValue
from reelforge.export.segments import SegmentedStage
from reelforge.runtime.engines.engine import Array
from reelforge.runtime.events import FloatArray
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.request import ResolvedRequest
from reelforge.runtime.sampling import step_inputs
from reelforge.runtime.stage_inputs import Conditions
from reelforge.runtime.tiling import plan_tiles

TEXT_STAGES = ("llm", "clip", "refiner", "modulation")
"""What runs before sampling, in order."""

OnTensor = Callable[[str, Array, int | None], None]
OnProgress = Callable[[str, int, int], None]

_ITEM_BYTES = 4


@dataclass
class Lockstep:
    """One pass over all prompts.

    Attributes:
        pipeline: Of the bundle.
        requests: One per prompt, equal but for prompt and seed.
        state: Where the inputs of ``dit`` are kept.
        observed: What to observe, by stage.
        memory_bytes: What the loaded weights may take.
        on_tensor: Told each observed tensor: its name, its values, and the sampling step if there is one.
        on_progress: Told (stage, done, in all).
    """

    pipeline: Pipeline
    requests: Sequence[ResolvedRequest]
    state: CalibrationState
    observed: Mapping[str, Sequence[ObservedValue]]
    memory_bytes: int
    on_tensor: OnTensor
    on_progress: OnProgress
    _open: dict[str, SegmentedStage] = field(default_factory=dict)

    def text(self, stages: Sequence[str]) -> None:
        """Run the first stages of ``TEXT_STAGES`` for all prompts, and keep what ``dit`` is told.

        Args:
            stages: A beginning of ``TEXT_STAGES``.

        Raises:
            RequestError: If a prompt is not valid Unicode text.
            EngineError: If an engine fails.
            CalibrationError: If the state cannot be written, or a value is not finite.
        """
        inputs = [self.pipeline.inputs.text(request.prompt) for request in self.requests]
        tokens = max(each.llm["input_ids"].shape[1] for each in inputs)
        states = [made["prompt_states"] for made in self._run("llm", [each.llm for each in inputs], tokens)]
        if "clip" not in stages:
            return
        pooled = [made["pooled_text"] for made in self._run("clip", [each.clip for each in inputs], tokens)]
        texts = [self.pipeline.inputs.text_encoding(*each) for each in zip(inputs, states, pooled, strict=True)]
        pairs = list(zip(self.requests, texts, strict=True))
        makers = {"refiner": self.pipeline.inputs.refiner, "modulation": self.pipeline.inputs.modulation}
        for stage in TEXT_STAGES[2 : len(stages)]:
            positions = tokens * self.requests[0].steps
            feeds = [makers[stage](request, text) for request, text in pairs]
            for index, made in enumerate(self._run(stage, feeds, positions)):
                self.state.save_inputs(index, made)

    def step(self, step: int, latents: Sequence[FloatArray]) -> list[FloatArray]:
        """Run one sampling step for all prompts and return the new latents ``[1, C, T, H, W]`` of each.

        Raises:
            EngineError: If an engine fails.
            CalibrationError: If a value is not finite.
        """
        feeds = [
            {"latents": own, **told.fixed, **step_inputs(told.per_step, step)}
            for own, told in zip(latents, self._conditions, strict=True)
        ]
        positions = max(len(feed["rope_cos"]) + feed["text"].shape[1] for feed in feeds)
        steps = self.requests[0].steps
        following: list[FloatArray] = [
            made["next_latents"] for made in self._run("dit", feeds, positions, ("next_latents",), step, steps)
        ]
        for own in following:
            if not np.isfinite(own).all():
                nan, infinite = int(np.isnan(own).sum()), int(np.isinf(own).sum())
                raise NonFiniteError(nan, infinite, own.size, f"the output of stage 'dit' at step {step}")
        return following

    def decode(self, latents: Sequence[FloatArray]) -> None:
        """Run the decoder over all tiles of all prompts; the frames are of no interest.

        Raises:
            EngineError: If an engine fails.
            CalibrationError: If a value is not finite.
        """
        spec = self.pipeline.spec
        tiles = []
        for own in latents:
            plan = plan_tiles((own.shape[2], own.shape[3], own.shape[4]), spec.tiling)
            for (t0, t1), (y0, y1), (x0, x1) in product(plan.windows, plan.rows, plan.columns):
                tiles.append({"latent_tile": own[:, :, t0:t1, y0:y1, x0:x1]})
        enlarged = spec.vae.temporal_compression * spec.vae.spatial_compression**2
        positions = max(tile["latent_tile"][0, 0].size for tile in tiles) * enlarged
        for _ in self._run("vae_decoder", tiles, positions, ()):
            pass

    def close(self) -> None:
        """Give back the memory of all engines."""
        while self._open:
            self._open.popitem()[1].close()

    @cached_property
    def _conditions(self) -> list[Conditions]:
        names = [info.name for info in self.pipeline.bundle.stage("modulation").outputs]
        return [
            self.pipeline.inputs.conditions(
                request,
                self.state.load_inputs(index, "text"),
                {name: self.state.load_inputs(index, name) for name in names},
            )
            for index, request in enumerate(self.requests)
        ]

    def _run(
        self,
        stage: str,
        inputs: Sequence[Mapping[str, Array]],
        positions: int,
        outputs: Sequence[str] | None = None,
        step: int | None = None,
        steps: int = 1,
    ) -> Iterator[dict[str, Array]]:
        """Run a stage for all ``inputs``; ``positions`` is how many rows of channels an observed tensor may have."""
        observed = {str(item.value.name): item.tensor for item in self.observed.get(stage, ())}
        if stage not in self._open:
            self.close()

            def bytes_of(value: ir.Value) -> int:
                tensor = observed.get(str(value.name))
                return 0 if tensor is None else tensor.channels * positions * _ITEM_BYTES

            bundle = self.pipeline.bundle
            wanted = [info.name for info in bundle.stage(stage).outputs] if outputs is None else outputs
            self._open[stage] = SegmentedStage(
                bundle, stage, wanted, list(observed), self.memory_bytes, bytes_of, self.pipeline.options
            )
        engine = self._open[stage]
        parts = engine.parts * len(inputs)
        done, total = (step or 0) * parts, steps * parts

        def count() -> None:
            nonlocal done
            done += 1
            self.on_progress(stage, done, total)

        yield from engine.run(inputs, lambda name, values: self.on_tensor(observed[name].name, values, step), count)
