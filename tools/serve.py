"""``reelforge serve``: a bundle behind an HTTP interface, as a durable service.

Knows the options and signals; what is served is in ``tools.service``.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reelforge.runtime.bundle.open import Check
from reelforge.runtime.errors import RequestError
from reelforge.tools import console
from reelforge.tools.service.settings import KEYS_VARIABLE, ApiKey, Limits, Settings, keys_of_file, keys_of_text

if TYPE_CHECKING:
    from fastapi import FastAPI

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(s|m|h|d)?")
_UNIT_S = {None: 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_DEFAULTS = Limits()


class Duration(click.ParamType[float]):
    """Seconds, written ``90``, ``90s``, ``15m``, ``12h`` or ``7d``."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        if isinstance(value, float):
            return value
        match = _DURATION.fullmatch(str(value))
        if match is None:
            self.fail(f"{value!r} is no duration: write for example 90s, 15m, 12h or 7d", param, ctx)
        return float(match[1]) * _UNIT_S[match[2]]


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, epilog=console.EXIT_CODES)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=Path("reelforge-data"),
    show_default=True,
    help="Folder for jobs and videos; one service each.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 is everywhere.")
@click.option("--port", type=click.IntRange(0, 65_535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--keys",
    type=click.Path(path_type=Path),
    help="File of API keys, 'NAME KEY' or 'NAME sha256:HEX' per line.  [default: the environment's "
    f"{KEYS_VARIABLE}, 'NAME=KEY,NAME=KEY'; without any, everyone may use the service]",
)
@click.option("--device", "devices", multiple=True, help="cpu, cuda:0, ...: one pipeline each; repeat it for more.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads per operator.  [default: one per core]")
@click.option("--memory-budget", help="Of each pipeline: 20GiB, least.  [default: see docs/runtime.md]")
@click.option(
    "--check",
    type=click.Choice([check.value for check in Check]),
    default=Check.FULL.value,
    show_default=True,
    help="How the bundle is checked when it is opened.",
)
@click.option("--previews/--no-previews", default=True, show_default=True, help="Pictures in the progress.")
@click.option(
    "--drain",
    type=Duration(),
    default="60s",
    show_default=True,
    help="How long jobs may go on after SIGTERM; then they return to the queue, their latents kept.",
)
@click.option("--retention", type=Duration(), default="7d", show_default=True, help="How long videos are kept.")
@click.option("--queue", type=click.IntRange(min=1), default=_DEFAULTS.waiting, show_default=True, help="Waiting jobs.")
@click.option(
    "--queue-per-key",
    type=click.IntRange(min=1),
    default=_DEFAULTS.waiting_per_caller,
    show_default=True,
    help="Waiting jobs of one key.",
)
@click.option("--max-pixels", type=click.IntRange(min=1), help="Width times height.  [default: what the bundle serves]")
@click.option("--max-frames", type=click.IntRange(min=1), help="[default: what the bundle serves]")
@click.option("--max-steps", type=click.IntRange(min=1), default=_DEFAULTS.steps, show_default=True, help="Per video.")
@click.option(
    "--max-prompt",
    type=click.IntRange(min=1),
    default=_DEFAULTS.prompt_characters,
    show_default=True,
    help="Characters.",
)
@click.option(
    "--max-body", type=click.IntRange(min=256), default=_DEFAULTS.body_bytes, show_default=True, help="Bytes."
)
@click.option(
    "--min-free",
    type=click.IntRange(min=0),
    default=256,
    show_default=True,
    help="MiB; with less room for --data no job is begun, and jobs wait.",
)
@click.option("--origin", "origins", multiple=True, help="A web page's origin that may call the service (CORS).")
@click.option("--access-log", is_flag=True, help="Log every request.")
def serve(
    bundle: Path,
    data: Path,
    host: str,
    port: int,
    keys: Path | None,
    devices: tuple[str, ...],
    threads: int | None,
    memory_budget: str | None,
    check: str,
    previews: bool,
    drain: float,
    retention: float,
    queue: int,
    queue_per_key: int,
    max_pixels: int | None,
    max_frames: int | None,
    max_steps: int,
    max_prompt: int,
    max_body: int,
    min_free: int,
    origins: tuple[str, ...],
    access_log: bool,
) -> None:
    """Serve videos from BUNDLE over HTTP: a jobs API under /v1/videos and a web page at /.

    Accepted jobs survive every end of the process. SIGTERM or Ctrl-C drains: nothing more is accepted, running jobs
    finish within --drain or return to the queue, and the exit code is 0. A second signal ends at once with exit code
    9; the next start takes up what was left. If the bundle cannot be opened it is 4, if no pipeline is left, 8.

    \b
    Examples:
      reelforge serve my.bundle
      reelforge serve my.bundle --host 0.0.0.0 --keys keys.txt --device cuda:0 --device cuda:1
      curl -s localhost:8000/v1/videos -H 'Content-Type: application/json' -d '{"prompt": "a red ball"}'
    """  # noqa: D301 - \b is click's mark for text that it does not wrap
    settings = Settings(
        bundle,
        data,
        host,
        port,
        _keys(keys),
        Limits(
            body_bytes=max_body,
            prompt_characters=max_prompt,
            pixels=max_pixels,
            frames=max_frames,
            steps=max_steps,
            waiting=queue,
            waiting_per_caller=queue_per_key,
        ),
        retention_s=retention,
        origins=origins,
        devices=devices or ("cpu",),
        threads=threads,
        memory_budget=memory_budget,
        check=check,
        previews=previews,
        drain_s=drain,
        least_free_bytes=min_free << 20,
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if not settings.keys and host not in ("127.0.0.1", "::1", "localhost"):
        console.print_notice(f"there are no API keys: everyone who reaches {host} may use the service")
    try:
        from reelforge.tools.service.application import create_application
        from reelforge.tools.service.server import Server
    except ModuleNotFoundError as error:
        raise RequestError(
            f"the service needs a package that is not installed: {error.name}.",
            expected="the extra 'serve'",
            fix="pip install 'reelforge[serve]'",
        ) from error
    listening = _listen(host, port)
    application: FastAPI = create_application(settings)
    server = Server(application, listening, access_log)
    with listening:
        server.serve_until_drained()
    if server.failure is not None:
        raise server.failure


def _keys(path: Path | None) -> tuple[ApiKey, ...]:
    if path is not None:
        return keys_of_file(path)
    return keys_of_text(os.environ.get(KEYS_VARIABLE, ""))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RequestError(
            f"the service cannot listen at {host} port {port}: {reason}.",
            expected="an address of this machine, and a port that is free",
            fix="choose another one with --port, or --port 0",
        ) from error
