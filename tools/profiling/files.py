"""The files of a profile: ``profile.json``, ``trace.json`` and ``report.html``, each complete or absent.

Whether the folder can be written is found out before anything is measured. Of the files' formats the module knows that
of ``profile.json``, to read it again.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from reelforge.runtime.codec import CodecError, from_json
from reelforge.runtime.errors import OutputError, RequestError
from reelforge.tools.profiling.schema import SCHEMA_VERSION, Profile

PROFILE, TRACE, REPORT = "profile.json", "trace.json", "report.html"


def require_writable(folder: Path) -> None:
    """Make a folder, if need be, and try to write into it.

    Raises:
        OutputError: If it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".profile-"):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error


def write_files(folder: Path, contents: dict[str, str]) -> None:
    """Write files by name; each appears when it is complete.

    Raises:
        OutputError: If one cannot be written.
    """
    try:
        for name, text in contents.items():
            unfinished = folder / f".{name}.{os.getpid()}"
            try:
                unfinished.write_text(text, encoding="utf-8")
                unfinished.replace(folder / name)
            finally:
                unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"the profile's folder {str(folder)!r} cannot be written: {error.strerror or error}.",
        received=str(folder),
        expected="a folder that may be created or written",
        fix="choose another folder with -o",
    )


def read_profile(path: Path) -> Profile:
    """Read a ``profile.json``.

    Raises:
        RequestError: If it cannot be read, or is of another version.
    """
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
        version = value.get("schema_version") if isinstance(value, dict) else None
        if version == SCHEMA_VERSION:
            return from_json(Profile, value)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, CodecError) as error:
        raise RequestError(f"the profile {str(path)!r} cannot be read: {error}.") from error
    raise RequestError(
        f"the profile {str(path)!r} has a schema version that this reelforge does not read.",
        received=repr(version),
        expected=str(SCHEMA_VERSION),
        fix="measure again with reelforge profile",
    )
