"""The identity of a checkpoint for scale files: equal for both layouts of one checkpoint, and cheap to compute.

It covers stage, name, type and shape of every parameter as the stages use it, and the first 4 KiB of its data. It does
not see a change that leaves the beginning of every tensor as it was, as after editing a few rows by hand: whoever
changes a checkpoint in such a way calibrates again. A trained or merged checkpoint differs from its origin everywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import NamedTuple

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.errors import BundleError

HEAD_BYTES = 4096


class StoredTensor(NamedTuple):
    """One parameter of a stage.

    Attributes:
        stage: The stage's name.
        name: The parameter's name in the stage.
        dtype: As safetensors calls it: ``"BF16"``.
        shape: As the stage uses it.
        head: Its first bytes in the order in which the stage uses it; what exceeds ``HEAD_BYTES`` is ignored.
    """

    stage: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    head: bytes


def fingerprint(tensors: Iterable[StoredTensor]) -> str:
    """Return the identity, ``"sha256:"`` and 64 hex digits; the order of the tensors does not matter."""
    lines = sorted(
        json.dumps(
            [
                tensor.stage,
                tensor.name,
                tensor.dtype,
                list(tensor.shape),
                hashlib.sha256(tensor.head[:HEAD_BYTES]).hexdigest(),
            ]
        )
        for tensor in tensors
    )
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def bundle_fingerprint(bundle: Bundle) -> str:
    """Return the identity of the checkpoint that ``bundle`` was built from, whichever views of its stages it has.

    Raises:
        BundleError: If a weight file cannot be read.
    """
    return fingerprint(_stored_tensors(bundle))


def _stored_tensors(bundle: Bundle) -> Iterable[StoredTensor]:
    stages = bundle.manifest.stages
    for stage in stages:
        if any(set(stage.weights) < set(other.weights) for other in stages):
            continue  # another view of that stage, of which a bundle may have some or none
        for weight in stage.weights:
            try:
                with (bundle.path / weight.file).open("rb", buffering=0) as file:
                    file.seek(weight.offset)
                    head = file.read(min(weight.length, HEAD_BYTES))
            except OSError as error:
                raise BundleError(
                    f"file {weight.file!r} of bundle {bundle.name!r} cannot be read: {error.strerror or error}."
                ) from error
            yield StoredTensor(stage.name, weight.name, weight.dtype, weight.shape, head)
