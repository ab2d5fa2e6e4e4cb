"""What CVAT knows of a job, from its REST endpoints or from an export in the format "CVAT for images 1.1".

The endpoints are those that CVAT 2.15 and newer ones share, so no cvat-sdk is needed, which refuses servers of
another age than its own. Attributes are told apart by their spec's id and looked up by name, since their order
changes from one answer to the next.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import re
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree import ElementTree

from tqdm import tqdm

from defectcam.cvat.client import CvatClient, CvatError, client_of
from defectcam.cvat_xml import geometry_of, root_of

EVENTS_PATIENCE_S = 120
EVENTS_POLL_S = 1
DATA_PATIENCE_S = 600
PHOTO_WAITS_S = (1, 5, 15)  # a server that is busy is asked again
IMAGE_QUALITY = 70  # of the copies that CVAT shows, its own default; functions get the file itself
PROPOSAL = "proposal"  # the attribute that names a proposal
UNTOUCHED = ("auto", "file")  # sources of unchanged proposals: of a run, or imported from a file
csv.field_size_limit(2**31 - 1)  # one event carries all shapes of a run


def proposal_name(attributes: Mapping[str, str]) -> str:
    """The name of the proposal that a shape was made from, "" if it has none: then it is no proposal.

    Nothing else tells: shapes drawn by hand, or with other models, have the label's default of `iterations` and a
    `confidence` of 0.
    """
    return (attributes.get(PROPOSAL) or "").strip()


class LeftOut(CvatError):
    """A job that is not harvested for what it is; the message says why."""


@dataclass(frozen=True)
class Shape:
    """A shape of a frame.

    Attributes:
        key: CVAT's id, which edits keep; in exports, which have none, a hash of the shape.
        label: name of its label.
        kind: polygon, mask, rectangle, ellipse, ...
        points: as CVAT stores them, see `defectcam.regions.region_of`.
        source: auto, semi-auto, manual or file; only CVAT's own page keeps it, which makes semi-auto of an auto shape
            that was edited, and manual of one from a file.
        attributes: name -> value.
        rotation: degrees.
    """

    key: str
    label: str
    kind: str
    points: tuple[float, ...]
    source: str = "manual"
    attributes: dict[str, str] = field(default_factory=dict)
    rotation: float = 0.0

    @property
    def proposal(self) -> str:
        """Name of the proposal it was made from, "" if it has none."""
        return proposal_name(self.attributes)


@dataclass(frozen=True)
class Frame:
    """A photo of a job with the shapes on it.

    Attributes:
        number: CVAT's, counted within the task.
        name: of the photo in CVAT, maybe with folders.
        width, height: px.
    """

    number: int
    name: str
    width: int
    height: int
    shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class Job:
    """A job as CVAT lists it: frames first_frame..last_frame of its task; times are ISO 8601, "" where unknown."""

    id: int
    task_id: int
    first_frame: int
    last_frame: int
    state: str
    annotator: str
    created: str
    updated: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class JobEvents:
    """What the event log tells of a job.

    Attributes:
        working_time_s: time somebody worked on it, None where no event says so.
        annotator: who worked on it longest, else who changed shapes; "" if unknown.
        shown: (frame, proposal) of all shapes that were ever created with such an attribute.
    """

    working_time_s: float | None = None
    annotator: str = ""
    shown: frozenset[tuple[int, str]] = frozenset()


class CvatServer:
    """What annotators' work needs of a running CVAT.

    Args:
        client: the connection.
        tasks: ids of the tasks to read; none = all that the user may see.
    """

    def __init__(self, client: CvatClient, tasks: Sequence[int] = ()) -> None:
        self.client = client
        self.name = client.url
        self.tasks = tasks
        self._labels: dict[int, dict[int, dict]] = {}
        self._meta: dict[int, dict] = {}

    def jobs(self) -> Iterator[Job]:
        """All annotation jobs of the tasks, by id."""
        found = []
        for path in [f"/api/jobs?task_id={task}" for task in self.tasks] or ["/api/jobs"]:
            found += self.client.pages(path)
        for job in sorted(found, key=lambda job: job["id"]):
            if job.get("type", "annotation") != "annotation":  # ground truth jobs of quality control
                continue
            labels = self.labels(job["task_id"]).values()
            yield Job(
                id=job["id"],
                task_id=job["task_id"],
                first_frame=job["start_frame"],
                last_frame=job["stop_frame"],
                state=job["state"],
                annotator=(job.get("assignee") or {}).get("username", ""),
                created=job.get("created_date") or "",
                updated=job.get("updated_date") or "",
                labels=tuple(sorted(label["name"] for label in labels if label.get("type") != "tag")),
            )

    def frames(self, job: Job) -> list[Frame]:
        """The job's frames with the shapes it holds now; those deleted in CVAT are left out."""
        frames, labels = self.photos(job), self.labels(job.task_id)
        shapes: dict[int, list[Shape]] = {}
        annotations = self.annotations(job)
        now = self.client.json(f"/api/jobs/{job.id}")
        if (now["state"], now.get("updated_date") or "") != (job.state, job.updated):
            raise LeftOut("somebody changed it meanwhile; run this again")
        for shape in sorted(annotations["shapes"], key=lambda shape: shape["id"]):
            if shape["label_id"] not in labels:
                raise CvatError("a label was added while it was read; run this again")
            one = shape_of(shape, labels[shape["label_id"]])
            shapes.setdefault(shape["frame"], []).append(one)
        return [replace(frame, shapes=tuple(shapes.get(frame.number, ()))) for frame in frames]

    def annotations(self, job: Job) -> dict:
        """The job's annotations as CVAT sends them: "shapes", "tags"; LeftOut if it has tracks."""
        annotations = self.client.json(f"/api/jobs/{job.id}/annotations", "shapes")
        if annotations.get("tracks"):
            raise LeftOut("it holds tracks, as videos have them; draw shapes instead (Shape, not Track)")
        return annotations

    def photos(self, job: Job) -> list[Frame]:
        """The job's frames without their shapes; those deleted in CVAT are left out.

        Raises:
            LeftOut: its task is a video.
        """
        if job.task_id not in self._meta:
            self._meta[job.task_id] = self.client.json(f"/api/tasks/{job.task_id}/data/meta")
        meta, own = self._meta[job.task_id], self.client.json(f"/api/jobs/{job.id}/data/meta")
        if len(meta["frames"]) < meta["size"]:
            raise LeftOut(f"task {job.task_id} is a video; only tasks of photos are harvested")
        numbers = own.get("included_frames") or range(job.first_frame, job.last_frame + 1)
        gone = {*meta.get("deleted_frames", ()), *own.get("deleted_frames", ())}
        return [
            Frame(n, frame["name"], frame["width"], frame["height"], ())
            for n, frame in ((n, meta["frames"][n]) for n in numbers if n not in gone)
        ]

    def events(self, job: Job) -> JobEvents:
        """What the event log has on the job; nothing where the server keeps none (it is part of its analytics)."""
        proposal_specs = {
            spec["id"]
            for label in self.labels(job.task_id).values()
            for spec in label["attributes"]
            if spec["name"] == PROPOSAL
        }
        working_ms: dict[str, float] = {}
        changed_by: dict[str, float] = {}
        shown = set()
        for row in self._event_rows(job):
            payload = json.loads(row.get("payload") or "{}")
            user = row.get("user_name") or ""
            if row["scope"] == "send:working_time":
                spent_ms = float(row.get("duration") or 0) or float(payload.get("working_time") or 0)
                working_ms[user] = working_ms.get(user, 0.0) + spent_ms
            elif row["scope"].endswith(":shapes"):
                if row["scope"] != "create:shapes":  # the run itself creates shapes too, in its starter's name
                    changed_by[user] = changed_by.get(user, 0.0) + 1
                    continue
                for shape in payload.get("shapes", ()):
                    if not isinstance(shape, dict):  # log collectors shorten long events
                        continue
                    values = [a["value"] for a in shape.get("attributes", ()) if a["spec_id"] in proposal_specs]
                    names = {proposal_name({PROPOSAL: value}) for value in values} - {""}
                    shown |= {(shape["frame"], name) for name in names}
        annotators = working_ms or changed_by
        return JobEvents(
            working_time_s=sum(working_ms.values()) / 1000 if working_ms else None,
            annotator=max(annotators, key=annotators.get) if annotators else "",
            shown=frozenset(shown),
        )

    def photo_bytes(self, job: Job, frame: Frame) -> bytes | None:
        """The photo's file as the function got it; None where the server does not give it away."""
        path = f"/api/jobs/{job.id}/data?type=frame&quality=original&number={frame.number}"
        response = self.client.request("GET", path)
        for wait_s in PHOTO_WAITS_S:
            if response.status_code != 429 and response.status_code < 500:
                break
            time.sleep(wait_s)
            response = self.client.request("GET", path)
        if response.status_code in (403, 404):
            return None
        self.client.check(path, response, 200)
        return response.content

    def create_task(self, name: str, labels: Sequence[dict], photos: Sequence[Path]) -> int:
        """Make a task of photos, in their order, and wait until CVAT has it; returns its id.

        Args:
            labels: as CVAT's API takes them: name, type, attributes.
            photos: files; CVAT names them by their last part.

        Raises:
            CvatError: two photos of one name, before anything is made; or what CVAT refused.
        """
        names = [photo.name for photo in photos]
        twice = next((photo for photo in photos if names.count(photo.name) > 1), None)
        if twice:
            raise CvatError(f"two of the photos are called {twice.name}, which a task cannot tell apart: rename one")
        task = self.client.checked("POST", "/api/tasks", 201, json={"name": name, "labels": list(labels)}).json()["id"]
        path = f"/api/tasks/{task}/data/"
        try:
            self.client.checked("POST", path, 202, headers={"Upload-Start": ""})
            for photo in tqdm(photos, desc="upload", unit="photo", disable=None):
                files = {"client_files[0]": (photo.name, photo.read_bytes())}
                part = {"headers": {"Upload-Multiple": ""}, "data": {"image_quality": IMAGE_QUALITY}, "files": files}
                self.client.checked("POST", path, 200, **part)
            order = {"image_quality": IMAGE_QUALITY, "sorting_method": "predefined", "upload_file_order": names}
            response = self.client.checked("POST", path, 202, headers={"Upload-Finish": ""}, json=order)
            self._wait_for_data(task, (response.json() or {}).get("rq_id"))
        except (CvatError, OSError) as error:
            raise CvatError(f"task {task} was made but not filled: {error}; delete it in CVAT and try again") from error
        return task

    def _wait_for_data(self, task: int, request: str | None) -> None:
        """Wait until CVAT has cut a task's photos into chunks; servers before requests tell of it by the task."""
        path = f"/api/requests/{request}" if request else f"/api/tasks/{task}/status"
        deadline = time.monotonic() + DATA_PATIENCE_S
        while time.monotonic() < deadline:
            state = self.client.json(path)
            status = (state.get("status") or state["state"]).lower()
            if status == "finished":
                return
            if status == "failed":
                raise CvatError(f"CVAT cannot read the photos: {state.get('message')}")
            time.sleep(EVENTS_POLL_S)
        raise CvatError(f"CVAT has not read the photos in {DATA_PATIENCE_S} s")

    def labels(self, task: int) -> dict[int, dict]:
        """A task's labels by id, as CVAT sends them."""
        if task not in self._labels:
            self._labels[task] = {label["id"]: label for label in self.client.pages(f"/api/labels?task_id={task}")}
        return self._labels[task]

    def _event_rows(self, job: Job) -> list[dict]:
        """The job's events from CVAT's CSV, which it makes in the background; [] where it cannot."""
        # Without a start CVAT looks back 30 days.
        query = {"job_id": job.id, "from": job.created, "to": datetime.now(timezone.utc).isoformat()}
        response = self.client.request("GET", "/api/events", params=query)
        if response.status_code in (404, 405, 410):  # servers that have retired the older way
            return self._event_rows_of_request(query)
        deadline = time.monotonic() + EVENTS_PATIENCE_S
        while response.status_code == 202 and time.monotonic() < deadline:
            query["query_id"] = response.json()["query_id"]
            response = self.client.request("GET", "/api/events", params=query)
            if response.status_code == 202:
                time.sleep(EVENTS_POLL_S)
        if response.status_code != 201:
            return []
        response = self.client.request("GET", "/api/events", params=query | {"action": "download"})
        return list(csv.DictReader(io.StringIO(response.text))) if response.status_code == 200 else []

    def _event_rows_of_request(self, query: dict) -> list[dict]:
        response = self.client.request("POST", "/api/events/export", params=query)
        if response.status_code != 202:
            return []
        request, deadline = response.json()["rq_id"], time.monotonic() + EVENTS_PATIENCE_S
        while time.monotonic() < deadline:
            state = self.client.json(f"/api/requests/{request}")
            if state["status"] == "finished":
                response = self.client.request("GET", self.client.path_of(state["result_url"]))
                return list(csv.DictReader(io.StringIO(response.text))) if response.status_code == 200 else []
            if state["status"] == "failed":
                return []
            time.sleep(EVENTS_POLL_S)
        return []


def shape_of(shape: dict, label: dict) -> Shape:
    """A shape of CVAT's annotations, whose label is that of `CvatServer.labels`."""
    names = {spec["id"]: spec["name"] for spec in label["attributes"]}
    values = {names[a["spec_id"]]: a["value"] for a in shape["attributes"] if a["spec_id"] in names}
    return Shape(
        key=str(shape["id"]),
        label=label["name"],
        kind=str(shape["type"]),
        points=tuple(shape.get("points") or ()),
        source=shape.get("source") or "manual",
        attributes=values,
        rotation=shape.get("rotation") or 0.0,
    )


def server_of(args: argparse.Namespace, tasks: Sequence[int] = ()) -> CvatServer:
    """The CVAT that `add_server_options` and the environment name; RequestError if none is named, or not well."""
    return CvatServer(client_of(args), tasks)


class CvatExport:
    """An export of a job, task or project in the format "CVAT for images 1.1": its zip, or the XML alone.

    Exports name no states of jobs, so `completed` says which jobs are completed. They name no ids of shapes. The frames'
    numbers are those of the server: the ids in the file count from the task's start frame in its steps, and in a project
    from task to task.

    Attributes:
        notes: sentences about what of it is left out.

    Args:
        path: of the zip or XML.
        completed: ids of the jobs that a person has completed; None = all.

    Raises:
        CvatError: it is no such export, or has a photo that none of its tasks has; naming what and the remedy.
    """

    def __init__(self, path: Path, completed: Sequence[int] | None) -> None:
        self.path, self.completed = path, completed
        self._zip = None
        try:
            if zipfile.is_zipfile(path):
                self._zip = zipfile.ZipFile(path)
                root = root_of(self._zip.read("annotations.xml"))
            else:
                root = root_of(Path(path).read_bytes())
        except (OSError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise CvatError(f'{path} is no export of the format "CVAT for images 1.1": {error}') from error
        tracks, images = root.findall("track"), root.findall("image")
        if tracks and not images:
            raise CvatError(f'{path} is a video\'s export; export a task of photos as "CVAT for images 1.1"')
        self.notes = [
            f"{path}: track {track.get('id')} ({track.get('label')!r}) is left out: draw shapes instead (Shape, not Track)"
            for track in tracks
        ]
        try:
            tasks = _exported_tasks(root)
            self.name, self._jobs = self._read_jobs(root, tasks)
            by_id = {task.element.findtext("id"): task for task in tasks}
            for image in images:
                own_task = tasks[0] if len(tasks) == 1 else None  # exports of a task or job do not name it
                task = by_id.get(image.get("task_id")) if image.get("task_id") else own_task
                number = task.number(int(image.get("id"))) if task else None
                what = f"an image {image.get('id')} ({image.get('name')})"
                if number is None:
                    raise CvatError(f"{path} has {what}, which is in none of its jobs: export it anew from CVAT")
                if not any(job.first_frame <= number <= job.last_frame for job, own in self._jobs if own is task):
                    self.notes.append(f"{path}: {what} is left out: it is in none of its jobs")
                if number in task.images:
                    raise CvatError(f"{path} has {what} twice: export it anew from CVAT")
                task.images[number] = image
        except (TypeError, ValueError, AttributeError) as error:
            raise CvatError(f"{path} cannot be read: {error}; export it anew from CVAT") from error

    def jobs(self) -> Iterator[Job]:
        """All jobs of the export, by id; those not among `completed` have the state ""."""
        for job, _ in self._jobs:
            yield job

    def frames(self, job: Job) -> list[Frame]:
        """The job's frames with their shapes.

        Raises:
            CvatError: a photo without name or size, or a shape without its numbers.
        """
        return [
            self._frame(number, image)
            for number, image in sorted(self._task_of(job).images.items())
            if job.first_frame <= number <= job.last_frame
        ]

    def events(self, job: Job) -> JobEvents:
        """Nothing: exports have no events."""
        return JobEvents()

    def photo_bytes(self, job: Job, frame: Frame) -> bytes | None:
        """The photo's file where the export was made with images, or where they lie in images/ beside the XML.

        Raises:
            CvatError: the zip is broken there.
        """
        beside = self.path.parent / "images" / Path(frame.name).name
        if not self._zip:
            return beside.read_bytes() if os.path.isfile(beside) else None
        names, images = self._zip.namelist() if self._zip else [], self._task_of(job).images
        wanted = [f"images/{images[frame.number].get('subset')}/{frame.name}", f"images/{frame.name}"]
        found = [name for name in wanted if name in names]
        if not found:
            others = {f"images/{image.get('name')}" for image in images.values()}
            found = [name for name in names if name.startswith("images/") and name.endswith(f"/{frame.name}")]
            found = [name for name in found if name not in others]
            if len(found) != 1:
                return None
        try:
            return self._zip.read(found[0])
        except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise CvatError(f"{self.path}: {found[0]} cannot be read: {error}; export it anew from CVAT") from error

    def _task_of(self, job: Job) -> _ExportedTask:
        return next(task for own, task in self._jobs if own.id == job.id)

    def _frame(self, number: int, image: ElementTree.Element) -> Frame:
        shapes, what = [], "its size"
        try:
            width, height = int(image.get("width")), int(image.get("height"))
            for place, element in enumerate(image, start=1):
                what = f"{element.tag} {place}"
                shapes.append(_exported_shape(element))
        except (TypeError, ValueError, AttributeError) as error:
            where = f"{what} of the photo {image.get('name')}"
            raise CvatError(f"{self.path}: {where} cannot be read: {error}; export it anew from CVAT") from error
        return Frame(number, image.get("name") or "", width, height, tuple(shape for shape in shapes if shape))

    def _read_jobs(
        self, root: ElementTree.Element, tasks: Sequence[_ExportedTask]
    ) -> tuple[str, list[tuple[Job, _ExportedTask]]]:
        """Name of the server, and all jobs by id, each with its task."""
        names = {label.findtext("name") for label in root.iter("label") if label.findtext("type") != "tag"}
        labels = tuple(sorted(names - {None}))
        server, jobs = "", []
        for own in tasks:
            task = own.element
            for segment in task.iterfind("segments/segment"):
                address = urlsplit(segment.findtext("url") or "")
                server = f"{address.scheme}://{address.netloc}" if address.netloc else self.path.name
                # The segment has an id of its own. Only its address names the job.
                in_url = re.search(r"(?:/jobs/|[?&]id=)(\d+)/?$", segment.findtext("url") or "")
                job_id = int(in_url[1] if in_url else segment.findtext("id"))
                done = self.completed is None or job_id in self.completed
                # A job's own export calls the job's id its id and does not name the task.
                task_id = int(task.findtext("id")) if task.tag == "task" else 0
                job = Job(
                    id=job_id,
                    task_id=task_id,
                    first_frame=int(segment.findtext("start")),
                    last_frame=int(segment.findtext("stop")),
                    state="completed" if done else "",
                    annotator=task.findtext("assignee/username") or "",
                    created=task.findtext("created") or "",
                    updated=task.findtext("updated") or root.findtext("meta/dumped") or "",
                    labels=labels,
                )
                jobs.append((job, own))
        if not jobs:
            raise CvatError(f'{self.path} names no jobs; export it from CVAT as "CVAT for images 1.1"')
        missing = sorted(set(self.completed or ()) - {job.id for job, _ in jobs})
        if missing:
            known = sorted(job.id for job, _ in jobs)
            raise CvatError(f"--completed names job {missing[0]}, but {self.path} has {known}")
        return server, sorted(jobs, key=lambda pair: pair[0].id)


@dataclass(frozen=True, eq=False)
class _ExportedTask:
    """A task, or the job of a job's own export, with how its frames are counted.

    Attributes:
        element: in the file's meta.
        first_id: of the task's frame 0, there or not.
        step: from one frame's id to the next.
        size: number of frames.
        images: those of its photos that the file has, by the frame's number.
    """

    element: ElementTree.Element
    first_id: int
    step: int
    size: int
    images: dict[int, ElementTree.Element] = field(default_factory=dict)

    def number(self, image_id: int) -> int | None:
        """The number of a frame by its id; None where the task has no such frame."""
        number, rest = divmod(image_id - self.first_id, self.step)
        return number if rest == 0 and 0 <= number < self.size else None


def _exported_tasks(root: ElementTree.Element) -> list[_ExportedTask]:
    """The tasks of an export, in the order in which CVAT counts their frames: on and on within a subset."""
    tasks, subset, offset = [], None, 0
    for path in ("meta/task", "meta/job", "meta/project/tasks/task"):
        for element in root.iterfind(path):
            segments = element.findall("segments/segment")
            last = max((int(segment.findtext("stop")) for segment in segments), default=-1)
            found = re.search(r"step\s*=\s*([1-9]\d*)", element.findtext("frame_filter") or "")
            step, start = int(found[1]) if found else 1, int(element.findtext("start_frame") or 0)
            if element.tag == "job":  # its start frame is that of its own first photo
                first = int(segments[0].findtext("start")) if segments and element.findtext("start_frame") else 0
                tasks.append(_ExportedTask(element, start - first * step, step, last + 1))
                continue
            if element.findtext("subset") != subset:
                subset, offset = element.findtext("subset"), 0
            size = int(element.findtext("size") or last + 1)
            if segments:
                tasks.append(_ExportedTask(element, offset + start, step, size))
            offset += start + step * size
    return tasks


def _exported_shape(element: ElementTree.Element) -> Shape | None:
    """A child of an <image>, without points where it is of a kind that has no pixels; None for tags."""
    if element.tag == "tag":
        return None
    kind, points, rotation = geometry_of(element) or (element.tag, [], 0.0)
    if kind != "mask" and len(points) % 2:
        raise ValueError(f"{len(points)} numbers are no points")
    get = element.get
    attributes = {child.get("name"): child.text or "" for child in element.iterfind("attribute")}
    digest = hashlib.blake2s(repr((get("label"), kind, points)).encode(), digest_size=6).hexdigest()
    return Shape(digest, get("label"), kind, tuple(points), get("source") or "manual", attributes, rotation)
