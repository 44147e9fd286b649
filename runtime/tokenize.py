"""Prompts to token ids with the bundle's own tokenizers, exactly as long as they are: no padding, no masks.

Text encoders here are causal with padding on the right, so running the valid tokens alone gives the same states
(specification 2). Knows the template and the two length limits; it does not know the encoders.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from reelforge.runtime.errors import BundleError, RequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from reelforge.runtime.manifest import PromptTemplate
    from reelforge.runtime.spec import ClipSpec, LlmSpec

TEMPLATE_SLOT = "{}"

_TOKENIZERS = 8
"""How many are kept: two per bundle that is open."""


@dataclass(frozen=True)
class Tokens:
    """Token ids, int64 ``[1, tokens]``, and a sentence for the user if the prompt was too long."""

    ids: NDArray[np.int64]
    notice: str | None = None


def clean_prompt(prompt: str) -> str:
    """Return the prompt without surrounding white space.

    A leading newline would merge with the template's last token and shift the crop (specification 2).

    Raises:
        RequestError: If the prompt is not valid Unicode text.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the prompt is not valid Unicode text at character {error.start}.",
            received=ascii(prompt[error.start : error.end]),
            expected="UTF-8 text",
            fix="save the prompt as UTF-8 and pass it with --prompt-file",
        ) from error
    return prompt.strip()


def llm_tokens(prompt: str, tokenizer_path: Path, template: PromptTemplate, spec: LlmSpec) -> Tokens:
    """Tokenise the prompt inside the template.

    Returns:
        ``crop_start`` tokens of the template, then at most ``spec.max_text_tokens``; cut on the right.

    Raises:
        RequestError: If the prompt is not valid Unicode text.
        BundleError: If the tokenizer cannot be loaded or does not fit the template.
    """
    if template.text.count(TEMPLATE_SLOT) != 1:
        raise BundleError(
            "the bundle's prompt template has no place for the prompt.",
            received=f"{template.text.count(TEMPLATE_SLOT)} times {TEMPLATE_SLOT!r}",
            expected="once",
            fix="rebuild the bundle with another --prompt-template",
        )
    text = template.text.replace(TEMPLATE_SLOT, clean_prompt(prompt))
    ids = _encode(_load(tokenizer_path), text)
    if len(ids) <= template.crop_start:
        raise BundleError(
            "the bundle's prompt template is shorter than the part of it that is cropped.",
            received=f"{len(ids)} tokens with the prompt",
            expected=f"more than crop_start = {template.crop_start}",
            fix="rebuild the bundle with the tokenizer and template of the checkpoint",
        )
    _check_vocabulary(ids, spec.vocabulary, "llm")
    kept = ids[: template.crop_start + spec.max_text_tokens]
    return Tokens(_row(kept), _notice("language model", ids[template.crop_start :], kept[template.crop_start :]))


def clip_tokens(prompt: str, tokenizer_path: Path, spec: ClipSpec) -> Tokens:
    """Tokenise the bare prompt for CLIP.

    Returns:
        At most ``spec.max_tokens`` tokens whose last, and only, end-of-text token is ``spec.eos_token``.

    Raises:
        RequestError: If the prompt is not valid Unicode text.
        BundleError: If the tokenizer cannot be loaded, or ends no text with ``spec.eos_token``.
    """
    ids = _encode(_load(tokenizer_path), clean_prompt(prompt))
    if spec.eos_token not in ids:
        raise BundleError(
            "the bundle's CLIP tokenizer does not end a text with the model's end-of-text token.",
            received=f"last token {ids[-1] if ids else 'none'}",
            expected=str(spec.eos_token),
            fix="rebuild the bundle with the tokenizer of the checkpoint",
        )
    _check_vocabulary(ids, spec.vocabulary, "clip")
    whole = ids[: ids.index(spec.eos_token) + 1]  # later tokens cannot be seen: the encoder is causal
    kept = whole if len(whole) <= spec.max_tokens else [*whole[: spec.max_tokens - 1], spec.eos_token]
    return Tokens(_row(kept), _notice("CLIP", whole, kept))


def _load(path: Path) -> Tokenizer:
    """Return a file's tokenizer; the same one again as long as the file is.

    Loading is slow where the vocabulary is large, and every time leaves kilobytes that tokenizers 0.23 never frees.
    """
    try:
        status = path.stat()
    except OSError:
        return _loaded(path, 0, 0, 0)  # which says what is wrong
    return _loaded(path, status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=_TOKENIZERS)
def _loaded(path: Path, *state: int) -> Tokenizer:
    del state  # part of the key
    from tokenizers import Tokenizer  # with the first prompt: a bundle can be opened without

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise BundleError(
            f"file 'tokenizers/{path.name}' is not a tokenizer.",
            received=str(error),
            expected="a tokenizer.json of the tokenizers library",
            fix="rebuild the bundle with build-engine",
        ) from error
    # A file may carry the settings that somebody trained with; lengths are decided here alone.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=True).ids]


def _check_vocabulary(ids: list[int], vocabulary: int, name: str) -> None:
    if max(ids) >= vocabulary:
        raise BundleError(
            f"the tokenizer {name!r} does not belong to the bundle's model.",
            received=f"token {max(ids)}",
            expected=f"tokens below {vocabulary}",
            fix="rebuild the bundle with the tokenizer of the checkpoint",
        )


def _row(ids: list[int]) -> NDArray[np.int64]:
    return np.asarray([ids], dtype=np.int64)


def _notice(encoder: str, whole: list[int], kept: list[int]) -> str | None:
    if len(whole) == len(kept):
        return None
    return f"the prompt has {len(whole)} tokens for {encoder}; the first {len(kept)} are used"
