"""Records what happens during one run: spans of time, and the process' memory, sampled by a thread.

The module knows clocks and ``/proc``; it knows neither pipelines nor engines. Spans may nest; one thread records them.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from reelforge.tools.profiling.nvtx_ranges import NO_RANGES, Ranges
from reelforge.tools.profiling.schema import Kind, MemorySample, Span

_INTERVAL_S = 0.005
_MAX_SAMPLES = 2000
"""Beyond this every second sample is dropped and the interval doubles: a long run's file stays small."""


class Recorder:
    """Collects one run's spans.

    Args:
        ranges: Where spans are announced besides.
        origin_ns: ``time.perf_counter_ns()`` at the run's beginning; None means now. The clock is the machine's, so
            that another process may have read it.
    """

    def __init__(self, ranges: Ranges = NO_RANGES, origin_ns: int | None = None) -> None:
        self.spans: list[Span] = []
        self.phase = "start"
        self.at_phase_end: Callable[[], object] = _nothing
        self.device_bytes: int | None = None
        self.calls: Counter[str] = Counter()  # of engines, by stage, in this run
        self._ranges = ranges
        self._origin_ns = time.perf_counter_ns() if origin_ns is None else origin_ns

    def use(self, ranges: Ranges) -> None:
        """Announce spans from now on."""
        self._ranges = ranges

    def enter(self, phase: str) -> None:
        """Begin a phase; memory is sampled at the end of the one before, however short it was."""
        if phase != self.phase:
            self.at_phase_end()
            self.phase = phase

    def now_ms(self) -> float:
        """Return milliseconds since the run's beginning."""
        return (time.perf_counter_ns() - self._origin_ns) / 1e6

    def add(self, name: str, kind: Kind, stage: str, start_ms: float, end_ms: float, size_bytes: int = 0) -> None:
        """Record a span that has ended."""
        self.spans.append(Span(name, kind, stage, start_ms, end_ms - start_ms, size_bytes))

    @contextmanager
    def span(self, name: str, kind: Kind, stage: str = "") -> Iterator[None]:
        """Record the ``with`` block, also if it fails."""
        self._ranges.push(name)
        start = self.now_ms()
        try:
            yield
        finally:
            self.add(name, kind, stage, start, self.now_ms())
            self._ranges.pop()


def _nothing() -> None:
    return None


class MemorySampler:
    """Samples resident memory in a thread for the duration of a ``with`` block.

    ``samples`` hold anonymous and file-backed memory; weights that are mapped from a file count as the latter once they
    were touched. Where the system has no ``/proc/self/status`` there are none.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.samples: list[MemorySample] = []
        self._lock = threading.Lock()  # both threads take samples, and one of them thins them out
        self._recorder = recorder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory sampler", daemon=True)

    def __enter__(self) -> MemorySampler:
        self._recorder.at_phase_end = self.take
        self._thread.start()
        return self

    def take(self) -> bool:
        """Take one sample; returns whether the system says anything."""
        with self._lock:
            sizes = resident_bytes()
            if sizes is not None:
                recorder = self._recorder
                self.samples.append(MemorySample(recorder.now_ms(), recorder.phase, *sizes, recorder.device_bytes))
            return sizes is not None

    def thin(self) -> bool:
        """Drop every second sample if there are too many; returns whether there were."""
        with self._lock:
            if len(self.samples) < _MAX_SAMPLES:
                return False
            self.samples = _thinned(self.samples)
            return True

    def __exit__(self, *error: object) -> None:
        self.take()
        self._recorder.at_phase_end = _nothing
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        interval = _INTERVAL_S
        while self.take():
            if self.thin():
                interval *= 2
            if self._stop.wait(interval):
                return


def _thinned(samples: list[MemorySample]) -> list[MemorySample]:
    """Keep of each pair the one with more anonymous memory, so that peaks stay."""
    pairs = zip(samples[::2], samples[1::2], strict=False)
    return [max(pair, key=lambda sample: sample.anonymous_bytes + sample.file_bytes) for pair in pairs]


def resident_bytes(status: Path = Path("/proc/self/status")) -> tuple[int, int] | None:
    """Return (anonymous, file-backed) resident bytes of this process; None where the system does not say."""
    try:
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    if "RssAnon" not in sizes:
        return None
    return sizes["RssAnon"], sizes.get("RssFile", 0) + sizes.get("RssShmem", 0)


class LoadMeter:
    """Tells how many cores other programs kept busy since it was made: the machine's busy time minus our own."""

    def __init__(self) -> None:
        self._busy_s, self._own_s, self._clock_s = _busy_seconds(), _own_seconds(), time.perf_counter()

    def other_cores(self) -> float | None:
        """Return cores, on average; None where the system does not say."""
        busy_s, elapsed_s = _busy_seconds(), time.perf_counter() - self._clock_s
        if busy_s is None or self._busy_s is None or elapsed_s <= 0:
            return None
        other_s = (busy_s - self._busy_s) - (_own_seconds() - self._own_s)
        return max(0.0, other_s / elapsed_s)


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _busy_seconds(stat: Path = Path("/proc/stat")) -> float | None:
    """Return seconds that the machine's cores have worked, or were taken away by a hypervisor."""
    try:
        fields = stat.read_text(encoding="ascii").splitlines()[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
