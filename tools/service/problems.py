"""What goes wrong between a caller and the service, with the HTTP status that says so.

The module knows no web framework.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from reelforge.runtime.errors import OutputError, ReelforgeError


class ServiceError(ReelforgeError):
    """A request over HTTP that is not carried out.

    Args:
        status: The HTTP status.
        code: A word for programs.
        message: A sentence for people.
        problems: Everything that is wrong, one by one.
        retry_after_s: When it may be worth to ask again.
    """

    def __init__(
        self, status: int, code: str, message: str, problems: Sequence[str] = (), retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.problems = tuple(problems)
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """The answer's own headers."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(math.ceil(self.retry_after_s), 1))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    @property
    def body(self) -> dict[str, object]:
        """The answer."""
        return {"error": {"code": self.code, "message": self.message, "problems": list(self.problems)}}


class StoreBusyError(ReelforgeError):
    """The database is locked by somebody else, or has no room; asked later, it may work."""

    exit_code = OutputError.exit_code


def not_found() -> ServiceError:
    """Return the answer to an id that is not one of the caller's jobs, whoever else's it may be."""
    return ServiceError(404, "not_found", "there is no such video job")


def invalid(problems: Sequence[str]) -> ServiceError:
    """Return the answer to a request that cannot be carried out as it is."""
    return ServiceError(422, "invalid_request", "the request cannot be carried out", problems)
