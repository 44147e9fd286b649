"""The service as a FastAPI application: routes, life, errors. ``create_application`` makes one.

The module knows no job; it puts ``routes``, ``guard`` and ``service`` together.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from reelforge.runtime.errors import ReelforgeError
from reelforge.tools.service import metrics, routes
from reelforge.tools.service.backend import Backend
from reelforge.tools.service.guard import Guard
from reelforge.tools.service.page_routes import page_router
from reelforge.tools.service.problems import ServiceError, StoreBusyError, invalid
from reelforge.tools.service.schema import State
from reelforge.tools.service.service import Phase, Service, busy
from reelforge.tools.service.settings import Settings

_log = logging.getLogger(__name__)

_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_application(
    settings: Settings, backend: Backend | None = None, on_failure: Callable[[ReelforgeError], None] | None = None
) -> FastAPI:
    """Return the service as an application. It begins with the application's lifespan, and ends with it.

    Args:
        settings: What it is told.
        backend: Computes; None means pipelines on this machine.
        on_failure: Told, from another thread, when nothing can be computed any longer.
    """
    if backend is None:
        from reelforge.tools.service.pool_backend import PoolBackend

        backend = PoolBackend(settings)
    service = Service(settings, backend, on_failure)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncGenerator[None, None]:
        if service.phase is Phase.NEW:  # whoever wants its errors without a framework around them has started it
            service.start()
        try:
            yield
        finally:
            await run_in_threadpool(service.close)

    application = FastAPI(
        title="reelforge",
        summary="Videos from prompts, as jobs that survive.",
        version=_version(),
        lifespan=life,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    application.state.service = service
    application.include_router(routes.router)
    application.include_router(routes.open_router)
    _add_state(application, service)
    application.include_router(page_router())
    _add_errors(application)
    application.add_middleware(Guard, settings=settings, metrics=service.metrics)
    if settings.origins:
        application.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", "Range"],
            expose_headers=["Location", "Retry-After", "Content-Range", "Accept-Ranges"],
            max_age=600,
        )
    return application


def _add_state(application: FastAPI, service: Service) -> None:
    # These two take no thread: they answer when all threads wait for a locked database, too.
    @application.get("/healthz", tags=["state"])
    async def alive() -> State:
        """Say that the process answers."""
        return State(status="alive")

    @application.get("/readyz", tags=["state"], responses={503: {"model": State}})
    async def ready(response: Response) -> State:
        """Say whether jobs are accepted: not while the model is loaded, nor while the service drains."""
        if service.phase is not Phase.READY:
            response.status_code = 503
        detail = "jobs wait for room on the disk" if service.short_of_room else ""
        return State(status=service.phase.value, detail=detail)

    text = {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format."}

    @application.get("/metrics", tags=["state"], response_class=Response, responses={200: text})
    def measurements() -> Response:
        """Return counters, gauges and histograms."""
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)


def _add_errors(application: FastAPI) -> None:
    def answer(error: ServiceError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @application.exception_handler(ServiceError)
    async def known(_: Request, error: ServiceError) -> JSONResponse:
        return answer(error)

    @application.exception_handler(StoreBusyError)
    async def locked(_: Request, error: StoreBusyError) -> JSONResponse:
        return answer(busy(error))

    @application.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        return answer(routes.unreadable(list(error.errors())))

    @application.exception_handler(HTTPException)
    async def by_the_framework(_: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400:  # JSON that Python cannot hold: lone surrogates, thousands of digits or brackets
            return answer(invalid(["body: it cannot be read as JSON"]))
        problem = ServiceError(error.status_code, _CODES.get(error.status_code, "error"), str(error.detail))
        return JSONResponse(problem.body, error.status_code, dict(error.headers or {}))

    @application.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> JSONResponse:
        _log.error("a request met a bug", exc_info=error)
        return answer(ServiceError(500, "internal", "something unexpected happened; the service's log has more"))


def _version() -> str:
    try:
        return version("reelforge")
    except PackageNotFoundError:
        return "0"
