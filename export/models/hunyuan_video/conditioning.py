"""What a step is conditioned on, computed for all steps at once: modulation vectors and refined text.

Neither depends on the latents, so both run once before the loop (specification 3.2, 3.3, 3.5 and 9). ``n`` is the
number of steps, ``L`` text tokens, ``D`` width. Sinusoids come in finished: the modules do not know timesteps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelforge.export.models.hunyuan_video.layers import Mlp, attend
from reelforge.runtime.spec import DitSpec


class ConditioningVector(nn.Module):
    """``SiLU(time_in(t) + guidance_in(g) + pooled_in(pooled))``: the input of every modulation linear."""

    def __init__(self, spec: DitSpec) -> None:
        super().__init__()
        self.time_in = Mlp(spec.sinusoid_width, spec.width)
        self.pooled_in = Mlp(spec.pooled_width, spec.width)
        self.guidance_in = Mlp(spec.sinusoid_width, spec.width) if spec.guidance_embedding else None

    def forward(
        self, timestep_embedding: Tensor, pooled_text: Tensor, guidance_embedding: Tensor | None = None
    ) -> Tensor:
        """Return [n, D].

        Args:
            timestep_embedding: fp32 [n, sinusoid].
            pooled_text: fp32 [1, pooled].
            guidance_embedding: fp32 [1, sinusoid]; None for models without embedded guidance.
        """
        dtype = self.time_in.fc1.weight.dtype
        vector = self.time_in(timestep_embedding.to(dtype)) + self.pooled_in(pooled_text.to(dtype))
        if self.guidance_in is not None and guidance_embedding is not None:
            vector = vector + self.guidance_in(guidance_embedding.to(dtype))
        return F.silu(vector)


class DoubleModulation(nn.Module):
    """Both streams' modulation of one double block."""

    def __init__(self, spec: DitSpec) -> None:
        super().__init__()
        self.image = nn.ModuleDict({"linear": nn.Linear(spec.width, 6 * spec.width)})
        self.text = nn.ModuleDict({"linear": nn.Linear(spec.width, 6 * spec.width)})

    def forward(self, vector: Tensor) -> Tensor:
        """Map [n, D] to fp32 [n, 2, 6, D]."""
        both = torch.stack((self.image["linear"](vector), self.text["linear"](vector)), dim=1)
        return both.unflatten(-1, (6, -1)).float()


class LinearModulation(nn.Module):
    """The modulation of a single block (three vectors) or of the final layer (two)."""

    def __init__(self, spec: DitSpec, vectors: int) -> None:
        super().__init__()
        self.vectors = vectors
        self.linear = nn.Linear(spec.width, vectors * spec.width)

    def forward(self, vector: Tensor) -> Tensor:
        """Map [n, D] to fp32 [n, vectors, D]."""
        return self.linear(vector).unflatten(-1, (self.vectors, -1)).float()


class RefinerEmbedding(nn.Module):
    """Raw LLM states to the refiner's tokens and its conditioning (specification 3.3, steps 1-3)."""

    def __init__(self, spec: DitSpec) -> None:
        super().__init__()
        self.time_in = Mlp(spec.sinusoid_width, spec.width)
        self.pooled_text_in = Mlp(spec.text_width, spec.width)
        self.input = nn.Linear(spec.text_width, spec.width)

    def forward(self, text_states: Tensor, timestep_embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens [n, L, D] and ``SiLU(c)`` [n, D].

        Args:
            text_states: fp32 [1, L, text width], valid tokens only.
            timestep_embedding: fp32 [n, sinusoid].
        """
        dtype = self.input.weight.dtype
        pooled = text_states.mean(dim=1).to(dtype)
        vector = self.time_in(timestep_embedding.to(dtype)) + self.pooled_text_in(pooled)
        tokens = self.input(text_states.to(dtype)).expand(timestep_embedding.shape[0], -1, -1)
        return tokens, F.silu(vector)


class RefinerBlock(nn.Module):
    """Bidirectional transformer block with gates from the conditioning (specification 3.3, step 4)."""

    def __init__(self, spec: DitSpec) -> None:
        super().__init__()
        self.heads, self.head_dim = spec.heads, spec.head_dim
        self.norm1 = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        self.norm2 = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        self.q = nn.Linear(spec.width, spec.width)
        self.k = nn.Linear(spec.width, spec.width)
        self.v = nn.Linear(spec.width, spec.width)
        self.proj = nn.Linear(spec.width, spec.width)
        self.fc1 = nn.Linear(spec.width, spec.mlp_width)
        self.fc2 = nn.Linear(spec.mlp_width, spec.width)
        self.gates = nn.Linear(spec.width, 2 * spec.width)

    def forward(self, tokens: Tensor, vector: Tensor) -> Tensor:
        """Return the new tokens [n, L, D]; ``vector`` is [n, D]."""
        gate1, gate2 = self.gates(vector).unsqueeze(1).chunk(2, dim=-1)
        normed = self.norm1(tokens)
        q, k, v = (p(normed).unflatten(-1, (self.heads, self.head_dim)) for p in (self.q, self.k, self.v))
        tokens = tokens + gate1 * self.proj(attend(q, k, v))
        return tokens + gate2 * self.fc2(F.silu(self.fc1(self.norm2(tokens))))


class RefinerOutput(nn.Module):
    """The refined text leaves in fp32."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return fp32 [n, L, D]."""
        return tokens.float()
