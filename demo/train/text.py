"""Tokenizers and text encoders of the demonstration model.

The vocabulary is tiny, so the encoders need no training: word embeddings are orthogonal where the world uses the word
and random elsewhere, and the layers are random. The LLaMA's residual branches are kept small, so that its states stay
separable; the CLIP's first layer attends evenly, so that its pooled state is a normalised sum of the prompt's words.
Every weight is rounded to fp16 first: training sees exactly what is shipped.

Shapes: ``B`` prompts, ``L`` tokens, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from demo.train import data

TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
LLM_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|pad|>",
)
CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
LLM_WIDTH = 128
CLIP_WIDTH = 64
HEAD = 64
LLM_LAYERS = 4
SKIPPED_LAYERS = 2
MAX_TOKENS = 10
FILLERS = ("a", "an", "on", "background", ",", "moving", "moves", "standing", "stands")


def corpus() -> list[str]:
    """Return every caption of the world and the template's own words."""
    texts = {caption for scene in data.scenes() for caption in (*scene.captions(), scene.image_caption())}
    return [*sorted(texts), "describe the video. system user"]


def _byte_level_bpe() -> Tokenizer:
    """Return a lower-casing byte-level BPE that knows each word of the corpus as one token, and any byte besides."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def llm_tokenizer() -> Tokenizer:
    """Return the LLM's tokenizer, which adds the begin-of-text token itself."""
    tokenizer = _byte_level_bpe()
    tokenizer.add_special_tokens(list(LLM_SPECIALS))
    begin = tokenizer.token_to_id(LLM_SPECIALS[0])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{LLM_SPECIALS[0]} $A", pair=None, special_tokens=[(LLM_SPECIALS[0], begin)]
    )
    return tokenizer


def clip_tokenizer() -> Tokenizer:
    """Return the CLIP's tokenizer, which adds start and end; the end token has the highest id, as in the original."""
    tokenizer = _byte_level_bpe()
    tokenizer.add_special_tokens(list(CLIP_SPECIALS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLIP_SPECIALS[0]} $A {CLIP_SPECIALS[1]}",
        pair=None,
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in CLIP_SPECIALS],
    )
    return tokenizer


def crop_start() -> int:
    """Return the number of template tokens in front of the prompt, including the begin-of-text token."""
    return len(llm_tokenizer().encode(TEMPLATE.split("{}")[0]).ids)


def _embeddings(tokenizer: Tokenizer, width: int, generator: torch.Generator, filler: float) -> Tensor:
    """Return embeddings [vocabulary, D] of unit mean square: orthogonal for the world's words, random for the rest."""
    table = torch.randn(tokenizer.get_vocab_size(), width, generator=generator)
    words = sorted({token for text in corpus() for token in tokenizer.encode(text, add_special_tokens=False).ids})
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q * width**0.5
    table[words] = basis[: len(words)]
    for word in FILLERS:
        ids = tokenizer.encode(word, add_special_tokens=False).ids
        table[ids] *= filler
    return table


def _round_to_half(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.half().float()
        parameter.requires_grad_(False)


@torch.no_grad()  # type: ignore[untyped-decorator]
def llm(seed: int = 0) -> LlamaModel:
    """Return the frozen LLaMA: states of layer ``LLM_LAYERS - 2`` are used, as in the original."""
    tokenizer = llm_tokenizer()
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=LLM_WIDTH,
        intermediate_size=LLM_WIDTH,
        num_hidden_layers=LLM_LAYERS,
        num_attention_heads=LLM_WIDTH // HEAD,
        num_key_value_heads=1,
        head_dim=HEAD,
        rope_theta=10000.0,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.token_to_id(LLM_SPECIALS[0]),
        eos_token_id=tokenizer.token_to_id(LLM_SPECIALS[1]),
        pad_token_id=tokenizer.token_to_id(LLM_SPECIALS[5]),
    )
    generator = torch.Generator().manual_seed(seed)
    model = LlamaModel(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            gain = 0.4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain / parameter.shape[1] ** 0.5)
    model.embed_tokens.weight.copy_(_embeddings(tokenizer, LLM_WIDTH, generator, filler=1.0))
    _round_to_half(model)
    return model.eval()


@torch.no_grad()  # type: ignore[untyped-decorator]
def clip(seed: int = 0) -> CLIPTextModel:
    """Return the frozen CLIP text tower, whose pooled state tells the prompt's words apart."""
    tokenizer = clip_tokenizer()
    begin, end = (tokenizer.token_to_id(token) for token in CLIP_SPECIALS)
    config = CLIPTextConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=CLIP_WIDTH // HEAD,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        bos_token_id=begin,
        eos_token_id=end,
        pad_token_id=end,
    )
    generator = torch.Generator().manual_seed(seed + 1)
    model = CLIPTextModel(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            small = name.endswith(("out_proj.weight", "fc2.weight", "position_embedding.weight"))
            gain = 0.3 if small else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain / parameter.shape[1] ** 0.5)
    modules = dict(model.named_modules())
    table = next(module for name, module in modules.items() if name.endswith("token_embedding"))
    table.weight.copy_(_embeddings(tokenizer, CLIP_WIDTH, generator, filler=0.2))
    table.weight[begin] *= 0.2
    first = next(module for name, module in modules.items() if name.endswith("layers.0.self_attn"))
    nn.init.zeros_(first.q_proj.weight)
    nn.init.zeros_(first.k_proj.weight)
    nn.init.eye_(first.v_proj.weight)
    first.out_proj.weight.copy_(6.0 * torch.eye(CLIP_WIDTH))
    _round_to_half(model)
    return model.eval()


@dataclass(frozen=True)
class TextBank:
    """Encoded captions.

    Attributes:
        index: row of every caption; the empty prompt is row 0.
        states: LLM states after the crop, zero where padded, [B, L, D].
        mask: 1 for valid tokens, [B, L].
        pooled: CLIP's pooled states [B, D].
    """

    index: dict[str, int]
    states: Tensor
    mask: Tensor
    pooled: Tensor


def _by_length(sequences: list[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (positions, ids [B, L]) for the sequences of each length, so that nothing needs padding."""
    lengths = sorted({len(ids) for ids in sequences})
    for length in lengths:
        rows = [row for row, ids in enumerate(sequences) if len(ids) == length]
        yield rows, torch.tensor([sequences[row] for row in rows])


@torch.no_grad()  # type: ignore[untyped-decorator]
def encode(captions: Iterable[str]) -> TextBank:
    """Encode captions on their valid tokens only, which equals what the pipeline does with padding.

    Raises:
        ValueError: for a caption of more than ``MAX_TOKENS`` tokens.
    """
    texts = ["", *dict.fromkeys(captions)]
    llm_tokens, clip_tokens = llm_tokenizer(), clip_tokenizer()
    llm_model, clip_model, start = llm(), clip(), crop_start()
    states = torch.zeros(len(texts), MAX_TOKENS, LLM_WIDTH)
    mask = torch.zeros(len(texts), MAX_TOKENS)
    pooled = torch.zeros(len(texts), CLIP_WIDTH)
    for rows, ids in _by_length([llm_tokens.encode(TEMPLATE.format(text)).ids for text in texts]):
        hidden = llm_model(ids, output_hidden_states=True).hidden_states[-1 - SKIPPED_LAYERS][:, start:]
        length = hidden.shape[1]
        if length > MAX_TOKENS:
            raise ValueError(
                f"caption too long\n  received: {texts[rows[0]]!r}   expected: at most {MAX_TOKENS} tokens"
            )
        states[rows, :length], mask[rows, :length] = hidden, 1.0
    for rows, ids in _by_length([clip_tokens.encode(text).ids for text in texts]):
        pooled[rows] = clip_model(ids).pooler_output
    return TextBank({text: row for row, text in enumerate(texts)}, states, mask, pooled)
