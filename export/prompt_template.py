"""Where the prompt template of a bundle comes from, and how many of its tokens are cropped.

The template is data of the model, not of reelforge. In this order: the file the user names, the checkpoint's own
``prompt_template.json``, and the literal in an installed diffusers, which is read from the source text (nothing is
imported) and verified by its digest. Whatever the source says, ``crop_start`` is checked against the tokenizer.
The module knows nothing of the networks that read the tokens.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from reelforge.runtime.errors import CheckpointError
from reelforge.runtime.manifest import PromptTemplate

SLOT = "{}"
CHECKPOINT_FILE = "prompt_template.json"
OPTION = "--prompt-template"
# Digest of the video template's text with its slot, UTF-8 (specification 2). It has 95 tokens before the slot.
VIDEO_TEMPLATE_SHA256 = "a52f68dde3637b127592fffe9e2483a5d0563987a49db6ddb9b06146f2ba7cb5"

_DIFFUSERS_SOURCE = Path("pipelines", "hunyuan_video", "pipeline_hunyuan_video.py")
_DIFFUSERS_NAME = "DEFAULT_PROMPT_TEMPLATE"
_FIX_FILE = f'write the text around the prompt with one {SLOT} slot, or JSON {{"template": ..., "crop_start": ...}}'
_FIX_NONE = (
    f"install diffusers 0.32 or newer, or pass {OPTION} FILE: the model's text around the prompt, with a {{}} slot"
)
_PROBES = ("x", "A cat walks on the grass.", "")


@dataclass(frozen=True)
class _Found:
    """A template as its source gives it."""

    text: str
    crop_start: int | None
    source: str
    where: str  # for messages


def find_prompt_template(checkpoint_root: Path | None, override: Path | None, tokenizer: Tokenizer) -> PromptTemplate:
    """Return the template to store in a bundle.

    Args:
        checkpoint_root: The checkpoint's folder, looked into for ``prompt_template.json``; None to skip that.
        override: A file that wins over every other source: the text itself, or JSON with ``template`` and optionally
            ``crop_start``.
        tokenizer: The LLM's tokenizer, which adds BOS.

    Raises:
        CheckpointError: If no source has a template, or the one found is damaged, has not exactly one slot, or
            disagrees with the tokenizer.
    """
    found = None
    if override is not None:
        found = _from_file(override, OPTION)
    elif checkpoint_root is not None and (checkpoint_root / CHECKPOINT_FILE).exists():
        found = _from_file(checkpoint_root / CHECKPOINT_FILE, "checkpoint")
    else:
        found = _from_diffusers()
    if found is None:
        raise CheckpointError(
            "the checkpoint comes without a prompt template, and none is installed.",
            received=f"no {CHECKPOINT_FILE} in '{checkpoint_root}', no diffusers with HunyuanVideo",
            expected="the text that the model was trained to read around a prompt",
            fix=_FIX_NONE,
        )
    return PromptTemplate(found.text, _checked_crop_start(found, tokenizer), found.source)


def _from_file(path: Path, source: str) -> _Found:
    where = f"the prompt template '{path}'"
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{where} is not UTF-8 text.",
            received=f"byte {error.object[error.start]:#04x} at offset {error.start}",
            fix="save the file as UTF-8",
        ) from error
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read.", received=error.strerror, fix="check the path") from error
    is_json = path.suffix == ".json" or text.lstrip().startswith('{"')
    if not is_json:
        return _Found(text.removesuffix("\n"), None, source, where)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where} is not valid JSON.", received=str(error), fix=_FIX_FILE) from error
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("template"), str)
        or set(content) - {"template", "crop_start"}
        or not isinstance(content.get("crop_start"), int | None)
        or isinstance(content.get("crop_start"), bool)
    ):
        raise CheckpointError(
            f"{where} has other fields than a template has.",
            received=sorted(content) if isinstance(content, dict) else type(content).__name__,
            expected='"template" (text) and, if you like, "crop_start" (a whole number)',
            fix=_FIX_FILE,
        )
    return _Found(content["template"], content.get("crop_start"), source, where)


def _from_diffusers() -> _Found | None:
    """Return the default template of an installed diffusers, or None if there is none.

    Raises:
        CheckpointError: If diffusers has a template, but not the one that the model was trained with.
    """
    package = importlib.util.find_spec("diffusers")  # finds the folder; importing it would pull in torch
    if package is None or package.origin is None:
        return None
    path = Path(package.origin).parent / _DIFFUSERS_SOURCE
    if not path.is_file():
        return None
    version = importlib.metadata.version("diffusers")
    where = f"the prompt template of diffusers {version}"
    value = _literal(path.read_text(encoding="utf-8"), _DIFFUSERS_NAME)
    text = value.get("template") if isinstance(value, dict) else None
    digest = hashlib.sha256(text.encode()).hexdigest() if isinstance(text, str) else "no text"
    if not isinstance(text, str) or digest != VIDEO_TEMPLATE_SHA256:
        raise CheckpointError(
            f"{where} is not the one HunyuanVideo was trained with.",
            received=f"sha256 {digest}",
            expected=f"sha256 {VIDEO_TEMPLATE_SHA256}",
            fix=f"install another version of diffusers, or pass {OPTION} FILE",
        )
    assert isinstance(value, dict)
    crop_start = value.get("crop_start")
    return _Found(text, crop_start if isinstance(crop_start, int) else None, f"diffusers {version}", where)


def _literal(source: str, name: str) -> object:
    """Return the literal that a Python ``source`` assigns to ``name`` at its top level, or None."""
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and [getattr(target, "id", None) for target in statement.targets] == [
            name
        ]:
            try:
                value: object = ast.literal_eval(statement.value)
            except ValueError:
                return None
            return value
    return None


def _checked_crop_start(found: _Found, tokenizer: Tokenizer) -> int:
    slots = found.text.count(SLOT)
    if slots != 1:
        raise CheckpointError(
            f"{found.where} needs exactly one place for the prompt.",
            received=f"{slots} times {SLOT}",
            expected=f"once {SLOT}",
            fix=_FIX_FILE,
        )
    prefix = tokenizer.encode(found.text.partition(SLOT)[0]).ids
    for probe in _PROBES:
        ids = tokenizer.encode(found.text.replace(SLOT, probe)).ids
        if ids[: len(prefix)] != prefix or len(ids) == len(prefix):
            raise CheckpointError(
                f"{found.where} cannot be cropped: its last tokens merge with the prompt, or nothing follows them.",
                received=f"{len(prefix)} tokens before the slot, which prompt {probe!r} changes"
                if ids[: len(prefix)] != prefix
                else "no token after the cropped ones for an empty prompt",
                expected="a line break or a special token before the slot, and a special token after it",
                fix="end the text before the slot and begin the text after it with a special token or a line break",
            )
    if found.crop_start is not None and found.crop_start != len(prefix):
        raise CheckpointError(
            f"{found.where} says crop_start={found.crop_start}, but the tokenizer disagrees.",
            received=f"{len(prefix)} tokens before the slot, BOS included",
            expected=f"{found.crop_start} tokens",
            fix="use the tokenizer that belongs to the template, or leave crop_start out",
        )
    return len(prefix)
