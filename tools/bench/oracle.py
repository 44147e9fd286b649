"""diffusers and transformers as oracle: each stage from the same plain inputs, theirs and ours. Development only.

Theirs receives padded text and a mask, ours the text cut to its length; both receive diffusers' own sinusoids, since
its fp32 arguments differ from our float64 ones by up to 4e-4 rad. Nothing here reads reelforge's model definitions.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from transformers import CLIPTextModel, LlamaModel

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.conditioning import rope_tables
from reelforge.runtime.engines.engine import Array, EngineOptions
from reelforge.runtime.engines.onnxruntime_engine import engine_from_onnx

GUIDANCE = 6000.0


class Stages:
    """Runs the stages of one bundle; an engine is loaded for each run."""

    def __init__(self, path: Path) -> None:
        self.bundle = Bundle.open(path)
        self.tolerance = {entry.name: entry.tolerance for entry in self.bundle.manifest.stages}

    def __call__(self, stage: str, **inputs: Array) -> dict[str, Array]:
        """Run one stage on one thread."""
        entry = self.bundle.stage(stage)
        with closing(engine_from_onnx(self.bundle.graph(stage), entry, EngineOptions(1, False))) as engine:
            return engine.run(inputs)


class Oracle:
    """The checkpoint's networks as the libraries that define them compute them, fp32."""

    def __init__(self, checkpoint: Path) -> None:
        with torch.device("cpu"):
            self.transformer = HunyuanVideoTransformer3DModel.from_pretrained(checkpoint / "transformer").eval()
            self.vae = AutoencoderKLHunyuanVideo.from_pretrained(checkpoint / "vae").eval()
            self.llm = LlamaModel.from_pretrained(checkpoint / "text_encoder").eval()
            self.clip = CLIPTextModel.from_pretrained(checkpoint / "text_encoder_2").eval()


def difference(received: Array, expected: torch.Tensor) -> float:
    """Return the largest difference, at output scale 1-4; the oracle's output must be of that scale."""
    wanted = expected.double().numpy()
    if received.shape != wanted.shape or received.dtype != np.float32:
        raise AssertionError(f"received {received.dtype} {received.shape}, expected float32 {wanted.shape}")
    if not 0.3 < wanted.std() < 4:
        raise AssertionError(f"the oracle's output has a standard deviation of {wanted.std():.2g}: it proves nothing")
    return float(np.abs(received - wanted).max() / max(1.0, np.abs(wanted).max() / 4))


def normal(seed: int, *shape: int) -> torch.Tensor:
    """Return unit Gaussian noise of ``shape``."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def padded(states: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``states`` [1, L, D] padded with noise to ``length`` and the mask that hides the noise."""
    valid = states.shape[1]
    mask = torch.zeros(1, length, dtype=torch.int64)
    mask[:, :valid] = 1
    return torch.cat((states, 9 * normal(99, 1, length - valid, states.shape[2])), dim=1), mask


# Ours and theirs, each from the same plain inputs.


def their_sinusoids(oracle: Oracle, values: torch.Tensor) -> Array:
    """Return diffusers' sinusoids of ``values``, [n, 256]."""
    sinusoids: Array = oracle.transformer.time_text_embed.time_proj(values).numpy()
    return sinusoids


def our_text(stages: Stages, oracle: Oracle, states: torch.Tensor, times: torch.Tensor) -> Array:
    """Run our refiner for each of ``times``: [n, L, D]."""
    return stages(
        "refiner", text_states=states.numpy(), timestep_embedding=their_sinusoids(oracle, times)
    )["text"]  # fmt: skip


def our_modulation(stages: Stages, oracle: Oracle, pooled: torch.Tensor, times: torch.Tensor) -> dict[str, Array]:
    """Run our modulation for each of ``times``."""
    inputs = {"timestep_embedding": their_sinusoids(oracle, times), "pooled_text": pooled.numpy()}
    if oracle.transformer.config.guidance_embeds:
        inputs["guidance_embedding"] = their_sinusoids(oracle, torch.tensor([GUIDANCE]))
    return stages("modulation", **inputs)


def our_rope(stages: Stages, latents: torch.Tensor) -> dict[str, Array]:
    """Return our rotary tables for ``latents``."""
    dit = stages.bundle.manifest.spec.dit
    grid = tuple(size // patch for size, patch in zip(latents.shape[2:], dit.patch, strict=True))
    cos, sin = rope_tables((grid[0], grid[1], grid[2]), dit.rope_axes, dit.rope_theta)
    return {"rope_cos": cos, "rope_sin": sin}


def our_step(
    stages: Stages, oracle: Oracle, latents: torch.Tensor, states: torch.Tensor, pooled: torch.Tensor, time: float
) -> dict[str, Array]:
    """Run our refiner, modulation and one dit step of -0.25 at ``time``."""
    times = torch.tensor([time])
    return stages(
        "dit",
        latents=latents.numpy(),
        text=our_text(stages, oracle, states, times),
        **our_modulation(stages, oracle, pooled, times),
        **our_rope(stages, latents),
        sigma_step=np.array(-0.25, np.float32),
    )


def their_velocity(
    oracle: Oracle, latents: torch.Tensor, states: torch.Tensor, mask: torch.Tensor, pooled: torch.Tensor, time: float
) -> torch.Tensor:
    """Run diffusers' transformer: [B, C, T, H, W]."""
    videos = latents.shape[0]
    return oracle.transformer(
        latents,
        torch.full((videos,), time),
        states,
        mask,
        pooled,
        guidance=torch.full((videos,), GUIDANCE) if oracle.transformer.config.guidance_embeds else None,
        return_dict=False,
    )[0]


def their_frames(oracle: Oracle, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents [1, C, T, H, W] as one tile, without diffusers' tiling."""
    return oracle.vae.decoder(oracle.vae.post_quant_conv(latents / oracle.vae.config.scaling_factor))


def their_prompt_states(oracle: Oracle, ids: torch.Tensor, length: int) -> torch.Tensor:
    """Run on ids padded to ``length`` as diffusers' pipeline does; return the valid states."""
    padding = torch.full((1, length - ids.shape[1]), 3)
    mask = torch.zeros(1, length, dtype=torch.int64)
    mask[:, : ids.shape[1]] = 1
    states = oracle.llm(
        input_ids=torch.cat((ids, padding), dim=1), attention_mask=mask, output_hidden_states=True
    ).hidden_states[-3]  # fmt: skip
    return states[:, : ids.shape[1]]


def their_pooled(oracle: Oracle, ids: torch.Tensor) -> torch.Tensor:
    """Run on ids padded to the longest text with end-of-text, as diffusers' pipeline does."""
    end = int(oracle.clip.config.eos_token_id)
    padding = torch.full((1, oracle.clip.config.max_position_embeddings - ids.shape[1]), end)
    return oracle.clip(input_ids=torch.cat((ids, padding), dim=1)).pooler_output


def clip_ids(oracle: Oracle, words: int) -> torch.Tensor:
    """Return ids that end with the only end-of-text token."""
    end = int(oracle.clip.config.eos_token_id)
    ids = torch.randint(0, min(end, 250), (1, words + 1), generator=torch.Generator().manual_seed(words))
    ids[0, -1] = end
    return ids
