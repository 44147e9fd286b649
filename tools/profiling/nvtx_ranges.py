"""NVTX ranges around what is measured, so that Nsight Systems shows the names that the report does.

Uses NVIDIA's package ``nvtx`` (the extra ``profile``), which is imported when ranges are asked for. Without that
nothing is imported or called. The module does not know what is measured.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from reelforge.runtime.errors import RequestError

DOMAIN = "reelforge"


@dataclass(frozen=True)
class Ranges:
    """Begins and ends nested ranges of one thread."""

    push: Callable[[str], None]
    pop: Callable[[], None]


def _no_push(name: str) -> None:
    del name


def _no_pop() -> None:
    return None


NO_RANGES = Ranges(_no_push, _no_pop)


def open_ranges() -> Ranges:
    """Return ranges in the domain ``reelforge``.

    Raises:
        RequestError: If the package is not installed.
    """
    try:
        nvtx = importlib.import_module("nvtx")
    except ImportError as error:
        raise RequestError(
            "NVTX ranges were asked for, and the package for them is not installed.",
            received=str(error),
            expected="the package nvtx",
            fix="pip install reelforge[profile], or leave --nvtx out",
        ) from error
    domain = nvtx.get_domain(DOMAIN)

    def push(name: str) -> None:
        domain.push_range(domain.get_event_attributes(message=name))

    def pop() -> None:
        domain.pop_range()

    return Ranges(push, pop)
