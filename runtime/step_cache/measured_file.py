"""Files that say what was measured of a checkpoint: JSON objects with a version, numbers and nothing that is run.

The module does not know what the numbers mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelforge.runtime.errors import OutputError, RequestError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class MeasuredFile:
    """One kind of file.

    Attributes:
        what: What it holds, for messages: "magnitude ratios".
        command: What writes it: "measure-ratios".
    """

    what: str
    command: str

    def write(self, path: Path, content: Mapping[str, object]) -> None:
        """Write a file.

        Raises:
            OutputError: If it cannot be written.
        """
        text = json.dumps({"schema_version": SCHEMA_VERSION, **content}, indent=1) + "\n"
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"the {self.what} cannot be written to {str(path)!r}: {error.strerror or error}.",
                fix="choose another path",
            ) from error

    def read(self, path: Path) -> dict[str, Any]:
        """Read a file's object.

        Raises:
            RequestError: If it cannot be read or is no such object.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self.refused(path, str(error)) from error
        if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
            raise self.refused(path, f"no object of schema version {SCHEMA_VERSION}")
        return content

    def numbers(self, content: Mapping[str, Any], name: str, path: Path) -> tuple[float, ...]:
        """Return a list of finite numbers of a file.

        Raises:
            RequestError: If it is something else.
        """
        row = content.get(name)
        if not isinstance(row, list) or not all(type(item) in (int, float) and math.isfinite(item) for item in row):
            raise self.refused(path, f"{name!r} is not a list of finite numbers")
        return tuple(float(item) for item in row)

    def refused(self, path: Path, received: str) -> RequestError:
        """Return the error for a file that holds something else."""
        return RequestError(
            f"the file {str(path)!r} does not hold {self.what}.",
            received=received,
            expected=f"a file from reelforge {self.command}",
            fix=f"run reelforge {self.command} BUNDLE -o {path}",
        )


def whole(item: object) -> int:
    """Return a count of a file, 1 where it has none."""
    return item if type(item) is int else 1
