from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.tools.service.application import create_application
from reelforge.tools.service.backend import Backend
from reelforge.tools.service.settings import Settings
from tests.runtime.fake_bundle import write_fake_bundle
from tests.tools.service.fake_backend import FakeBackend
from tests.tools.service.process import ServiceProcess
from tests.tools.service.waiting import wait_until

Serve = Callable[..., TestClient]


@pytest.fixture(scope="session")
def fake_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole bundle; do not alter it."""
    path = tmp_path_factory.mktemp("bundles") / "fake.bundle"
    write_fake_bundle(path)
    return path


@pytest.fixture
def backend(fake_bundle: Path) -> Iterator[FakeBackend]:
    backend = FakeBackend(Bundle.open(fake_bundle, Check.SIZES).manifest)
    yield backend
    for hold in backend.holds.values():
        hold.released.set()


@pytest.fixture
def settings(tmp_path: Path, fake_bundle: Path) -> Settings:
    return Settings(fake_bundle, tmp_path / "data", ahead=0, least_free_bytes=0, drain_s=0.0, keep_alive_s=0.2)


@pytest.fixture
def serve(settings: Settings, backend: FakeBackend) -> Iterator[Serve]:
    """Start a service with these changes of the settings, and return its client; ended with the test."""
    with ExitStack() as open_clients:

        def start(backend: Backend = backend, ready: bool = True, **changes: object) -> TestClient:
            application: FastAPI = create_application(replace(settings, **changes), backend)  # type: ignore[arg-type]
            client = open_clients.enter_context(TestClient(application, raise_server_exceptions=False))
            if ready:
                wait_until(lambda: client.get("/readyz").status_code == 200)
            return client

        yield start


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("reelforge"):
            thread.join(10)
            assert not thread.is_alive(), f"{thread.name} goes on"


@pytest.fixture
def process(fake_bundle: Path, tmp_path: Path) -> Iterator[ServiceProcess]:
    """A real service, not started."""
    process = ServiceProcess(fake_bundle, tmp_path / "data")
    yield process
    process.stop()
