"""The application in a process of its own: signals, draining, and what the process says in the end.

The module knows no job.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI

from reelforge.runtime.errors import ReelforgeError
from reelforge.tools.service.service import Service

_log = logging.getLogger(__name__)

ENDED_AT_ONCE = 9
_CONNECTIONS_S = 5  # for open connections, when everything has ended


class Server(uvicorn.Server):
    """Serves until a signal comes, drains, and ends.

    Attributes:
        failure: Why nothing can be computed, if that is the reason for the end.

    Args:
        application: From ``create_application``.
        listening: A socket that listens already.
        access_log: Whether requests are logged.
    """

    def __init__(self, application: FastAPI, listening: socket.socket, access_log: bool = False) -> None:
        super().__init__(
            uvicorn.Config(
                application,
                log_config=None,
                access_log=access_log,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=_CONNECTIONS_S,
                timeout_keep_alive=30,
                lifespan="on",
                ws="none",
            )
        )
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self.failure: ReelforgeError | None = None
        self._listening = listening
        self._service: Service = application.state.service
        self._service.on_failure = self._failed
        self._drains: threading.Thread | None = None

    def serve_until_drained(self) -> None:
        """Serve; returns when everything has ended.

        Raises:
            OutputError: If the service's folder cannot be used.
        """
        self._service.start()
        address, port = self._listening.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        _log.info("serving %s at http://%s:%d", self._service.settings.bundle.name, shown, port)
        self.run(sockets=[self._listening])
        _log.info("ended")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's names
        """Drain at the first signal; end the process at the second, with exit code 9."""
        if self._drains is not None:
            # Not an orderly end of any kind: those wait for the pipelines to end their units of work.
            _log.info("ended at once")
            logging.shutdown()
            os._exit(ENDED_AT_ONCE)
        # A second signal may come while this is handled: the thread is known before anything else is done.
        self._drains = threading.Thread(target=self._drain, args=(sig,), name="reelforge-drain", daemon=True)
        self._drains.start()

    def _drain(self, sig: int) -> None:
        _log.info("%s: draining; a second signal ends at once", signal.Signals(sig).name)
        try:
            finished = self._service.drain()
            told = "all jobs that ran are finished" if finished else "unfinished jobs are queued again"
            _log.info("drained: %s", told)
        finally:
            self.should_exit = True

    def _failed(self, error: ReelforgeError) -> None:
        self.failure = error
        self.should_exit = True
