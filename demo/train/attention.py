"""A lean attention processor for training HunyuanVideo on few tokens; computes what diffusers' own processor computes.

On sequences of 60 tokens the stock path spends half of a training step on copies, on rotary embeddings and on the fused
attention's backward pass. Here q, k and v are one product, q and k are normalised and rotated together as complex
numbers, and attention is plain batched products.

Shapes: ``B`` batch, ``S`` tokens (``N`` image tokens first, then text), ``H`` heads, ``D`` head width.
"""

from __future__ import annotations

import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional


def _project(hidden: Tensor, layers: tuple[nn.Linear, nn.Linear, nn.Linear], heads: int) -> Tensor:
    """Return q, k and v of [B, S, H * D] as [B, S, 3, H, D]."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    return functional.linear(hidden, weight, bias).unflatten(2, (3, heads, -1))


def _normalise(qkv: Tensor, norm_q: nn.Module, norm_k: nn.Module) -> Tensor:
    """Return RMS-normalised q and k [B, S, 2, H, D] in fp32."""
    both = qkv[:, :, :2].float()
    weight = torch.stack([norm_q.weight, norm_k.weight])[:, None]
    return both * (torch.rsqrt(both.square().mean(-1, keepdim=True) + 1e-6) * weight)


class LeanAttention:
    """Attention of both block types; see the module's docstring."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return the attention's output for image [B, N, H * D] and text tokens."""
        tokens = hidden_states.shape[1]
        layers = (attn.to_q, attn.to_k, attn.to_v)
        if attn.add_q_proj is None:
            qkv = _project(torch.cat([hidden_states, encoder_hidden_states], 1), layers, attn.heads)
            both, value = _normalise(qkv, attn.norm_q, attn.norm_k), qkv[:, :, 2]
        else:
            image = _project(hidden_states, layers, attn.heads)
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text = _project(encoder_hidden_states, added, attn.heads)
            image_both = _normalise(image, attn.norm_q, attn.norm_k)
            both = torch.cat([image_both, _normalise(text, attn.norm_added_q, attn.norm_added_k)], 1)
            value = torch.cat([image[:, :, 2], text[:, :, 2]], 1)
        cosine, sine = (table[:, ::2] for table in image_rotary_emb)
        turn = torch.complex(cosine, sine)
        turn = torch.cat([turn, turn.new_ones(both.shape[1] - tokens, turn.shape[1])])
        pairs = torch.view_as_complex(both.unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * turn[:, None, None]).flatten(-2).to(value.dtype)
        query, key = turned.permute(2, 0, 3, 1, 4)
        bias = torch.zeros(attention_mask.shape, dtype=value.dtype).masked_fill(~attention_mask, float("-inf"))
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2) + bias
        output = (scores.softmax(-1).to(value.dtype) @ value.transpose(1, 2)).transpose(1, 2).flatten(2)
        image_output, text_output = output[:, :tokens], output[:, tokens:]
        if attn.to_out is not None:
            image_output = attn.to_out[0](image_output)
        if attn.to_add_out is not None:
            text_output = attn.to_add_out(text_output)
        return image_output, text_output


def install(model: HunyuanVideoTransformer3DModel) -> None:
    """Make the blocks of ``model`` use ``LeanAttention``; the refiner keeps its own processor."""
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.set_processor(LeanAttention())
