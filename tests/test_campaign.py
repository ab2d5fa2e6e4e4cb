"""The whole way of docs/adapt.md: five finished photos of a task in CVAT make weights for the rest of the campaign."""

import json
import logging
from pathlib import Path

import cv2
import pytest

from defectcam.cvat import annotate
from defectcam.feedback import adapt, harvest, next_images
from defectcam.handler import ModelHandler
from defectcam.request import Request
from defectcam.weights import load_weights
from tests.conftest import dark_wall, dark_weights, little_training
from tests.cvat_state import ACCESS_TOKEN, CvatState, serving
from tests.test_deploy import ports, stand_in, world  # noqa: F401, pytest finds fixtures by name

SPOTS = [(30, 30, 14), (100, 26, 12), (36, 78, 13), (110, 74, 15)]


@pytest.fixture(autouse=True)
def little_work(monkeypatch):
    monkeypatch.setattr(adapt, "CROP_PX", 32)
    monkeypatch.setattr(adapt, "BATCH", 4)
    monkeypatch.setattr(adapt, "ENCODERS_WITH_GRAPH", ())  # to export takes 10 s
    with little_training(val_crops=4):
        yield


def proposed(weights, cvat, **environ):
    """An automatic annotation of all frames by the function."""
    environ = {"ADVCAM_WEIGHTS": str(weights), "ADVCAM_DEVICE": "cpu", **environ}
    model = ModelHandler.from_env(environ, logging.getLogger("test"))
    for frame, image_rgb in enumerate(cvat.photos):
        photo = cv2.imencode(".png", image_rgb[..., ::-1])[1].tobytes()
        cvat.automatic_annotation(frame, model.answer(Request(photo, model.settings, ())))


def test_five_finished_photos_make_weights_for_the_rest(tmp_path, monkeypatch, capsys, world):  # noqa: F811
    monkeypatch.setenv("ADVCAM_CVAT_TOKEN", ACCESS_TOKEN)
    monkeypatch.setenv("ADVCAM_DEVICE", "cpu")
    weights, log, out = dark_weights(tmp_path / "weights"), tmp_path / "log", tmp_path / "next"
    (tmp_path / "photos").mkdir()
    for number in range(7):
        cv2.imwrite(str(tmp_path / "photos" / f"pier{number}.png"), dark_wall(SPOTS, seed=number)[0][..., ::-1])

    cvat = CvatState(is_new=True)
    with serving(cvat) as url:
        # Which five: they become a task.
        next_images.main([*map(str, (tmp_path / "photos", "--weights", weights, "--out", tmp_path / "order")),
                          "--top", "5", "--cvat-task", "pier, first five", "--url", url])  # fmt: skip
        assert len(cvat.photos) == 5
        # The function proposes, a person corrects and completes.
        proposed(weights, cvat, ADVCAM_LOG_DIR=str(log))
        for frame in range(5):
            edited, rejected, *_ = cvat.of(frame, "crack")
            cvat.edit(edited, dx=1)
            cvat.shapes.remove(rejected)
            cvat.add(frame, "crack", [70, 40, 76, 40, 76, 52, 70, 52])
        cvat.jobs[7]["state"] = "completed"
        # What was it worth?
        harvest.main(["--url", url, "--tasks", "12", "--log", str(log), "--db", str(tmp_path / "feedback.db")])
        told = capsys.readouterr().out
        assert "job 7: 10 kept, 5 edited, 5 rejected, 5 missed" in told and "crack, weights" in told
        # New weights.
        given = ["--defect", "crack", "--weights", weights, "--cvat-task", "12", "--log", log, "--steps", 2, "--out", out]
        adapt.main([*map(str, given), "--url", url])
        told = capsys.readouterr().out
        assert "task12: 5 finished photos, 0 that are known in part" in told and "fold 2" in told
        assert f"deploy them with: ./deploy.sh weights {out}" in told
    (record,) = load_weights(out).configs["crack"].training["adapted"]
    assert record["photos"] == 5 and record["verdict"] in ("better", "same") and ACCESS_TOKEN not in json.dumps(record)
    assert not Path(record["config"]["data"]).exists(), "the photos are in CVAT"

    # The function gets them; here its commands are printed.
    monkeypatch.delenv("ADVCAM_CVAT_TOKEN")
    world.succeed("gpu")
    assert "nuctl deploy" in world.succeed("weights", out, "--dry-run") and world.weights == {"old"}

    # The rest of the campaign.
    monkeypatch.setenv("ADVCAM_CVAT_TOKEN", ACCESS_TOKEN)
    others = [number for number in range(7) if f"pier{number}.png" not in cvat.names]
    rest = CvatState([dark_wall(SPOTS, seed=number)[0] for number in others], cvat.labels, is_new=True)
    proposed(weights, rest)
    before = {rest.value(shape, "proposal") for shape in rest.shapes}
    with serving(rest) as url:
        annotate.main(["12", "--iterations", "2", "--weights", str(out), "--log-dir", str(log), "--url", url])
    assert "2 photos annotated, 0 had proposals of this run, 0 not processed" in capsys.readouterr().out
    after = {rest.value(shape, "proposal") for shape in rest.shapes}
    assert len(after) == 8 and not before & after
