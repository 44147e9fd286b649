"""Where caches lie if nothing else is said. The module does not know what is cached."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def default_folder(environment: Mapping[str, str], home: Path) -> Path:
    """Return ``$XDG_CACHE_HOME/reelforge``, or ``~/.cache/reelforge``.

    Args:
        environment: ``os.environ``.
        home: The user's home folder. A relative ``XDG_CACHE_HOME`` is ignored, as the XDG specification has it.
    """
    stated = Path(environment.get("XDG_CACHE_HOME", ""))
    return (stated if stated.is_absolute() else home / ".cache") / "reelforge"
