"""Clients of a video service, many in one process, as light as they can be: a part of the service's benchmark.

They share the machine with what they measure: a library for HTTP, which takes milliseconds per request, would be
measured too. Each has a connection of its own, sends a request, reads the job's events to the end, and goes on. Of
HTTP/1.1 this knows what such a service answers: ``Content-Length`` and chunks; it checks no more than it needs.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LARGEST = 1 << 24


@dataclass
class Timings:
    """What the clients saw, in seconds.

    Attributes:
        accepted: From the request to the answer.
        first_event: From the request to the first event.
        jobs: The accepted jobs.
        ends: How each ended.
        refused: How often there was no place.
        seconds: From the first request to the last end.
        cpu_s: Of the processor, in this process and all its threads.
    """

    accepted: list[float] = field(default_factory=list)
    first_event: list[float] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    refused: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0


class Connection:
    """One client's connection, kept open from request to request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, method: str, path: str, body: bytes = b"") -> tuple[int, dict[str, str]]:
        """Send a request, and return the answer's status and headers; its content is to be read next."""
        head = f"{method} {path} HTTP/1.1\r\nHost: service\r\nContent-Type: application/json\r\n"
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
        pairs = (line.split(":", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1]), {name.lower(): value.strip() for name, value in pairs}

    async def content(self, headers: dict[str, str]) -> bytes:
        """Return an answer's content that came with its length."""
        return await self._reader.readexactly(int(headers["content-length"]))

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield an answer's content as it comes."""
        while size := int(await self._reader.readline(), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readexactly(2)

    async def close(self) -> None:
        """Close the connection."""
        self._writer.close()
        await self._writer.wait_closed()


async def clients(url: str, bodies: list[dict[str, Any]], count: int) -> Timings:
    """Send requests from many clients at once; each sends its next one when its last video is there."""
    told = Timings()
    todo = iter([json.dumps(body).encode() for body in bodies])
    address = urlsplit(url)
    opened = [await asyncio.open_connection(address.hostname, address.port, limit=LARGEST) for _ in range(count)]
    connections = [Connection(*pair) for pair in opened]
    started, cpu_s = time.monotonic(), time.process_time()
    await asyncio.gather(*(_one(connection, todo, told) for connection in connections))
    told.seconds, told.cpu_s = time.monotonic() - started, time.process_time() - cpu_s
    for connection in connections:
        await connection.close()
    return told


async def _one(connection: Connection, todo: Iterator[bytes], told: Timings) -> None:
    for body in todo:
        await _follow(connection, body, told)


async def _follow(connection: Connection, body: bytes, told: Timings) -> None:
    while True:
        began = time.monotonic()
        status, headers = await connection.send("POST", "/v1/videos", body)
        content = await connection.content(headers)
        if status != 429:
            break
        told.refused += 1
        await asyncio.sleep(float(headers["retry-after"]))
    if status != 202:
        raise RuntimeError(f"the service answered {status}: {content[:500]!r}")
    told.accepted.append(time.monotonic() - began)
    job_id = json.loads(content)["id"]
    told.jobs.append(job_id)
    status, headers = await connection.send("GET", f"/v1/videos/{job_id}/events")
    if status != 200:
        raise RuntimeError(f"the service answered {status}: {(await connection.content(headers))[:500]!r}")
    first, last = None, ""
    async for chunk in connection.chunks():
        first = time.monotonic() if first is None else first
        found = chunk.rfind(b"event: ")
        last = last if found < 0 else chunk[found:].split(b"\n", 1)[0].decode()
    told.first_event.append((first or time.monotonic()) - began)
    told.ends.append(last.removeprefix("event: "))


def main() -> None:
    """Run ``COUNT`` clients on the service at ``URL`` with the requests in a file, and print what they saw as JSON."""
    url, path, count = sys.argv[1:]
    told = asyncio.run(clients(url, json.loads(Path(path).read_text()), int(count)))
    print(json.dumps(asdict(told)))


if __name__ == "__main__":
    main()
