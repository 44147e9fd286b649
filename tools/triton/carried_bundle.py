"""The part of a bundle that lies in the pipeline's model: its manifest, its tokenizers, and stages that run inside.

The manifest lists files of other models too, so that this is no whole bundle and ``Bundle.open`` refuses it. The module
checks what is there; what the other models' folders hold is Triton's to load.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from reelforge.runtime.bundle.digest import sha256_of_file
from reelforge.runtime.bundle.open import MANIFEST_NAME, Bundle
from reelforge.runtime.codec import CodecError, from_json
from reelforge.runtime.errors import BundleError
from reelforge.runtime.manifest import SCHEMA_VERSION, Manifest, content_digest
from reelforge.tools.triton.repository import carried_files

_AGAIN = "write the repository again with reelforge export-triton"


def open_carried(folder: Path, inside: Sequence[str]) -> Bundle:
    """Open what a pipeline's model carries of a bundle.

    Args:
        folder: Of the manifest.
        inside: Stages whose files must be there.

    Raises:
        BundleError: If a file is missing or not the one that the manifest states; weights are held against their sizes.
    """
    bundle = Bundle(folder, _read_manifest(folder / MANIFEST_NAME))
    known = {entry.path: entry for entry in bundle.manifest.files}
    for path in carried_files(bundle, tuple(inside)):
        if path == MANIFEST_NAME:
            continue
        entry, file = known[path], folder / path
        try:
            size = file.stat().st_size
            digest = sha256_of_file(file) if entry.sha256 else None
        except OSError as error:
            raise BundleError(f"{file} cannot be read: {error.strerror}.", fix=_AGAIN) from error
        if (size, digest) != (entry.bytes, entry.sha256):
            raise BundleError(
                f"{file} is not the file that the bundle had.",
                received=f"{size} bytes, sha256 {digest}",
                expected=f"{entry.bytes} bytes, sha256 {entry.sha256}",
                fix=_AGAIN,
            )
    return bundle


def _read_manifest(path: Path) -> Manifest:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        manifest = from_json(Manifest, value)
    except (OSError, ValueError, CodecError) as error:
        raise BundleError(
            f"{path} cannot be read by this reelforge: {error}.",
            expected=f"a manifest of schema version {SCHEMA_VERSION}",
            fix=f"install the reelforge that wrote the repository, or {_AGAIN}",
        ) from error
    if manifest.schema_version != SCHEMA_VERSION or content_digest(manifest) != manifest.content_digest:
        raise BundleError(
            f"{path} was altered, or is of another schema version.",
            received=f"schema version {manifest.schema_version}, digest {content_digest(manifest)}",
            expected=f"schema version {SCHEMA_VERSION}, digest {manifest.content_digest}",
            fix=f"install the reelforge that wrote the repository, or {_AGAIN}",
        )
    return manifest
