"""Opening a bundle: the manifest is read strictly and every file and weight is checked against it.

Knows the manifest and the file system. It does not know what the graphs compute, nor how a bundle is written
(``runtime.bundle.write``). Files that the manifest does not list are ignored: nothing refers to them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from reelforge.runtime.bundle.check import Check as Check
from reelforge.runtime.bundle.digest import ByteRange, sha256_of_ranges
from reelforge.runtime.codec import CodecError, from_json
from reelforge.runtime.errors import BundleError
from reelforge.runtime.manifest import SCHEMA_VERSION, Manifest, StageEntry, content_digest

MANIFEST_NAME = "manifest.json"
_REBUILD = "copy the bundle again, or rebuild it with build-engine"


@dataclass(frozen=True)
class Bundle:
    """A checked bundle: its folder and its manifest. Make one with :meth:`open`."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(
        cls, path: str | Path, check: Check = Check.FULL, on_progress: Callable[[int, int], None] | None = None
    ) -> Bundle:
        """Open the bundle in folder ``path``.

        Args:
            path: The bundle's folder.
            check: ``Check.FULL`` verifies every digest on all cores; ``Check.SIZES`` only presence and sizes.
            on_progress: Called with (bytes verified so far, bytes to verify) during a full check.

        Raises:
            BundleError: If the folder is no bundle, is of another schema version, or a file is missing, truncated or
                altered. The message names the file, and the tensor where the difference is in a weight.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        bundle = cls(folder, manifest)
        bundle._check_references()
        bundle._check_sizes()
        if check is Check.FULL:
            bundle._check_digests(on_progress)
        return bundle

    @property
    def name(self) -> str:
        """The folder's name, as messages show it."""
        return self.path.resolve().name

    def stage(self, name: str) -> StageEntry:
        """Return the manifest's entry of a stage.

        Raises:
            BundleError: If the bundle was built without that stage.
        """
        entry = self.manifest.stage(name)
        if entry is None:
            raise BundleError(
                f"bundle {self.name!r} has no stage {name!r}.",
                received="stages " + (", ".join(stage.name for stage in self.manifest.stages) or "none"),
                expected=f"the stage {name!r} among them",
                fix="rebuild the bundle with all stages (build-engine without --stages)",
            )
        return entry

    def graph(self, stage: str) -> Path:
        """Return the path of a stage's ONNX file.

        Raises:
            BundleError: If the bundle was built without that stage.
        """
        return self.path / self.stage(stage).graph

    def tokenizer_path(self, name: str) -> Path:
        """Return the path of the tokenizer ``"llm"`` or ``"clip"``.

        Raises:
            BundleError: If the bundle holds no such tokenizer.
        """
        relative = f"tokenizers/{name}.json"
        if all(entry.path != relative for entry in self.manifest.files):
            raise BundleError(
                f"bundle {self.name!r} has no tokenizer {name!r}.",
                expected=f"the file {relative} among the manifest's files",
                fix="rebuild the bundle from a checkpoint that has its tokenizers",
            )
        return self.path / relative

    def _check_references(self) -> None:
        """Every path stays inside the folder, and whatever a stage refers to is a listed file with that range."""
        sizes = {entry.path: entry.bytes for entry in self.manifest.files}
        for path in sizes:
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise self._damaged(f"lists the file {path!r}, which is outside the bundle", path)
        for stage in self.manifest.stages:
            if stage.graph not in sizes:
                raise self._damaged(f"names the graph {stage.graph!r} of stage {stage.name!r} but does not list it", "")
            for plan in stage.plans:
                for file in (plan.path, plan.receipt):
                    if file not in sizes:
                        raise self._damaged(f"names {file!r} of stage {stage.name!r} but does not list it", "")
            for weight in stage.weights:
                end = weight.offset + weight.length
                if weight.file not in sizes or weight.offset < 0 or weight.length < 0 or end > sizes[weight.file]:
                    raise self._damaged(
                        f"places tensor {weight.name!r} of stage {stage.name!r} outside of file {weight.file!r}",
                        f"bytes {weight.offset}..{end} of {sizes.get(weight.file, 'an unlisted file')}",
                    )

    def _check_sizes(self) -> None:
        for entry in self.manifest.files:
            path = self.path / entry.path
            if not path.is_file():
                raise BundleError(
                    f"file {entry.path!r} of bundle {self.name!r} is missing.",
                    expected=f"a file of {entry.bytes} bytes",
                    fix=_REBUILD,
                )
            size = path.stat().st_size
            if size != entry.bytes:
                what = "truncated" if size < entry.bytes else "altered"
                raise BundleError(
                    f"file {entry.path!r} of bundle {self.name!r} is {what}.",
                    received=f"{size} bytes",
                    expected=f"{entry.bytes} bytes",
                    fix=_REBUILD,
                )

    def _check_digests(self, on_progress: Callable[[int, int], None] | None) -> None:
        if content_digest(self.manifest) != self.manifest.content_digest:
            raise BundleError(
                f"file {MANIFEST_NAME!r} of bundle {self.name!r} is altered: its content digest does not fit it.",
                received=content_digest(self.manifest),
                expected=self.manifest.content_digest,
                fix=_REBUILD,
            )
        # A range that several stages share is read once; its first name is the one a message shows.
        expected: dict[ByteRange, tuple[str, str]] = {}
        for entry in self.manifest.files:
            if entry.sha256 is not None:
                part = ByteRange(self.path / entry.path, 0, entry.bytes)
                expected[part] = (entry.sha256, f"file {entry.path!r}")
        for stage in self.manifest.stages:
            for weight in stage.weights:
                part = ByteRange(self.path / weight.file, weight.offset, weight.length)
                name = f"tensor {weight.name!r} of stage {stage.name!r} in file {weight.file!r}"
                if expected.setdefault(part, (weight.sha256, name))[0] != weight.sha256:
                    raise self._damaged(f"gives two digests for {name}", weight.sha256)
        total = sum(part.length for part in expected)
        done = 0

        def count(length: int) -> None:
            nonlocal done
            done += length
            if on_progress is not None:
                on_progress(done, total)

        parts = sorted(expected, key=lambda part: (str(part.path), part.offset))
        try:
            for part, digest in sha256_of_ranges(parts, count):
                wanted, name = expected[part]
                if digest != wanted:
                    raise BundleError(
                        f"{name} of bundle {self.name!r} is altered.",
                        received=f"sha256 {digest}",
                        expected=f"sha256 {wanted}",
                        fix=_REBUILD,
                    )
        except (OSError, EOFError) as error:
            raise BundleError(f"bundle {self.name!r} cannot be read: {error}.", fix=_REBUILD) from error

    def _damaged(self, what: str, received: str) -> BundleError:
        return BundleError(
            f"file {MANIFEST_NAME!r} of bundle {self.name!r} {what}.", received=received or None, fix=_REBUILD
        )


def _read_manifest(folder: Path) -> Manifest:
    """Read ``manifest.json``: first the schema version, since another version may have other fields."""
    path = folder / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(
            f"{str(folder)!r} is not a bundle: it has no {MANIFEST_NAME}.",
            received="a folder without it" if folder.is_dir() else "no such folder",
            expected="a folder made by build-engine",
            fix="check the path; a build that was interrupted leaves no bundle, so build it again",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(
            f"file {MANIFEST_NAME!r} in {str(folder)!r} cannot be read: {error}.", fix=_REBUILD
        ) from error
    name = folder.resolve().name
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise BundleError(
            f"file {MANIFEST_NAME!r} of bundle {name!r} is truncated or altered: it is not JSON ({error}).",
            fix=_REBUILD,
        ) from error
    version = value.get("schema_version") if isinstance(value, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:
        raise BundleError(
            f"bundle {name!r} has a schema version that this reelforge does not read.",
            received=repr(version),
            expected=str(SCHEMA_VERSION),
            fix="rebuild the bundle with this reelforge, or install the reelforge that built it",
        )
    value.setdefault("step_cache", None)  # bundles are older than the field, and the same without it
    try:
        return from_json(Manifest, value)
    except CodecError as error:
        raise BundleError(f"file {MANIFEST_NAME!r} of bundle {name!r} is altered: {error}.", fix=_REBUILD) from error
