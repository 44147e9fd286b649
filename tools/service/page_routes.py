"""The web page: `/` and the files it is made of, read once when the router is made.

What can be asked for is a table of names written here, so a path is never put together from a request. Nothing on the
page comes from elsewhere and nothing is inline, which the Content-Security-Policy enforces. The module knows no job, no
key and no video: the page talks to the API like any other client.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

FOLDER = Path(__file__).resolve().parent / "page"
MEDIA_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "app.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
    "dom.js": "text/javascript; charset=utf-8",
    "form.js": "text/javascript; charset=utf-8",
    "history.js": "text/javascript; charset=utf-8",
    "stage.js": "text/javascript; charset=utf-8",
}
"""All there is, by file name; a file that is not here is not served."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",  # previews come as data URLs in events
        "media-src 'self' blob:",  # with an API key a video is fetched with its header, and played from memory
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    # Names stay the same from version to version, so a browser asks each time, and is mostly answered in one line.
    "Cache-Control": "no-cache",
    "Vary": "Accept-Encoding",
}


@dataclass(frozen=True)
class PageFile:
    """One file of the page.

    Attributes:
        media_type: Its ``Content-Type``.
        content: Its bytes.
        compressed: The same with gzip.
        tag: What an ``ETag`` is made of: changes with the content.
    """

    media_type: str
    content: bytes
    compressed: bytes
    tag: str

    @classmethod
    def read(cls, path: Path, media_type: str) -> PageFile:
        """Read a file.

        Raises:
            OSError: If it is not there, which means a broken installation.
        """
        content = path.read_bytes()
        return cls(media_type, content, gzip.compress(content, mtime=0), hashlib.sha256(content).hexdigest()[:32])

    def answer(self, request: Request) -> Response:
        """Return the file, or 304 where the client has it already."""
        packed = accepts_gzip(request.headers.get("accept-encoding", ""))
        tag = f'"{self.tag}-gzip"' if packed else f'"{self.tag}"'
        headers = {**HEADERS, "ETag": tag}
        if is_known(request.headers.get("if-none-match", ""), tag):
            return Response(status_code=304, headers=headers)
        if packed:
            headers["Content-Encoding"] = "gzip"
        body = self.compressed if packed else self.content
        if request.method == "HEAD":
            return Response(headers={**headers, "Content-Length": str(len(body))}, media_type=self.media_type)
        return Response(body, headers=headers, media_type=self.media_type)


def accepts_gzip(accept_encoding: str) -> bool:
    """Tell whether an ``Accept-Encoding`` header names gzip and does not refuse it (RFC 9110, 12.5.3)."""
    for item in accept_encoding.split(","):
        name, _, parameter = item.partition(";")
        if name.strip().lower() in ("gzip", "x-gzip"):
            return re.fullmatch(r"\s*q=0(\.0*)?\s*", parameter.lower()) is None
    return False


def is_known(if_none_match: str, tag: str) -> bool:
    """Tell whether an ``If-None-Match`` header names ``tag``; weakly, as RFC 9110, 13.1.2 wants it."""
    names = [item.strip().removeprefix("W/") for item in if_none_match.split(",")]
    return "*" in names or tag in names


def page_router(folder: Path = FOLDER) -> APIRouter:
    """Return the routes ``/`` and ``/page/{file}``.

    Args:
        folder: Where the files are; those of this package, unless a test has others.

    Raises:
        OSError: If one of the files is missing.
    """
    files = {name: PageFile.read(folder / name, media_type) for name, media_type in MEDIA_TYPES.items()}
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        return files["index.html"].answer(request)

    @router.api_route("/page/{file}", methods=["GET", "HEAD"])
    async def page_file(request: Request, file: str) -> Response:
        if file == "index.html" or file not in files:  # its links are relative to `/`
            error = {"code": "not_found", "message": "the page has no such file.", "problems": []}
            return JSONResponse({"error": error}, status_code=404, headers=HEADERS)
        return files[file].answer(request)

    return router
