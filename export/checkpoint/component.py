"""Component and Checkpoint: an opened checkpoint as data, whatever its layout on disk.

A component is one network of the checkpoint (``transformer``, ``vae``, ``text_encoder``, ``text_encoder_2``) with its
tensors' names and ranges and its configuration. The module reads no files except small JSON ones.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reelforge.export.checkpoint.tensor_ref import TensorRef
from reelforge.runtime.errors import CheckpointError

COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
STRIPPED_PREFIXES = {
    "vae": ("vae.",),
    "text_encoder": ("language_model.", "model."),
    "text_encoder_2": ("text_model.",),
}
"""Prefixes that library versions put before the same names (specification, section 2)."""


class Layout(enum.Enum):
    """How a checkpoint lies on disk."""

    DIFFUSERS = "diffusers"
    TENCENT = "tencent"


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint.

    Attributes:
        name: One of :data:`COMPONENTS`.
        tensors: Every stored tensor by name, known prefixes removed (the reference keeps the stored name).
        config: Its ``config.json``, or None where the layout has none.
        where: The file or folder, for messages.
    """

    name: str
    tensors: Mapping[str, TensorRef]
    config: Mapping[str, Any] | None
    where: str


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: headers only, no weights.

    Attributes:
        path: The folder it was opened from (its root).
        layout: How it lies on disk.
        components: The components that are there, by name.
        family: The model family, as specs and ``export.family`` name it; both layouts' readers refuse all others.
        scheduler: ``scheduler_config.json`` where the layout has one.
        tokenizers: Folders of tokenizer files: ``llm`` and ``clip``, None where there is none.
        prompt_template: ``prompt_template.json`` at the root, or None.
        sampling_defaults: ``sampling_defaults.json`` at the root, or None.
    """

    path: Path
    layout: Layout
    components: Mapping[str, Component]
    family: str = "hunyuan_video"
    scheduler: Mapping[str, Any] | None = None
    tokenizers: Mapping[str, Path | None] = field(default_factory=dict)
    prompt_template: Path | None = None
    sampling_defaults: Path | None = None

    def component(self, name: str) -> Component:
        """Return a component.

        Raises:
            CheckpointError: If the checkpoint came without it.
        """
        if name not in self.components:
            raise CheckpointError(
                f"the checkpoint {self.path} has no {name}.",
                received=", ".join(self.components) or "nothing",
                expected=f"a folder {name}/ with its weights",
                fix=f"download {name}/ next to the others",
            )
        return self.components[name]


def component(
    name: str, tensors: Mapping[str, TensorRef], config: Mapping[str, Any] | None, where: Path | str
) -> Component:
    """Return a component with the known prefixes of its kind removed from the tensors' names.

    Raises:
        CheckpointError: If two names differ by a prefix only.
    """
    stripped: dict[str, TensorRef] = {}
    for key, ref in tensors.items():
        short = _without(key, STRIPPED_PREFIXES.get(name, ()))
        if short in stripped:
            raise CheckpointError(
                f"in {where}, two tensors differ by a prefix only.",
                received=f"{stripped[short].name!r} and {key!r}",
                expected=f"{short!r} once",
                fix="remove one of the two sets of weights",
            )
        stripped[short] = ref
    return Component(name, stripped, config, str(where))


def _without(key: str, prefixes: tuple[str, ...]) -> str:
    while prefix := next((prefix for prefix in prefixes if key.startswith(prefix)), None):
        key = key.removeprefix(prefix)
    return key


def first_file(folders: Sequence[Path], name: str) -> Path | None:
    """Return the first of ``folders`` / ``name`` that is a file, or None."""
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``.

    Raises:
        CheckpointError: If it cannot be read or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}.", fix="check the path and its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not JSON.", received=str(error), expected="a JSON object", fix="download it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} is not a JSON object.", received=type(value).__name__, expected="a JSON object", fix="restore it"
        )
    return value


def read_json_if_there(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in ``path``, or None if there is no such file."""
    return read_json(path) if path.exists() else None
