"""Whether files of an open bundle are still those that were checked: stages are loaded long after that, and again.

Sizes, times of modification and inodes are compared, which finds files that were replaced, rewritten, cut or removed
without reading them; whoever sets a file's time back on purpose is not found. The module does not know what the files
are for.
"""

from __future__ import annotations

from pathlib import Path

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.errors import BundleError
from reelforge.runtime.manifest import StageEntry

_State = tuple[int, int, int]


class Watch:
    """Remembers the state of a bundle's files as it is now."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        listed = [entry.path for entry in bundle.manifest.files]
        # An unfinished bundle, as a build's gate runs it, does not list all files of its stages yet.
        of_stages = [path for entry in bundle.manifest.stages for path in _files(entry)]
        self._states = {path: _state(bundle.path / path) for path in dict.fromkeys([*listed, *of_stages])}

    def check_stage(self, stage: str) -> None:
        """Check the files of which a stage is loaded.

        Raises:
            BundleError: Naming the first that is another than before.
        """
        for path in _files(self._bundle.stage(stage)):
            self._check(path)

    def check_tokenizers(self) -> None:
        """Check the tokenizers' files.

        Raises:
            BundleError: Naming the first that is another than before.
        """
        for path in self._states:
            if path.startswith("tokenizers/"):
                self._check(path)

    def _check(self, path: str) -> None:
        before, now = self._states.get(path), _state(self._bundle.path / path)
        if before != now:
            what = "removed" if now is None else "altered"
            raise BundleError(
                f"file {path!r} of bundle {self._bundle.name!r} was {what} while the bundle was open.",
                received="no file" if now is None else _words(now),
                expected="no file" if before is None else _words(before),
                fix="open the pipeline again, which checks the bundle as it is now; do not build into an open bundle",
            )


def _files(entry: StageEntry) -> list[str]:
    """Return the files of which a stage is loaded."""
    plans = [plan.path for plan in entry.plans]
    return plans or [entry.graph, *dict.fromkeys(weight.file for weight in entry.weights)]


def _state(path: Path) -> _State | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def _words(state: _State) -> str:
    return f"{state[0]} bytes, modified at {state[1] / 1e9:.6f} s, inode {state[2]}"
