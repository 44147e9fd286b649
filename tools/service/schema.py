"""The bodies of the HTTP interface as types, from which the OpenAPI document follows.

What may be in a request is said twice: here its form, and in ``admission`` what this service and its bundle allow.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

Status = Literal["queued", "running", "completed", "failed", "cancelled"]

LARGEST = 2**53 - 1
"""Whole numbers that every JSON reader keeps exactly."""

JOB_ID = r"^video_[0-9a-f]{32}$"

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Whole = Annotated[StrictInt, Field(ge=1, le=LARGEST)]


class VideoRequest(BaseModel):
    """What to generate. What is left out is the model's default."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"prompt": "a red ball rolls to the left", "size": "256x256", "seed": 7}]},
    )

    prompt: StrictStr = Field(description="What to show. It may be empty.")
    negative_prompt: StrictStr | None = Field(None, description="What to keep away from; with cfg_scale above 1.")
    size: Annotated[StrictStr, Field(pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$")] | None = Field(
        None, description="WIDTHxHEIGHT in pixels.", examples=["1280x720"]
    )
    frames: Whole | None = Field(None, description="Number of frames; 1 makes a still.")
    steps: Whole | None = Field(None, description="Sampling steps.")
    seed: Annotated[StrictInt, Field(ge=0, le=LARGEST)] | None = Field(
        None, description="Seed of the noise; the same seed, the same video. Left out, the service chooses one."
    )
    guidance: Number | None = Field(None, description="Embedded guidance scale.")
    cfg_scale: Number | None = Field(None, description="Classifier-free guidance; 1 is off.")
    step_cache: StrictStr | None = Field(
        None, max_length=100, description="Steps that may be skipped.", examples=["easycache:0.025"]
    )
    priority: StrictInt | None = Field(None, description="Higher goes first.")
    deadline_s: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Seconds from now until the video is worth nothing."
    )


class Progress(BaseModel):
    """Where a job is."""

    phase: str = Field(description="queued, text, conditioning, sampling, decoding, or how the job ended.")
    step: int
    steps: int
    eta_s: float | None = Field(description="Seconds until the phase ends, as far as that is known.")


class Failure(BaseModel):
    """Why there is no video."""

    code: str
    message: str


class Job(BaseModel):
    """One video on its way, or made."""

    id: str = Field(pattern=JOB_ID)
    object: Literal["video"] = "video"
    status: Status
    created_at: float = Field(description="Seconds since 1970.")
    started_at: float | None
    finished_at: float | None
    progress: Progress
    request: dict[str, str | int | float | None] = Field(
        description="What was asked for, with every default filled in."
    )
    error: Failure | None
    expires_at: float | None = Field(description="When the video is deleted, or was.")
    attempts: int = Field(description="How often work has begun: more than once if the service was stopped meanwhile.")


class JobList(BaseModel):
    """Some of the caller's jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[Job]
    has_more: bool


class FrameLimits(BaseModel):
    """Which numbers of frames there are: ``multiple * k + offset``."""

    min: int
    max: int
    multiple: int
    offset: int


class Defaults(BaseModel):
    """What is taken for what a request leaves out."""

    width: int
    height: int
    frames: int
    steps: int


class LimitsAnswer(BaseModel):
    """What a request may ask for."""

    sizes: list[tuple[int, int]] | None = Field(description="Width and height, if there are only these.")
    min_size: tuple[int, int]
    max_size: tuple[int, int]
    max_pixels: int
    size_multiple: int
    frames: FrameLimits
    max_steps: int
    max_prompt_characters: int
    max_priority: int
    frames_per_second: int
    guidance: bool
    cfg: bool
    step_cache: bool
    defaults: Defaults
    needs_key: bool
    model: str


class ErrorBody(BaseModel):
    """What went wrong."""

    code: str
    message: str
    problems: list[str] = []


class ErrorAnswer(BaseModel):
    """Every answer that is not a success."""

    error: ErrorBody


class State(BaseModel):
    """Of the service."""

    status: str
    detail: str = ""
