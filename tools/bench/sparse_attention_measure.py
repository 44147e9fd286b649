"""What sparse attention does to the demonstration model's videos: PSNR against dense attention, and prompt accuracy.

All settings of one kind run on one bundle, from the same noise and the same encoded prompts as dense attention, so
whatever differs is what attention did not see. The judge is ``demo.train.checker``. Nothing here is about time: on the
CPU a mask hides the keys that a kernel would skip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from reelforge.calibration.quality import psnr
from reelforge.export.build import build_bundle
from reelforge.export.build_request import BuildRequest
from reelforge.runtime.attention.inputs import JointSequence, attention_inputs
from reelforge.runtime.attention.table import DENSE, AttentionTable, Pattern, Rule
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.conditioning import rope_tables
from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.recipe import SparseAttention, SparseKind, Target
from reelforge.runtime.request import Request, ResolvedRequest
from reelforge.tools.bench.demo_model import ATTRIBUTES, Case, held_out_cases, judge

FINE, COARSE = (1, 1), (4, 4)
"""Tokens of query and key blocks: single tokens, and 2x2 patches of a frame."""

SEED_STRIDE = 100_000
_TARGET = Target.parse("cpu")
_OPTIONS = EngineOptions(threads=1, spinning=False)  # a step of 60 tokens has no work for more


@dataclass(frozen=True)
class Setting:
    """One way of leaving keys out.

    Attributes:
        name: Its width in words.
        blocks: Tokens of query and key blocks.
        table: What is left out.
    """

    name: str
    blocks: tuple[int, int]
    table: AttentionTable


@dataclass(frozen=True)
class Result:
    """A setting's videos.

    Attributes:
        pattern: Its pattern.
        blocks: As the setting's.
        name: Likewise.
        dense_steps: Steps before sparse attention begins.
        density: Visited share of the pairs of blocks that dense attention visits, mean over steps and prompts.
        psnr_db: Per video, against dense attention from the same noise.
        rates: Attribute -> share of videos that agree with their prompt, per seed.
    """

    pattern: str
    blocks: tuple[int, int]
    name: str
    dense_steps: int
    density: float
    psnr_db: tuple[float, ...]
    rates: dict[str, tuple[float, ...]]


_WINDOWS = ((FINE, (3, 3, 3)), (FINE, (1, 5, 5)), (FINE, (3, 1, 1)), (COARSE, (1, 3, 3)))
_DECAYS = (1.0, 0.5, 0.25)
_SHARES = ((COARSE, 0.75), (COARSE, 0.5), (COARSE, 0.25), (FINE, 0.25))


def settings(dense_steps: Sequence[int]) -> list[Setting]:
    """Return what is measured: every width of every pattern, with so many dense steps before it."""
    found = []
    for count in dense_steps:
        for blocks, window in _WINDOWS:
            table = AttentionTable(Pattern.SLIDING_TILE, (Rule(window=window),), count)
            found.append(Setting("x".join(map(str, window)), blocks, table))
        for decay in _DECAYS:
            table = AttentionTable(Pattern.RADIAL, (Rule(decay=decay),), count)
            found.append(Setting(f"decay {decay:g}", FINE, table))
        for blocks, share in _SHARES:
            found.append(Setting(f"{share:.0%}", blocks, AttentionTable(Pattern.TOP_K, (Rule(share=share),), count)))
    return found


class Studio:
    """The bundles and the dense videos of some prompts. Bundles are built when they are first asked for.

    Args:
        checkpoint: The demonstration checkpoint.
        folder: For bundles.
        cases: Prompts and what they ask for.
        seeds: Each gives every prompt other noise.
    """

    def __init__(self, checkpoint: Path, folder: Path, cases: Sequence[Case], seeds: Sequence[int]) -> None:
        self._checkpoint, self._folder = checkpoint, folder
        self.cases, self.seeds = cases, seeds
        self._pipelines: dict[tuple[SparseKind, tuple[int, int]], Pipeline] = {}
        self._dense: dict[tuple[int, int], np.ndarray] = {}
        build_bundle(BuildRequest(checkpoint, folder / "dense.bundle", _TARGET))
        self._dense_bundle = Bundle.open(folder / "dense.bundle")
        self._dense_pipeline = Pipeline(self._dense_bundle, _OPTIONS)
        self.dense_rates = self._rates(
            [[self._dense_video(number, seed) for number in range(len(cases))] for seed in seeds]
        )

    def measure(self, setting: Setting) -> Result:
        """Make and judge a setting's videos."""
        pipeline = self._pipeline(setting)
        videos = [
            [self._video(pipeline, number, seed, setting.table) for number in range(len(self.cases))]
            for seed in self.seeds
        ]
        ratios = [
            psnr(video, self._dense_video(number, seed))
            for seed, row in zip(self.seeds, videos, strict=True)
            for number, video in enumerate(row)
        ]
        return Result(
            setting.table.pattern.value,
            setting.blocks,
            setting.name,
            setting.table.dense_steps,
            float(np.mean([self._density(pipeline, number, setting) for number in range(len(self.cases))])),
            tuple(ratios),
            self._rates(videos),
        )

    def check_dense(self, setting: Setting) -> float:
        """Return the lowest PSNR of a few videos of a setting's bundle with dense attention."""
        pipeline = self._pipeline(setting)
        seed = self.seeds[0]
        numbers = range(min(4, len(self.cases)))
        return min(psnr(self._video(pipeline, n, seed, DENSE), self._dense_video(n, seed)) for n in numbers)

    def _pipeline(self, setting: Setting) -> Pipeline:
        kind = SparseKind.TOP_K if setting.table.pattern is Pattern.TOP_K else SparseKind.LISTS
        key = (kind, setting.blocks)
        if key not in self._pipelines:
            self._pipelines[key] = Pipeline(self._sparse_bundle(SparseAttention(kind, *setting.blocks)), _OPTIONS)
        return self._pipelines[key]

    def _sparse_bundle(self, sparse: SparseAttention) -> Bundle:
        """Return the dense bundle with its ``dit`` built for sparse attention; the other stages are the same."""
        path = self._folder / f"{sparse.kind.value}_{sparse.query_block}x{sparse.key_block}"
        request = BuildRequest(self._checkpoint, path, _TARGET, sparse_attention=sparse, stages=("dit",))
        manifest = self._dense_bundle.manifest
        own = {entry.name: entry for entry in build_bundle(request).stages}
        for file in self._dense_bundle.path.rglob("*"):
            target = path / file.relative_to(self._dense_bundle.path)
            if file.is_file() and not target.exists():
                target.parent.mkdir(exist_ok=True)
                target.hardlink_to(file)
        stages = tuple(own.get(entry.name, entry) for entry in manifest.stages)
        recipe = replace(manifest.recipe, sparse_attention=sparse)
        return Bundle(path, replace(manifest, recipe=recipe, stages=stages))

    def _dense_video(self, number: int, seed: int) -> np.ndarray:
        if (number, seed) not in self._dense:
            self._dense[number, seed] = self._video(self._dense_pipeline, number, seed, None)
        return self._dense[number, seed]

    def _request(self, pipeline: Pipeline, number: int, seed: int, table: AttentionTable | None) -> ResolvedRequest:
        request = Request(self.cases[number].prompt, seed=seed * SEED_STRIDE + number, attention=table)
        return pipeline.resolve(request)

    def _video(self, pipeline: Pipeline, number: int, seed: int, table: AttentionTable | None) -> np.ndarray:
        """Return frames [T, H, W, 3] in [0, 1]."""
        resolved = self._request(pipeline, number, seed, table)
        conditions = pipeline.condition(resolved, pipeline.encode_text(resolved.prompt))
        return np.concatenate(list(pipeline.decode(pipeline.sample(resolved, conditions))))

    def _density(self, pipeline: Pipeline, number: int, setting: Setting) -> float:
        resolved = self._request(pipeline, number, 0, setting.table)
        spec, sparse = pipeline.spec, pipeline.bundle.manifest.recipe.sparse_attention
        if sparse is None:
            raise AssertionError("a dense bundle has no density")
        shape = resolved.shape
        grid = spec.token_grid(shape.height, shape.width, shape.frames)
        tokens = pipeline.encode_text(resolved.prompt).states.shape[1]
        rope = rope_tables(grid, spec.dit.rope_axes, spec.dit.rope_theta)
        sequence = JointSequence(grid, tokens, spec.dit.heads)
        return float(np.mean(attention_inputs(setting.table, sparse, sequence, resolved.steps, rope).density))

    def _rates(self, videos: Sequence[Sequence[np.ndarray]]) -> dict[str, tuple[float, ...]]:
        by_seed = [judge([video.transpose(0, 3, 1, 2) for video in row], self.cases) for row in videos]
        return {name: tuple(rates[name] for rates in by_seed) for name in ATTRIBUTES}


def chosen_cases(count: int) -> list[Case]:
    """Return prompts of held-out scenes, spread over all of them.

    Raises:
        ValueError: If there are not so many scenes.
    """
    plain = held_out_cases()[::2]
    if not 0 < count <= len(plain):
        raise ValueError(f"{count} prompts\n  received: {count}   expected: 1 to {len(plain)}")
    return [plain[number * len(plain) // count] for number in range(count)]
