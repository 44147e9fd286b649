"""What a service counts, in the text format of Prometheus.

Names of callers, prompts and ids are not in it: ``/metrics`` needs no key. The module knows no jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from reelforge.runtime.host_memory import anonymous_bytes, available_bytes

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_STEP_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 180)
_JOB_BUCKETS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_HTTP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """Counters of one service; registries are not shared, so that two services in one process do not meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(namespace="reelforge", registry=self.registry)
        registry = self.registry
        self.accepted = Counter("reelforge_jobs_accepted", "Jobs that were accepted.", registry=registry)
        self.refused = Counter(
            "reelforge_requests_refused", "Requests for a video that got no place.", ["reason"], registry=registry
        )
        self.ended = Counter("reelforge_jobs_ended", "Jobs that have ended.", ["status"], registry=registry)
        self.failures = Counter("reelforge_job_failures", "Jobs that failed, by cause.", ["cause"], registry=registry)
        self.returned = Counter(
            "reelforge_jobs_returned", "Jobs that went back to the queue.", ["reason"], registry=registry
        )
        self.steps = Counter("reelforge_sampling_steps", "Sampling steps taken.", registry=registry)
        self.skipped = Counter(
            "reelforge_sampling_steps_skipped", "Sampling steps that a step cache skipped.", registry=registry
        )
        self.step_seconds = Histogram(
            "reelforge_step_seconds", "Time of a sampling step.", buckets=_STEP_BUCKETS, registry=registry
        )
        self.waited_seconds = Histogram(
            "reelforge_job_wait_seconds", "Time in the queue.", buckets=_JOB_BUCKETS, registry=registry
        )
        self.job_seconds = Histogram(
            "reelforge_job_seconds", "Time from the beginning of work to the end.", buckets=_JOB_BUCKETS,
            registry=registry,
        )  # fmt: skip
        self.http_seconds = Histogram(
            "reelforge_http_seconds",
            "Time to the first byte of an answer.",
            ["method", "status"],
            buckets=_HTTP_BUCKETS,
            registry=registry,
        )

    def watch(
        self, waiting: Callable[[], int], running: Callable[[], int], free_bytes: Callable[[], int],
        listeners: Callable[[], int],
    ) -> None:  # fmt: skip
        """Show these numbers whenever somebody asks."""
        gauges: Mapping[str, tuple[str, Callable[[], int]]] = {
            "reelforge_queue_depth": ("Jobs that wait.", waiting),
            "reelforge_jobs_running": ("Jobs that were handed to pipelines.", running),
            "reelforge_store_free_bytes": ("Room for videos.", free_bytes),
            "reelforge_event_listeners": ("Streams of events that are open.", listeners),
        }
        for name, (about, number) in gauges.items():
            Gauge(name, about, registry=self.registry).set_function(number)
        self.registry.register(_Memory())

    def text(self) -> bytes:
        """Return everything."""
        return generate_latest(self.registry)


class _Memory(Collector):
    """Memory, asked when somebody looks; what the system does not say is left out."""

    def collect(self) -> list[GaugeMetricFamily]:
        family = GaugeMetricFamily("reelforge_memory_bytes", "Memory of this process and machine.", labels=["kind"])
        for kind, value in (("anonymous", anonymous_bytes()), ("available", available_bytes())):
            if value is not None:
                family.add_metric([kind], value)
        return [family]
