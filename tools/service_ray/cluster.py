"""What knows Ray: the deployments, and calls of the one that computes.

Two deployments make the application. ``Pipelines`` has a replica per pipeline and grows with the calls that wait;
``Front`` is the service itself, HTTP and jobs, as one replica on the machine that has its folder. A front that is lost
is started again by Ray Serve and finds all jobs in its store.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
    RequestCancelledError,
)

from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.recipe import Backend
from reelforge.runtime.request import Request
from reelforge.tools.service.settings import Settings
from reelforge.tools.service_ray.messages import Message
from reelforge.tools.service_ray.ray_backend import RayBackend
from reelforge.tools.service_ray.replica import PipelineReplica

APPLICATION, PIPELINES, FRONT = "reelforge", "Pipelines", "Front"

_LOST = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    ObjectLostError,  # what a lost machine had said and nobody had heard
    OutOfMemoryError,  # Ray ended a process because its machine ran out of memory
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
_LEAST_INTERVAL_S, _LONGEST_INTERVAL_S = 0.1, 5.0  # of looking at how many calls wait
_CONNECTIONS = 1000  # of the front at once: streams of events are open as long as someone looks
_UNIT_OF_WORK_S = 90.0  # what a step or a tile may take until it hears that it is to stop
_HEAD = "node:__internal_head__"  # a resource that Ray gives the cluster's first machine


@dataclass(frozen=True)
class Scale:
    """How many pipelines there are.

    Attributes:
        least: Replicas that stay; 0 lets the last one go when nothing waits.
        most: Replicas at most.
        cpus: Cores of each.
        grow_s: How long jobs have waited when a replica is added.
        shrink_s: How long there was too little to do when one is taken away.
        finish_s: How long a replica that is taken away may go on with its video.
    """

    least: int = 1
    most: int = 1
    cpus: float = 1.0
    grow_s: float = 10.0
    shrink_s: float = 300.0
    finish_s: float = 3600.0


class RayCall:
    """A call of a replica (see ``ray_backend.Call``)."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def __iter__(self) -> Iterator[list[Message]]:
        return iter(self._response)

    def cancel(self) -> None:
        """End it; one that has ended stays as it is."""
        self._response.cancel()


class RayReplicas:
    """The deployment of pipelines (see ``ray_backend.Replicas``)."""

    def __init__(self) -> None:
        self._handle: Any = None

    def open(self) -> None:
        """Find it."""
        self._handle = serve.get_deployment_handle(PIPELINES, APPLICATION).options(stream=True)

    def make(self, request: Request, digest: str, kept: str) -> RayCall:
        """Hand a job over."""
        return RayCall(self._handle.make.remote(request, digest, kept))

    def is_lost(self, error: Exception) -> bool:
        """Return whether a replica has gone, or there is none at the moment."""
        return isinstance(error, _LOST)

    def is_cancelled(self, error: Exception) -> bool:
        """Return whether this is the end of a cancelled call."""
        return isinstance(error, RequestCancelledError | TaskCancelledError | RayError)


def deploy(settings: Settings, scale: Scale, notice: Callable[[str], None] = lambda _: None) -> None:
    """Deploy the service on the cluster that this process is connected to, and wait until it answers.

    Args:
        settings: Of the service.
        scale: How many pipelines.
        notice: Told if the cluster has too little for them at the moment: then this waits, and may do so for ever.

    Raises:
        BundleError: If the bundle is damaged.
        RuntimeError: If Ray Serve cannot start it.
    """
    manifest = Bundle.open(settings.bundle, Check.SIZES).manifest
    gpus = 0 if manifest.target.backend is Backend.CPU else 1
    for kind, each in (("CPU", scale.cpus), ("GPU", gpus)):
        there, needed = ray.cluster_resources().get(kind, 0), each * scale.least  # type: ignore[no-untyped-call]
        if there < needed:
            notice(f"the cluster has {there:g} {kind}s, and the replicas need {needed:g}: waiting for more")
    interval_s = max(min(scale.grow_s, scale.shrink_s, 2 * _LONGEST_INTERVAL_S) / 2, _LEAST_INTERVAL_S)
    serve.start(http_options={"host": settings.host, "port": settings.port, "keep_alive_timeout_s": 30})
    make_deployment = serve.deployment(
        name=PIPELINES,
        max_ongoing_requests=1,
        autoscaling_config=AutoscalingConfig(
            min_replicas=scale.least,
            max_replicas=scale.most,
            target_ongoing_requests=1,
            upscale_delay_s=scale.grow_s,
            downscale_delay_s=scale.shrink_s,
            metrics_interval_s=interval_s,
            look_back_period_s=max(min(scale.grow_s, scale.shrink_s, 30.0), interval_s),
        ),
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": gpus},
        graceful_shutdown_timeout_s=scale.finish_s,
        graceful_shutdown_wait_loop_s=0.5,
    )
    pipelines = make_deployment(PipelineReplica).bind(replace(settings, keys=()))  # who may call is the front's matter
    try:
        serve.run(_front(settings, scale.most, pipelines), name=APPLICATION, route_prefix="/")
    except (RayServeException, RayError) as error:
        raise RuntimeError(str(error)) from error


def _front(settings: Settings, most: int, pipelines: serve.Application) -> serve.Application:
    def build() -> FastAPI:
        from reelforge.tools.service.application import create_application

        return create_application(settings, RayBackend(settings, RayReplicas(), most))

    @serve.ingress(build)
    class Front:
        """The service; told of the pipelines so that they are deployed with it."""

        def __init__(self, pipelines: object) -> None:
            self.pipelines = pipelines

    make_deployment = serve.deployment(
        name=FRONT,
        num_replicas=1,
        max_ongoing_requests=_CONNECTIONS,
        ray_actor_options={"num_cpus": 0, "resources": {_HEAD: 0.001}},
        graceful_shutdown_timeout_s=_UNIT_OF_WORK_S,
    )
    return make_deployment(Front).bind(pipelines)


def connect(address: str | None, **options: Any) -> None:
    """Connect to a cluster, or begin one on this machine.

    Args:
        address: ``auto``, ``HOST:PORT``; None begins one.
        options: Of ``ray.init``.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone unless somebody wants it
    ray.init(address=address or "local", log_to_driver=False, **options)


def end() -> None:
    """Take the service away from its cluster: what runs goes back to its queue. Other applications there stay."""
    if any(name != APPLICATION for name in serve.status().applications):
        serve.delete(APPLICATION)
    else:
        serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()
