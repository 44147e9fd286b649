"""LLaMA and CLIP as text encoders, from transformers' own layers, cut into embedding, layers and output.

Both are causal and run on valid tokens only, so no mask is built: attention is marked causal. LLaMA stops after
``used_layers`` layers and has no final norm; CLIP's pooled state is that of its last token, because the runtime cuts
the ids after the first end-of-text (specification 2). The module does not know tokenizers or templates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from reelforge.runtime.spec import ClipSpec, LlmSpec

CAUSAL = "reelforge_causal"


def causal_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: causal, mask-free, grouped where keys have fewer heads.

    query is [B, h, S, d], key and value [B, h_kv, S, d]; returns [B, S, h, d]. The unnamed arguments are those that the
    interface passes to every implementation and that a causal encoder does not have.
    """
    if attention_mask is not None or dropout:
        raise AssertionError("the causal text encoders run without mask and dropout")
    out = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


def llama_config(spec: LlmSpec) -> LlamaConfig:
    """Return transformers' configuration of ``spec``."""
    ALL_ATTENTION_FUNCTIONS.register(CAUSAL, causal_attention)
    return LlamaConfig(
        vocab_size=spec.vocabulary,
        hidden_size=spec.width,
        intermediate_size=spec.mlp_width,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        rms_norm_eps=spec.norm_eps,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        attn_implementation=CAUSAL,
    )


class LlamaEmbedding(nn.Module):
    """Token ids to states and rotary tables."""

    def __init__(self, spec: LlmSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocabulary, spec.width)
        self.head_dim, self.theta = spec.head_dim, spec.rope_theta

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map int64 [B, L] to states [B, L, D] and cos, sin [1, L, d].

        The frequencies ``theta^(-2i/d)`` are computed in the graph, in fp32 as transformers does: a module without
        buffers can be traced without storage.
        """
        states = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device, dtype=torch.float32)
        exponents = torch.arange(0, self.head_dim, 2, device=input_ids.device, dtype=torch.float32) / self.head_dim
        angles = positions.unsqueeze(1) * (1.0 / self.theta**exponents).unsqueeze(0)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(0)
        return states, angles.cos().to(states.dtype), angles.sin().to(states.dtype)


class LlamaLayer(LlamaDecoderLayer):
    """One decoder layer."""

    def __init__(self, spec: LlmSpec) -> None:
        super().__init__(llama_config(spec), layer_idx=0)

    def forward(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map [B, L, D] to the same shape."""
        return super().forward(states, position_embeddings=(cos, sin))


class Float32Output(nn.Module):
    """States leave a stage in fp32."""

    def forward(self, states: Tensor) -> Tensor:
        """Return fp32 states."""
        return states.float()


def clip_config(spec: ClipSpec) -> CLIPTextConfig:
    """Return transformers' configuration of ``spec``."""
    ALL_ATTENTION_FUNCTIONS.register(CAUSAL, causal_attention)
    return CLIPTextConfig(
        vocab_size=spec.vocabulary,
        hidden_size=spec.width,
        intermediate_size=spec.mlp_width,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        max_position_embeddings=spec.max_tokens,
        layer_norm_eps=spec.norm_eps,
        hidden_act=spec.activation,
        bos_token_id=None,
        eos_token_id=spec.eos_token,
        attn_implementation=CAUSAL,
    )


class ClipEmbedding(nn.Module):
    """Token ids to states."""

    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(spec.vocabulary, spec.width)
        self.position_embedding = nn.Embedding(spec.max_tokens, spec.width)

    def forward(self, clip_ids: Tensor) -> Tensor:
        """Map int64 [B, L] to [B, L, D]."""
        return self.token_embedding(clip_ids) + self.position_embedding.weight[: clip_ids.shape[1]]


class ClipLayer(CLIPEncoderLayer):
    """One encoder layer, causal."""

    def __init__(self, spec: ClipSpec) -> None:
        super().__init__(clip_config(spec))

    def forward(self, states: Tensor) -> Tensor:
        """Map [B, L, D] to the same shape."""
        return super().forward(states, attention_mask=None)


class ClipPooled(nn.Module):
    """Final norm of the last token, which is the end-of-text."""

    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        self.final_layer_norm = nn.LayerNorm(spec.width, eps=spec.norm_eps)

    def forward(self, states: Tensor) -> Tensor:
        """Map [B, L, D] to fp32 [B, D]."""
        return self.final_layer_norm(states[:, -1]).float()
