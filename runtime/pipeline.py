"""A bundle from prompt to frames: text encoders, conditioning for all steps, sampling loop, tiled decoding.

Each stage is loaded when it is needed and closed when it is not, so that at most one large engine is in memory. The
module knows the stages' names and how they are chained; the arithmetic is in the stages, and in ``schedule``,
``conditioning`` and ``tiling``. It knows no video files (``runtime.video``).

Letters: ``C`` channels, ``T`` ``H`` ``W`` latent frames, rows and columns, ``L`` text tokens, ``n`` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.conditioning import guidance_value, rope_tables, sinusoids
from reelforge.runtime.engines.engine import Array, Engine, EngineOptions
from reelforge.runtime.engines.load import load_engine
from reelforge.runtime.errors import EngineError, RequestError
from reelforge.runtime.latents_file import write_latents
from reelforge.runtime.noise import gaussian_noise
from reelforge.runtime.recipe import VideoShape
from reelforge.runtime.request import Request, ResolvedRequest, resolve_request
from reelforge.runtime.sampling import sample
from reelforge.runtime.schedule import flow_match_sigmas, sigma_steps, timesteps
from reelforge.runtime.tiling import decode_tiled, plan_tiles
from reelforge.runtime.tokenize import clip_tokens, llm_tokens

if TYPE_CHECKING:
    from reelforge.runtime.engines.device_session import DeviceSession

FloatArray = NDArray[np.float32]

STAGES = ("llm", "clip", "refiner", "modulation", "dit", "vae_decoder")


@dataclass(frozen=True)
class Progress:
    """Where a generation is: ``done`` of ``total`` units of ``phase`` (text, conditioning, sampling, decoding)."""

    phase: str
    done: int
    total: int


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class TextInputs:
    """What the text encoders read of a prompt: the inputs of ``llm`` and ``clip``, and sentences for the user."""

    llm: dict[str, Array]
    clip: dict[str, Array]
    notices: tuple[str, ...]


@dataclass(frozen=True)
class TextEncoding:
    """What the text encoders say about a prompt.

    ``states`` float32 ``[1, L, text_width]`` without the template's prefix, ``pooled`` float32 ``[1, pooled_width]``,
    ``notices`` sentences for the user (a truncated prompt).
    """

    states: FloatArray
    pooled: FloatArray
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Conditions:
    """The inputs of ``dit`` besides the latents: ``fixed`` for all steps, ``per_step`` with the step as first axis."""

    fixed: dict[str, Array]
    per_step: dict[str, Array]


class Pipeline:
    """Generates videos from one bundle. Make one with :meth:`open`.

    Example::

        with Pipeline.open("my.bundle") as pipeline:
            frames = pipeline.generate(Request("a red ball", steps=20))  # uint8 [frames, height, width, 3]
    """

    def __init__(self, bundle: Bundle, options: EngineOptions | None = None) -> None:
        self.bundle = bundle
        self.options = options or EngineOptions()
        self.spec = bundle.manifest.spec
        self._session: DeviceSession | None = None
        for stage in STAGES:
            bundle.stage(stage)  # a bundle built with --stages cannot generate; say so before any work

    @classmethod
    def open(cls, path: str | Path, threads: int | None = None, check: Check = Check.FULL) -> Pipeline:
        """Open a bundle for generation.

        Args:
            path: The bundle's folder.
            threads: Threads per operator; None means one per core.
            check: How thoroughly the bundle is checked.

        Raises:
            BundleError: If the bundle is damaged, of another schema version, or lacks a stage.
        """
        return cls(Bundle.open(path, check), EngineOptions(threads=threads))

    def resolve(self, request: Request) -> ResolvedRequest:
        """Check a request and fill in the bundle's defaults.

        Raises:
            RequestError: Listing everything that the bundle does not support.
        """
        return resolve_request(request, self.bundle.manifest, self.bundle.name)

    def generate(
        self,
        request: Request,
        on_progress: OnProgress | None = None,
        latents: FloatArray | None = None,
        save_latents: str | Path | None = None,
    ) -> NDArray[np.uint8]:
        """Generate a video.

        Args:
            request: What to generate.
            on_progress: Told about every finished unit of work.
            latents: Initial noise ``[1, C, T, H, W]`` float32 instead of the seed's.
            save_latents: A ``.npy`` file for the final latents, written before decoding begins.

        Returns:
            uint8 ``[frames, height, width, 3]``, RGB.

        Raises:
            RequestError: If the bundle does not support the request.
            EngineError: If an engine fails.
            OutputError: If ``save_latents`` cannot be written.
        """
        batches = self.stream(request, on_progress, latents, save_latents)
        return np.concatenate([to_uint8(batch) for batch in batches])

    def stream(
        self,
        request: Request,
        on_progress: OnProgress | None = None,
        latents: FloatArray | None = None,
        save_latents: str | Path | None = None,
        on_notice: Callable[[str], None] | None = None,
    ) -> Iterator[FloatArray]:
        """Like :meth:`generate`, but yield the frames as they become final, so that they can be written away.

        Args:
            request: What to generate.
            on_progress: Told about every finished unit of work.
            latents: Initial noise ``[1, C, T, H, W]`` float32 instead of the seed's.
            save_latents: A ``.npy`` file for the final latents, written before decoding begins.
            on_notice: Told about a truncated prompt.

        Yields:
            float32 ``[some frames, height, width, 3]``, RGB in [0, 1], in order.

        Raises:
            RequestError: If the bundle does not support the request.
            EngineError: If an engine fails.
            OutputError: If ``save_latents`` cannot be written.
        """
        resolved = self.resolve(request)
        report = on_progress or _ignore
        text = self.encode_text(resolved.prompt, report)
        for notice in text.notices:
            if on_notice is not None:
                on_notice(notice)
        conditions = self.condition(resolved, text, report)
        final = self.sample(resolved, conditions, latents, report)
        if save_latents is not None:
            write_latents(Path(save_latents), final)
        yield from self.decode(final, report)

    def encode_text(self, prompt: str, on_progress: OnProgress | None = None) -> TextEncoding:
        """Run both text encoders on a prompt.

        Raises:
            RequestError: If the prompt is not valid Unicode text.
            EngineError: If an engine fails.
        """
        report = on_progress or _ignore
        inputs = self.text_inputs(prompt)
        with self.engine("llm") as llm:
            states = llm.run(inputs.llm)["prompt_states"]
        report(Progress("text", 1, 2))
        with self.engine("clip") as clip:
            pooled = clip.run(inputs.clip)["pooled_text"]
        report(Progress("text", 2, 2))
        return self.text_encoding(inputs, states, pooled)

    def text_inputs(self, prompt: str) -> TextInputs:
        """Return what both text encoders take for a prompt.

        Raises:
            RequestError: If the prompt is not valid Unicode text.
        """
        template = self.bundle.manifest.prompt_template
        words = llm_tokens(prompt, self.bundle.tokenizer_path("llm"), template, self.spec.llm)
        pooled_words = clip_tokens(prompt, self.bundle.tokenizer_path("clip"), self.spec.clip)
        notices = tuple(tokens.notice for tokens in (words, pooled_words) if tokens.notice is not None)
        return TextInputs({"input_ids": words.ids}, {"clip_ids": pooled_words.ids}, notices)

    def text_encoding(self, inputs: TextInputs, states: FloatArray, pooled: FloatArray) -> TextEncoding:
        """Return the encoding of a prompt, given what ``llm`` (``prompt_states``) and ``clip`` made of its inputs."""
        cropped = states[:, self.bundle.manifest.prompt_template.crop_start :].copy()
        return TextEncoding(cropped, pooled, inputs.notices)

    def condition(
        self, request: ResolvedRequest, text: TextEncoding, on_progress: OnProgress | None = None
    ) -> Conditions:
        """Compute everything that ``dit`` is told besides the latents, for all steps at once.

        Raises:
            EngineError: If an engine fails.
        """
        report = on_progress or _ignore
        with self.engine("refiner") as refiner:
            refined = refiner.run(self.refiner_inputs(request, text))["text"]
        report(Progress("conditioning", 1, 2))
        with self.engine("modulation") as modulation:
            vectors = modulation.run(self.modulation_inputs(request, text))
        report(Progress("conditioning", 2, 2))
        return self.conditions(request, refined, vectors)

    def refiner_inputs(self, request: ResolvedRequest, text: TextEncoding) -> dict[str, Array]:
        """Return what ``refiner`` takes."""
        return {"text_states": text.states, "timestep_embedding": self._timestep_embedding(request)}

    def modulation_inputs(self, request: ResolvedRequest, text: TextEncoding) -> dict[str, Array]:
        """Return what ``modulation`` takes."""
        inputs: dict[str, Array] = {
            "timestep_embedding": self._timestep_embedding(request),
            "pooled_text": text.pooled,
        }
        if self.spec.dit.guidance_embedding:
            guidance = guidance_value(request.guidance, self.spec.guidance_rounding)
            inputs["guidance_embedding"] = sinusoids([guidance], self.spec.dit.sinusoid_width)
        return inputs

    def conditions(self, request: ResolvedRequest, refined: Array, vectors: Mapping[str, Array]) -> Conditions:
        """Return what ``dit`` is told, given what ``refiner`` (``text``) and ``modulation`` made of their inputs."""
        dit = self.spec.dit
        cos, sin = rope_tables(self.token_grid(request.shape), dit.rope_axes, dit.rope_theta)
        fixed: dict[str, Array] = {"rope_cos": cos, "rope_sin": sin}
        if any(info.name == "text_lengths" for info in self.bundle.stage("dit").inputs):
            fixed["text_lengths"] = np.array([refined.shape[1]], dtype=np.int64)
        # One video per call: the axis after the step is the batch.
        per_step = {name: rows[:, None] for name, rows in {"text": refined, **vectors}.items()}
        sigmas = flow_match_sigmas(request.steps, request.shift)
        return Conditions(fixed, {**per_step, "sigma_step": sigma_steps(sigmas)})

    def sample(
        self,
        request: ResolvedRequest,
        conditions: Conditions,
        latents: FloatArray | None = None,
        on_progress: OnProgress | None = None,
    ) -> FloatArray:
        """Run the sampling loop and return the final latents ``[1, C, T, H, W]``.

        Args:
            request: Gives the shape and, if ``latents`` is None, the seed.
            conditions: From :meth:`condition`.
            latents: Initial noise instead of the seed's.
            on_progress: Told after each step.

        Raises:
            RequestError: If ``latents`` does not have the request's shape.
            EngineError: If the engine fails or its numbers are not finite.
        """
        report = on_progress or _ignore
        shape = (1, *self.spec.latent_shape(request.shape.height, request.shape.width, request.shape.frames))
        if latents is None:
            latents = gaussian_noise(shape, request.seed)
        if latents.shape != shape or latents.dtype != np.float32:
            raise RequestError(
                "the initial latents do not fit the request.",
                received=f"{latents.dtype} {list(latents.shape)}",
                expected=f"float32 {list(shape)}",
                fix="pass noise of the request's shape, or leave it out",
            )
        with self.engine("dit") as dit:
            final: FloatArray = sample(
                dit,
                latents,
                conditions.fixed,
                conditions.per_step,
                lambda done: report(Progress("sampling", done, request.steps)),
            )
        if not np.isfinite(final).all():
            raise EngineError(
                "sampling gave latents that are not finite numbers.",
                received=f"{int(np.count_nonzero(~np.isfinite(final)))} of {final.size} values",
                fix="rebuild the bundle with --precision fp32, or check its parity with reelforge verify",
            )
        return final

    def decode(self, latents: FloatArray, on_progress: OnProgress | None = None) -> Iterator[FloatArray]:
        """Decode final latents ``[1, C, T, H, W]``, tile by tile.

        Yields:
            float32 ``[some frames, height, width, 3]`` in [0, 1], in order.

        Raises:
            EngineError: If the engine fails.
        """
        report = on_progress or _ignore
        total = plan_tiles((latents.shape[2], latents.shape[3], latents.shape[4]), self.spec.tiling).tiles
        done = 0
        with self.engine("vae_decoder") as vae:

            def decode_tile(tile: FloatArray) -> FloatArray:
                nonlocal done
                frames: FloatArray = vae.run({"latent_tile": tile})["frame_tile"]
                done += 1
                report(Progress("decoding", done, total))
                return frames

            for batch in decode_tiled(latents, decode_tile, self.spec.tiling, self.spec.vae):
                yield np.clip(batch[0].transpose(1, 2, 3, 0) * np.float32(0.5) + np.float32(0.5), 0.0, 1.0)

    def token_grid(self, shape: VideoShape) -> tuple[int, int, int]:
        """Return the grid ``(T, H, W)`` of image tokens of a video."""
        _, frames, height, width = self.spec.latent_shape(shape.height, shape.width, shape.frames)
        patch = self.spec.dit.patch
        return frames // patch[0], height // patch[1], width // patch[2]

    def _timestep_embedding(self, request: ResolvedRequest) -> Array:
        sigmas = flow_match_sigmas(request.steps, request.shift)
        return sinusoids(timesteps(sigmas), self.spec.dit.sinusoid_width)

    @contextmanager
    def engine(self, stage: str) -> Iterator[Engine]:
        """Load a stage for the duration of a ``with`` block."""
        with closing(load_engine(self.bundle, stage, self.options, self._device)) as engine:
            yield engine

    def close(self) -> None:
        """Give back the GPU, if there is one; a later use of the pipeline opens it again. Closing twice is harmless."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _device(self) -> DeviceSession:
        """Return the GPU's session, which all stages share."""
        if self._session is None:
            from reelforge.runtime.engines.device_session import open_session

            self._session = open_session(self.bundle.manifest.target.backend, self.options.device)
        return self._session


def to_uint8(frames: FloatArray) -> NDArray[np.uint8]:
    """Return frames in [0, 1] as uint8, rounded to nearest."""
    rounded: NDArray[np.uint8] = np.rint(frames * np.float32(255)).astype(np.uint8)
    return rounded


def _ignore(progress: Progress) -> None:
    del progress
