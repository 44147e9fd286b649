"""A checkpoint's tokenizers as files of the ``tokenizers`` library, which the runtime reads without transformers.

The files are normalised so that equal tokenizers give equal bytes: padding and truncation (which belong to a request)
are taken out, keys are sorted. The module knows nothing of templates or of what the ids mean to a network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from reelforge.runtime.errors import CheckpointError

Role = Literal["llm", "clip"]

# By role: ids that an empty text must give, by name, and further tokens that prompts or templates are written with.
_FRAME: dict[Role, tuple[str, ...]] = {
    "llm": ("<|begin_of_text|>",),
    "clip": ("<|startoftext|>", "<|endoftext|>"),
}
_OTHER_SPECIALS: dict[Role, tuple[str, ...]] = {
    "llm": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "clip": (),
}
_SLOW_CLIP_FILES = ("vocab.json", "merges.txt")
_FIX = "copy the tokenizer's folder of the original checkpoint again"


def tokenizer_json(folder: Path, role: Role) -> bytes:
    """Return the bytes of a ``tokenizer.json`` for the tokenizer in ``folder``.

    Args:
        folder: The checkpoint's tokenizer folder: ``tokenizer.json``, or for CLIP ``vocab.json`` and ``merges.txt``.
        role: ``llm`` (adds the begin-of-text token) or ``clip`` (adds start and end).

    Raises:
        CheckpointError: If files are missing or damaged, or the tokenizer does not behave as its role needs.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        content = _read(path)
    elif role == "clip" and all((folder / name).is_file() for name in _SLOW_CLIP_FILES):
        path = folder / _SLOW_CLIP_FILES[0]
        content = _converted_clip(folder)
    else:
        expected = "tokenizer.json" + (" or vocab.json and merges.txt" if role == "clip" else "")
        present = sorted(item.name for item in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise CheckpointError(f"'{folder}' holds no tokenizer.", received=present, expected=expected, fix=_FIX)
    content["padding"] = None
    content["truncation"] = None
    result = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    _check(_loaded(result, path), role, path)
    return result.encode()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"the tokenizer '{path}' cannot be read.", received=str(error), fix=_FIX) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"the tokenizer '{path}' is not a JSON object.", received=type(content).__name__, fix=_FIX
        )
    return content


def _converted_clip(folder: Path) -> dict[str, Any]:
    """Return CLIP's two slow files as the content of a ``tokenizer.json``.

    Only CLIP's own rules are applied to the vocabulary and merges; whatever else the folder says is not needed.
    """
    # Imported here: most checkpoints need no conversion, and transformers takes seconds.
    from transformers import CLIPTokenizerFast

    _read(folder / "vocab.json")
    begin, end = _FRAME["clip"]
    try:
        tokenizer = CLIPTokenizerFast.from_pretrained(
            str(folder), local_files_only=True, bos_token=begin, eos_token=end, unk_token=end, pad_token=end
        )
        content = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(
            f"CLIP's vocabulary in '{folder}' cannot be converted.", received=str(error).strip(), fix=_FIX
        ) from error
    assert isinstance(content, dict)
    return content


def _loaded(content: str, path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(content)
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(
            f"the tokenizer '{path}' is not a file of the tokenizers library.", received=str(error), fix=_FIX
        ) from error


def _check(tokenizer: Tokenizer, role: Role, path: Path) -> None:
    frame = _FRAME[role]
    missing = [name for name in (*frame, *_OTHER_SPECIALS[role]) if tokenizer.token_to_id(name) is None]
    if missing:
        raise CheckpointError(
            f"the tokenizer '{path}' lacks special tokens.",
            received=f"none of {missing}",
            expected=f"{role}: {', '.join((*frame, *_OTHER_SPECIALS[role]))}",
            fix="use the tokenizer of the model's text encoder",
        )
    for name in (*frame, *_OTHER_SPECIALS[role]):
        if tokenizer.encode(name, add_special_tokens=False).ids != [tokenizer.token_to_id(name)]:
            raise CheckpointError(
                f"the tokenizer '{path}' does not keep {name!r} in one piece.",
                received=tokenizer.encode(name, add_special_tokens=False).tokens,
                expected="one special token",
                fix="use the tokenizer of the model's text encoder",
            )
    text = "a prompt"
    expected = tokenizer.encode(text, add_special_tokens=False).tokens
    expected = [frame[0], *expected, *frame[1:]]
    received = tokenizer.encode(text).tokens
    if received != expected:
        raise CheckpointError(
            f"the tokenizer '{path}' does not add {' and '.join(frame)} to a text.",
            received=received,
            expected=str(expected),
            fix="use the tokenizer of the model's text encoder",
        )
