"""What a running CVAT knows of a job, from its REST endpoints.

The endpoints are those that CVAT 2.15 and newer ones share, so no cvat-sdk is needed, which refuses servers of
another age than its own. Attributes are told apart by their spec's id and looked up by name, since their order
changes from one answer to the next.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from tqdm import tqdm

from defectcam import cvat_answers
from defectcam.cvat.client import CvatClient, CvatError, client_of
from defectcam.cvat_answers import Annotations, Data, Label
from defectcam.feedback.jobs import PROPOSAL, Frame, Job, JobEvents, LeftOut, Shape, proposal_name

EVENTS_PATIENCE_S = 120
EVENTS_POLL_S = 1
DATA_PATIENCE_S = 600
PHOTO_WAITS_S = (1, 5, 15)  # a server that is busy is asked again
IMAGE_QUALITY = 70  # of the copies that CVAT shows, its own default; functions get the file itself
csv.field_size_limit(2**31 - 1)  # one event carries all shapes of a run


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
        self._labels: dict[int, dict[int, Label]] = {}
        self._data: dict[int, Data] = {}

    def jobs(self) -> Iterator[Job]:
        """All annotation jobs of the tasks, by id."""
        found = []
        for path in [f"/api/jobs?task_id={task}" for task in self.tasks] or ["/api/jobs"]:
            found += self.client.pages(path, cvat_answers.Job)
        for job in sorted(found, key=lambda job: job.id):
            if job.type != "annotation":  # ground truth jobs of quality control
                continue
            labels = self.labels(job.task_id).values()
            yield Job(
                id=job.id,
                task_id=job.task_id,
                first_frame=job.start_frame,
                last_frame=job.stop_frame,
                state=job.state,
                annotator=job.assignee.username if job.assignee else "",
                created=job.created_date or "",
                updated=job.updated_date or "",
                labels=tuple(sorted(label.name for label in labels if label.type != "tag")),
            )

    def frames(self, job: Job) -> list[Frame]:
        """The job's frames with the shapes it holds now; those deleted in CVAT are left out."""
        frames, labels = self.photos(job), self.labels(job.task_id)
        shapes: dict[int, list[Shape]] = {}
        raw_shapes = self.shapes(job)
        now = self.client.json(f"/api/jobs/{job.id}", cvat_answers.Job)
        if (now.state, now.updated_date or "") != (job.state, job.updated):
            raise LeftOut("somebody changed it meanwhile; run this again")
        for shape in sorted(raw_shapes, key=lambda shape: shape["id"]):
            if shape["label_id"] not in labels:
                raise CvatError("a label was added while it was read; run this again")
            one = shape_of(shape, labels[shape["label_id"]])
            shapes.setdefault(shape["frame"], []).append(one)
        return [replace(frame, shapes=tuple(shapes.get(frame.number, ()))) for frame in frames]

    def shapes(self, job: Job) -> list[dict]:
        """The job's shapes as CVAT sends them; LeftOut if it has tracks."""
        annotations = self.client.json(f"/api/jobs/{job.id}/annotations", Annotations)
        if annotations.tracks:
            raise LeftOut("it holds tracks, as videos have them; draw shapes instead (Shape, not Track)")
        return annotations.shapes

    def photos(self, job: Job) -> list[Frame]:
        """The job's frames without their shapes; those deleted in CVAT are left out.

        Raises:
            LeftOut: its task is a video.
        """
        if job.task_id not in self._data:
            self._data[job.task_id] = self.client.json(f"/api/tasks/{job.task_id}/data/meta", Data)
        data, own = self._data[job.task_id], self.client.json(f"/api/jobs/{job.id}/data/meta", Data)
        if len(data.frames) < data.size:
            raise LeftOut(f"task {job.task_id} is a video; only tasks of photos are harvested")
        numbers = own.included_frames or range(job.first_frame, job.last_frame + 1)
        gone = {*data.deleted_frames, *own.deleted_frames}
        frames = [(number, data.frames[number]) for number in numbers if number not in gone]
        return [Frame(number, frame.name, frame.width, frame.height, ()) for number, frame in frames]

    def events(self, job: Job) -> JobEvents:
        """What the event log has on the job; nothing where the server keeps none (it is part of its analytics)."""
        proposal_specs = {
            attribute.id
            for label in self.labels(job.task_id).values()
            for attribute in label.attributes
            if attribute.name == PROPOSAL
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

    def labels(self, task: int) -> dict[int, Label]:
        """A task's labels by id."""
        if task not in self._labels:
            self._labels[task] = {label.id: label for label in self.client.pages(f"/api/labels?task_id={task}", Label)}
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


def shape_of(shape: dict, label: Label) -> Shape:
    """A shape of CVAT's annotations."""
    names = {attribute.id: attribute.name for attribute in label.attributes}
    values = {names[a["spec_id"]]: a["value"] for a in shape["attributes"] if a["spec_id"] in names}
    return Shape(
        key=str(shape["id"]),
        label=label.name,
        kind=str(shape["type"]),
        points=tuple(shape.get("points") or ()),
        source=shape.get("source") or "manual",
        attributes=values,
        rotation=shape.get("rotation") or 0.0,
    )


def server_of(args: argparse.Namespace, tasks: Sequence[int] = ()) -> CvatServer:
    """The CVAT that `add_server_options` and the environment name; RequestError if none is named, or not well."""
    return CvatServer(client_of(args), tasks)
