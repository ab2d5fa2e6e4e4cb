"""What CVAT's REST endpoints answer, as far as it is read here: fields that CVAT 2.15 and 2.73 share; others are ignored."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, FiniteFloat

T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    """One page of a list; `next` is the address of the next one."""

    results: list[T]
    next: str | None


class Attribute(BaseModel, extra="allow"):
    """An attribute of a label. Its default may be any text: CVAT's raw editor of labels checks nothing."""

    id: int
    name: str
    input_type: str
    values: list[str]
    default_value: Any


class Label(BaseModel, extra="allow"):
    """A label of a task or project. A change sends it back with the fields that are not read."""

    id: int
    name: str
    type: str
    color: str | None = None
    has_parent: bool = False
    attributes: list[Attribute]


class User(BaseModel):
    id: int
    username: str
    is_superuser: bool = False
    groups: list[str] = []


class Task(BaseModel):
    """A task, or a project, which has an id alone of this."""

    id: int
    project_id: int | None = None
    owner: User | None = None
    assignee: User | None = None
    organization: Any = None


class Job(BaseModel):
    """Frames start_frame..stop_frame of a task."""

    id: int
    task_id: int
    type: str = "annotation"
    state: str
    start_frame: int
    stop_frame: int
    assignee: User | None = None
    created_date: str | None = None
    updated_date: str | None = None


class Photo(BaseModel):
    name: str
    width: int
    height: int


class Data(BaseModel):
    """The frames of a task or job; those of a job that has a choice of them are the included ones."""

    size: int
    frames: list[Photo]
    deleted_frames: list[int]
    included_frames: list[int] | None = None


class Annotations(BaseModel):
    """Of a job or task. Shapes stay as they are sent: deleting one takes all of it."""

    shapes: list[dict]
    tracks: list[dict] = []


class Called(BaseModel):
    """The function that a run calls, and what for."""

    id: str | None
    task: int
    job: int | None = None


class Run(BaseModel):
    """A run of a function. Newer versions have no progress before the first frame is done."""

    id: str
    status: str
    function: Called
    progress: FiniteFloat | None = None
    enqueued: str | None = None


class AccessToken(BaseModel):
    expiry_date: datetime | None
    read_only: bool


class About(BaseModel):
    version: str
