"""Tokenizers and prompt templates for synthetic checkpoints: real shapes and special tokens, an invented vocabulary.

The LLM's is a byte-level BPE in Llama-3's form (its pre-tokeniser, its special tokens, whole words before merges), the
CLIP's a byte-level BPE in OpenAI's two files. Both hold a small list of words and fall back to bytes; whatever a
configuration's vocabulary has beyond that is filler that no text reaches. The module knows nothing of weights.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

from tokenizers import Tokenizer

from reelforge.runtime.spec import ClipSpec, LlmSpec

BEGIN, END, START_HEADER, END_HEADER = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
)
END_TURN, PAD, IMAGE = "<|eot_id|>", "<pad>", "<image>"
CLIP_BEGIN, CLIP_END = "<|startoftext|>", "<|endoftext|>"

# Ids of Llama 3 with LLaVA's additions, used where the vocabulary is as large as theirs (specification 2).
_LLAMA_BASE = 128000
_LLAMA_SPECIALS = {
    BEGIN: 128000,
    END: 128001,
    START_HEADER: 128006,
    END_HEADER: 128007,
    END_TURN: 128009,
    IMAGE: 128257,
    PAD: 128258,
}
_LLAMA_WORDS = {"system": 9125, "user": 882, "\n\n": 271}
_SMALL_SPECIALS = (BEGIN, END, START_HEADER, END_HEADER, END_TURN, PAD, IMAGE)

_WORD_LIST = (
    "a an and angles are aspects at atmosphere background behaviors below big black blue by camera cat changes "
    "circle city color content cyan describe detailing dog down environment events flying following from gray "
    "green growing grows in into is its large left light magenta main moves movement movements moving night "
    "objects of on orange over physical purple quantity rectangle red relationships right ring running sea shape "
    "shrinking size slowly small spatial square standing stands still street style temporal text texture the "
    "theme through to transitions triangle up used video walking water white with yellow"
)
_EXTRA_WORDS = ("Describe", "system", "user", "video", "a", "an", "the", "\n\n", ":")
_LLAMA_PATTERN = (  # contractions, words, numbers of up to three digits, punctuation, line breaks, spaces
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEMPLATE = (
    f"{START_HEADER}system{END_HEADER}\n\nDescribe the video:{END_TURN}{START_HEADER}user{END_HEADER}\n\n{{}}{END_TURN}"
)


def byte_alphabet() -> list[str]:
    """Return the 256 printable characters that stand for bytes 0..255 (GPT-2's table, used by both tokenizers)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("\xa1"), ord("\xac") + 1),
        *range(ord("\xae"), ord("\xff") + 1),
    ]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _as_bytes(text: str) -> str:
    alphabet = byte_alphabet()
    return "".join(alphabet[byte] for byte in text.encode())


def llm_specials(spec: LlmSpec) -> dict[str, int]:
    """Return the ids of the LLM's special tokens: Llama 3's where they fit, else the last ones of the vocabulary."""
    if spec.vocabulary > max(_LLAMA_SPECIALS.values()):
        return _LLAMA_SPECIALS
    first = spec.vocabulary - len(_SMALL_SPECIALS)
    return {token: first + i for i, token in enumerate(_SMALL_SPECIALS)}


def clip_specials(spec: ClipSpec) -> dict[str, int]:
    """Return the ids of CLIP's special tokens; the end has the largest id, which older libraries rely on."""
    return {CLIP_BEGIN: spec.eos_token - 1, CLIP_END: spec.eos_token}


def llm_tokenizer(spec: LlmSpec) -> bytes:
    """Return a ``tokenizer.json`` whose vocabulary has ``spec.vocabulary`` ids at most and that adds BOS."""
    specials = llm_specials(spec)
    base = min(specials.values())
    fixed = {index: _as_bytes(word) for word, index in _LLAMA_WORDS.items()} if base == _LLAMA_BASE else {}
    vocabulary = _fill(_llm_words(), fixed, base)
    if base == _LLAMA_BASE:
        names = {index: token for token, index in specials.items()}
        last = max(names)
        tokens = [names.get(i, f"<|reserved_special_token_{i - base}|>") for i in range(base, last + 1)]
    else:
        tokens = sorted(specials, key=lambda token: specials[token])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return _json(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": base + i, "content": token, **flags} for i, token in enumerate(tokens)],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": _LLAMA_PATTERN}, "behavior": "Isolated", "invert": False},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
                ],
            },
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": BEGIN, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [
                    {"SpecialToken": {"id": BEGIN, "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                    {"SpecialToken": {"id": BEGIN, "type_id": 1}},
                    {"Sequence": {"id": "B", "type_id": 1}},
                ],
                "special_tokens": {BEGIN: {"id": BEGIN, "ids": [specials[BEGIN]], "tokens": [BEGIN]}},
            },
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,  # as in Llama 3: a word of the vocabulary is one token, merges or not
                "vocab": vocabulary,
                "merges": [],
            },
        }
    )


def _llm_words() -> Iterator[str]:
    yield from byte_alphabet()
    for word in _EXTRA_WORDS:
        yield _as_bytes(word)
    for word in _WORD_LIST.split():
        yield _as_bytes(f" {word}")
    for word in ("The", "Actions"):
        yield _as_bytes(f" {word}")


def _fill(words: Iterator[str], fixed: dict[int, str], size: int) -> dict[str, int]:
    """Number ``words`` from 0 around the ``fixed`` ids and fill up with words that no text contains."""
    taken = set(fixed.values())
    queue = iter([word for word in dict.fromkeys(words) if word not in taken])
    vocabulary: dict[str, int] = {}
    for index in range(size):
        word = fixed.get(index) or next(queue, f"filler {index}")  # a space cannot occur in byte-level text
        vocabulary[word] = index
    left = list(queue)
    if left:
        raise ValueError(f"{len(left)} words do not fit into a vocabulary of {size}")
    return vocabulary


def clip_files(spec: ClipSpec) -> dict[str, bytes]:
    """Return ``vocab.json`` and ``merges.txt`` of CLIP's byte-level BPE with ``</w>`` at the end of words."""
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    specials = clip_specials(spec)
    room = min(specials.values()) - len(tokens)
    merges = _merges(_WORD_LIST.split())[:room]  # short of room the last words stay in pieces
    tokens += [first + second for first, second in merges]
    vocabulary = _fill(iter(tokens), {}, min(specials.values()))
    vocabulary.update(specials)
    return {
        "vocab.json": _json(vocabulary),
        "merges.txt": ("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n").encode(),
    }


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Return merges, by falling priority, that join each of ``words`` (ASCII) into one token with ``</w>``.

    A word is first split by the merges so far; what is left is joined from the left by new merges of lower priority,
    which cannot change the words before it, since those are one token already.
    """
    merges: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            best = min(pairs, key=lambda pair: merges.get(pair, len(merges)))
            merges.setdefault(best, len(merges))
            i = pairs.index(best)
            pieces[i : i + 2] = [best[0] + best[1]]
    return list(merges)


def crop_start(tokenizer_file: bytes, template: str) -> int:
    """Return how many ids, BOS included, stand before the slot of ``template``."""
    tokenizer = Tokenizer.from_str(tokenizer_file.decode())
    return len(tokenizer.encode(template.partition("{}")[0]).ids)


def _json(value: object) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
