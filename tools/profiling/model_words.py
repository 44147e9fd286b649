"""Names of layers for people: ``double.17.image.fc1`` is ``double block 17, image MLP up-projection``.

A table of patterns, tried in order, for the stages' canonical names (those of their weights). A name that no pattern
fits is shown as it is, so that an unknown family is readable, too. The module knows names only.
"""

from __future__ import annotations

import re

_PARTS = {
    "q": "query projection",
    "k": "key projection",
    "v": "value projection",
    "q_proj": "query projection",
    "k_proj": "key projection",
    "v_proj": "value projection",
    "o_proj": "attention output projection",
    "to_q": "query projection",
    "to_k": "key projection",
    "to_v": "value projection",
    "to_out.0": "attention output projection",
    "out_proj": "attention output projection",
    "proj": "attention output projection",
    "proj_attention": "attention output projection",
    "proj_mlp": "MLP down-projection",
    "fc1": "MLP up-projection",
    "fc2": "MLP down-projection",
    "gate_proj": "MLP gate projection",
    "up_proj": "MLP up-projection",
    "down_proj": "MLP down-projection",
    "q_norm": "query norm",
    "k_norm": "key norm",
    "norm": "norm",
    "norm1": "first norm",
    "norm2": "second norm",
    "layer_norm1": "first norm",
    "layer_norm2": "second norm",
    "input_layernorm": "first norm",
    "post_attention_layernorm": "second norm",
    "group_norm": "norm",
    "linear": "modulation projection",
    "gates": "gates projection",
    "conv": "convolution",
    "conv1": "convolution 1",
    "conv2": "convolution 2",
    "conv_shortcut": "shortcut convolution",
    "attention": "attention",
    "elementwise": "element-wise arithmetic",
    "layout": "reordering and casts",
    "quantise": "rounding to 8 bits",
    "other": "the rest",
    "gemm": "matrix products",
    "convolution": "convolutions",
}

_WHERE: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), words)
    for pattern, words in (
        (r"double\.(\d+)\.(image|text)", r"double block \1, \2"),
        (r"double\.(\d+)", r"double block \1"),
        (r"single\.(\d+)", r"single block \1"),
        (r"layers\.(\d+)", r"text layer \1"),
        (r"encoder\.layers\.(\d+)", r"CLIP layer \1"),
        (r"blocks\.(\d+)", r"refiner block \1"),
        (r"decoder\.mid_block\.resnets\.(\d+)", r"decoder middle, residual block \1"),
        (r"decoder\.mid_block\.attentions\.(\d+)", r"decoder middle"),
        (r"decoder\.mid_block", r"decoder middle"),
        (r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)", r"decoder level \1, residual block \2"),
        (r"decoder\.up_blocks\.(\d+)\.upsamplers\.\d+", r"decoder level \1, upsampling"),
        (r"decoder\.up_blocks\.(\d+)", r"decoder level \1"),
        (r"final", r"final layer"),
        (r"time_in", r"timestep embedding"),
        (r"guidance_in", r"guidance embedding"),
        (r"(?:pooled_in|pooled_text_in)", r"pooled text embedding"),
    )
)

_WHOLE = {
    "patch_embed": "patch embedding",
    "final.proj": "final projection",
    "embed_tokens": "token embedding",
    "input": "text input projection",
    "post_quant_conv": "first 1x1x1 convolution",
    "decoder.conv_in": "decoder's first convolution",
    "decoder.conv_out": "decoder's last convolution",
    "decoder.conv_norm_out": "decoder's last norm",
}

_BLOCK = re.compile(r"(?:double|single|layers|blocks)\.\d+|encoder\.layers\.\d+|decoder\.(?:mid_block|up_blocks\.\d+)")


def words_for(name: str) -> str:
    """Return a canonical layer name in words."""
    head, plus, _ = name.partition("+")
    if plus:  # several layers in one kernel: double.0.image.q+k+v
        stem = head.rpartition(".")[0]
        others = [words_for(f"{stem}.{part}").removeprefix(f"{words_for(stem)} ") for part in name.split("+")[1:]]
        return ", ".join([words_for(head), *others[:-1]]) + f" and {others[-1]}"
    name = re.sub(r"\.conv$", "", name)  # causal convolutions hold their weights in a module called conv
    if name in _WHOLE:
        return _WHOLE[name]
    for pattern, words in _WHERE:
        found = pattern.match(name)
        if found is None or (found.end() < len(name) and name[found.end()] != "."):
            continue
        where, rest = found.expand(words), name[found.end() + 1 :]
        part = _part(rest)
        if part is not None:
            joint = " " if where.endswith((" image", " text")) else ", "
            return f"{where}{joint}{part}" if part else where
    head, _, last = name.rpartition(".")
    part = _PARTS.get(last)
    return name if part is None else f"{head}, {part}" if head else part


def _part(rest: str) -> str | None:
    """Return the words for what follows a block's name; None if the table has none."""
    if not rest:
        return ""
    rest = re.sub(r"^(?:self_attn|mlp|attention_block)\.(?=.)", "", rest)
    return _PARTS.get(rest)


def block_of(name: str) -> str:
    """Return the block that a layer belongs to, ``double.17``; empty outside of blocks."""
    found = _BLOCK.match(name)
    return found[0] if found else ""
