"""Exports "CVAT for images 1.1" of projects, tasks and jobs, numbered as CVAT numbers them."""

import logging
import sqlite3
import zipfile
from dataclasses import dataclass, field

import cv2
import numpy as np
import pytest

from defectcam.feedback import harvest
from defectcam.cvat.client import CvatError
from defectcam.feedback.cvat_export import CvatExport
from defectcam.proposal_log import ProposalLog, image_hash
from tests.conftest import textured

SERVER = "http://cvat:8080"


@dataclass
class ExportedTask:
    """A task as it was made in CVAT: its photos, and its segments as (segment, job, start, stop)."""

    id: int
    photos: list
    segments: list
    subset: str = "default"
    start_frame: int = 0
    step: int = 1
    deleted: tuple = ()
    size: tuple = (200, 150)
    shapes: dict = field(default_factory=dict)  # of photos
    url: str = SERVER + "/api/jobs/{}"

    def images(self, first_id, numbers, extra=""):
        width, height = self.size
        return "".join(
            f'<image id="{first_id + self.step * n}" name="{self.photos[n]}" {extra} width="{width}" height="{height}">'
            f"{self.shapes.get(self.photos[n], '')}</image>"
            for n in numbers
            if n not in self.deleted
        )

    def meta(self, tag="task", own_id=None, segments=None, start_frame=None, labels=""):
        parts = "".join(
            f"<segment><id>{segment}</id><start>{start}</start><stop>{stop}</stop>"
            f"<url>{self.url.format(job)}</url></segment>"
            for segment, job, start, stop in segments or self.segments
        )
        steps = f"step={self.step}" if self.step > 1 else ""
        start_frame = self.start_frame if start_frame is None else start_frame
        return (
            f"<{tag}><id>{own_id or self.id}</id><name>t</name><size>{len(self.photos)}</size><mode>annotation</mode>"
            "<created>2020-01-01 00:00:00+00:00</created><updated>2099-01-01 00:00:00+00:00</updated>"
            f"<subset>{self.subset}</subset><start_frame>{start_frame}</start_frame>"
            f"<frame_filter>{steps}</frame_filter><segments>{parts}</segments>"
            f"<assignee><username>emil</username></assignee>{labels}</{tag}>"
        )


def export_text(tasks, what, labels=("crack",), more=""):
    """The XML of a project of tasks, of one task, or of the job with a number (`what`)."""
    own = "".join(f"<label><name>{label}</name><type>polygon</type></label>" for label in labels)
    own = f"<labels>{own}<label><name>unprocessed</name><type>tag</type></label></labels>"
    if what == "project":
        images, offset, subset = "", 0, None
        for task in tasks:  # CVAT orders them by subset and id
            offset = offset if task.subset == subset else 0
            subset, extra = task.subset, f'subset="{task.subset}" task_id="{task.id}"'
            images += task.images(offset + task.start_frame, range(len(task.photos)), extra)
            offset += task.start_frame + task.step * len(task.photos)
        meta = f"<project><id>1</id><tasks>{''.join(task.meta() for task in tasks)}</tasks>{own}</project>"
    elif what == "task":
        (task,) = tasks
        images, meta = task.images(task.start_frame, range(len(task.photos))), task.meta(labels=own)
    else:
        (task,) = tasks
        (segment,) = [one for one in task.segments if one[1] == what]
        first = task.start_frame + task.step * segment[2]
        images = task.images(task.start_frame, range(segment[2], segment[3] + 1))
        meta = task.meta("job", what, [segment], first, own)
    return f"<annotations><version>1.1</version><meta>{meta}<dumped>x</dumped></meta>{images}{more}</annotations>"


def square_in(label, left, top, name="", side=20, source="manual"):
    points = f"{left},{top};{left + side},{top};{left + side},{top + side};{left},{top + side}"
    attribute = f'<attribute name="proposal">{name}</attribute>' if name else ""
    return f'<polygon label="{label}" source="{source}" points="{points}">{attribute}</polygon>'


def read(tmp_path, text, completed=None):
    (tmp_path / "annotations.xml").write_text(text)
    return CvatExport(tmp_path / "annotations.xml", completed)


def photos_by_job(export):
    return {job.id: [(frame.number, frame.name) for frame in export.frames(job)] for job in export.jobs()}


def two_jobs(**fields):
    """Segments 40 and 41 are jobs 52 and 40: by the segment's id the first would be the second job."""
    return ExportedTask(7, list("abcd"), [(40, 52, 0, 2), (41, 40, 2, 3)], **fields)


FRAMES_OF_TWO = {52: [(0, "a"), (1, "b"), (2, "c")], 40: [(2, "c"), (3, "d")]}


@pytest.mark.parametrize("start, step", [(0, 1), (5, 1), (0, 3), (10, 4)])
def test_frames_count_from_the_start_frame_in_steps(tmp_path, start, step):
    task = two_jobs(start_frame=start, step=step)
    assert photos_by_job(read(tmp_path, export_text([task], "task"))) == FRAMES_OF_TWO
    for job, frames in FRAMES_OF_TWO.items():
        assert photos_by_job(read(tmp_path, export_text([task], job))) == {job: frames}
    gone = two_jobs(start_frame=start, step=step, deleted=(0, 2))
    assert photos_by_job(read(tmp_path, export_text([gone], "task"))) == {52: [(1, "b")], 40: [(3, "d")]}


@pytest.mark.parametrize("subsets", [("default", "default"), ("train", "val")])
def test_the_tasks_of_a_project_count_on_within_their_subset(tmp_path, subsets):
    tasks = [
        ExportedTask(3, list("xyz"), [(9, 9, 0, 2)], subsets[0], start_frame=2, step=2, deleted=(1,)),
        two_jobs(subset=subsets[1], start_frame=1),
        ExportedTask(12, ["a"], [(80, 99, 0, 0)], subsets[1]),
    ]
    export = read(tmp_path, export_text(tasks, "project"))
    assert photos_by_job(export) == {9: [(0, "x"), (2, "z")], **FRAMES_OF_TWO, 99: [(0, "a")]}
    assert {job.id: job.task_id for job in export.jobs()} == {9: 3, 40: 7, 52: 7, 99: 12}
    assert [job.state for job in read(tmp_path, export_text(tasks, "project"), [52]).jobs()] == ["", "", "completed", ""]


@pytest.mark.parametrize("url", ["http://old:8080/?id={}", "/api/jobs/{}", SERVER + "/api/jobs/{}/"])
def test_jobs_are_named_by_their_address(tmp_path, url):
    export = read(tmp_path, export_text([two_jobs(url=url)], "task"), [40])
    assert {job.id: (job.first_frame, job.state) for job in export.jobs()} == {40: (2, "completed"), 52: (0, "")}
    with pytest.raises(CvatError, match=r"names job 41, but .* has \[40, 52\]"):
        read(tmp_path, export_text([two_jobs(url=url)], "task"), [41])


def test_a_track_and_a_photo_of_no_job_are_named_and_the_rest_is_taken(tmp_path):
    task = ExportedTask(7, list("abc"), [(1, 1, 0, 1)], shapes={"b": square_in("crack", 1, 1)})
    export = read(tmp_path, export_text([task], "task", more='<track id="4" label="rust"><box/></track>'))
    assert photos_by_job(export) == {1: [(0, "a"), (1, "b")]}
    assert [frame.shapes[0].label for frame in export.frames(next(export.jobs())) if frame.shapes] == ["crack"]
    track, photo = export.notes
    assert "track 4 ('rust') is left out: draw shapes instead" in track and "image 2 (c) is left out" in photo


@pytest.mark.parametrize("old, new, message", [
    ('id="4"', 'id="5"', "an image 5 .c., which is in none of its jobs"),
    ('id="4"', 'id="2"', "an image 2 .c. twice"),
    ('id="4"', "", "cannot be read: .*; export it anew from CVAT"),
    ("<start>0</start>", "<start/>", "cannot be read: .*; export it anew from CVAT"),
    ("<segment>", "<other>", "no export"),
    ('width="200"', 'width="wide"', "its size of the photo a cannot be read: .*'wide'"),
    ('points="1,1;21,1', 'points="1,1;21', "polygon 1 of the photo a cannot be read"),
])  # fmt: skip
def test_what_no_export_has_is_refused(tmp_path, old, new, message):
    task = ExportedTask(7, list("abc"), [(1, 1, 0, 2)], step=2, shapes={"a": square_in("crack", 1, 1)})
    text = export_text([task], "task")
    assert old in text
    with pytest.raises(CvatError, match=message):
        photos_by_job(read(tmp_path, text.replace(old, new, 1)))


def test_an_image_of_a_task_that_the_project_does_not_name_is_refused(tmp_path):
    text = export_text([ExportedTask(3, ["a"], [(1, 1, 0, 0)])], "project").replace('task_id="3"', 'task_id="4"')
    with pytest.raises(CvatError, match="image 0 .a., which is in none of its jobs"):
        read(tmp_path, text)


def test_broken_zips_are_named(tmp_path):
    path = tmp_path / "export.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("annotations.xml", export_text([two_jobs()], "task"))
    content = bytearray(path.read_bytes())
    content[60:90] = bytes(30)
    path.write_bytes(content)
    with pytest.raises(CvatError, match='export.zip is no export of the format "CVAT for images 1.1"'):
        CvatExport(path, None)


# ---- through the command ----


@pytest.fixture
def project(tmp_path):
    """Two tasks whose photos have one name, each with a proposal and its photo in the zip but for the last."""
    log = ProposalLog(tmp_path / "log", logging.getLogger("test"))
    tasks = [
        ExportedTask(3, ["p.png"], [(8, 18, 0, 0)], "train", start_frame=4),
        ExportedTask(5, ["p.png", "gone.png", "r.png"], [(9, 8, 0, 1), (10, 9, 2, 2)], "val", step=2),
    ]
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as file:
        for seed, (task, name) in enumerate([(tasks[0], "p.png"), (tasks[1], "p.png"), (tasks[1], "r.png")]):
            photo, own = textured(150, 200, seed), f"aaaa000{seed}"
            square = {"label": "crack", "type": "polygon", "points": [10, 10, 30, 10, 30, 30, 10, 30]}
            square["attributes"] = [{"name": "proposal", "value": own}]
            log.append(image_hash(photo), 200, 150, "v1", {"crack": {"iterations": 2}}, [square])
            if seed != 1:  # of the second photo all was rejected
                task.shapes[name] = square_in("Riss", 10, 10, own, source="auto")
            file.writestr(f"images/{task.subset}/{name}", cv2.imencode(".png", photo[..., ::-1])[1].tobytes())
        tasks[1].shapes["gone.png"] = square_in("Riss", 60, 60) + square_in("Cracked", 90, 90)
        file.writestr("annotations.xml", export_text(tasks, "project", ["Riss", "Cracked", "cracks"]))
    return tmp_path


def harvested(folder, *options):
    command = ["--export", folder / "export.zip", "--log", folder / "log", "--db", folder / "f.db", *options]
    harvest.main([str(part) for part in command])
    with sqlite3.connect(folder / "f.db") as connection:
        rows = connection.execute("SELECT job, frame, outcome, defect, final_defect FROM interactions ORDER BY 1, 2, 3, 4")
        return rows.fetchall()


def test_a_project_with_labels_of_its_own_is_harvested(project, capsys):
    rows = harvested(project, "--completed", "all", "--label", "riss=crack")
    assert rows == [
        (8, 0, "rejected", "crack", None),
        (8, 1, "miss", "Cracked", "Cracked"),
        (8, 1, "miss", "crack", "crack"),
        (9, 2, "accepted", "crack", "crack"),
        (18, 0, "accepted", "crack", "crack"),
    ]
    told = capsys.readouterr().err
    assert "job 8: no photo gone.png is in what CVAT gives" in told
    assert "job 8: the label 'cracks' does not count as crack; if it is, say so by --label cracks=crack" in told


def test_only_the_job_that_was_named_is_harvested(project):
    assert [row[:3] for row in harvested(project, "--completed", "9", "--label", "Riss=crack")] == [(9, 2, "accepted")]


@pytest.mark.parametrize("label, message", [
    ("Ris=crack", r"--label Ris=crack: http://cvat:8080 has no label 'Ris' \(did you mean 'Riss'\?\); its labels are"),
    ("Riss=crak", r"--label Riss=crak: there is no defect 'crak' \(did you mean 'crack'\?\)"),
])  # fmt: skip
def test_a_label_that_no_job_has_is_refused_before_anything_is_written(project, label, message):
    with pytest.raises(SystemExit, match=message):
        harvested(project, "--completed", "all", "--label", label)
    with sqlite3.connect(project / "f.db") as connection:
        assert not connection.execute("SELECT * FROM jobs").fetchall()


def test_photos_of_a_task_are_found_in_its_zip(tmp_path):
    photo = np.full((150, 200, 3), 7, np.uint8)
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as file:
        file.writestr("annotations.xml", export_text([ExportedTask(3, ["x/a.png", "a.png"], [(1, 1, 0, 1)])], "task"))
        file.writestr("images/x/a.png", cv2.imencode(".png", photo)[1].tobytes())
    export = CvatExport(tmp_path / "export.zip", None)
    (job,) = export.jobs()
    found = {frame.name: export.photo_bytes(job, frame) for frame in export.frames(job)}
    assert found["x/a.png"] and found["a.png"] is None
