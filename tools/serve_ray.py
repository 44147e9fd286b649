"""``python -m reelforge.tools.serve_ray``: the service of ``reelforge serve`` on a Ray cluster.

Knows the options and signals; the work is in ``tools.service_ray``.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path

import click

from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.errors import EngineError, RequestError
from reelforge.tools import console
from reelforge.tools.serve import Duration
from reelforge.tools.service.settings import KEYS_VARIABLE, Limits, Settings, keys_of_file, keys_of_text
from reelforge.tools.service_ray.messages import first_line

_DEFAULTS = Limits()
_REACHABLE_S = 10.0
_LOOK_S = 0.5


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, epilog=console.EXIT_CODES)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=Path("reelforge-data"),
    show_default=True,
    help="Folder for jobs and videos, on the cluster's head node.",
)
@click.option("--address", help="Of a cluster: auto, or HOST:PORT.  [default: a cluster of this machine alone]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 is everywhere.")
@click.option("--port", type=click.IntRange(1, 65_535), default=8000, show_default=True)
@click.option(
    "--replicas",
    default="1",
    show_default=True,
    metavar="N|LEAST..MOST",
    help="Pipelines, one GPU each with a bundle for GPUs; a range grows and shrinks with the jobs that wait.",
)
@click.option("--cpus", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Cores of each pipeline.")
@click.option("--grow", type=Duration(), default="10s", show_default=True, help="Jobs wait so long: a replica more.")
@click.option("--shrink", type=Duration(), default="5m", show_default=True, help="Too little to do: a replica less.")
@click.option(
    "--keys",
    type=click.Path(path_type=Path),
    help=f"File of API keys, as for reelforge serve.  [default: the environment's {KEYS_VARIABLE}]",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads per operator.  [default: --cpus, at least 1]")
@click.option("--memory-budget", help="Of each pipeline: 20GiB, least.  [default: see docs/runtime.md]")
@click.option("--retention", type=Duration(), default="7d", show_default=True, help="How long videos are kept.")
@click.option("--queue", type=click.IntRange(min=1), default=_DEFAULTS.waiting, show_default=True, help="Waiting jobs.")
@click.option("--max-steps", type=click.IntRange(min=1), default=_DEFAULTS.steps, show_default=True, help="Per video.")
@click.option("--origin", "origins", multiple=True, help="A web page's origin that may call the service (CORS).")
def serve_ray(
    bundle: Path,
    data: Path,
    address: str | None,
    host: str,
    port: int,
    replicas: str,
    cpus: float,
    grow: float,
    shrink: float,
    keys: Path | None,
    threads: int | None,
    memory_budget: str | None,
    retention: float,
    queue: int,
    max_steps: int,
    origins: tuple[str, ...],
) -> None:
    """Serve videos from BUNDLE on a Ray cluster: the API and page of `reelforge serve`, over many pipelines.

    BUNDLE lies at the same path on every machine. A replica that is lost loses no job, and neither does the front,
    whose jobs are in --data. SIGTERM or Ctrl-C ends the service; jobs that run stop before their next step, their
    latents are kept, and the next start goes on with them.

    \b
    Examples:
      python -m reelforge.tools.serve_ray /models/hv.bundle --replicas 1..4
      python -m reelforge.tools.serve_ray /models/hv.bundle --address auto --replicas 2..16 --keys keys.txt
    """  # noqa: D301 - \b is click's mark for text that it does not wrap
    least, most = replica_range(replicas)
    settings = Settings(
        bundle.resolve(),
        data.resolve(),
        host,
        port,
        keys_of_file(keys) if keys is not None else keys_of_text(os.environ.get(KEYS_VARIABLE, "")),
        Limits(steps=max_steps, waiting=queue),
        retention_s=retention,
        origins=origins,
        threads=threads or max(int(cpus), 1),
        memory_budget=memory_budget,
    )
    Bundle.open(settings.bundle, Check.SIZES)  # before a cluster is begun for it
    if not settings.keys and host not in ("127.0.0.1", "::1", "localhost"):
        console.print_notice(f"there are no API keys: everyone who reaches {host} may use the service")
    try:
        from reelforge.tools.service_ray.cluster import Scale, connect, deploy, end
    except ModuleNotFoundError as error:
        raise RequestError(
            f"the service on Ray needs a package that is not installed: {error.name}.",
            expected="the extra 'ray'",
            fix="pip install 'reelforge[ray]'",
        ) from error
    try:
        _require_reachable(address)
        connect(address)
    except (OSError, RuntimeError, ValueError) as error:
        raise RequestError(
            "there is no Ray cluster to connect to.",
            received=first_line(error),
            expected="a cluster begun with `ray start --head`",
            fix="check --address, or leave it out for a cluster of this machine alone",
        ) from error
    over, serving = threading.Event(), threading.Event()

    def interrupt(*_: object) -> None:
        over.set()
        if not serving.is_set():  # deploying waits for replicas, which may never come
            raise KeyboardInterrupt

    # Ray has handlers of its own, which abort the process.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)
    try:
        deploy(settings, Scale(least, most, cpus, grow, shrink), console.print_notice)
        serving.set()
        click.echo(f"serving {bundle.name} at http://{host}:{port} with {replicas} replicas", err=True)
        while not over.wait(_LOOK_S):  # a signal that another thread was given interrupts no wait
            pass
    except RuntimeError as error:
        raise EngineError(
            "Ray Serve could not start the service.",
            received=first_line(error),
            fix="see the logs of Ray Serve, below /tmp/ray/session_latest/logs/serve on its machines",
        ) from error
    finally:
        end()


def _require_reachable(address: str | None) -> None:
    """Raise OSError if nobody listens at ``HOST:PORT``, for which Ray itself would wait for minutes."""
    host, separator, port = (address or "").rpartition(":")
    if separator and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), _REACHABLE_S).close()


def replica_range(text: str) -> tuple[int, int]:
    """Read ``4`` or ``1..4``.

    Raises:
        RequestError: If it is neither, or the range is empty.
    """
    first, separator, last = text.partition("..")
    try:
        least, most = int(first), int(last if separator else first)
    except ValueError:
        least, most = 1, 0
    if not 0 <= least <= most or most < 1:
        raise RequestError(
            "--replicas cannot be read.", received=text, expected="a number, or LEAST..MOST", fix="write 2, or 1..4"
        )
    return least, most


if __name__ == "__main__":
    console.run(serve_ray, None, "python -m reelforge.tools.serve_ray")
