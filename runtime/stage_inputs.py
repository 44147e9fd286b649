"""What each stage is told: a request and what the stages before it made, as named arrays.

No engine is loaded or run here. The arithmetic is in ``tokenize``, ``conditioning`` and ``schedule``; the chain is in
``runtime.pipeline``.

Letters: ``L`` text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.conditioning import guidance_value, rope_tables, sinusoids
from reelforge.runtime.engines.engine import Array
from reelforge.runtime.errors import RequestError
from reelforge.runtime.events import FloatArray
from reelforge.runtime.latents_file import kind_of
from reelforge.runtime.noise import gaussian_noise
from reelforge.runtime.recipe import VideoShape
from reelforge.runtime.request import ResolvedRequest
from reelforge.runtime.sampling import all_finite
from reelforge.runtime.schedule import flow_match_sigmas, sigma_steps, timesteps
from reelforge.runtime.tokenize import clip_tokens, llm_tokens


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
    """The inputs of ``dit`` besides the latents: ``fixed`` for all steps, ``per_step`` with the step as first axis.

    ``negative`` is what a second evaluation per step is told, with classifier-free guidance.
    """

    fixed: dict[str, Array]
    per_step: dict[str, Array]
    negative: Conditions | None = None


class StageInputs:
    """Makes the inputs of a bundle's stages."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._spec = bundle.manifest.spec

    def text(self, prompt: str) -> TextInputs:
        """Return what both text encoders take for a prompt.

        Raises:
            RequestError: If the prompt is not valid Unicode text.
        """
        template = self._bundle.manifest.prompt_template
        words = llm_tokens(prompt, self._bundle.tokenizer_path("llm"), template, self._spec.llm)
        pooled_words = clip_tokens(prompt, self._bundle.tokenizer_path("clip"), self._spec.clip)
        notices = tuple(tokens.notice for tokens in (words, pooled_words) if tokens.notice is not None)
        return TextInputs({"input_ids": words.ids}, {"clip_ids": pooled_words.ids}, notices)

    def text_encoding(self, inputs: TextInputs, states: FloatArray, pooled: FloatArray) -> TextEncoding:
        """Return the encoding of a prompt, given what ``llm`` (``prompt_states``) and ``clip`` made of its inputs."""
        cropped = states[:, self._bundle.manifest.prompt_template.crop_start :].copy()
        return TextEncoding(cropped, pooled, inputs.notices)

    def refiner(self, request: ResolvedRequest, text: TextEncoding) -> dict[str, Array]:
        """Return what ``refiner`` takes."""
        return {"text_states": text.states, "timestep_embedding": self._timestep_embedding(request)}

    def modulation(self, request: ResolvedRequest, text: TextEncoding) -> dict[str, Array]:
        """Return what ``modulation`` takes."""
        inputs: dict[str, Array] = {
            "timestep_embedding": self._timestep_embedding(request),
            "pooled_text": text.pooled,
        }
        if self._spec.dit.guidance_embedding:
            guidance = guidance_value(request.guidance, self._spec.guidance_rounding)
            inputs["guidance_embedding"] = sinusoids([guidance], self._spec.dit.sinusoid_width)
        return inputs

    def conditions(self, request: ResolvedRequest, refined: Array, vectors: Mapping[str, Array]) -> Conditions:
        """Return what ``dit`` is told, given what ``refiner`` (``text``) and ``modulation`` made of their inputs."""
        dit = self._spec.dit
        grid, sparse = self.token_grid(request.shape), self._bundle.manifest.recipe.sparse_attention
        cos, sin = rope_tables(grid, dit.rope_axes, dit.rope_theta)
        fixed: dict[str, Array] = {"rope_cos": cos, "rope_sin": sin}
        if any(info.name == "text_lengths" for info in self._bundle.stage("dit").inputs):
            fixed["text_lengths"] = np.array([refined.shape[1]], dtype=np.int64)
        # One video per call: the axis after the step is the batch.
        per_step = {name: rows[:, None] for name, rows in {"text": refined, **vectors}.items()}
        if sparse is not None:
            from reelforge.runtime.attention.inputs import JointSequence, attention_inputs  # few bundles need it

            sequence = JointSequence(grid, refined.shape[1], dit.heads)
            attention = attention_inputs(request.attention, sparse, sequence, request.steps, (cos, sin))
            fixed |= attention.fixed
            per_step |= attention.per_step
        sigmas = flow_match_sigmas(request.steps, request.shift)
        return Conditions(fixed, {**per_step, "sigma_step": sigma_steps(sigmas)})

    def initial_latents(self, request: ResolvedRequest, latents: FloatArray | None) -> FloatArray:
        """Return the noise of a request's seed, or ``latents`` if they are given.

        Raises:
            RequestError: If ``latents`` do not have the request's shape, or are not finite.
        """
        shape = self.latent_shape(request.shape)
        if latents is None:
            return gaussian_noise(shape, request.seed)
        if not isinstance(latents, np.ndarray) or latents.shape != shape or latents.dtype != np.float32:
            raise RequestError(
                "the initial latents do not fit the request.",
                received=kind_of(latents),
                expected=f"float32 {list(shape)}",
                fix="pass noise of the request's shape, or leave it out",
            )
        if not all_finite(latents):
            raise RequestError(
                "the initial latents are not finite numbers: no step can begin with them.",
                received=f"{int(np.count_nonzero(~np.isfinite(latents)))} of {latents.size} values",
                fix="pass other noise, or leave it out",
            )
        return latents

    def latent_shape(self, shape: VideoShape) -> tuple[int, int, int, int, int]:
        """Return ``(1, C, T, H, W)`` of a video's latents."""
        return (1, *self._spec.latent_shape(shape.height, shape.width, shape.frames))

    def token_grid(self, shape: VideoShape) -> tuple[int, int, int]:
        """Return the grid ``(T, H, W)`` of image tokens of a video."""
        return self._spec.token_grid(shape.height, shape.width, shape.frames)

    def _timestep_embedding(self, request: ResolvedRequest) -> Array:
        sigmas = flow_match_sigmas(request.steps, request.shift)
        return sinusoids(timesteps(sigmas), self._spec.dit.sinusoid_width)
