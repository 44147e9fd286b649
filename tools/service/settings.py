"""What a service is told when it starts: folders, keys, limits, times.

Keys are kept as SHA-256 digests only, so that no message, log or dump of the settings can hold one. The module knows no
HTTP and no jobs.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

from reelforge.runtime.errors import RequestError

KEYS_VARIABLE = "REELFORGE_API_KEYS"
"""The environment's name for keys: ``NAME=KEY`` separated by commas or line ends."""

LEAST_KEY_LENGTH = 16
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")

ANYONE = "anyone"
"""The caller's name where no keys are configured."""


@dataclass(frozen=True)
class ApiKey:
    """A caller who may use the service.

    Attributes:
        name: For the queue's shares, and for people.
        digest: SHA-256 of the key.
    """

    name: str
    digest: bytes = field(repr=False)

    @classmethod
    def of(cls, name: str, secret: str) -> ApiKey:
        """Return the key ``secret``, or the one whose digest ``sha256:HEX`` is."""
        given = _DIGEST.fullmatch(secret)
        return cls(name, bytes.fromhex(given[1]) if given else digest_of(secret))


def digest_of(secret: str) -> bytes:
    """Return the digest of a key as it comes from a header."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def caller_of(secret: str, keys: Iterable[ApiKey]) -> str | None:
    """Return whose key this is, or None.

    All keys are looked at, and digests are compared in constant time: how long it takes says nothing about a key.
    """
    presented = digest_of(secret)
    found = None
    for key in keys:
        if hmac.compare_digest(presented, key.digest):
            found = key.name
    return found


@dataclass(frozen=True)
class Limits:
    """What one request may ask for and how much may wait, besides what the bundle itself supports.

    Attributes:
        body_bytes: Of a request's body.
        prompt_characters: Of the prompt, and of the negative prompt.
        pixels: Width times height; None means what the bundle serves.
        frames: None means what the bundle serves.
        steps: Sampling steps.
        waiting: Jobs that wait, of all callers together.
        waiting_per_caller: Of one caller.
        priority: Largest magnitude of a job's priority; 0 lets nobody choose.
        deadline_s: The longest deadline.
    """

    body_bytes: int = 64 * 1024
    prompt_characters: int = 4000
    pixels: int | None = None
    frames: int | None = None
    steps: int = 100
    waiting: int = 256
    waiting_per_caller: int = 64
    priority: int = 10
    deadline_s: float = 7 * 86_400.0

    def __post_init__(self) -> None:
        _require_numbers(self, optional=("pixels", "frames"), zero=("priority",))


@dataclass(frozen=True)
class Settings:
    """Everything a service is told.

    Attributes:
        bundle: What it serves.
        data: A folder of its own: the jobs, the videos, latents of interrupted jobs.
        host: Where it listens.
        port: 0 takes a free one.
        keys: Who may use it; empty lets anyone who can reach it.
        limits: What may be asked for.
        retention_s: How long a finished video is kept.
        record_s: How long a job that has ended is remembered.
        origins: Web pages of other origins that may call it (CORS); ``*`` is any.
        devices: One pipeline each.
        ahead: Jobs that are handed to the pipelines before one is free, so that none waits between two videos, and
            prompts are encoded together.
        threads: Threads per operator of each pipeline; None means one per core.
        memory_budget: Of each pipeline, as ``Pipeline.open`` takes it.
        check: How thoroughly the bundle is checked: ``full`` or ``sizes``.
        previews: Whether progress shows pictures.
        drain_s: How long running jobs may go on after SIGTERM; then they return to the queue.
        most_crashes: After so many ends of the process in the midst of it a job is given up.
        least_free_bytes: With less room for ``data`` no job is begun.
        busy_s: How long a statement waits for the database's lock.
        keep_alive_s: Between two comments in a silent stream of events.
    """

    bundle: Path
    data: Path
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[ApiKey, ...] = ()
    limits: Limits = field(default_factory=Limits)
    retention_s: float = 7 * 86_400.0
    record_s: float = 30 * 86_400.0
    origins: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)
    ahead: int = 2
    threads: int | None = None
    memory_budget: str | None = None
    check: str = "full"
    previews: bool = True
    drain_s: float = 60.0
    most_crashes: int = 5
    least_free_bytes: int = 256 << 20
    busy_s: float = 2.0
    keep_alive_s: float = 15.0

    def __post_init__(self) -> None:
        _require_numbers(self, optional=("threads",), zero=("port", "ahead", "drain_s", "least_free_bytes"))
        names = [key.name for key in self.keys]
        if len(set(names)) != len(names) or len({key.digest for key in self.keys}) != len(names):
            raise RequestError(
                "a name or a key occurs twice among the API keys.", expected="each name and each key once"
            )


def _require_numbers(settings: object, optional: tuple[str, ...], zero: tuple[str, ...]) -> None:
    for one in fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, one.name)
        if one.type not in ("int", "float", "int | None") or (value is None and one.name in optional):
            continue
        usable = isinstance(value, int | float) and not isinstance(value, bool)
        if not usable or value < 0 or (value == 0 and one.name not in zero) or value == float("inf"):
            raise RequestError(
                f"the service's setting {one.name} is not usable.",
                received=repr(value),
                expected="a number of at least 0" if one.name in zero else "a number above 0",
            )


def keys_of_file(path: Path) -> tuple[ApiKey, ...]:
    """Read keys from a file: one ``NAME KEY`` or ``NAME sha256:HEX`` per line; ``#`` begins a comment.

    Raises:
        RequestError: If it cannot be read, or a line is not one of these. The message has no key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise RequestError(
            f"the file of API keys {str(path)!r} cannot be read: {reason}.", expected="a readable UTF-8 text file"
        ) from error
    found = []
    for number, line in enumerate(lines, 1):
        words = [] if line.lstrip().startswith("#") else line.split()
        if words:
            found.append(_key(words, f"line {number} of {str(path)!r}"))
    if not found:
        raise RequestError(
            f"the file of API keys {str(path)!r} has none.",
            expected="a line 'NAME KEY'",
            fix="leave --keys out to serve without keys",
        )
    return tuple(found)


def keys_of_text(text: str) -> tuple[ApiKey, ...]:
    """Read keys as the environment has them: ``NAME=KEY`` separated by commas or line ends.

    Raises:
        RequestError: If an entry is not of this form. The message has no key.
    """
    entries = [entry.strip() for entry in re.split(r"[,\n]", text) if entry.strip()]
    return tuple(
        _key(entry.split("=", 1), f"entry {number} of {KEYS_VARIABLE}") for number, entry in enumerate(entries, 1)
    )


def _key(words: list[str], where: str) -> ApiKey:
    fine = len(words) == 2 and _NAME.fullmatch(words[0].strip()) is not None
    if not fine or len(words[1].strip()) < LEAST_KEY_LENGTH:
        raise RequestError(
            f"{where} is no API key.",
            expected=f"a name (letters, digits, . _ @ -) and a key of at least {LEAST_KEY_LENGTH} characters",
            fix="make a key with: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    return ApiKey.of(words[0].strip(), words[1].strip())
