"""What knows Ray, without a cluster: which errors mean what, and what is left of a cluster that others use too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from ray import exceptions
from ray.serve import exceptions as serve_exceptions

from reelforge.tools.service_ray import cluster
from reelforge.tools.service_ray.cluster import RayReplicas


def without_init(kind: type[Exception]) -> Exception:
    """Return an error of a class whose arguments are Ray's own affair."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    "kind",
    [
        exceptions.ActorDiedError,
        exceptions.ActorUnavailableError,
        exceptions.WorkerCrashedError,
        exceptions.NodeDiedError,
        exceptions.ObjectLostError,
        exceptions.OwnerDiedError,
        exceptions.OutOfMemoryError,
        serve_exceptions.DeploymentUnavailableError,
        serve_exceptions.ReplicaUnavailableError,
        serve_exceptions.BackPressureError,
    ],
)
def test_what_a_lost_replica_or_machine_raises(kind: type[Exception]) -> None:
    assert RayReplicas().is_lost(without_init(kind))


@pytest.mark.parametrize("kind", [exceptions.RayTaskError, exceptions.TaskCancelledError, ValueError, OSError])
def test_what_says_something_else(kind: type[Exception]) -> None:
    assert not RayReplicas().is_lost(without_init(kind))


@pytest.mark.parametrize(("others", "expected"), [([], "shutdown"), (["theirs"], "delete reelforge")])
def test_other_applications_of_a_cluster_stay(
    monkeypatch: pytest.MonkeyPatch, others: list[str], expected: str
) -> None:
    done: list[str] = []
    status = SimpleNamespace(applications=dict.fromkeys(["reelforge", *others]))
    fake: Any = SimpleNamespace(
        status=lambda: status,
        delete=lambda name: done.append(f"delete {name}"),
        shutdown=lambda: done.append("shutdown"),
    )
    monkeypatch.setattr(cluster, "serve", fake)
    monkeypatch.setattr(cluster, "ray", SimpleNamespace(shutdown=lambda: done.append("left")))
    cluster.end()
    assert done == [expected, "left"]
