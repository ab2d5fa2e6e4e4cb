"""What an export in the format "CVAT for images 1.1" knows of its jobs."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree import ElementTree

from defectcam.cvat.client import CvatError
from defectcam.cvat_xml import geometry_of, root_of
from defectcam.feedback.jobs import Frame, Job, JobEvents, Shape


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
        except OSError as error:
            raise CvatError(f"cannot read {path}: {error.strerror}") from error
        except (KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
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
