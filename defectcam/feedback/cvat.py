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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree import ElementTree

import httpx
from tqdm import tqdm

from defectcam.credentials import TOKEN, checked_token, checked_url
from defectcam.request import RequestError

TIMEOUT_S = 120
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


class CvatError(RuntimeError):
    """CVAT cannot be read; the message says what failed and what to do."""


class LeftOut(CvatError):
    """A job that is not harvested for what it is; the message says why."""


@dataclass(frozen=True)
class Shape:
    """A shape of a frame.

    Attributes:
        key: CVAT's id, which edits keep; in exports, which have none, a hash of the shape.
        label: name of its label.
        kind: polygon, mask, rectangle, ellipse, ...
        points: as CVAT stores them, see `regions.region_of`.
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
    """A running CVAT.

    Args:
        url: as in the browser, http://host:port.
        token: of a user who may see the jobs: a key of CVAT's login or a personal access token.
        tasks: ids of the tasks to read; none = all that the user may see.

    Raises:
        RequestError: what cannot be an address or a token.
    """

    def __init__(self, url: str, token: str, tasks: Sequence[int] = ()) -> None:
        self.name = checked_url(url, "--url")
        self.tasks = tasks
        self._token = token = checked_token(token)
        # Keys of CVAT's own login are 40 hex digits; personal access tokens, which newer servers have, are not.
        scheme = "Token" if re.fullmatch("[0-9a-f]{40}", token) else "Bearer"
        headers = {"Authorization": f"{scheme} {token}", "Accept": "application/vnd.cvat+json, application/json, */*"}
        try:
            self._client = httpx.Client(
                base_url=self.name,
                headers=headers,
                timeout=TIMEOUT_S,
                follow_redirects=True,  # to another server without the token
                transport=httpx.HTTPTransport(retries=3),
            )
        except httpx.InvalidURL as error:
            raise RequestError(f"--url is {self.name!r}, which is no address: {error}") from None
        self._labels: dict[int, dict[int, dict]] = {}
        self._meta: dict[int, dict] = {}

    def jobs(self) -> Iterator[Job]:
        """All annotation jobs of the tasks, by id."""
        found = []
        for path in [f"/api/jobs?task_id={task}" for task in self.tasks] or ["/api/jobs"]:
            found += self._pages(path)
        for job in sorted(found, key=lambda job: job["id"]):
            if job.get("type", "annotation") != "annotation":  # ground truth jobs of quality control
                continue
            labels = self._task_labels(job["task_id"]).values()
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
        if job.task_id not in self._meta:
            self._meta[job.task_id] = self._json(f"/api/tasks/{job.task_id}/data/meta")
        meta, own = self._meta[job.task_id], self._json(f"/api/jobs/{job.id}/data/meta")
        if len(meta["frames"]) < meta["size"]:
            raise LeftOut(f"task {job.task_id} is a video; only tasks of photos are harvested")
        labels = self._task_labels(job.task_id)
        shapes: dict[int, list[Shape]] = {}
        annotations = self._json(f"/api/jobs/{job.id}/annotations")
        now = self._json(f"/api/jobs/{job.id}")
        if (now["state"], now.get("updated_date") or "") != (job.state, job.updated):
            raise LeftOut("somebody changed it meanwhile; run this again")
        if annotations.get("tracks"):
            raise LeftOut("it holds tracks, as videos have them; draw shapes instead (Shape, not Track)")
        for shape in sorted(annotations["shapes"], key=lambda shape: shape["id"]):
            if shape["label_id"] not in labels:
                raise CvatError("a label was added while it was read; run this again")
            label = labels[shape["label_id"]]
            names = {spec["id"]: spec["name"] for spec in label["attributes"]}
            values = {names[a["spec_id"]]: a["value"] for a in shape["attributes"] if a["spec_id"] in names}
            shapes.setdefault(shape["frame"], []).append(
                Shape(
                    key=str(shape["id"]),
                    label=label["name"],
                    kind=str(shape["type"]),
                    points=tuple(shape.get("points") or ()),
                    source=shape.get("source") or "manual",
                    attributes=values,
                    rotation=shape.get("rotation") or 0.0,
                )
            )
        numbers = own.get("included_frames") or range(job.first_frame, job.last_frame + 1)
        gone = {*meta.get("deleted_frames", ()), *own.get("deleted_frames", ())}
        return [
            Frame(n, frame["name"], frame["width"], frame["height"], tuple(shapes.get(n, ())))
            for n, frame in ((n, meta["frames"][n]) for n in numbers if n not in gone)
        ]

    def events(self, job: Job) -> JobEvents:
        """What the event log has on the job; nothing where the server keeps none (it is part of its analytics)."""
        proposal_specs = {
            spec["id"]
            for label in self._task_labels(job.task_id).values()
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
        response = self._get(path)
        for wait_s in PHOTO_WAITS_S:
            if response.status_code != 429 and response.status_code < 500:
                break
            time.sleep(wait_s)
            response = self._get(path)
        if response.status_code in (403, 404):
            return None
        self._check(path, response, 200)
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
        task = self._post("/api/tasks", 201, json={"name": name, "labels": list(labels)}).json()["id"]
        path = f"/api/tasks/{task}/data/"
        try:
            self._post(path, 202, headers={"Upload-Start": ""})
            for photo in tqdm(photos, desc="upload", unit="photo", disable=None):
                files = {"client_files[0]": (photo.name, photo.read_bytes())}
                self._post(path, 200, headers={"Upload-Multiple": ""}, data={"image_quality": IMAGE_QUALITY}, files=files)
            order = {"image_quality": IMAGE_QUALITY, "sorting_method": "predefined", "upload_file_order": names}
            response = self._post(path, 202, headers={"Upload-Finish": ""}, json=order)
            self._wait_for_data(task, (response.json() or {}).get("rq_id"))
        except (CvatError, OSError) as error:
            raise CvatError(f"task {task} was made but not filled: {error}; delete it in CVAT and try again") from error
        return task

    def _wait_for_data(self, task: int, request: str | None) -> None:
        """Wait until CVAT has cut a task's photos into chunks; servers before requests tell of it by the task."""
        path = f"/api/requests/{request}" if request else f"/api/tasks/{task}/status"
        deadline = time.monotonic() + DATA_PATIENCE_S
        while time.monotonic() < deadline:
            state = self._json(path)
            status = (state.get("status") or state["state"]).lower()
            if status == "finished":
                return
            if status == "failed":
                raise CvatError(f"CVAT cannot read the photos: {state.get('message')}")
            time.sleep(EVENTS_POLL_S)
        raise CvatError(f"CVAT has not read the photos in {DATA_PATIENCE_S} s")

    def _task_labels(self, task: int) -> dict[int, dict]:
        if task not in self._labels:
            self._labels[task] = {label["id"]: label for label in self._pages(f"/api/labels?task_id={task}")}
        return self._labels[task]

    def _event_rows(self, job: Job) -> list[dict]:
        """The job's events from CVAT's CSV, which it makes in the background; [] where it cannot."""
        # Without a start CVAT looks back 30 days.
        query = {"job_id": job.id, "from": job.created, "to": datetime.now(timezone.utc).isoformat()}
        response = self._get("/api/events", params=query)
        if response.status_code in (404, 405, 410):  # servers that have retired the older way
            return self._event_rows_of_request(query)
        deadline = time.monotonic() + EVENTS_PATIENCE_S
        while response.status_code == 202 and time.monotonic() < deadline:
            query["query_id"] = response.json()["query_id"]
            response = self._get("/api/events", params=query)
            if response.status_code == 202:
                time.sleep(EVENTS_POLL_S)
        if response.status_code != 201:
            return []
        response = self._get("/api/events", params=query | {"action": "download"})
        return list(csv.DictReader(io.StringIO(response.text))) if response.status_code == 200 else []

    def _event_rows_of_request(self, query: dict) -> list[dict]:
        response = self._request("POST", "/api/events/export", params=query)
        if response.status_code != 202:
            return []
        request, deadline = response.json()["rq_id"], time.monotonic() + EVENTS_PATIENCE_S
        while time.monotonic() < deadline:
            state = self._json(f"/api/requests/{request}")
            if state["status"] == "finished":
                response = self._get(_path_and_query(state["result_url"]))
                return list(csv.DictReader(io.StringIO(response.text))) if response.status_code == 200 else []
            if state["status"] == "failed":
                return []
            time.sleep(EVENTS_POLL_S)
        return []

    def _pages(self, path: str) -> list[dict]:
        results: list[dict] = []
        while path:
            page = self._json(path)
            if not isinstance(page, dict) or "results" not in page:
                raise CvatError(f"{self.name}{path} answers no list: is this CVAT's address?")
            results += page["results"]
            # Behind a proxy the link may name a host that only the server knows.
            path = _path_and_query(page["next"]) if page.get("next") else ""
        return results

    def _json(self, path: str):
        response = self._get(path)
        self._check(path, response, 200)
        try:
            return response.json()
        except ValueError:
            raise CvatError(f"{self.name}{path} answers no JSON: is this CVAT's address?") from None

    def _check(self, path: str, response: httpx.Response, expected: int) -> None:
        if response.status_code in (401, 403):
            raise CvatError(
                f"{self.name}{path} answers {response.status_code}: give a valid token ({TOKEN}) of a user who may "
                "see these tasks"
            )
        if response.status_code != expected:
            text = response.text.replace(self._token, "...")[:200]  # a server's error page may repeat what it was sent
            raise CvatError(f"{self.name}{path} answers {response.status_code}: {text}")

    def _post(self, path: str, expected: int, **options) -> httpx.Response:
        response = self._request("POST", path, **options)
        self._check(path, response, expected)
        return response

    def _get(self, path: str, **options) -> httpx.Response:
        return self._request("GET", path, **options)

    def _request(self, method: str, path: str, **options) -> httpx.Response:
        try:
            return self._client.request(method, path, **options)
        except httpx.HTTPError as error:
            raise CvatError(f"{self.name} cannot be reached: {error}; check --url (or ADVCAM_CVAT_URL)") from error


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """`--url`; and a `--token` that is refused, since others see what is on the command line."""

    class Refused(argparse.Action):
        def __call__(self, parser, *_) -> None:
            parser.error(f"others can see what is on the command line: give the token as {TOKEN}, not by --token")

    url = os.environ.get("ADVCAM_CVAT_URL", "")
    parser.add_argument("--url", default=url, help=f"CVAT's (default: $ADVCAM_CVAT_URL); the token is read from ${TOKEN}")
    parser.add_argument("--token", action=Refused, help=argparse.SUPPRESS)


def server_of(args: argparse.Namespace, tasks: Sequence[int] = ()) -> CvatServer:
    """The CVAT that `add_server_options` and the environment name.

    Raises:
        RequestError: none is named, or not well.
    """
    token = os.environ.get(TOKEN, "")
    if not (args.url.strip() and token.strip()):
        raise RequestError(f"give --url (or ADVCAM_CVAT_URL), and a token as {TOKEN}")
    return CvatServer(args.url, token, tasks)


class CvatExport:
    """An export of a job, task or project in the format "CVAT for images 1.1": its zip, or the XML alone.

    Exports name no job states, so whoever makes one says which jobs are completed, and no shape ids.

    Args:
        path: of the zip or XML.
        completed: ids of the jobs that a person has completed; None = all.
    """

    def __init__(self, path: Path, completed: Sequence[int] | None) -> None:
        self.completed = completed
        self._zip = None
        try:
            if zipfile.is_zipfile(path):
                self._zip = zipfile.ZipFile(path)
                root = ElementTree.fromstring(self._zip.read("annotations.xml"))
            else:
                root = ElementTree.parse(path).getroot()
        except (OSError, KeyError, ElementTree.ParseError) as error:
            raise CvatError(f'{path} is no export of the format "CVAT for images 1.1": {error}') from error
        if root.find("track") is not None:
            raise CvatError(f'{path} is a video\'s export; export a task of photos as "CVAT for images 1.1"')
        self._images = root.findall("image")
        self.name, self._jobs = self._read_meta(root, path)
        for image in self._images:
            if not any(_is_of_job(image, job) for job in self._jobs):
                raise CvatError(f"{path} has an image {image.get('id')} ({image.get('name')}), which is in none of its jobs")

    def jobs(self) -> Iterator[Job]:
        """All jobs of the export, by id; those not among `completed` have the state ""."""
        yield from self._jobs

    def frames(self, job: Job) -> list[Frame]:
        """The job's frames with their shapes."""
        frames = []
        for image in self._images:
            if _is_of_job(image, job):
                shapes = tuple(shape for shape in map(_exported_shape, image) if shape)
                name, width, height = image.get("name"), int(image.get("width")), int(image.get("height"))
                frames.append(Frame(int(image.get("id")), name, width, height, shapes))
        return frames

    def events(self, job: Job) -> JobEvents:
        """Nothing: exports have no events."""
        return JobEvents()

    def photo_bytes(self, job: Job, frame: Frame) -> bytes | None:
        """The photo's file where the export was made with images."""
        names = self._zip.namelist() if self._zip else []
        found = [name for name in names if name == f"images/{frame.name}"]
        found = found or [name for name in names if name.startswith("images/") and name.endswith(f"/{frame.name}")]
        return self._zip.read(found[0]) if len(found) == 1 else None

    def _read_meta(self, root: ElementTree.Element, path: Path) -> tuple[str, list[Job]]:
        """Name of the server, and the jobs."""
        tasks = [*root.iterfind("meta/task"), *root.iterfind("meta/job"), *root.iterfind("meta/project/tasks/task")]
        labels = tuple(
            sorted(label.findtext("name") for label in root.iter("label") if label.findtext("type") != "tag")
        )
        server, jobs = "", []
        for task in tasks:
            for segment in task.iterfind("segments/segment"):
                address = urlsplit(segment.findtext("url") or "")
                server = f"{address.scheme}://{address.netloc}" if address.netloc else path.name
                job_id = int(segment.findtext("id"))
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
                jobs.append(job)
        if not jobs:
            raise CvatError(f'{path} names no jobs; export it from CVAT as "CVAT for images 1.1"')
        missing = sorted(set(self.completed or ()) - {job.id for job in jobs})
        if missing:
            raise CvatError(f"--completed names job {missing[0]}, but {path} has {[job.id for job in jobs]}")
        return server, sorted(jobs, key=lambda job: job.id)


def _is_of_job(image: ElementTree.Element, job: Job) -> bool:
    number, task = int(image.get("id")), int(image.get("task_id", job.task_id))
    return task == job.task_id and job.first_frame <= number <= job.last_frame


def _exported_shape(element: ElementTree.Element) -> Shape | None:
    """A child of an <image>; None for tags and whatever has no pixels."""
    get, kind = element.get, element.tag
    if kind == "box":
        kind, points = "rectangle", [float(get(key)) for key in ("xtl", "ytl", "xbr", "ybr")]
    elif kind == "ellipse":
        x, y, rx, ry = (float(get(key)) for key in ("cx", "cy", "rx", "ry"))
        points = [x, y, x + rx, y - ry]
    elif kind == "mask":
        left, top, width, height = (int(get(key)) for key in ("left", "top", "width", "height"))
        points = [int(run) for run in get("rle").split(",")] + [left, top, left + width - 1, top + height - 1]
    elif get("points"):
        points = [float(value) for point in get("points").split(";") for value in point.split(",")]
    else:
        return None
    attributes = {child.get("name"): child.text or "" for child in element.iterfind("attribute")}
    digest = hashlib.blake2s(repr((get("label"), kind, points)).encode(), digest_size=6).hexdigest()
    rotation = float(get("rotation") or 0)
    return Shape(digest, get("label"), kind, tuple(points), get("source") or "manual", attributes, rotation)


def _path_and_query(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.path}?{parts.query}" if parts.query else parts.path
