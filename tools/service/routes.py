"""The HTTP interface under ``/v1``: paths, parameters and answers; what they do is in ``service``."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.security import HTTPBearer

from reelforge.tools.service import streams
from reelforge.tools.service.problems import invalid
from reelforge.tools.service.schema import JOB_ID, ErrorAnswer, Job, JobList, LimitsAnswer, VideoRequest
from reelforge.tools.service.service import Service

_PREFIX = "/v1"

# Only for the document: keys are checked in ``guard``, before bodies are read.
_bearer = HTTPBearer(auto_error=False, description="A key of this service, if it has keys.")

JobId = Annotated[str, Path(description="The job's id.", pattern=JOB_ID)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="The same key with the same request gives the same job, however often it is sent.",
    ),
]


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    about = {
        401: "A key is needed, and this is none.",
        404: "There is no such job of this caller.",
        408: "The body did not arrive in time.",
        409: "The video is not finished.",
        410: "The video was deleted.",
        413: "The body is too large.",
        416: "There is no such range.",
        422: "The request cannot be carried out.",
        429: "The queue is full; see Retry-After.",
        503: "The service is loading, draining or busy; see Retry-After.",
    }
    return {status: {"model": ErrorAnswer, "description": about[status]} for status in statuses}


_EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "id": {"type": "string", "description": "For Last-Event-ID."},
        "event": {"enum": ["progress", "preview", "completed", "failed", "cancelled"]},
        "data": {"type": "string", "description": "JSON: a progress, {step, image}, or at the end the job."},
    },
}

_COMMON = _errors(401, 408, 413, 422, 503)


# What waits for nothing is ``async``: everything else takes one of a limited number of threads, all of which may be
# waiting for the database.


async def service_of(request: Request) -> Service:
    """Return the application's service."""
    service: Service = request.app.state.service
    return service


async def caller_of(request: Request) -> str:
    """Return whose request this is."""
    caller: str = request.state.caller
    return caller


TheService = Annotated[Service, Depends(service_of)]
Caller = Annotated[str, Depends(caller_of)]

router = APIRouter(prefix=_PREFIX, dependencies=[Depends(_bearer)], tags=["videos"])
open_router = APIRouter(prefix=_PREFIX, tags=["videos"])


@router.post(
    "/videos",
    status_code=202,
    responses={
        202: {
            "description": "The job was accepted; no end of the service's process loses it.",
            "headers": {"Location": {"description": "The job's address.", "schema": {"type": "string"}}},
        },
        **_COMMON,
        **_errors(429),
    },
)
def create_video(
    body: VideoRequest, service: TheService, caller: Caller, response: Response, idempotency_key: IdempotencyKey = None
) -> Job:
    """Ask for a video."""
    job = service.accept(caller, body, idempotency_key)
    response.headers["Location"] = f"{_PREFIX}/videos/{job.id}"
    return job


@router.get("/videos", responses={**_COMMON, **_errors(404)})
def list_videos(
    service: TheService,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=100, description="How many.")] = 20,
    after: Annotated[str | None, Query(pattern=JOB_ID, description="Those that are older than this job.")] = None,
) -> JobList:
    """Return the caller's jobs, newest first."""
    jobs, more = service.page(caller, limit, after)
    return JobList(data=jobs, has_more=more)


@router.get("/videos/{video_id}", responses={**_COMMON, **_errors(404)})
def get_video(video_id: JobId, service: TheService, caller: Caller) -> Job:
    """Return a job."""
    return service.shown(service.get(caller, video_id))


@router.delete("/videos/{video_id}", responses={**_COMMON, **_errors(404)})
def delete_video(video_id: JobId, service: TheService, caller: Caller) -> Job:
    """Cancel a job, or delete the video of one that has ended and take it out of the list."""
    return service.delete(caller, video_id)


@router.get(
    "/videos/{video_id}/content",
    response_class=FileResponse,
    responses={
        200: {"content": {"video/mp4": {"schema": {"type": "string", "format": "binary"}}}},
        206: {"description": "The range that was asked for.", "content": {"video/mp4": {}}},
        **_COMMON,
        **_errors(404, 409, 410),
        416: {"description": "There is no such range."},
        400: {"description": "The range cannot be read."},
    },
)
def get_content(video_id: JobId, service: TheService, caller: Caller) -> FileResponse:
    """Return the video; ``Range`` is supported."""
    path, found = service.content(caller, video_id)
    return FileResponse(
        path,
        stat_result=found,  # asked here, where a file that retention has just deleted still has an answer of its own
        media_type="video/mp4",
        filename=f"{video_id}.mp4",
        content_disposition_type="inline",
        headers={"Cache-Control": "private, max-age=3600"},
    )


@router.get(
    "/videos/{video_id}/events",
    response_class=StreamingResponse,
    responses={
        200: {
            "content": {streams.MEDIA_TYPE: {"schema": _EVENT}},
            "description": "Server-sent events, each like this.",
        },
        **_COMMON,
        **_errors(404),
    },
)
def get_events(
    video_id: JobId,
    service: TheService,
    caller: Caller,
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID", max_length=100)] = None,
) -> StreamingResponse:
    """Follow a job: ``progress``, ``preview``, and at the end ``completed``, ``failed`` or ``cancelled``."""
    feed = service.feed(video_id)  # before the store is asked, so that no end can come in between
    record = service.get(caller, video_id)  # what is not there has an answer; a stream that has begun has none
    events = streams.event_stream(service, feed, record, last_event_id)
    return StreamingResponse(events, media_type=streams.MEDIA_TYPE, headers=streams.HEADERS)


@open_router.get("/limits", responses=_errors(408, 413, 503))
async def get_limits(service: TheService) -> LimitsAnswer:
    """Return what requests may ask for. No key is needed."""
    return service.limits()


def unreadable(errors: list[dict[str, Any]]) -> Any:
    """Return the answer to a request whose form is wrong, without repeating what was sent."""
    problems = []
    for error in errors:
        where = ".".join(str(part) for part in error["loc"] if part not in ("body", "query", "header", "path"))
        problems.append(f"{where[:100] or 'body'}: {error['msg'][:300]}")
    return invalid(problems)
