"""`defectcam cvat annotate`: a second run over a task of a CVAT that keeps state, after people have worked on the first."""

import copy
import os
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from defectcam.cvat import annotate
from defectcam.cvat.client import CvatClient
from defectcam.cvat.shapes import overlaps, stored_shapes
from defectcam.cvat_answers import Label
from defectcam.cvat_labels import labels_with, task_labels
from defectcam.feedback import harvest
from defectcam.feedback.shown import names_in
from defectcam.handler import ModelHandler
from defectcam.proposal_log import ProposalLog, read_proposal_log
from defectcam.regions import region_of, run_lengths
from tests.conftest import ROOT
from tests.cvat_place import function, make, photos, remembering, version, weights  # noqa: F401
from tests.cvat_state import CvatState, serving


def snapshot(shapes):
    """Shapes in a form that can be compared: attributes have no order."""
    return [{**s, "attributes": sorted(s["attributes"], key=lambda a: a["spec_id"])} for s in copy.deepcopy(shapes)]


# ---- what is replaced, what is kept


def test_untouched_proposals_are_replaced(make, version):
    place = make(2, is_new=version)
    before = {shape["id"] for shape in place.cvat.shapes}
    told = place.annotate()
    for frame in (0, 1):
        for label in ("crack", "rust"):
            assert len(place.wanted(frame, label)) == 4 and place.names(frame, label) == place.wanted(frame, label)
    assert not before & {shape["id"] for shape in place.cvat.shapes}
    assert {place.cvat.value(shape, "iterations") for shape in place.cvat.shapes} == {"1"}
    assert {place.cvat.value(shape, "severity") for shape in place.cvat.shapes} == {"low"}
    assert {shape["source"] for shape in place.cvat.shapes} == {"auto"}
    assert "job 7, frame 1, 1.png: 8 new, 8 replaced, 0 kept, 0 left out" in told
    assert "task 12: 2 photos annotated, 0 had proposals of this run, 0 not processed\nshapes: 16 new, 16 replaced" in told


def test_new_shapes_are_stored_before_old_ones_are_deleted(make):
    place = make(2)
    place.annotate("--defects", "crack")
    actions = [query["action"] for method, _, query in place.cvat.asked if method == "PATCH"]
    assert actions == ["create", "delete"] * 2
    assert place.names(0, "rust") == place.wanted(0, "rust", 0), "a defect that is not asked for stays as it is"


@pytest.mark.parametrize("logged", [True, False])
def test_what_people_did_survives(make, version, logged):
    """An edited shape, a relabelled one, one with a value of their own, a drawn one; each keeps its place to itself."""
    place = make(is_new=version)
    cvat = place.cvat
    edited, relabelled, valued, untouched = cvat.of(0, "crack")
    cvat.edit(edited)
    cvat.relabel(relabelled, "spalling")
    cvat.set_value(valued, "severity", "high")
    drawn = cvat.add(0, "crack", untouched["points"], source="manual")
    theirs = [edited, relabelled, valued, drawn]
    before = snapshot(theirs)
    told = place.annotate("--defects", "crack", *(("--log-dir", place.folder) if logged else ()))
    ids = {shape["id"] for shape in theirs}
    left = [shape for shape in cvat.shapes if shape["id"] in ids]
    assert snapshot(sorted(left, key=lambda s: s["id"])) == sorted(before, key=lambda s: s["id"])
    assert sorted(s["id"] for s in cvat.of(0, "crack")) == sorted(ids - {relabelled["id"]}), "nothing is laid on them"
    assert untouched["id"] not in {shape["id"] for shape in cvat.shapes}
    assert "0 new, 1 replaced, 3 kept, 4 left out (4 overlap kept shapes, 0 were rejected before)" in told


@pytest.mark.parametrize("touch", [
    lambda cvat, shape: shape.update(group=3),
    lambda cvat, shape: shape.update(source="manual"),  # CVAT's page, of a shape from a file
    lambda cvat, shape: shape["attributes"].pop(next(  # joined masks, labels that had no such attribute
        n for n, a in enumerate(shape["attributes"]) if a["value"] == cvat.value(shape, "proposal"))),
])  # fmt: skip
def test_other_traces_of_people(make, touch):
    place = make()
    shape = place.cvat.of(0, "crack")[0]
    touch(place.cvat, shape)
    place.annotate("--defects", "crack")
    assert shape["id"] in {shape["id"] for shape in place.cvat.shapes}
    assert len(place.cvat.of(0, "crack")) == 4


def test_an_outline_changed_by_a_script_is_known_from_the_log(make):
    """CVAT's server leaves the source auto."""
    place = make()
    shape = place.cvat.of(0, "crack")[0]
    place.cvat.edit(shape, dx=5)
    shape["source"] = "auto"
    place.annotate("--defects", "crack", "--log-dir", place.folder)
    assert shape["id"] in {shape["id"] for shape in place.cvat.shapes}


@pytest.mark.parametrize("known, options", [
    (True, ["--log-dir"]), (True, []),  # from the log; from the name
    (False, []),  # of unknown weights: by its name on the other photo, where it is replaced before
])  # fmt: skip
def test_a_shape_propagated_to_another_photo_is_a_persons(make, known, options):
    place = make(2)
    if not known:
        for number, shape in enumerate(place.cvat.shapes):
            place.cvat.set_value(shape, "proposal", f"{number:08}")
    copied = {**copy.deepcopy(place.cvat.of(0, "crack")[0]), "id": place.cvat.new_id(), "frame": 1}
    place.cvat.shapes.append(copied)
    place.annotate("--defects", "crack", *options, *([place.folder] if options else []))
    assert copied["id"] in {shape["id"] for shape in place.cvat.shapes}
    assert len(place.names(0)) == len(place.names(1)) == 4
    assert (place.names(0) == place.wanted(0)) == known, "which of the two is the copy cannot be told: both are kept"


def test_proposals_from_a_file_are_proposals(make):
    place = make(is_new=True)
    for shape in place.cvat.shapes:
        shape["source"] = "file"
    place.annotate("--defects", "crack")
    assert place.names(0) == place.wanted(0)


def test_proposals_of_unknown_weights_and_settings_are_replaced(make):
    """Without a log the source tells, and that no other photo has a shape of this name."""
    place = make()
    for number, shape in enumerate(place.cvat.of(0, "crack")):
        place.cvat.set_value(shape, "proposal", f"feed000{number}")
    place.annotate("--defects", "crack")
    assert place.names(0) == place.wanted(0)


def test_completed_jobs_are_left_alone(make, version):
    """Untouched shapes of a completed job are accepted ones."""
    place = make(2, is_new=version, job_frames=1)
    place.cvat.jobs[7]["state"] = "completed"
    before = snapshot(place.cvat.of(0))
    told = place.annotate()
    assert snapshot(place.cvat.of(0)) == before and place.names(1) == place.wanted(1)
    assert "job 7 is left alone: it is completed" in told and "1 photos annotated" in told


def test_a_job_completed_while_the_photo_was_computed(make):
    place = make()
    before = snapshot(place.cvat.of(0))

    def complete(method, path, query):
        if path.endswith("/data"):
            place.cvat.jobs[7]["state"] = "completed"

    place.cvat.before = complete
    assert "its job was completed meanwhile" in place.annotate()
    assert snapshot(place.cvat.of(0)) == before


def test_what_people_did_while_the_photo_was_computed(make):
    place = make()
    shape = place.cvat.of(0, "crack")[0]

    def edit(method, path, query):
        if path.endswith("/data"):
            place.cvat.edit(shape)

    place.cvat.before = edit
    place.annotate("--defects", "crack")
    assert shape["id"] in {shape["id"] for shape in place.cvat.shapes} and len(place.cvat.of(0, "crack")) == 4


# ---- rejected proposals


def test_rejected_proposals_are_not_proposed_again(make, version):
    place = make(2, is_new=version)
    gone = place.cvat.of(0, "crack")[0]
    place.cvat.shapes.remove(gone)
    told = place.annotate("--log-dir", place.folder)
    assert len(place.names(0)) == 3 and set(place.names(0)) < set(place.wanted(0)) and place.names(1) == place.wanted(1)
    assert place.names(0, "rust") == place.wanted(0, "rust"), "it was rejected as a crack only"
    assert "1 left out (0 overlap kept shapes, 1 were rejected before)" in told
    region = stored_shapes([gone], {label["id"]: Label.model_validate(label) for label in place.cvat.labels}, 160, 96)[0].region
    for one in stored_shapes(place.cvat.of(0, "crack"), {label["id"]: Label.model_validate(label) for label in place.cvat.labels}, 160, 96):
        assert not overlaps(one.region, region)
    assert "1 were rejected before" in place.annotate("--log-dir", place.folder, steps=2)
    assert len(place.names(0)) == 3, "nor in the third run"


def test_a_photo_of_which_everything_was_rejected(make):
    """It shows by the other photo that the run had reached the job."""
    place = make(2)
    for shape in place.cvat.of(0, "crack"):
        place.cvat.shapes.remove(shape)
    place.annotate("--defects", "crack", "--log-dir", place.folder)
    assert place.names(0) == [] and place.names(1) == place.wanted(1)


def test_a_run_that_failed_was_not_rejected(make):
    """It is in the function's log, but nothing of it ever reached CVAT."""
    place = make(2)
    place.cvat.shapes.clear()
    place.annotate("--log-dir", place.folder)
    assert place.names(0) == place.wanted(0) and place.names(1) == place.wanted(1)


def test_what_a_run_replaced_was_not_rejected(make):
    """One edited shape of T = 0 stays; its siblings were replaced at T = 1, and by nothing at a high threshold."""
    place = make()
    log = ("--defects", "crack", "--log-dir", place.folder)
    place.cvat.edit(place.cvat.of(0, "crack")[0])
    place.annotate(*log, "--threshold", 1)
    assert len(place.names(0)) == 1
    place.annotate(*log)
    assert len(place.names(0)) == 4
    second = [record["second_run"] for record in read_proposal_log(place.folder) if "second_run" in record]
    assert [(one["job"], len(one["replaced"]), one["rejected"]) for one in second] == [(7, 3, []), (7, 0, [])]


@pytest.mark.parametrize("edited, rejected, thresholds, harvested", [
    (1, 0, [0.5], "7 accepted, 1 modified, 0 rejected"),  # 4 of rust, which no one touched
    (1, 0, [0.5, 1], "4 accepted, 1 modified, 0 rejected"),  # replaced by nothing
    (0, 1, [0.5], "7 accepted, 0 modified, 1 rejected"),
    (0, 4, [0.5], "4 accepted, 0 modified, 4 rejected"),
    (1, 1, [0.5, 0.4], "6 accepted, 1 modified, 1 rejected"),
])  # fmt: skip
def test_harvest_after_second_runs(make, tmp_path, capsys, edited, rejected, thresholds, harvested):
    """Replaced proposals are not taken for rejected ones, and those that were rejected before are."""
    place = make()
    shapes = place.cvat.of(0, "crack")
    for shape in shapes[:rejected]:
        place.cvat.shapes.remove(shape)
    for shape in shapes[rejected:][:edited]:
        place.cvat.edit(shape)
    for threshold in thresholds:
        place.annotate("--defects", "crack", "--log-dir", place.folder, "--threshold", threshold)
    place.cvat.jobs[7]["state"] = "completed"
    with serving(place.cvat) as url:
        harvest.main(["--url", url, "--tasks", "12", "--db", str(tmp_path / "f.db"), "--log", str(place.folder)])
    assert f"{harvested}, 0 miss" in capsys.readouterr().out


# ---- interrupted runs


def test_the_same_command_again_changes_nothing(make, monkeypatch):
    place = make(2)
    place.annotate()
    before, computed = snapshot(place.cvat.shapes), []
    monkeypatch.setattr(ModelHandler, "answer", lambda *_: computed.append(1))
    assert "0 photos annotated, 2 had proposals of this run" in place.annotate()
    assert snapshot(place.cvat.shapes) == before and not computed


def test_one_defect_after_the_other(make, monkeypatch):
    """A run for cracks alone says nothing about rust."""
    place = make()
    place.annotate("--defects", "crack")
    cracks = snapshot(place.cvat.of(0, "crack"))
    assert "1 photos annotated" in place.annotate()
    assert snapshot(place.cvat.of(0, "crack")) == cracks and place.names(0, "rust") == place.wanted(0, "rust")


def test_photos_without_proposals_are_not_computed_again(make, monkeypatch):
    """The log remembers them; without it that is not known."""
    place = make()
    log = ("--log-dir", place.folder, "--threshold", 1)
    place.annotate(*log)
    assert not place.cvat.shapes
    assert "1 photos annotated, 0 had" in place.annotate("--threshold", 1)
    assert "0 photos annotated, 1 had proposals of this run" in place.annotate(*log)
    place.cvat.automatic_annotation(0, place.function(place.cvat.photos[0], 0))
    assert "1 photos annotated, 0 had" in place.annotate(*log) and not place.cvat.shapes, "another run has been there"


def test_what_is_there_twice_is_there_once_afterwards(make):
    place = make()
    for _ in range(2):
        place.cvat.automatic_annotation(0, place.function(place.cvat.photos[0], 1))
    place.annotate("--log-dir", place.folder)
    assert place.names(0) == place.wanted(0) and place.names(0, "rust") == place.wanted(0, "rust")
    (second,) = [record["second_run"] for record in read_proposal_log(place.folder) if "second_run" in record]
    assert not set(place.wanted(0)) & set(second["replaced"])


def test_of_two_equal_shapes_the_edited_one_stays(make):
    place = make()
    for _ in range(2):
        place.cvat.automatic_annotation(0, place.function(place.cvat.photos[0], 1))
    edited = place.cvat.of(0, "crack")[-1]
    place.cvat.edit(edited)
    place.annotate("--defects", "crack")
    assert edited in place.cvat.of(0, "crack") and len(place.names(0)) == len(set(place.names(0))) == 4


def test_after_the_run_people_go_on(make):
    """What they delete of it does not come back; what is left of older runs is replaced as before."""
    place = make()
    place.annotate("--defects", "crack")
    gone, edited, *_ = place.cvat.of(0, "crack")
    place.cvat.shapes.remove(gone)
    place.cvat.edit(edited)
    before = snapshot(place.cvat.shapes)
    place.annotate("--defects", "crack")
    assert snapshot(place.cvat.shapes) == before


@pytest.mark.parametrize("logged", [True, False])
def test_interrupted_between_create_and_delete(make, logged, monkeypatch):
    place = make(2)
    options, old = ["--defects", "crack", *(["--log-dir", place.folder] if logged else [])], place.names(0)

    def interrupt(self, path, body, *keys):
        if path.endswith("delete"):
            raise KeyboardInterrupt
        return patch(self, path, body, *keys)

    patch = CvatClient.patch
    with monkeypatch.context() as here:
        here.setattr(CvatClient, "patch", interrupt)
        assert "interrupted; the same command goes on from here" in place.annotate(*options, status=130)
    assert place.names(0) == sorted(old + place.wanted(0))
    place.annotate(*options)
    assert [place.names(frame) for frame in (0, 1)] == [place.wanted(frame) for frame in (0, 1)]


def test_killed_between_create_and_delete(make):
    """By SIGKILL, in a process of its own. Nothing is lost, and after the next run nothing is there twice."""
    place = make(2)
    cvat, old = place.cvat, {frame: place.names(frame) for frame in (0, 1)}
    running = SimpleNamespace(process=None)

    def kill(method, path, query):
        if query.get("action") == "delete":
            os.kill(running.process.pid, signal.SIGKILL)
            running.process.wait()
            return 500, "killed"

    cvat.before = kill
    options = ["--defects", "crack", "--log-dir", str(place.folder)]
    with serving(cvat) as url:
        command = [sys.executable, "-m", "defectcam", "cvat", "annotate", "12", "--iterations", "1", "--url", url, *options]
        environ = os.environ | {"PYTHONPATH": str(ROOT)}
        running.process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output = running.process.communicate(timeout=300)[0]
    assert running.process.returncode == -signal.SIGKILL, output
    assert place.names(0) == sorted(old[0] + place.wanted(0)), "the new ones are there, and the old ones still"
    assert place.names(1) == old[1]
    cvat.before = lambda *_: None
    told = place.annotate(*options)
    assert "1 photos annotated, 1 had proposals of this run" in told
    for frame in (0, 1):
        assert place.names(frame) == place.wanted(frame)
    names = [names_in(record) for record in read_proposal_log(place.folder)]
    assert set(place.wanted(0)) in names and set(place.wanted(1)) in names


def test_killed_before_the_log_was_written(make, monkeypatch):
    """The line of the log is made from what is stored, so that nothing of it counts as of unknown origin."""
    place = make()
    log = ("--defects", "crack", "--log-dir", place.folder)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProposalLog, "append", interrupted)
        assert "the same command goes on from here" in place.annotate(*log, status=130)
    assert len(place.names(0)) == 8
    place.annotate(*log)
    assert place.names(0) == place.wanted(0)
    record = list(read_proposal_log(place.folder))[-1]
    wanted = [e for e in place.function(place.cvat.photos[0], 1) if e["label"] == "crack"]
    logged = {e["attributes"][2]["value"]: e for e in record["shapes"]}
    assert {e["attributes"][2]["value"]: e for e in wanted} == logged


def test_cvat_stops_answering(make):
    place = make(2)
    creations = []

    def fail(method, path, query):
        creations.extend([1] if query.get("action") == "create" else [])
        return (502, "Bad Gateway") if len(creations) == 2 else None

    place.cvat.before = fail
    told = place.annotate("--defects", "crack", status=1)
    for part in ("answers 502: Bad Gateway", "the same command goes on from here", "1 photos annotated"):
        assert part in told
    place.cvat.before = lambda *_: None
    place.annotate("--defects", "crack")
    assert place.names(0) == place.wanted(0) and place.names(1) == place.wanted(1)


# ---- masks, photos that cannot be processed, labels that do not fit


@pytest.mark.parametrize("logged", [True, False])
def test_labels_of_type_mask_get_masks_and_the_rules_hold(make, version, logged, monkeypatch):
    place = make(is_new=version)
    cvat, log = place.cvat, ("--log-dir", place.folder) if logged else ()
    cvat.label("crack")["type"] = "mask"  # the function, which could not read the task, had answered polygons
    assert "8 new, 8 replaced" in place.annotate(*log)
    shapes = cvat.of(0, "crack")
    assert len(shapes) == 4 and {shape["type"] for shape in shapes} == {"mask"}
    assert {shape["type"] for shape in cvat.of(0, "rust")} == {"polygon"}
    other = CvatState(labels=task_labels(labels_with([])))
    other.automatic_annotation(0, place.function(cvat.photos[0], 1, ADVCAM_SHAPE="mask"))
    assert [(s["points"], cvat.value(s, "proposal")) for s in shapes] == [
        (s["points"], other.value(s, "proposal")) for s in other.of(0, "crack")
    ]
    erased, deleted, covered, untouched = shapes
    region = region_of("mask", erased["points"], 160, 96)
    erased["points"] = [float(n) for n in run_lengths(replace(region, mask=region.mask[:-5]))]  # with CVAT's eraser
    erased["source"] = "semi-auto"
    cvat.shapes = [shape for shape in cvat.shapes if shape not in (deleted, covered)]
    cvat.add(0, "crack", covered["points"], "mask")  # with CVAT's brush
    told = place.annotate("--defects", "crack", *log, steps=4)
    rejected = 1 if logged else 0
    assert f"{1 + (not logged)} new, 1 replaced, 2 kept" in told
    assert f"(2 overlap kept shapes, {rejected} were rejected before)" in told
    left = [shape for shape in cvat.of(0, "crack") if cvat.value(shape, "iterations") == "4"]
    assert len(left) == 2 - rejected and {shape["type"] for shape in left} == {"mask"} and untouched not in cvat.shapes
    monkeypatch.setenv("ADVCAM_SHAPE", "polygon")
    place.annotate("--defects", "crack", *log, steps=4)
    assert {cvat.value(s, "iterations"): s["type"] for s in cvat.of(0, "crack")}["4"] == "polygon", "the shape given decides"


def test_a_photo_that_cannot_be_processed_keeps_its_shapes(make, monkeypatch):
    place = make(2)
    monkeypatch.setenv("ADVCAM_MAX_MEGAPIXELS", "0.001")
    before = snapshot(place.cvat.shapes)
    told = place.annotate(status=1)
    assert "not processed, its shapes are left as they are: too large" in told and "2 not processed" in told
    assert snapshot(place.cvat.shapes) == before


@pytest.mark.parametrize("change, options, message", [
    (lambda cvat: cvat.labels.remove(cvat.label("rust")), (), "has no label 'rust': run defectcam cvat setup task:12, or"),
    (lambda cvat: cvat.label("crack")["attributes"].pop(2), (), "has no attribute 'proposal': run defectcam cvat setup"),
    (lambda cvat: cvat.label("crack").update(type="rectangle"), (), "has the type rectangle, which holds no polygons: run"),
    (lambda cvat: None, ("--iterations", "16"), "has no value 16: run defectcam cvat set-iterations task:12 16"),
    (lambda cvat: cvat.jobs.clear(), (), "task 12 has no job that this user may see"),
])  # fmt: skip
def test_tasks_that_do_not_fit(make, change, options, message):
    place = make()
    change(place.cvat)
    assert message in place.annotate(*options, status=1)
    assert {method for method, _, _ in place.cvat.asked} == {"GET"}


@pytest.mark.parametrize("options, message", [
    (("--threshold", "2"), "ADVCAM_THRESHOLD is '2'"),
    (("--defects", "mould"), "ADVCAM_DEFECTS is 'mould'"),
    (("--iterations", "51"), "'51' is no number of climbing steps: give 0 to 50"),
    (("--log-dir", "/nowhere"), "--log-dir /nowhere is no folder"),
])  # fmt: skip
def test_wrong_commands(make, options, message):
    place = make()
    assert message in place.annotate(*options, status=2)
    assert not place.cvat.asked


def test_names_follow_from_pixels_weights_and_settings(make, function):
    """Without a run: so frames that have proposals of it are known at once."""
    place = make()
    photo = place.cvat.photos[0]
    model = function.model(photo, 1)
    names = annotate.PhotoNames(model, np.ascontiguousarray(photo), {"crack": model.effective("crack", model.settings)})
    assert set(place.wanted(0)) <= names.of_run and not set(place.wanted(0, "rust")) & names.of_run
    here = stored_shapes(place.cvat.of(0), {label["id"]: Label.model_validate(label) for label in place.cvat.labels}, 160, 96)
    assert {(one.shape.label, names.defect_of(one.shape)) for one in here} == {("crack", "crack"), ("rust", "rust")}
