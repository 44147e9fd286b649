"""Before anything else is done for a request: whose it is, and whether its body is small enough.

Plain ASGI, outside of the framework, because that reads and parses bodies before it asks who sent them. Keys come in
the header ``Authorization`` only; nothing here logs headers. The module knows no jobs.
"""

from __future__ import annotations

import asyncio
import json
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reelforge.tools.service.metrics import Metrics
from reelforge.tools.service.problems import ServiceError
from reelforge.tools.service.settings import ANYONE, Settings, caller_of

OPEN = frozenset({"/", "/v1/limits", "/healthz", "/readyz", "/metrics", "/openapi.json", "/favicon.ico"})
OPEN_FOLDER = "/page/"
"""What needs no key. Everything else does, also what does not exist: a path that is spelt oddly opens nothing."""

BODY_S = 30.0
"""How long a body may take to arrive."""


class Guard:
    """Asks for keys, reads bodies up to the limit, and counts answers.

    ``scope["state"]["caller"]`` is the caller's name for everything that follows.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, answered = time.monotonic(), False

        def count(status: int) -> None:
            labels = (_method(scope["method"]), str(status))
            self._metrics.http_seconds.labels(*labels).observe(time.monotonic() - started)

        async def answer(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                headers = MutableHeaders(scope=message)
                headers.setdefault("X-Content-Type-Options", "nosniff")
                if not _open(scope):
                    headers.setdefault("Cache-Control", "no-store")
                count(message["status"])
            await send(message)

        try:
            scope.setdefault("state", {})["caller"] = self._caller(scope)
            body = await self._body(scope, receive)
        except ServiceError as error:
            await _refuse(error, answer)
            return
        if body is None:
            return  # whoever asked is gone
        try:
            await self._app(scope, _replayed(body, receive), answer)
        except Exception:
            if not answered:  # the framework answers bugs further out
                count(500)
            raise

    def _caller(self, scope: Scope) -> str:
        if not self._settings.keys or _open(scope) or scope["method"] == "OPTIONS":
            return ANYONE
        kind, _, secret = Headers(scope=scope).get("authorization", "").partition(" ")
        caller = caller_of(secret.strip(), self._settings.keys) if kind.lower() == "bearer" else None
        if caller is None:
            raise ServiceError(401, "unauthorized", "a key is needed: Authorization: Bearer KEY")
        return caller

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        limit = self._settings.limits.body_bytes
        announced = Headers(scope=scope).get("content-length", "0")
        too_large = ServiceError(413, "too_large", f"a body has at most {limit} bytes")
        if not announced.isascii() or not announced.isdigit() or int(announced[:20]) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            raise ServiceError(408, "timeout", f"the body did not arrive within {BODY_S:g} s") from error


def _open(scope: Scope) -> bool:
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
    if root and path.startswith(f"{root}/"):  # mounted below a prefix
        path = path[len(root) :]
    return path in OPEN or path.startswith(OPEN_FOLDER)


def _replayed(body: bytes, receive: Receive) -> Receive:
    read = False

    async def again() -> Message:
        nonlocal read
        if read:
            return await receive()
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(error: ServiceError, send: Send) -> None:
    content = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content)), **error.headers}
    # A body that was not read would be taken for the next request.
    headers["connection"] = "close"
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": content})


def _method(method: str) -> str:
    """Return a method as a label: anything can be sent as one, and each would be a series of its own."""
    return method if method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS") else "other"
