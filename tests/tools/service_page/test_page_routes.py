"""The page's files over HTTP: what is served, what is not, and with which headers."""

from __future__ import annotations

import gzip
import http.client
import re
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelforge.tools.service.page_routes import FOLDER, HEADERS, MEDIA_TYPES, accepts_gzip, is_known, page_router
from tests.tools.service_page.stand_in import StandIn

ROOT = Path(__file__).resolve().parents[3]
ADDRESSES = {name: "/" if name == "index.html" else f"/page/{name}" for name in MEDIA_TYPES}
TEXTS = {name: (FOLDER / name).read_text(encoding="utf-8") for name in MEDIA_TYPES}


def ask(service: StandIn, path: str, method: str = "GET", **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Send a path as it is: other clients tidy it up first."""
    connection = http.client.HTTPConnection(urlsplit(service.url).netloc, timeout=20)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize("name", MEDIA_TYPES)
def test_files_are_served(service: StandIn, name: str) -> None:
    content = (FOLDER / name).read_bytes()
    status, headers, body = ask(service, ADDRESSES[name])
    assert (status, body) == (200, content)
    assert headers["Content-Type"] == MEDIA_TYPES[name]
    assert int(headers["Content-Length"]) == len(content)
    assert all(headers[header] == value for header, value in HEADERS.items())

    status, packed, body = ask(service, ADDRESSES[name], Accept_Encoding="gzip, br")
    assert (status, packed["Content-Encoding"], gzip.decompress(body)) == (200, "gzip", content)
    assert packed["ETag"] != headers["ETag"]

    for encoding, tag in (("identity", headers["ETag"]), ("gzip", packed["ETag"])):
        status, again, body = ask(service, ADDRESSES[name], Accept_Encoding=encoding, If_None_Match=f'"x", W/{tag}')
        assert (status, body, again["ETag"]) == (304, b"", tag)
        assert again["Content-Security-Policy"] == headers["Content-Security-Policy"]
    assert ask(service, ADDRESSES[name], If_None_Match='"else"')[0] == 200

    status, head, body = ask(service, ADDRESSES[name], method="HEAD")
    assert (status, body, head["Content-Length"], head["ETag"]) == (200, b"", str(len(content)), headers["ETag"])


def test_the_table_is_the_folder() -> None:
    assert set(MEDIA_TYPES) == {path.name for path in FOLDER.iterdir()}


def test_a_missing_file_is_found_out_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"index\.html"):
        page_router(tmp_path)


OUTSIDE = (
    "/page/../page_routes.py", "/page/%2e%2e/page_routes.py", "/page/..%2fpage_routes.py", "/page/..%5cpage_routes.py",
    "/page//etc/passwd", "/page/%2fetc%2fpasswd", "/page/app.js%00", "/page/app.js/", "/page/APP.JS", "/page/",
    "/page/%252e%252e%252fpage_routes.py", "/page/./app.js", "/page/index.html", "/page/__init__.py", "/page/.",
)  # fmt: skip


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_else_is_served(service: StandIn, path: str) -> None:
    status, headers, body = ask(service, path)
    # A trailing slash is put right by the framework; that leads nowhere but to a name of the table.
    assert status == 404 or (status == 307 and headers["Location"].endswith("/page/app.js"))
    assert b"import" not in body
    assert b"root:" not in body


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["..", ".", "/", "\\", "%2e", "%2f", "%5c", "%00", "app.js", "page", "etc", "passwd", "~", ";"]
        ),
        min_size=1,
        max_size=8,
    )
)
def test_paths_lead_to_the_table_or_nowhere(stand_in_service: StandIn, parts: list[str]) -> None:
    status, _, body = ask(stand_in_service, "/page/" + "".join(parts))
    known = {text.encode() for text in TEXTS.values()}
    assert status in (307, 404) or (status == 200 and body in known)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_files_are_only_read(service: StandIn, method: str) -> None:
    assert ask(service, "/page/app.js", method=method)[0] == 405


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for name, text in TEXTS.items():
        addresses = re.findall(
            r"(?:https?:)?//[\w.]+\.\w+[^\s\"']*", re.sub(r"^\s*(//|/\*).*$", "", text, flags=re.MULTILINE)
        )
        assert [found for found in addresses if found != "http://www.w3.org/2000/svg"] == [], name
    index = TEXTS["index.html"]
    files = re.findall(r'(?:href|src)="([^#"]+)"', index)
    assert {f"page/{name}" for name in MEDIA_TYPES if name != "index.html"} == set(files)
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", index)
    scripts = {name: text for name, text in TEXTS.items() if name.endswith(".js")}
    for name, text in scripts.items():
        assert set(re.findall(r'from "\./([\w.]+)"', text)) <= set(scripts), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), name


def test_the_policy_lets_nothing_inline_run() -> None:
    policy = HEADERS["Content-Security-Policy"]
    assert "unsafe" not in policy
    for needed in ("default-src 'none'", "script-src 'self'", "style-src 'self'", "base-uri 'none'",
                   "frame-ancestors 'none'", "form-action 'none'", "require-trusted-types-for 'script'"):  # fmt: skip
        assert needed in policy


def test_the_page_is_small() -> None:
    assert sum(len(gzip.compress(text.encode())) for text in TEXTS.values()) < 32 * 1024


def test_files_of_the_page_are_packed() -> None:
    """The wheel takes whole folders; nothing of this one is left out."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["scikit-build"]
    assert build["wheel"]["packages"]["reelforge/tools"] == "tools"
    assert "tools" in build["sdist"]["include"]
    assert not build["wheel"].get("exclude")


@pytest.mark.parametrize(
    ("header", "accepted"),
    [("gzip", True), ("br, GZIP;q=0.5", True), ("x-gzip", True), ("gzip;q=0", False), ("gzip; q=0.000", False),
     ("br", False), ("", False), ("identity;q=1, gzip; q=1.0", True)],
)  # fmt: skip
def test_encodings(header: str, accepted: bool) -> None:
    assert accepts_gzip(header) is accepted


@pytest.mark.parametrize(
    ("header", "known"), [("", False), ("*", True), ('"a"', True), ('W/"a"', True), ('"b", "a"', True), ('"ab"', False)]
)
def test_tags(header: str, known: bool) -> None:
    assert is_known(header, '"a"') is known
