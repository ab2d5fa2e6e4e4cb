"""`make demo`'s command end to end, and on files that are no photos."""

import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest

from tests.conftest import ROOT, dark_wall, dark_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return dark_weights(tmp_path_factory.mktemp("weights"))


def demo(weights, *arguments, **environ):
    command = [sys.executable, "-m", "defectcam", "demo", *map(str, arguments)]
    environ = {**os.environ, "ADVCAM_DEVICE": "cpu", "ADVCAM_WEIGHTS": str(weights), **environ}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ)


def test_defects_are_proposed_and_drawn(weights, tmp_path):
    """The outline proposed lies on the dark spot; what was left out is told and drawn beside it."""
    photo, truth = dark_wall([(60, 50, 30), (130, 40, 8)])
    cv2.imwrite(str(tmp_path / "wall.png"), photo[..., ::-1])
    out = demo(weights, tmp_path / "wall.png", "--iterations", 1, "--out", tmp_path / "out", ADVCAM_MAX_PROPOSALS="1")
    assert out.returncode == 0, out.stderr
    assert str(tmp_path / "out" / "wall.json") in out.stdout and str(tmp_path / "out" / "wall.png") in out.stdout
    assert "1 proposals" in out.stdout and "notice: 1 more crack" in out.stdout
    shape, notice = json.loads((tmp_path / "out" / "wall.json").read_text())
    overlay = cv2.imread(str(tmp_path / "out" / "wall.png"))
    assert overlay.shape == photo.shape and (overlay != photo[..., ::-1]).any()
    proposed = np.zeros(truth.shape, np.uint8)
    cv2.fillPoly(proposed, [np.round(np.reshape(shape["points"], (-1, 2))).astype(np.int32)], 1)
    truth[:, 110:] = False  # the smaller spot
    assert (proposed & truth).sum() > 0.8 * (proposed | truth).sum() and notice["label"] == "notice"
    assert {attribute["name"]: attribute["value"] for attribute in shape["attributes"]}["iterations"] == "1"


def test_several_t_stand_side_by_side(weights, tmp_path):
    photo, _ = dark_wall([(60, 50, 30)])
    cv2.imwrite(str(tmp_path / "wall.png"), photo[..., ::-1])
    out = demo(weights, tmp_path / "wall.png", "--iterations", "0,3", "--out", tmp_path / "out")
    assert out.returncode == 0, out.stderr
    assert "1 proposals" in out.stdout and "at T = 0" in out.stdout and "at T = 3" in out.stdout
    both = cv2.imread(str(tmp_path / "out" / "wall.png"))
    assert both.shape == (photo.shape[0], 2 * photo.shape[1], 3)
    for steps, part in ((0, both[:, : photo.shape[1]]), (3, both[:, photo.shape[1] :])):
        (shape,) = json.loads((tmp_path / "out" / f"wall T={steps}.json").read_text())
        assert {one["name"]: one["value"] for one in shape["attributes"]}["iterations"] == str(steps)
        assert (part != photo[..., ::-1]).any()


def test_no_photo(weights, tmp_path):
    out = demo(weights, tmp_path / "missing.jpg")
    assert out.returncode != 0 and "missing.jpg" in out.stderr
    (tmp_path / "text.jpg").write_text("no photo")
    out = demo(weights, tmp_path / "text.jpg", "--out", tmp_path)
    assert out.returncode != 0 and "unknown format" in out.stderr
    assert json.loads((tmp_path / "text.json").read_text())[0]["label"] == "unprocessed"
    out = demo(weights, ROOT / "docs" / "sample.jpg", "--iterations", "many")
    assert out.returncode != 0 and "iterations" in out.stderr and "many" in out.stderr


def test_the_shipped_weights_propose_something_on_the_sample_photo(shipped_weights, tmp_path):
    out = demo(shipped_weights, ROOT / "docs" / "sample.jpg", "--iterations", 0, "--out", tmp_path)
    assert out.returncode == 0, out.stderr
    assert any(shape["type"] == "polygon" for shape in json.loads((tmp_path / "sample.json").read_text()))
