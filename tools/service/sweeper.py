"""What is too old goes: videos after their time, jobs after theirs, files that belong to no job.

The module knows no HTTP and nothing that runs.
"""

from __future__ import annotations

import logging
import threading

from reelforge.tools.service.clock import Clock
from reelforge.tools.service.problems import StoreBusyError
from reelforge.tools.service.settings import Settings
from reelforge.tools.service.store import Store
from reelforge.tools.service.videos import Videos

_log = logging.getLogger(__name__)

_LONGEST_S, _SHORTEST_S = 60.0, 0.05


class Sweeper:
    """Deletes in the background."""

    def __init__(self, settings: Settings, store: Store, videos: Videos, clock: Clock) -> None:
        self._settings, self._store, self._videos, self._clock = settings, store, videos, clock
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="reelforge-sweeper", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; stopping one that never began is harmless."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join(5.0)

    def tidy(self) -> None:
        """Make folder and store agree, before anything runs: what a sudden end may leave apart."""
        wanted = {record.id for record in self._store.with_file()}
        for job_id in self._videos.stored():
            if job_id not in wanted:
                self._videos.delete(job_id)
        live = {record.id for record in self._store.live()}
        for job_id in self._videos.worked_on():
            if job_id not in live:
                self._videos.clear(job_id)

    def sweep(self) -> None:
        """Delete what is too old now."""
        now = self._clock.now()
        for record in self._store.with_file(expired_before=now):
            self._videos.delete(record.id)
            self._store.file_deleted(record.id, now)
        self._store.forget(now - self._settings.record_s)

    def _work(self) -> None:
        pause_s = min(max(self._settings.retention_s / 20, _SHORTEST_S), _LONGEST_S)
        while not self._stopped.wait(pause_s):
            try:
                self.sweep()
            except (StoreBusyError, OSError) as error:
                _log.warning("what is too old could not be deleted, and will be later: %s", error)
