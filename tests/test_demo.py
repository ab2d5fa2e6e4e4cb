"""`make demo`'s command end to end, and on files that are no photos."""

import json

import cv2
import numpy as np
import pytest

from defectcam.demo import main
from tests.conftest import ROOT, dark_wall, dark_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return dark_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def demo(monkeypatch, capsys):
    """Function (weights folder, arguments, variables) -> (stdout, why it ended) of the command."""

    def run(weights, *arguments, **environ) -> tuple[str, str]:
        for name, value in {"ADVCAM_DEVICE": "cpu", "ADVCAM_WEIGHTS": str(weights), **environ}.items():
            monkeypatch.setenv(name, value)
        why = ""
        try:
            main([*map(str, arguments)])
        except SystemExit as end:
            why = str(end)
        said = capsys.readouterr()
        return said.out, why + said.err * bool(why)

    return run


def test_defects_are_proposed_and_drawn(demo, weights, tmp_path):
    """The outline proposed lies on the dark spot; what was left out is told and drawn beside it."""
    photo, truth = dark_wall([(60, 50, 30), (130, 40, 8)])
    cv2.imwrite(str(tmp_path / "wall.png"), photo[..., ::-1])
    told, why = demo(weights, tmp_path / "wall.png", "--iterations", 1, "--out", tmp_path / "out", ADVCAM_MAX_PROPOSALS="1")
    assert not why and str(tmp_path / "out" / "wall.json") in told and str(tmp_path / "out" / "wall.png") in told
    assert "1 proposals" in told and "notice: 1 more crack" in told
    shape, notice = json.loads((tmp_path / "out" / "wall.json").read_text())
    overlay = cv2.imread(str(tmp_path / "out" / "wall.png"))
    assert overlay.shape == photo.shape and (overlay != photo[..., ::-1]).any()
    proposed = np.zeros(truth.shape, np.uint8)
    cv2.fillPoly(proposed, [np.round(np.reshape(shape["points"], (-1, 2))).astype(np.int32)], 1)
    truth[:, 110:] = False  # the smaller spot
    assert (proposed & truth).sum() > 0.8 * (proposed | truth).sum() and notice["label"] == "notice"
    assert {attribute["name"]: attribute["value"] for attribute in shape["attributes"]}["iterations"] == "1"


def test_several_t_stand_side_by_side(demo, weights, tmp_path):
    photo, _ = dark_wall([(60, 50, 30)])
    cv2.imwrite(str(tmp_path / "wall.png"), photo[..., ::-1])
    told, why = demo(weights, tmp_path / "wall.png", "--iterations", "0,3", "--out", tmp_path / "out")
    assert not why and "1 proposals" in told and "at T = 0" in told and "at T = 3" in told
    both = cv2.imread(str(tmp_path / "out" / "wall.png"))
    assert both.shape == (photo.shape[0], 2 * photo.shape[1], 3)
    for steps, part in ((0, both[:, : photo.shape[1]]), (3, both[:, photo.shape[1] :])):
        (shape,) = json.loads((tmp_path / "out" / f"wall T={steps}.json").read_text())
        assert {one["name"]: one["value"] for one in shape["attributes"]}["iterations"] == str(steps)
        assert (part != photo[..., ::-1]).any()


def test_no_photo(demo, weights, tmp_path):
    assert "missing.jpg" in demo(weights, tmp_path / "missing.jpg")[1]
    (tmp_path / "text.jpg").write_text("no photo")
    assert "unknown format" in demo(weights, tmp_path / "text.jpg", "--out", tmp_path)[1]
    assert json.loads((tmp_path / "text.json").read_text())[0]["label"] == "unprocessed"
    _, why = demo(weights, ROOT / "docs" / "sample.jpg", "--iterations", "many")
    assert "iterations" in why and "many" in why


def test_the_shipped_weights_propose_something_on_the_sample_photo(demo, shipped_weights, tmp_path):
    assert not demo(shipped_weights, ROOT / "docs" / "sample.jpg", "--iterations", 0, "--out", tmp_path)[1]
    assert any(shape["type"] == "polygon" for shape in json.loads((tmp_path / "sample.json").read_text()))
