"""The labels of a campaign from tasks of CVAT: photos, outlines, and what is known of photos that are not finished.

All photos of a completed job are finished: what is not outlined there does not show the defect. A photo of another job counts if
a person has drawn or changed a shape of the defect on it, or rejected a proposal of it. Then this is known:

| on the photo | is |
|---|---|
| shapes of the defect: proposals that stayed or were changed, and drawn ones | the defect |
| a rim around them, since a person has placed the outline | not the defect |
| proposals that were rejected or relabelled, and what was cut off from others | not the defect |
| everything else | unknown |

What was rejected is known from the function's proposal log. Without it, shapes are all there is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from tqdm import tqdm

from defectcam.evaluation.figures import painted
from defectcam.feedback.cvat import CvatServer
from defectcam.feedback.jobs import UNTOUCHED, Frame, Job, LeftOut, Shape
from defectcam.feedback.match import Interaction, match
from defectcam.feedback.regions import innermost_xy
from defectcam.feedback.shown import LoggedProposals, shown_proposals, with_model_labels
from defectcam.feedback.store import ACCEPTED
from defectcam.image import PHOTO_SUFFIXES, ImageError, decode_image, pixel_limit
from defectcam.paths import file_name, write_image
from defectcam.proposal_log import image_hash
from defectcam.regions import AREA_TYPES, region_of
from defectcam.training.clicks import Click, write_clicks
from defectcam.training.labels import UNKNOWN
from defectcam.training.names import LabelNames, check_label_names

RIM_SHARE, LEAST_RIM_PX = 0.01, 4  # width of the rim, of the photo's longer side: people place outlines no finer


@dataclass(frozen=True)
class TaskPhotos:
    """Photos with labels as `defectcam train` takes them.

    Attributes:
        data: folder of the sets, one for each task. masks: folder of <set>/<photo>.png of 0, UNKNOWN and 255.
        sets: names of the sets.
        clicks: file of clicks in rejected proposals, None without any.
        finished, unfinished: numbers of photos that are known wholly and in part.
        notes: what was left out, and why.
    """

    data: Path
    masks: Path
    sets: tuple[str, ...]
    clicks: Path | None
    finished: int
    unfinished: int
    notes: tuple[str, ...]


class TaskLabels:
    """Reads the labels of one defect from tasks.

    Args:
        server: CVAT, with the tasks to read.
        defect: whose labels are read.
        defects: all that the weights know.
        log: the function's, empty without one.
        label_names: what labels in CVAT mean, such as {"Riss": "crack"}.
        folder: that photos and masks are written to.
    """

    def __init__(
        self,
        server: CvatServer,
        defect: str,
        defects: Collection[str],
        log: LoggedProposals,
        label_names: Mapping[str, str],
        folder: Path,
    ) -> None:
        self.server, self.defect, self.defects, self.log, self.label_names = server, defect, defects, log, label_names
        self.data, self.masks, self.clicks_file = folder / "photos", folder / "masks", folder / "clicks.csv"
        self.clicks: dict[Path, list[Click]] = {}
        self.finished: dict[Path, bool] = {}
        self.notes: list[str] = []

    def write(self) -> TaskPhotos:
        """Write photos and labels of all tasks.

        Raises:
            CvatError: CVAT cannot be read.
            ValueError: a task has no job, or no label for the defect; a name of `label_names` is none of its labels; or no
                photo has a label. The message says what to do.
        """
        jobs = list(self.server.jobs())
        for task in self.server.tasks:
            labels = {label for job in jobs if job.task_id == task for label in job.labels}
            if not labels:
                raise ValueError(f"task {task} has no job that this user may see: check its id, --org and whose token it is")
            check_label_names(self.label_names, labels, f"task {task}", self.defects)
        # Of jobs that have a photo in common the one that was completed last counts.
        for job in sorted(jobs, key=lambda job: (job.state == "completed", job.updated)):
            try:
                self._job(job)
            except LeftOut as reason:
                self.notes.append(f"job {job.id} is left out: {reason}")
        if not self.finished:
            states = ", ".join(f"job {job.id} is {job.state}" for job in jobs)
            raise ValueError(
                f"no photo of {self._tasks()} is labelled yet ({states}): correct the proposals of a few photos and set their "
                "job to completed"
            )
        clicks = [click for own in self.clicks.values() for click in own]
        if clicks:
            write_clicks(self.clicks_file, clicks)
        count = Counter(self.finished.values())
        sets = tuple(sorted({path.parent.parent.name for path in self.finished}))
        clicks_file = self.clicks_file if clicks else None
        return TaskPhotos(self.data, self.masks, sets, clicks_file, count[True], count[False], tuple(self.notes))

    def _tasks(self) -> str:
        return f"task{'s' * (len(self.server.tasks) > 1)} {', '.join(map(str, self.server.tasks))}"

    def _job(self, job: Job) -> None:
        is_finished, all_frames = job.state == "completed", self.server.frames(job)
        job, all_frames, _, notes = with_model_labels(job, all_frames, None, self.log, self.label_names, self.defects)
        self.notes += notes
        if self.defect not in job.labels:
            raise ValueError(f"task {job.task_id} {LabelNames(self.defect, {}).lacking(job.labels)}")
        frames, paths, images = [], {}, {}
        for frame in tqdm(all_frames if is_finished else (), desc=f"job {job.id}", unit="photo", disable=None):
            if found := self._photo(job, frame):
                frames.append(frame)
                paths[frame.number], images[frame.number] = found
        # Photos of a job that is not completed are found by names alone: an answer of a run that failed has none in the job.
        frames = frames if is_finished else all_frames
        judged = self._judged(job, frames, images)
        for frame in frames:
            shapes = [shape for shape in frame.shapes if shape.label == self.defect]
            if not is_finished:
                is_touched = judged.get(frame.number) or any(shape.source not in UNTOUCHED for shape in shapes)
                shapes = [shape for shape in shapes if shape.source != "auto" or shape.proposal]  # others are another model's
                found = self._photo(job, frame) if is_touched else None
                if not found:
                    continue
                paths[frame.number] = found[0]
            self._write(paths[frame.number], frame, shapes, judged.get(frame.number, []), is_finished)

    def _judged(self, job: Job, frames: Sequence[Frame], images: dict[int, str]) -> dict[int, list[Interaction]]:
        """What people have done to proposals and shapes of the defect, but for accepting them; by frame."""
        if not self.log.by_name:
            return {}
        shown, _ = shown_proposals(frames, images, job, self.server.events(job), self.log, None)
        found = {}
        for frame in frames:
            of_frame, _ = match(shown[frame.number], frame.shapes, frame.width, frame.height)
            of_defect = [one for one in of_frame if self.defect in (one.defect, one.final_defect)]
            found[frame.number] = [one for one in of_defect if one.outcome != ACCEPTED]
        return found

    def _photo(self, job: Job, frame: Frame) -> tuple[Path, str] | None:
        """Store a photo as CVAT has it; returns its path and the hash of its pixels, None if it is left out."""
        try:
            file = self.server.photo_bytes(job, frame)
            if file is None:
                raise ImageError("CVAT does not give it away")
            image_rgb = decode_image(file, pixel_limit())
            height, width = image_rgb.shape[:2]
            if (width, height) != (frame.width, frame.height):
                raise ImageError(f"it has {width} x {height} px, but {frame.width} x {frame.height} in CVAT")
        except ImageError as error:
            self.notes.append(f"job {job.id}: photo {frame.name} is left out: {error}")
            return None
        name = PurePosixPath(frame.name)
        suffix = name.suffix if name.suffix.lower() in PHOTO_SUFFIXES else PHOTO_SUFFIXES[0]
        path = self.data / f"task{job.task_id}" / "images" / file_name(f"{frame.number:06}-{name.stem}", suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file)
        return path, image_hash(image_rgb)

    def _write(
        self, photo: Path, frame: Frame, shapes: Sequence[Shape], judged: Sequence[Interaction], is_finished: bool
    ) -> None:
        """Write what is known of a photo, in place of what another job has said of it."""
        width, height = frame.width, frame.height
        regions = [region_of(s.kind, s.points, width, height, s.rotation) for s in shapes if s.kind in AREA_TYPES]
        defect = painted([region for region in regions if region], (height, width))
        judged = [one for one in judged if one.defect == self.defect and one.proposed]
        proposed = [region_of("mask", one.proposed["points"], width, height) for one in judged]
        mask = np.full((height, width), 0 if is_finished else UNKNOWN, np.uint8)
        if not is_finished:
            rim_px = max(LEAST_RIM_PX, round(RIM_SHARE * max(width, height)))
            around = cv2.dilate(defect.astype(np.uint8), np.ones((2 * rim_px + 1,) * 2, np.uint8))
            mask[(around > 0) | painted([region for region in proposed if region], (height, width))] = 0
        mask[defect] = 255
        set_name = photo.parent.parent.name
        write_image(self.masks / set_name / f"{photo.stem}.png", mask)
        wrong = [region for one, region in zip(judged, proposed) if region and one.final_defect != self.defect]
        group = f"{set_name}/{photo.stem}"
        self.clicks[photo] = [Click(str(photo), *innermost_xy(one), "none", self.defect, group) for one in wrong]
        self.finished[photo] = is_finished
