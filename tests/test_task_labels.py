"""The labels of a campaign from tasks of a CVAT over real HTTP, whose jobs are completed and not completed."""

import logging

import cv2
import numpy as np
import pytest

from defectcam.cvat.client import CvatClient
from defectcam.cvat_labels import labels_with, task_labels
from defectcam.feedback import adapt
from defectcam.feedback.cvat import CvatServer
from defectcam.feedback.shown import LoggedProposals
from defectcam.feedback.task_labels import TaskLabels
from defectcam.proposal_log import ProposalLog, image_hash, read_proposal_log
from defectcam.regions import region_of
from defectcam.training.clicks import read_clicks
from defectcam.training.labels import UNKNOWN, read_own_mask
from tests.conftest import dark_weights, textured
from tests.cvat_state import ACCESS_TOKEN, KEY, CvatState, serving

WIDTH, HEIGHT = 160, 96


def square(left, top, side=20):
    return [left, top, left + side, top, left + side, top + side, left, top + side]


def proposal(name, points, label="crack"):
    values = {"confidence": "70", "iterations": "2", "proposal": name}
    attributes = [{"name": key, "value": value} for key, value in values.items()]
    return {"label": label, "type": "polygon", "points": points, "attributes": attributes}


def pixels(*shapes):
    """(HEIGHT, WIDTH) bool of some polygons."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    for points in shapes:
        region = region_of("polygon", points, WIDTH, HEIGHT)
        mask[region.top : region.top + region.mask.shape[0], region.left : region.left + region.mask.shape[1]] |= region.mask
    return mask


def near(mask, px=4):
    return cv2.dilate(mask.astype(np.uint8), np.ones((2 * px + 1,) * 2)) > 0


class Campaign:
    """Task 12 of a CVAT: job 7 has the frames 0 and 1, job 8 the frames 2 to 4."""

    def __init__(self, folder, is_new=True):
        self.cvat = CvatState([textured(HEIGHT, WIDTH, seed) for seed in range(5)], task_labels(labels_with([])), is_new)
        self.cvat.jobs = {
            7: {"first": 0, "last": 1, "state": "completed"}, 8: {"first": 2, "last": 4, "state": "in progress"}
        }  # fmt: skip
        self.folder, self.log = folder, ProposalLog(folder / "log", logging.getLogger("test"))

    def run(self, frame, *answer):
        photo = self.cvat.photos[frame]
        self.log.append(image_hash(photo), WIDTH, HEIGHT, "v1", {"crack": {}, "rust": {}}, answer)
        self.cvat.automatic_annotation(frame, answer)

    def of(self, name):
        return next(shape for shape in self.cvat.shapes if self.cvat.value(shape, "proposal") == name)

    def labels(self, defect="crack", logged=True, tasks=(12,), **label_names):
        log = LoggedProposals(read_proposal_log(self.folder / "log") if logged else ())
        with serving(self.cvat) as url:
            server = CvatServer(CvatClient(url, ACCESS_TOKEN if self.cvat.is_new else KEY), tasks)
            return TaskLabels(server, defect, ("crack", "rust"), log, label_names, self.folder / "out").write()


def masks_of(found, defect="crack"):
    """Frame -> what is known of it."""
    files = {int(path.name[:6]): path for path in found.masks.glob("task12/*.png")}
    photos = {int(path.name[:6]): path for path in found.data.glob("task12/images/*")}
    assert files.keys() == photos.keys(), "no photo is stored of which nothing is known"
    return {frame: read_own_mask(path, HEIGHT, WIDTH) for frame, path in files.items()}


@pytest.mark.parametrize("is_new, label", [(False, "crack"), (True, "Riss")])
def test_completed_jobs_are_known_wholly_and_others_in_part(tmp_path, is_new, label):
    """Labels that are called otherwise are known by --label; the answers themselves have the function's names."""
    place, here = Campaign(tmp_path, is_new), (10, 55, 100)
    cvat = place.cvat
    place.run(0, proposal("a0", square(10, 10)), proposal("a1", square(60, 10)), proposal("a2", square(110, 60), "rust"))
    place.run(2, *(proposal(f"c{n}", square(left, 10)) for n, left in enumerate(here)), proposal("c3", square(55, 60), "rust"))
    place.run(3, proposal("d0", square(10, 10)), proposal("d1", square(60, 60), "rust"))
    place.run(4, proposal("e0", square(10, 10)), proposal("e1", square(70, 10), "rust"))
    cvat.shapes.remove(place.of("a1"))
    cvat.edit(place.of("c1"), dx=8)
    cvat.shapes.remove(place.of("c2"))
    cvat.add(2, "crack", square(10, 60))
    cvat.add(2, "crack", square(130, 60), source="auto")  # another model's, which was not edited
    cvat.shapes.remove(place.of("d1"))  # says nothing of cracks
    cvat.relabel(place.of("e0"), "rust")
    cvat.label("crack")["name"] = label
    found = place.labels(**({} if label == "crack" else {label: "crack"}))
    assert (found.sets, found.finished, found.unfinished, found.notes) == (("task12",), 2, 2, ())
    masks = masks_of(found)
    assert sorted(masks) == [0, 1, 2, 4]
    assert np.array_equal(masks[0], pixels(square(10, 10)) * np.uint8(255)) and not masks[1].any()
    shown = pixels(square(10, 10), square(63, 10), square(10, 60))
    wrong = pixels(square(100, 10))
    assert np.array_equal(masks[2] == 255, shown)
    cut = pixels(square(55, 10))  # the edited one was there before
    assert np.array_equal(masks[2] == 0, (near(shown) | wrong | cut) & ~shown) and (masks[2] == UNKNOWN).mean() > 0.7
    assert np.array_equal(masks[4] == 0, pixels(square(10, 10))) and not (masks[4] == 255).any()
    clicks = {int(click.image.rpartition("/")[2][:6]): click for click in read_clicks(found.clicks, with_photos=True)}
    assert sorted(clicks) == [0, 2, 4] and {(c.defect, c.negative_for) for c in clicks.values()} == {("none", "crack")}
    assert wrong[clicks[2].y, clicks[2].x] and pixels(square(60, 10))[clicks[0].y, clicks[0].x]


def test_without_a_log_the_shapes_are_all_that_is_known(tmp_path):
    place = Campaign(tmp_path)
    place.run(0, proposal("a0", square(10, 10)), proposal("a1", square(60, 10)))
    place.run(2, proposal("c0", square(10, 10)), proposal("c1", square(100, 10)))
    place.run(3, proposal("d0", square(10, 10)))
    place.cvat.shapes.remove(place.of("a1"))
    place.cvat.shapes.remove(place.of("c1"))
    place.cvat.edit(place.of("c0"), dx=2)
    found = place.labels(logged=False)
    masks = masks_of(found)
    assert sorted(masks) == [0, 1, 2] and found.clicks is None
    assert np.array_equal(masks[0], pixels(square(10, 10)) * np.uint8(255))
    assert np.array_equal(masks[2] == 255, pixels(square(12, 10))) and masks[2][20, 110] == UNKNOWN


def test_the_log_tells_what_a_label_means(tmp_path):
    place = Campaign(tmp_path)
    place.run(0, proposal("a0", square(10, 10)), proposal("a1", square(60, 10)))
    place.cvat.label("crack")["name"] = "Riss"
    place.cvat.jobs.pop(8)
    found = place.labels()
    assert found.notes == ("job 7: labels taken for the function's: {'Riss': 'crack'}",) and masks_of(found)[0].any()


def test_of_jobs_that_share_a_photo_the_completed_one_counts(tmp_path):
    place = Campaign(tmp_path)
    place.cvat.jobs[8]["first"] = 1
    place.cvat.add(1, "crack", square(10, 10))
    found = place.labels(logged=False)
    assert (found.finished, found.unfinished) == (2, 0) and not (masks_of(found)[1] == UNKNOWN).any()


def test_a_run_whose_answers_never_arrived_rejects_nothing_in_a_job_that_is_not_completed(tmp_path):
    place = Campaign(tmp_path)
    place.run(2, proposal("c0", square(10, 10)), proposal("c1", square(60, 10)))
    place.cvat.shapes.clear()
    place.cvat.add(2, "crack", square(10, 60))
    (mask,) = (mask for frame, mask in masks_of(place.labels()).items() if frame == 2)
    assert mask[20, 70] == UNKNOWN and mask[70, 20] == 255


def test_what_is_left_out_is_named(tmp_path):
    place = Campaign(tmp_path)

    def before(method, path, query):
        if path == "/api/jobs/8/annotations":
            return 200, {"shapes": [], "tags": [], "tracks": [{}]}
        if path.endswith("/data") and query["number"] == "1":
            return 403, {}

    place.cvat.before = before
    found = place.labels()
    assert found.finished == 1 and sorted(found.notes) == [
        "job 7: photo 1.png is left out: CVAT does not give it away",
        "job 8 is left out: it holds tracks, as videos have them; draw shapes instead (Shape, not Track)",
    ]


@pytest.mark.parametrize("change, given, message", [
    (lambda cvat: None, {"tasks": (12, 13)}, "task 13 has no job that this user may see: check its id, --org"),
    (lambda cvat: cvat.label("crack").update(name="Cracks"), {},
     "task 12 has no label 'crack' .did you mean 'Cracks'.*say so by --label"),
    (lambda cvat: None, {"Riss": "crack"}, "--label Riss=crack: task 12 has no label 'Riss'"),
    (lambda cvat: cvat.jobs[7].update(state="new"), {},
     r"no photo of task 12 is labelled yet \(job 7 is new, job 8 is in progress\): correct"),
])  # fmt: skip
def test_tasks_that_teach_nothing_are_refused_with_a_remedy(tmp_path, change, given, message):
    place = Campaign(tmp_path)
    change(place.cvat)
    with pytest.raises(ValueError, match=message):
        place.labels(**given)


def test_the_command_refuses_two_sources_of_labels_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    place, weights = Campaign(tmp_path), dark_weights(tmp_path / "weights", ["crack", "rust"])
    monkeypatch.setenv("ADVCAM_CVAT_TOKEN", ACCESS_TOKEN)
    command = ["--defect", "crack", "--weights", str(weights), "--cvat-task", "12", "--out", str(tmp_path / "next")]
    for more, message in (
        (["--data", "x"], "--cvat-task gives photos and labels: leave out --data"),
        (["--labels", "clicks"], "leave out --labels clicks"),
        (["--log", str(tmp_path / "gone")], "gone is no folder"),
    ):
        with pytest.raises(SystemExit):
            adapt.main([*command, *more])
        assert message in capsys.readouterr().err
    with serving(place.cvat) as url, pytest.raises(SystemExit, match="training needs photos with the defect"):
        adapt.main([*command, "--url", url])
    with pytest.raises(SystemExit, match="give --url .or ADVCAM_CVAT_URL."):
        adapt.main(command)
    assert not [path for path in (tmp_path / "next").rglob("*") if path.is_file()]
