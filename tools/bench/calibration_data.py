"""Records what a bundle's stage is given while the bundle samples videos: the data that every quantiser calibrates on.

``python -m reelforge.tools.bench.calibration_data BUNDLE -o DIR`` runs the bundle's own pipeline over seeded prompts of
the demonstration world and all steps. The module knows no quantiser; it names no input of any stage.

A recording is one ``.npz`` per prompt: each of the stage's inputs with the step as an additional first axis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from demo.train import data
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.engines.engine import Array, Engine
from reelforge.runtime.events import FloatArray
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.request import Request
from reelforge.runtime.stage_inputs import Conditions

CALIBRATION_PROMPTS, EVALUATION_PROMPTS = 8, 16
CALIBRATION_SEED, EVALUATION_SEED = 1000, 0  # of the noise of the first prompt; each prompt after it has the next


@dataclass(frozen=True)
class Recording:
    """One sampled video, with ``n`` steps.

    Attributes:
        request: What was asked for.
        inputs: Every input of the stage, ``[n, ...]``.
        velocities: What ``dit`` answered, ``[n, 1, C, T, H, W]``.
        conditions: From which sampling can be repeated.
        latents: The final latents ``[1, C, T, H, W]``.
    """

    request: Request
    inputs: dict[str, Array]
    velocities: FloatArray
    conditions: Conditions
    latents: FloatArray


class RecordingEngine:
    """An engine that keeps a copy of every call's inputs, and of the outputs named ``keep``."""

    def __init__(self, engine: Engine, keep: str) -> None:
        self.name = engine.name
        self.inputs = engine.inputs
        self.outputs = engine.outputs
        self.calls: list[dict[str, Array]] = []
        self.kept: list[Array] = []
        self._engine = engine
        self._keep = keep

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None] | None = None) -> dict[str, Array]:
        """Compute the outputs (see :class:`reelforge.runtime.engines.engine.Engine`)."""
        wanted = dict.fromkeys(self.outputs) if outputs is None else outputs
        result = self._engine.run(inputs, {**wanted, self._keep: wanted.get(self._keep)})
        self.calls.append({name: array.copy() for name, array in inputs.items()})
        self.kept.append(result[self._keep].copy())
        return {name: result[name] for name in wanted}

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()


class RecordingPipeline(Pipeline):
    """A pipeline whose ``dit`` is recorded; ``recorded`` is the engine of the last sampling."""

    recorded: RecordingEngine | None = None

    @contextmanager
    def engine(self, stage: str) -> Iterator[Engine]:
        """Load a stage for the duration of a ``with`` block; ``dit`` with a recorder around it."""
        with super().engine(stage) as engine:
            if stage == "dit":
                engine = self.recorded = RecordingEngine(engine, "velocity")
            yield engine


def record(pipeline: RecordingPipeline, request: Request) -> Recording:
    """Sample one video and return everything that ``dit`` saw and said."""
    resolved = pipeline.resolve(request)
    conditions = pipeline.condition(resolved, pipeline.encode_text(resolved.prompt))
    latents = pipeline.sample(resolved, conditions)
    if pipeline.recorded is None:
        raise AssertionError("the pipeline sampled without loading dit")
    calls = pipeline.recorded.calls
    inputs = {name: np.stack([call[name] for call in calls]) for name in calls[0]}
    return Recording(request, inputs, np.stack(pipeline.recorded.kept), conditions, latents)


def calibration_requests(count: int = CALIBRATION_PROMPTS, seed: int = 0) -> list[Request]:
    """Return requests at the bundle's defaults for scenes that the demonstration model was trained on."""
    scenes = [scene for scene in data.scenes() if not scene.held_out]
    return _requests(_prompts(scenes, count, seed), CALIBRATION_SEED)


def evaluation_requests(count: int = EVALUATION_PROMPTS, seed: int = 0) -> list[Request]:
    """Return requests for held-out scenes, so none has a prompt or the noise of a calibration request."""
    scenes = [scene for scene in data.scenes() if scene.held_out]
    return _requests(_prompts(scenes, count, seed), EVALUATION_SEED)


def write_recordings(pipeline: RecordingPipeline, requests: Sequence[Request], folder: Path) -> list[Path]:
    """Record ``requests`` and return the files, in order; ``prompts.txt`` beside them lists the prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("".join(f"{request.prompt}\n" for request in requests), encoding="utf-8")
    paths = []
    for number, request in enumerate(requests):
        path = folder / f"{number:03d}.npz"
        inputs: dict[str, Any] = record(pipeline, request).inputs
        np.savez(path, **inputs)
        paths.append(path)
    return paths


def _requests(prompts: Sequence[str], seed: int) -> list[Request]:
    return [Request(prompt, seed=seed + number) for number, prompt in enumerate(prompts)]


def _prompts(scenes: Sequence[data.Scene], count: int, seed: int) -> list[str]:
    """Choose ``count`` scenes in a seeded order, so that every colour, shape and so on is asked for about as often.

    Phrasings take turns.
    """
    if not 0 < count <= len(scenes):
        raise ValueError(f"{count} prompts\n  received: {count}   expected: 1 to {len(scenes)}")
    left = [scenes[index] for index in np.random.default_rng(seed).permutation(len(scenes))]
    asked: Counter[str] = Counter()
    prompts = []
    for number in range(count):
        scene = min(left, key=lambda one: sum(asked[word] for word in astuple(one)))
        left.remove(scene)
        asked.update(astuple(scene))
        phrasings = scene.captions()
        prompts.append(phrasings[number % len(phrasings)])
    return prompts


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", "folder", required=True, type=click.Path(path_type=Path), help="Folder for the files.")
@click.option("--count", default=CALIBRATION_PROMPTS, show_default=True, help="Prompts.")
@click.option("--seed", default=0, show_default=True, help="Of the choice of prompts.")
@click.option("--steps", type=int, help="Instead of the bundle's default.")
def main(bundle: Path, folder: Path, count: int, seed: int, steps: int | None) -> None:
    """Record the inputs of BUNDLE's dit over calibration prompts and all steps."""
    pipeline = RecordingPipeline(Bundle.open(bundle))
    requests = [replace(request, steps=steps) for request in calibration_requests(count, seed)]
    paths = write_recordings(pipeline, requests, folder)
    click.echo(f"wrote {len(paths)} recordings to {folder}")


if __name__ == "__main__":
    main()
